"""Raw parameters of a request -> `Params`, or `InvalidRequest`.

Clients match on the texts and see the first broken rule only, so both the texts and the order of
`RULES` belong to the public contract (TGIS api). Every rule says what must hold rather than what
must not: a NaN holds nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import msgspec

from tgis.errors import InvalidRequest
from tgis.front.params import Length, Limits, Params
from tgis.proto import generation_pb2 as pb
from tgis.types import DetailParams, SamplingParams

DEFAULT_MAX_NEW_TOKENS = 20
MAX_STOP_SEQUENCES = 6
MAX_STOP_SEQUENCE_BYTES = 240
MAX_TOP_N_TOKENS = 10
# float32(0.05): the wire carries float32, and the bound itself must be accepted.
MIN_TEMPERATURE = 0.05000000074505806
TOP_K_END = 1 << 31  # clients count in signed 32 bits

_STOP_SEQUENCES_TEXT = (
    f"can specify at most {MAX_STOP_SEQUENCES} non-empty stop sequences, "
    f"each not more than {MAX_STOP_SEQUENCE_BYTES} UTF8 bytes"
)
_NO_PARAMETERS = pb.Parameters()
_NO_SAMPLING = pb.SamplingParameters()


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the rules look at: defaults applied, nothing checked."""

    temperature: float  # 0 = greedy, asked for by a client with field presence
    top_k: int
    top_p: float
    typical_p: float
    max_new_tokens: int
    min_new_tokens: int
    repetition_penalty: float
    decay_factor: float
    stop_sequences: Sequence[str]
    response: pb.ResponseOptions
    guided: str | None  # the field of the guided decoding that is asked for


def _ask(raw: pb.Parameters, limits: Limits) -> _Asked:
    sampling = raw.sampling if raw.method == pb.SAMPLE else _NO_SAMPLING
    stopping, decoding = raw.stopping, raw.decoding
    has_length_penalty = decoding.HasField("length_penalty")
    default_max_new_tokens = min(DEFAULT_MAX_NEW_TOKENS, limits.max_new_tokens)
    return _Asked(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_k=sampling.top_k,
        top_p=sampling.top_p or 1.0,
        typical_p=sampling.typical_p,
        max_new_tokens=stopping.max_new_tokens or default_max_new_tokens,
        min_new_tokens=stopping.min_new_tokens,
        repetition_penalty=decoding.repetition_penalty or 1.0,
        decay_factor=decoding.length_penalty.decay_factor if has_length_penalty else 1.0,
        stop_sequences=stopping.stop_sequences,
        response=raw.response,
        guided=_guided_field(decoding),
    )


def _guided_field(decoding: pb.DecodingParameters) -> str | None:
    field: str | None = decoding.WhichOneof("guided")
    if field == "format" and decoding.format == pb.DecodingParameters.TEXT:
        return None  # any text will do
    return field


class Rule(NamedTuple):
    """One condition on a request, and what a client that breaks it is told."""

    name: str
    holds: Callable[[_Asked, Limits], bool]
    text: str  # a format string over `asked` and `limits`


def _details_have_tokens(asked: _Asked, _: Limits) -> bool:
    options = asked.response
    wants_details = options.token_logprobs or options.token_ranks or options.top_n_tokens
    return not wants_details or options.input_tokens or options.generated_tokens


def _stop_sequences_have_size(asked: _Asked, _: Limits) -> bool:
    sizes = (len(text.encode()) for text in asked.stop_sequences)
    return all(0 < size <= MAX_STOP_SEQUENCE_BYTES for size in sizes)


