"""A request in proto3 JSON, its parameters with all defaults applied, and what is refused."""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

STOP_TEXT = "can specify at most 6 non-empty stop sequences, each not more than 240 UTF8 bytes"
DETAIL_TEXT = "must request input and/or generated tokens to request extra token detail"


class RejectedError(Exception):
    """The request is answered with a gRPC status.

    `exact` is false where the api fixes only how the text begins.
    """

    def __init__(self, code: str, message: str, exact: bool = True) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.exact = exact


@dataclass(frozen=True)
class Limits:
    """The settings of the server that change answers."""

    max_sequence_length: int = 200
    max_new_tokens: int = 169
    max_concurrent_requests: int = 512
    default_include_stop_seqs: bool = True
    output_special_tokens: bool = False

    @property
    def effective_new_tokens(self) -> int:
        """A sequence has at least one input token."""
        return min(self.max_new_tokens, self.max_sequence_length - 1)


@dataclass(frozen=True)
class Params:
    """TGIS api, parameter defaults: every "off" has one spelling."""

    sample: bool
    temperature: float
    top_k: int
    top_p: float
    typical_p: float
    seed: int | None
    max_new_tokens: int
    min_new_tokens: int
    stop_sequences: list[str]
    include_stop_sequence: bool
    repetition_penalty: float
    length_penalty: tuple[int, float] | None
    truncate: int
    input_text: bool
    generated_tokens: bool
    input_tokens: bool
    logprobs: bool
    ranks: bool
    top_n: int

    @property
    def details(self) -> bool:
        return self.logprobs or self.ranks or self.top_n > 0


def snake(value: Any) -> Any:
    """proto3 JSON allows lowerCamelCase and the original names: make all of them the latter."""
    if isinstance(value, dict):
        return {re.sub(r"(?=[A-Z])", "_", key).lower(): snake(item) for key, item in value.items()}
    if isinstance(value, list):
        return [snake(item) for item in value]
    return value


def float32(value: Any) -> float:
    """The value as a protobuf `float` field carries it; JSON spells NaN and Infinity as text."""
    return float(struct.unpack("<f", struct.pack("<f", float(value)))[0])


def parse(request: Json, limits: Limits) -> Params:
    """Apply the defaults, then every check that needs no input text.

    Raises:
        RejectedError: the first check, in the api's order, that fails.
    """
    message = snake(request)
    params = _defaults(message.get("params", {}), limits)
    for wrong, text in _checks(params, limits):
        if wrong:
            raise RejectedError("INVALID_ARGUMENT", text)
    _refuse_adapters(message)
    return params


def _defaults(message: Json, limits: Limits) -> Params:
    sampling = message.get("sampling", {})
    stopping = message.get("stopping", {})
    response = message.get("response", {})
    decoding = message.get("decoding", {})
    sample = message.get("method") in ("SAMPLE", 1)
    if not sample:
        sampling = {}
    # Only a client that knows the field as optional can send a zero temperature: it means greedy,
    # with the rest of `sampling` still checked.
    temperature = float32(sampling.get("temperature", 1))
    sample = sample and temperature != 0
    length_penalty = None
    if (penalty := decoding.get("length_penalty")) is not None:
        length_penalty = penalty.get("start_index", 0), float32(penalty.get("decay_factor", 0))
    return Params(
        sample=sample,
        temperature=temperature,
        top_k=sampling.get("top_k", 0),
        top_p=float32(sampling.get("top_p", 0)) or 1.0,
        typical_p=float32(sampling.get("typical_p", 0)) or 1.0,
        seed=int(sampling["seed"]) if "seed" in sampling else None,
        max_new_tokens=stopping.get("max_new_tokens", 0) or min(20, limits.effective_new_tokens),
        min_new_tokens=stopping.get("min_new_tokens", 0),
        stop_sequences=stopping.get("stop_sequences", []),
        include_stop_sequence=stopping.get(
            "include_stop_sequence", limits.default_include_stop_seqs
        ),
        repetition_penalty=float32(decoding.get("repetition_penalty", 0)) or 1.0,
        length_penalty=length_penalty,
        truncate=message.get("truncate_input_tokens", 0),
        input_text=response.get("input_text", False),
        generated_tokens=response.get("generated_tokens", False),
        input_tokens=response.get("input_tokens", False),
        logprobs=response.get("token_logprobs", False),
        ranks=response.get("token_ranks", False),
        top_n=response.get("top_n_tokens", 0),
    )


def _checks(p: Params, limits: Limits) -> Iterator[tuple[bool, str]]:
    """(is wrong, text) in the order of the api; a NaN or an infinity is always wrong."""

    def wrong(value: float, ok: bool) -> bool:
        return not math.isfinite(value) or not ok

    yield (
        wrong(p.temperature, p.temperature == 0 or p.temperature >= 0.05),
        "temperature must be >= 0.05",
    )
    yield wrong(p.top_p, 0 < p.top_p <= 1), "top_p must be > 0.0 and <= 1.0"
    yield wrong(p.typical_p, p.typical_p <= 1), "typical_p must be <= 1.0"
    yield p.top_k >= 2**31, "top_k must be strictly positive"
    yield (
        p.max_new_tokens > limits.effective_new_tokens,
        f"max_new_tokens must be <= {limits.effective_new_tokens}",
    )
    yield p.min_new_tokens > p.max_new_tokens, "min_new_tokens must be <= max_new_tokens"
    yield (
        wrong(p.repetition_penalty, p.repetition_penalty > 0),
        "repetition_penalty must be > 0.0",
    )
    decay = 1.0 if p.length_penalty is None else p.length_penalty[1]
    yield wrong(decay, 1 <= decay <= 10), "length_penalty must be >= 1.0 and <= 10.0"
    yield len(p.stop_sequences) > 6, STOP_TEXT
    yield p.details and not (p.input_tokens or p.generated_tokens), DETAIL_TEXT
    yield any(not 1 <= len(stop.encode()) <= 240 for stop in p.stop_sequences), STOP_TEXT
    yield p.top_n > 10, f"top_n_tokens ({p.top_n}) must be <= 10"


def _refuse_adapters(request: Json) -> None:
    """No server of the contract suite has a store of prefixes or adapters."""
    if request.get("adapter_id"):
        text = "adapter_id supplied but no adapter store was configured"
        raise RejectedError("INVALID_ARGUMENT", text)
    if prefix := request.get("prefix_id"):
        text = f"can't retrieve prompt prefix with id '{prefix}': "
        raise RejectedError("INVALID_ARGUMENT", text, exact=False)


def check_length(num_input: int, params: Params, limits: Limits) -> None:
    """The two rules on the length of one (truncated) input.

    Raises:
        RejectedError: the input leaves no room.
    """
    limit = limits.max_sequence_length
    text = f"input tokens ({num_input}) plus prefix length (0)"
    if num_input >= limit:
        raise RejectedError("INVALID_ARGUMENT", f"{text} must be < {limit}")
    if num_input + params.min_new_tokens > limit:
        text = f"{text} plus min_new_tokens ({params.min_new_tokens}) must be <= {limit}"
        raise RejectedError("INVALID_ARGUMENT", text)
