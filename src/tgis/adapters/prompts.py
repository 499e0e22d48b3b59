"""Soft prompts: trained embeddings that go before those of the input.

Sources: the TGIS prompt store (`decoder.pt`, `encoder.pt`, each one tensor [tokens, hidden]) and
PEFT's prompt tuning (`adapter_model.safetensors` or `.bin`, tensor `prompt_embeddings`). The
checks, their order and their texts are TGIS's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tgis.adapters.pickles import is_plain, read_pickle
from tgis.adapters.store import DECODER, ENCODER, Directory, Refused
from tgis.adapters.tensors import stored_tensors
from tgis.types import AdapterKind, ModelKind

_PEFT_KEY = "prompt_embeddings"
_MAX_PICKLE_BYTES = 1 << 16  # of a .pt file, which describes one tensor
_MAX_RECORDS = 64  # files in a .pt archive
# A prompt of more rows than allowed is still read, if it is not much more, to say how many it has.
_READ_ROWS = 8
_WIDEST = 8  # bytes of a float64
_LEAST_BYTES, _MOST_BYTES = 1 << 20, 1 << 30  # limits of that
_UNKNOWN_SIZE = 1 << 16
_GRANULE = 512  # bytes that a tensor's size is rounded up to, as TGIS does


@dataclass(frozen=True, slots=True)
class PromptRules:
    """What a soft prompt must fit.

    Attributes:
        size: of the model's embeddings; None = not known, any will do.
        dtype: of the model's arithmetic.
        max_length: most rows of one tensor.
    """

    kind: ModelKind
    size: int | None
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
    if directory.peft_file() is not None:
        if is_seq2seq:
            raise _refused("encoder-decoder architectures not supported for peft models")
        return SoftPrompt(_read_peft(directory, rules))
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
    limit = _most_bytes(rules)
    tensor = read_pickle(
        directory, name, AdapterKind.PROMPT, limit, _MAX_PICKLE_BYTES, _MAX_RECORDS
    )
    if not is_plain(tensor):
        raise _refused("Invalid prefix embedding tensor")
    _check_shape(tensor.dtype, tensor.shape, rules)
    return _converted(tensor, rules.dtype)


def _read_peft(directory: Directory, rules: PromptRules) -> Tensor:
    stored = stored_tensors(directory, AdapterKind.PROMPT, _most_bytes(rules)).get(_PEFT_KEY)
    if stored is None:
        raise _refused(f"{directory.peft_file()} has no tensor {_PEFT_KEY}")
    _check_shape(stored.dtype, stored.shape, rules)
    return _converted(stored.rows(stored.shape[0]), rules.dtype)


def _check_shape(dtype: torch.dtype, shape: Sequence[int], rules: PromptRules) -> None:
    """The first rules; their order is TGIS's."""
    if len(shape) != 2 or not dtype.is_floating_point or dtype.itemsize == 1:
        raise _refused("Invalid prefix embedding tensor")
    length, size = shape
    if not 1 <= length <= rules.max_length:
        raise _refused(f"Invalid prefix embedding length of {length}")
    if rules.kind is ModelKind.ENCODER_DECODER and length % 2:
        raise _refused("Encoder/decoder prefix tensor must be of even length")
    if rules.size not in (None, size):
        raise _refused(f"Prefix embedding tensor dim {size} does not match model ({rules.size})")


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in the model's dtype, if all of it is finite."""
    if not tensor.isfinite().all():
        raise _refused("Prefix contains non-finite elements")
    converted = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not converted.isfinite().all():
        text = f"Prefix contains non-finite elements after conversion from {tensor.dtype} to"
        raise _refused(f"{text} {dtype}")
    return converted


def _most_bytes(rules: PromptRules) -> int:
    """Of a file that is read at all."""
    size = rules.size or _UNKNOWN_SIZE
    wanted = _READ_ROWS * rules.max_length * size * _WIDEST
    return min(max(wanted, _LEAST_BYTES), _MOST_BYTES)


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _GRANULE) * _GRANULE


def _refused(message: str) -> Refused:
    return Refused(message, kind=AdapterKind.PROMPT)