RULES = (
    Rule(
        "temperature",
        lambda asked, _: asked.temperature == 0 or MIN_TEMPERATURE <= asked.temperature < inf,
        "temperature must be >= 0.05",
    ),
    Rule("top_p", lambda asked, _: 0 < asked.top_p <= 1, "top_p must be > 0.0 and <= 1.0"),
    Rule("typical_p", lambda asked, _: -inf < asked.typical_p <= 1, "typical_p must be <= 1.0"),
    Rule("top_k", lambda asked, _: asked.top_k < TOP_K_END, "top_k must be strictly positive"),
    Rule(
        "max_new_tokens",
        lambda asked, limits: asked.max_new_tokens <= limits.max_new_tokens,
        "max_new_tokens must be <= {limits.max_new_tokens}",
    ),
    Rule(
        "min_new_tokens",
        lambda asked, _: asked.min_new_tokens <= asked.max_new_tokens,
        "min_new_tokens must be <= max_new_tokens",
    ),
    Rule(
        "repetition_penalty",
        lambda asked, _: 0 < asked.repetition_penalty < inf,
        "repetition_penalty must be > 0.0",
    ),
    Rule(
        "length_penalty",
        lambda asked, _: 1 <= asked.decay_factor <= 10,
        "length_penalty must be >= 1.0 and <= 10.0",
    ),
    Rule(
        "number of stop_sequences",
        lambda asked, _: len(asked.stop_sequences) <= MAX_STOP_SEQUENCES,
        _STOP_SEQUENCES_TEXT,
    ),
    Rule(
        "token details",
        _details_have_tokens,
        "must request input and/or generated tokens to request extra token detail",
    ),
    Rule("size of stop_sequences", _stop_sequences_have_size, _STOP_SEQUENCES_TEXT),
    Rule(
        "top_n_tokens",
        lambda asked, _: asked.response.top_n_tokens <= MAX_TOP_N_TOKENS,
        f"top_n_tokens ({{asked.response.top_n_tokens}}) must be <= {MAX_TOP_N_TOKENS}",
    ),
    Rule(
        "guided",
        lambda asked, _: asked.guided is None,
        "guided decoding is not supported: decoding.{asked.guided} must not be set",
    ),
)


def validate(raw: pb.Parameters | None, limits: Limits) -> Params:
    """Check the parameters of a request (None: the request has none) and apply all defaults.

    Raises:
        InvalidRequest: with the text of the first rule that does not hold.
    """
    raw = _NO_PARAMETERS if raw is None else raw
    asked = _ask(raw, limits)
    for rule in RULES:
        if not rule.holds(asked, limits):
            raise InvalidRequest(rule.text.format(asked=asked, limits=limits))
    return _params(raw, asked, limits)


def _params(raw: pb.Parameters, asked: _Asked, limits: Limits) -> Params:
    stopping = raw.stopping
    sampling = _sampling_params(raw, asked)
    return Params(
        sampling=sampling,
        seed=sampling.seed if sampling.do_sample and raw.sampling.HasField("seed") else None,
        details=_detail_params(raw.response),
        max_new_tokens=asked.max_new_tokens,
        time_limit=stopping.time_limit_millis / 1000 if stopping.time_limit_millis else None,
        stop_sequences=tuple(asked.stop_sequences),
        include_stop_sequence=(
            stopping.include_stop_sequence
            if stopping.HasField("include_stop_sequence")
            else limits.default_include_stop_seqs
        ),
        input_text=raw.response.input_text,
        truncate_input_tokens=raw.truncate_input_tokens,
    )


def _sampling_params(raw: pb.Parameters, asked: _Asked) -> SamplingParams:
    """The one spelling of what is asked for: everything that has no effect is at its "off"."""
    is_penalised = asked.decay_factor > 1
    start = raw.decoding.length_penalty.start_index if is_penalised else 0
    greedy = SamplingParams(
        repetition_penalty=asked.repetition_penalty,
        length_penalty_start=start,
        length_penalty_decay=asked.decay_factor,
        min_new_tokens=asked.min_new_tokens,
    )
    if raw.method != pb.SAMPLE or asked.temperature == 0:
        return greedy
    return msgspec.structs.replace(
        greedy,
        do_sample=True,
        temperature=asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p,
        typical_p=asked.typical_p if asked.typical_p > 0 else 1.0,
        seed=raw.sampling.seed,
    )


def _detail_params(options: pb.ResponseOptions) -> DetailParams:
    return DetailParams(
        logprobs=options.token_logprobs,
        ranks=options.token_ranks,
        top_n=options.top_n_tokens,
        output=options.generated_tokens,
        input=options.input_tokens,
    )


def fit_length(num_input_tokens: int, prefix_length: int, params: Params, limits: Limits) -> Length:
    """Fit one input into the model's sequence length.

    Args:
        num_input_tokens: tokens of the input after truncation.
        prefix_length: virtual tokens of the soft prompt.

    Raises:
        InvalidRequest: nothing to continue, no room for a single token, or not for
            `min_new_tokens`.
    """
    if num_input_tokens + prefix_length == 0:
        raise InvalidRequest("input must have at least one token; this tokenizer adds none")
    room = limits.max_sequence_length - num_input_tokens - prefix_length
    min_new_tokens = params.sampling.min_new_tokens
    found = f"input tokens ({num_input_tokens}) plus prefix length ({prefix_length})"
    if room <= 0:
        raise InvalidRequest(f"{found} must be < {limits.max_sequence_length}")
    if room < min_new_tokens:
        raise InvalidRequest(
            f"{found} plus min_new_tokens ({min_new_tokens}) "
            f"must be <= {limits.max_sequence_length}"
        )
    return Length(min(params.max_new_tokens, room), params.max_new_tokens > room)
