"""The nouns that every part of the server shares.

Plain immutable data: no torch, no gRPC, no asyncio. Structs that cross the process boundary are
`msgspec` structs, so the wire format and the types cannot drift apart.
"""

from enum import IntEnum
from typing import Any

import msgspec


class FinishReason(IntEnum):
    """Why a sequence ended; the numbers are those of `fmaas.StopReason`."""

    NOT_FINISHED = 0
    MAX_TOKENS = 1
    EOS_TOKEN = 2
    CANCELLED = 3
    TIME_LIMIT = 4
    STOP_SEQUENCE = 5
    TOKEN_LIMIT = 6
    ERROR = 7


class ModelKind(IntEnum):
    """The two kinds of text model; the numbers are those of `ModelInfoResponse.ModelKind`."""

    DECODER_ONLY = 0
    ENCODER_DECODER = 1


class AdapterKind(IntEnum):
    """What an adapter changes of a model."""

    PROMPT = 0  # a soft prompt: embeddings before those of the input
    LORA = 1  # low-rank additions to weights


class Cause(IntEnum):
    """Why an adapter cannot be had; who asked decides how that is put."""

    MISSING = 0  # no such directory in the store
    NO_CONFIG = 1  # nothing in it that is an adapter
    UNSUPPORTED = 2  # of a `peft_type` that is not served; the message is its name
    INVALID = 3  # broken, too large, or not for this model; the message says what
    BUSY = 4  # no room as long as other adapters are in use


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How one sequence's logits are processed and its next token chosen.

    Values are final: defaults applied, every "off" has exactly one spelling.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 1 = off
    typical_p: float = 1.0  # 1 = off
    seed: int = 0  # uint64; read only when do_sample
    repetition_penalty: float = 1.0  # 1 = off
    length_penalty_start: int = 0  # generated tokens before the penalty sets in
    length_penalty_decay: float = 1.0  # 1 = off
    min_new_tokens: int = 0  # EOS is impossible while fewer have been generated


class DetailParams(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Which details of its tokens a sequence wants back."""

    logprobs: bool = False
    ranks: bool = False
    top_n: int = 0
    output: bool = False  # for generated tokens
    input: bool = False  # for input tokens


NO_DETAILS = DetailParams()


class TokenDetails(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Details of one token, generated or input.

    `top` holds (token id, logprob) in the order in which they are shown.
    """

    logprob: float = 0.0
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


class TokenOut(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One generated token, or the end of a sequence without one (`token_id` = -1)."""

    seq_id: int
    token_id: int
    finish: FinishReason = FinishReason.NOT_FINISHED
    details: TokenDetails | None = None


class Compilation(msgspec.Struct, frozen=True):
    """What became of PT2_COMPILE when the core started."""

    active: bool = False  # compiled code computes the steps
    num_compiled: int = 0  # networks that were compiled for it, not found on disk
    seconds: float = 0.0  # that compiling and warming up took


class ModelInfo(msgspec.Struct, frozen=True):
    """What the core says of the model that it serves, once it can serve."""

    kind: ModelKind
    engine: str
    dtype: str
    vocab_size: int
    max_sequence_length: int  # input + generated tokens of one sequence
    max_new_tokens: int
    kv_tokens: int  # tokens of all sequences together that fit in memory
    max_running: int  # sequences that one step can advance
    compilation: Compilation = Compilation()


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model lies, and what its small files say of it."""

    name: str  # as it was asked for
    path: str  # directory with config.json, weights and tokenizer
    model_type: str
    kind: ModelKind
    weights: tuple[str, ...]  # names of the weight files within `path`
    config: dict[str, Any]  # the whole config.json
    vocab_size: int | None = None
    max_length: int | None = None  # tokens of one sequence
    eos_token_ids: tuple[int, ...] = ()  # any of them ends a sequence
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None  # encoder-decoder models only
    dtype: str | None = None  # a torch name such as "bfloat16"
    quantization: dict[str, Any] | None = None
    auto_map: bool = False  # Python code of its own comes with it
