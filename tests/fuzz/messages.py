"""Random requests as bytes of the wire: plausible, at the bounds, damaged, and with foreign fields.

The bytes are written field by field from the descriptors, not through the protobuf library, so
that they may hold what the library never writes: repeated singular fields, wrong wire types,
broken UTF-8, endless varints, unknown fields.
"""

import random
import struct
from collections.abc import Callable

from google.protobuf.descriptor import Descriptor, FieldDescriptor

VARINT, FIXED64, BYTES, GROUP, GROUP_END, FIXED32 = range(6)


def _float(value: float) -> float:
    """The float32 nearest to `value`."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _neighbours(value: float) -> list[float]:
    """`value` as float32, and the float32 numbers just below and above it (value > 0)."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return [struct.unpack("<f", struct.pack("<I", bits + step))[0] for step in (-1, 0, 1)]


FLOATS = [
    *(bound for value in (0.05, 1.0, 2.0, 10.0) for bound in _neighbours(value)),
    *(0.0, -0.0, 0.02, 0.5, 0.7, 1.2, 2.5, 100.0, -1.0, -1e-45, 1e-45, 1e-38, 3.4028235e38),
    *(float("nan"), float("inf"), float("-inf")),
]
PLAUSIBLE_FLOATS = [_float(value) for value in (0.05, 0.3, 0.7, 0.95, 1.0)]
PLAUSIBLE_DECAYS = [_float(value) for value in (1.0, 1.01, 4.0, 10.0)]
INTEGERS = [0, 1, 2, 5, 6, 7, 10, 11, 19, 20, 21, 168, 169, 170, 199, 200, 201, 1 << 16]
INTEGERS += [bound + step for bound in (1 << 31, 1 << 32, 1 << 63, 1 << 64) for step in (-1, 0)]
STRINGS = [b"", b"a", b".", b"\n\n", "né🙂".encode(), b"x" * 240, b"x" * 241, "é".encode() * 120]
STRINGS += ["é".encode() * 121, b"\0", b"\xff", b"\xed\xa0\x80", b"\xc3"]
PLAUSIBLE_STRINGS = [b"a", b". ", "né🙂".encode()]


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def sized(body: bytes) -> bytes:
    return varint(len(body)) + body


class Messages:
    """An endless stream of random messages of one type.

    Args:
        hostile: the share of values that are at a bound or beyond.
    """

    def __init__(self, rng: random.Random, hostile: float = 0.15) -> None:
        self.rng = rng
        self.hostile = hostile
        self._fields: dict[Descriptor, list[FieldDescriptor]] = {}

    def message(self, kind: Descriptor, fill: float = 0.35) -> bytes:
        """One message; a field is there with probability `fill`, and seldom twice."""
        fields = self._fields.setdefault(kind, list(kind.fields))
        parts = []
        for field in fields:
            alternatives = len(field.containing_oneof.fields) if field.containing_oneof else 1
            if self.rng.random() * alternatives < fill:
                count = self.rng.randrange(8) if field.is_repeated else 1 + (self._one_in(50))
                parts += [self._field(field) for _ in range(count)]
        if self._one_in(30):
            parts.append(self._foreign_field())
        if self._one_in(10):
            self.rng.shuffle(parts)
        return b"".join(parts)

    def damaged(self, body: bytes) -> bytes:
        """`body` with some bytes changed, lost, doubled or added."""
        damage: Callable[[bytearray], None] = self.rng.choice(
            [self._flip, self._cut, self._insert, self._double]
        )
        damaged = bytearray(body)
        damage(damaged)
        return bytes(damaged)

    def noise(self) -> bytes:
        """Bytes without any structure."""
        return self.rng.randbytes(self.rng.randrange(64))

    def _one_in(self, chances: int) -> bool:
        return self.rng.random() * chances < 1

    def _field(self, field: FieldDescriptor) -> bytes:
        if self._one_in(200):  # the right number with a wire type of chance
            return tag(field.number, self.rng.randrange(6)) + self._value(field)[1]
        wire_type, value = self._value(field)
        return tag(field.number, wire_type) + value

    def _value(self, field: FieldDescriptor) -> tuple[int, bytes]:
        is_hostile = self.rng.random() < self.hostile
        if field.message_type is not None:
            return BYTES, sized(self.message(field.message_type))
        if field.type == FieldDescriptor.TYPE_STRING:
            return BYTES, sized(self.rng.choice(STRINGS if is_hostile else PLAUSIBLE_STRINGS))
        if field.type == FieldDescriptor.TYPE_FLOAT:
            return FIXED32, struct.pack("<f", self._some_float(field, is_hostile))
        if field.type == FieldDescriptor.TYPE_BOOL or field.enum_type is not None:
            return VARINT, varint(self.rng.choice(INTEGERS) if is_hostile else self._bit())
        return VARINT, varint(self.rng.choice(INTEGERS) if is_hostile else self._small())

    def _bit(self) -> int:
        return self.rng.getrandbits(1)

    def _small(self) -> int:
        return self.rng.randrange(11)

    def _some_float(self, field: FieldDescriptor, is_hostile: bool) -> float:
        if not is_hostile:
            is_decay = field.name == "decay_factor"
            return self.rng.choice(PLAUSIBLE_DECAYS if is_decay else PLAUSIBLE_FLOATS)
        if self._bit():
            return self.rng.choice(FLOATS)
        (value,) = struct.unpack("<f", self.rng.randbytes(4))
        return float(value)

    def _foreign_field(self) -> bytes:
        number = self.rng.choice([1, 7, 15, 16, 99, 2047, (1 << 29) - 1])
        if self._one_in(4):
            inner = self._foreign_field() if self._bit() else b""
            return tag(number, GROUP) + inner + tag(number, GROUP_END)
        value = self.rng.choice([varint(1 << 63), sized(b"\xff" * 9), self.rng.randbytes(8)])
        return tag(number, self.rng.choice([VARINT, BYTES, FIXED64])) + value

    def _flip(self, body: bytearray) -> None:
        for _ in range(min(len(body), 1 + self._small() // 4)):
            body[self.rng.randrange(len(body))] ^= 1 << self.rng.randrange(8)

    def _cut(self, body: bytearray) -> None:
        start = self.rng.randrange(len(body) + 1)
        del body[start : start + 1 + self._small()]

    def _insert(self, body: bytearray) -> None:
        at = self.rng.randrange(len(body) + 1)
        body[at:at] = self.rng.randbytes(1 + self._small())

    def _double(self, body: bytearray) -> None:
        start = self.rng.randrange(len(body) + 1)
        body[start:start] = body[start : start + 40]
