"""Soft prompts: trained embeddings that go before those of the input.

Sources: the TGIS prompt store (`decoder.pt`, `encoder.pt`, each one tensor [tokens, hidden]) and
PEFT's prompt tuning (`adapter_model.safetensors` or `.bin`, tensor `prompt_embeddings`). The
checks, their order and their texts are TGIS's.
"""

import io
import json
import struct
import zipfile
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from tgis.adapters.store import DECODER, ENCODER, Directory, Refused
from tgis.hub.safetensors import DTYPES
from tgis.types import AdapterKind, ModelKind

_PEFT_KEY = "prompt_embeddings"
_MAX_HEADER_BYTES = 1 << 20  # of a safetensors file with one tensor that matters
_MAX_PICKLE_BYTES = 1 << 16  # of a .pt file, which describes one tensor
_MAX_RECORDS = 64  # files in a .pt archive
# A prompt of more rows than allowed is still read, if it is not much more, to say how many it has.
_READ_ROWS = 8
_WIDEST = 8  # bytes of a float64
_GRANULE = 512  # bytes that a tensor's size is rounded up to, as TGIS does


@dataclass(frozen=True, slots=True)
class PromptRules:
    """What a soft prompt must fit.

    Attributes:
        size: of the model's embeddings.
        dtype: of the model's arithmetic.
        max_length: most rows of one tensor.
    """

    kind: ModelKind
    size: int
    dtype: torch.dtype
    max_length: int


@dataclass(frozen=True, slots=True, eq=False)
class SoftPrompt:
    """Embeddings [tokens, hidden] in the model's dtype; at least one of both is there.

    Attributes:
        decoder: before the input; of an encoder-decoder model, before the decoder's start token.
        encoder: before the input that the encoder reads; encoder-decoder models only.
    """

    decoder: Tensor | None
    encoder: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return sum(_rounded(t) for t in (self.decoder, self.encoder) if t is not None)

    @property
    def num_decoder(self) -> int:
        """Rows for the decoder."""
        return 0 if self.decoder is None else len(self.decoder)

    @property
    def num_encoder(self) -> int:
        """Rows for the encoder."""
        return 0 if self.encoder is None else len(self.encoder)


def load_prompt(directory: Directory, rules: PromptRules) -> SoftPrompt:
    """Read and check the soft prompt of a directory.

    Raises:
        Refused: there is none, or it breaks a rule.
    """
    is_seq2seq = rules.kind is ModelKind.ENCODER_DECODER
    if (name := directory.peft_file()) is not None:
        if is_seq2seq:
            raise _refused("encoder-decoder architectures not supported for peft models")
        read = _read_safetensors if name.endswith(".safetensors") else _read_peft_pickle
        return SoftPrompt(_check(read(directory, name, rules), rules))
    prompt = SoftPrompt(
        _read_part(directory, DECODER, rules),
        _read_part(directory, ENCODER, rules) if is_seq2seq else None,
    )
    if prompt.decoder is None and prompt.encoder is None:
        wanted = f"neither {DECODER} nor {ENCODER}" if is_seq2seq else f"no {DECODER}"
        raise _refused(f"there is {wanted}")
    return prompt


def _read_part(directory: Directory, name: str, rules: PromptRules) -> Tensor | None:
    if name not in directory.names:
        return None
    return _check(_read_pickle(directory, name, rules), rules)


def _check(tensor: object, rules: PromptRules) -> Tensor:
    """The tensor in the model's dtype, if it obeys the rules; their order is TGIS's."""
    if not _is_plain(tensor) or tensor.ndim != 2:
        raise _refused("Invalid prefix embedding tensor")
    length, size = tensor.shape
    if not 1 <= length <= rules.max_length:
        raise _refused(f"Invalid prefix embedding length of {length}")
    if rules.kind is ModelKind.ENCODER_DECODER and length % 2:
        raise _refused("Encoder/decoder prefix tensor must be of even length")
    if size != rules.size:
        raise _refused(f"Prefix embedding tensor dim {size} does not match model ({rules.size})")
    if not tensor.isfinite().all():
        raise _refused("Prefix contains non-finite elements")
    converted = tensor.to(rules.dtype, copy=True, memory_format=torch.contiguous_format)
    if not converted.isfinite().all():
        raise _refused(
            "Prefix contains non-finite elements after conversion"
            f" from {tensor.dtype} to {rules.dtype}"
        )
    return converted


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """Whether this is a real tensor of numbers that can be embeddings, and nothing cleverer."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.dtype.itemsize > 1
    )


def _most_bytes(rules: PromptRules) -> int:
    rows = _READ_ROWS * rules.max_length * rules.size * _WIDEST
    return rows + _MAX_HEADER_BYTES


def _read_safetensors(directory: Directory, name: str, rules: PromptRules) -> Tensor:
    """The tensor `prompt_embeddings`; nothing else of the file's data is read."""
    (length,) = struct.unpack("<Q", directory.read(name, 8, 0, 8))
    if not 2 <= length <= min(directory.size(name) - 8, _MAX_HEADER_BYTES):
        raise _refused(f"{name} has a broken safetensors header, or none")
    try:
        entry = json.loads(directory.read(name, length, 8, 8 + length))[_PEFT_KEY]
        dtype = DTYPES[entry["dtype"]]
        shape = [int(size) for size in entry["shape"]]
        start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refused(f"{name} has no tensor {_PEFT_KEY}") from None
    if len(shape) != 2 or min(shape) < 0:
        raise _refused("Invalid prefix embedding tensor")
    if stop - start != shape[0] * shape[1] * dtype.itemsize or start < 8 + length:
        raise _refused(f"{name} has a broken safetensors header, or none")
    data = directory.read(name, _most_bytes(rules), start, stop)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def _read_peft_pickle(directory: Directory, name: str, rules: PromptRules) -> object:
    tensors = _read_pickle(directory, name, rules)
    if not isinstance(tensors, dict) or _PEFT_KEY not in tensors:
        raise _refused(f"{name} has no tensor {_PEFT_KEY}")
    return tensors[_PEFT_KEY]


def _read_pickle(directory: Directory, name: str, rules: PromptRules) -> object:
    """What torch has saved, as plain data: no code is run, and nothing is unpacked.

    Only the archive format is taken, whose size says how much memory it can need.
    """
    data = directory.read(name, _most_bytes(rules))
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise _refused(f"{name} is truncated or is no file of torch.save") from None
    for record in records:
        is_pickle = record.filename.endswith(".pkl")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > len(data):
            raise _refused(f"{name} is compressed; torch.save does not do that")
        if is_pickle and record.file_size > _MAX_PICKLE_BYTES:
            raise _refused(f"{name} holds more than tensors")
    if len(records) > _MAX_RECORDS:
        raise _refused(f"{name} holds more than tensors")
    try:
        found: object = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # whatever a broken or hostile file makes of the library
        raise _refused(f"{name} is broken or holds more than tensors") from None
    return found


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _GRANULE) * _GRANULE


def _refused(message: str) -> Refused:
    return Refused(message, kind=AdapterKind.PROMPT)
