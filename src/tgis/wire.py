"""What front and core say to each other, and how it is framed.

One Unix stream socket, each frame a 4-byte little-endian length and a msgpack body. A body is one
struct of the tagged unions below. End of file means that the peer has died.

    front -> core   Add, Abort, Hold, Lookup, Unpin
    core -> front   Loading*, Ready, then Out, Failed, Found, NotFound and Beat in any order

Every `Lookup` is answered by exactly one `Found`, which the front gives back with an `Unpin`, or
`NotFound`. Every `Add` is answered by exactly one terminal message: a `TokenOut` with a finish
reason inside an `Out`, or a `Failed`. An `Abort` ends a sequence without an answer.
Times are CLOCK_MONOTONIC seconds, which the processes of one machine share.
"""

import struct
from enum import IntEnum
from typing import Generic, TypeVar

import msgspec

from tgis.types import (
    AdapterKind,
    Cause,
    DetailParams,
    ModelInfo,
    SamplingParams,
    TokenDetails,
    TokenOut,
)

MAX_FRAME_BYTES = 1 << 30
_LENGTH = struct.Struct("<I")


class Add(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """A new sequence: generate from `token_ids`."""

    seq_id: int
    token_ids: list[int]
    sampling: SamplingParams
    details: DetailParams
    max_new_tokens: int
    deadline: float  # inf = none
    arrival: float
    adapter: int = 0  # handle of a `Found` that has not been given back; 0 = none
    tenant: bytes = b""  # who shares the engine fairly with others; cached prefixes are its own


class Abort(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Forget these sequences; unknown ids are ignored."""

    seq_ids: list[int]


class Hold(msgspec.Struct, frozen=True, tag=12, array_like=True):
    """Compute nothing more of a sequence, whose client does not keep up, until told otherwise."""

    seq_id: int
    held: bool


class Loading(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """How far the model has been read."""

    bytes_done: int
    bytes_total: int


class Ready(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """The core serves from now on."""

    model: ModelInfo


class InputDetails(msgspec.Struct, frozen=True, array_like=True):
    """Details of input tokens 1, 2, ... of one sequence, sent with its first generated token.

    The first input token has none: nothing was predicted before it.
    """

    seq_id: int
    details: list[TokenDetails]


class SchedulerCounts(msgspec.Struct, array_like=True):
    """What the scheduler counted since it was asked last."""

    num_preempted: int = 0
    num_queue_jumps: int = 0  # admitted although an earlier one had just been passed over
    num_exact_fits: int = 0  # admitted only thanks to the budget's exact test
    num_weight_skips: int = 0  # passed over for the weight of their prefill
    num_padding_skips: int = 0  # passed over for the padding that they would have caused
    prefix_query_tokens: int = 0  # tokens of admitted prompts
    prefix_hit_tokens: int = 0  # of those, tokens that were cached


class DraftCounts(msgspec.Struct, array_like=True):
    """What became of speculative decoding since it was asked last."""

    num_drafts: int = 0  # runs of drafted tokens that were computed
    num_drafted: int = 0  # tokens of these
    num_accepted: int = 0  # of those, tokens that were then chosen


class StepStats(msgspec.Struct, frozen=True, array_like=True):
    """One step of the engine, for the batch metrics. Sent to one front, so that sums are right."""

    duration: float  # seconds from plan to accounted tokens
    forward_duration: float  # of those, in the engine
    tokens_duration: float  # of those, choosing and accounting tokens
    num_prefill_seqs: int  # that have not got a token before, or are computed anew
    num_prefill_tokens: int
    num_decode_seqs: int
    num_joined: int  # that got their first token while others were running
    num_calls: int  # of the engine; more than one if it failed
    num_errors: int  # failed calls
    num_out_of_memory: int  # calls that failed for want of memory
    counts: SchedulerCounts
    drafts: DraftCounts = msgspec.field(default_factory=DraftCounts)
    num_compiled: int = 0  # graphs that were compiled since the step before


class Gauges(msgspec.Struct, frozen=True, array_like=True):
    """The state of queue and batch after a step, or when idle."""

    num_waiting: int = 0
    num_running: int = 0
    running_tokens: int = 0  # input + generated tokens of running sequences, with padding
    remaining_tokens: int = 0  # most tokens that a running sequence may still generate
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0


class Out(msgspec.Struct, frozen=True, tag=5, array_like=True):
    """All that one step produced."""

    tokens: list[TokenOut]
    inputs: list[InputDetails]
    started: list[tuple[int, float]]  # sequences that left the queue, and when
    step: StepStats | None
    gauges: Gauges


class FailureKind(IntEnum):
    """Which error of `tgis.errors` a failed sequence raises in the front."""

    GENERATION = 0
    OUT_OF_MEMORY = 1
    INVALID = 2
    UNAVAILABLE = 3  # its adapter is not loaded (any more)


class Failed(msgspec.Struct, frozen=True, tag=6, array_like=True):
    """One sequence ended with an error."""

    seq_id: int
    kind: FailureKind
    message: str


class Beat(msgspec.Struct, frozen=True, tag=7, array_like=True):
    """The core's process is alive; `busy_for` is the age in seconds of the step under way."""

    busy_for: float
    gauges: Gauges


class Lookup(msgspec.Struct, frozen=True, tag=8, array_like=True):
    """Load an adapter, if it is not loaded as it lies in the store now, and hold on to it."""

    lookup_id: int  # unique per connection
    adapter_id: str


class Found(msgspec.Struct, frozen=True, tag=9, array_like=True):
    """The adapter is loaded, and stays so until `Unpin` or the end of the connection."""

    lookup_id: int
    handle: int  # never 0, and never used again for another one, by no core
    kind: AdapterKind
    num_virtual: int  # embeddings before the input: the rows of a soft prompt
    length: int  # tokens that it takes of the sequence length
    seconds: float  # that loading took; 0 = was loaded


class NotFound(msgspec.Struct, frozen=True, tag=10, array_like=True):
    """The adapter cannot be used."""

    lookup_id: int
    cause: Cause
    message: str
    kind: AdapterKind | None  # as far as it is known


class Unpin(msgspec.Struct, frozen=True, tag=11, array_like=True):
    """One `Found` of this handle is not needed any more."""

    handle: int


ToCore = Add | Abort | Hold | Lookup | Unpin
ToFront = Loading | Ready | Out | Failed | Beat | Found | NotFound

_encoder = msgspec.msgpack.Encoder()


def frame(message: msgspec.Struct) -> bytes:
    """One framed message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def encode(message: ToCore | ToFront) -> bytes:
    """One framed message between front and core."""
    return frame(message)


T = TypeVar("T")


class Decoder(Generic[T]):
    """Cuts a byte stream into messages of one direction.

    Args:
        union: the union of message types to expect (`ToCore` or `ToFront`).
    """

    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(union)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """Return every message that `data` completes.

        Raises:
            msgspec.DecodeError: the bytes are not of this protocol.
        """
        self._buffer += data
        messages: list[T] = []
        offset = 0
        while len(self._buffer) - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, offset)
            if length > MAX_FRAME_BYTES:
                raise msgspec.DecodeError(f"frame of {length} bytes exceeds {MAX_FRAME_BYTES}")
            end = offset + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(self._decoder.decode(bytes(self._buffer[offset + _LENGTH.size : end])))
            offset = end
        del self._buffer[:offset]
        return messages
