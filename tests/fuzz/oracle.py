"""The validation rules written a second time, plainly, as the slow twin of `front.validate`."""

import math

import numpy as np

from tgis.front.params import Length, Limits, Params
from tgis.proto import generation_pb2 as pb

STOP_TEXT = "can specify at most 6 non-empty stop sequences, each not more than 240 UTF8 bytes"
DETAIL_TEXT = "must request input and/or generated tokens to request extra token detail"


def verdict(raw: pb.Parameters, limits: Limits) -> str | None:
    """The text that these parameters must be refused with; None if they must be accepted."""
    return (
        _sampling_verdict(raw)
        or _length_verdict(raw.stopping, limits)
        or _decoding_verdict(raw.decoding)
        or _text_verdict(raw)
        or _guided_verdict(raw.decoding)
    )


def _sampling_verdict(raw: pb.Parameters) -> str | None:
    if raw.method != 1:
        return None
    temperature = np.float32(raw.sampling.temperature)
    top_p = np.float32(raw.sampling.top_p)
    typical_p = np.float32(raw.sampling.typical_p)
    if temperature != 0 and (not np.isfinite(temperature) or temperature < np.float32(0.05)):
        return "temperature must be >= 0.05"
    if top_p < 0 or top_p > 1 or np.isnan(top_p):
        return "top_p must be > 0.0 and <= 1.0"
    if typical_p > 1 or not np.isfinite(typical_p):
        return "typical_p must be <= 1.0"
    if raw.sampling.top_k >= 2**31:
        return "top_k must be strictly positive"
    return None


def _length_verdict(stopping: pb.StoppingCriteria, limits: Limits) -> str | None:
    if stopping.max_new_tokens > limits.max_new_tokens:
        return f"max_new_tokens must be <= {limits.max_new_tokens}"
    effective = stopping.max_new_tokens
    if effective == 0:
        effective = 20 if limits.max_new_tokens >= 20 else limits.max_new_tokens
    if stopping.min_new_tokens > effective:
        return "min_new_tokens must be <= max_new_tokens"
    return None


def _decoding_verdict(decoding: pb.DecodingParameters) -> str | None:
    penalty = decoding.repetition_penalty
    if penalty < 0 or math.isnan(penalty) or math.isinf(penalty):
        return "repetition_penalty must be > 0.0"
    if decoding.HasField("length_penalty"):
        decay = np.float32(decoding.length_penalty.decay_factor)
        if np.isnan(decay) or decay < np.float32(1) or decay > np.float32(10):
            return "length_penalty must be >= 1.0 and <= 10.0"
    return None


def _text_verdict(raw: pb.Parameters) -> str | None:
    stops = list(raw.stopping.stop_sequences)
    options = raw.response
    if len(stops) > 6:
        return STOP_TEXT
    asks_details = options.token_logprobs or options.token_ranks or options.top_n_tokens > 0
    if asks_details and not (options.input_tokens or options.generated_tokens):
        return DETAIL_TEXT
    for stop in stops:
        if len(stop) == 0 or len(bytes(stop, "utf-8")) > 240:
            return STOP_TEXT
    if options.top_n_tokens > 10:
        return f"top_n_tokens ({options.top_n_tokens}) must be <= 10"
    return None


def _guided_verdict(decoding: pb.DecodingParameters) -> str | None:
    for field in ("format", "json_schema", "regex", "choice", "grammar"):
        if decoding.HasField(field) and not (field == "format" and decoding.format == 0):
            return f"guided decoding is not supported: decoding.{field} must not be set"
    return None


def check_params(params: Params, limits: Limits) -> None:
    """Assert all that the rest of the server relies on."""
    sampling = params.sampling
    if not sampling.do_sample:
        off = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p)
        assert off == (1.0, 0, 1.0, 1.0)
        assert sampling.seed == 0
        assert params.seed is None
    assert 0.05 <= sampling.temperature < math.inf
    assert 0 <= sampling.top_k < 2**31
    assert 0 < sampling.top_p <= 1
    assert 0 < sampling.typical_p <= 1
    assert 0 <= sampling.seed < 2**64
    assert params.seed in (None, sampling.seed)
    assert 0 < sampling.repetition_penalty < math.inf
    assert 1 <= sampling.length_penalty_decay <= 10
    assert 0 <= sampling.length_penalty_start < 2**32
    assert 1 <= params.max_new_tokens <= limits.max_new_tokens
    assert 0 <= sampling.min_new_tokens <= params.max_new_tokens
    assert params.time_limit is None or 0.001 <= params.time_limit < 2**32
    assert len(params.stop_sequences) <= 6
    assert all(1 <= len(stop.encode()) <= 240 for stop in params.stop_sequences)
    assert 0 <= params.details.top_n <= 10
    assert 0 <= params.truncate_input_tokens < 2**32


def check_length(length: Length, num_tokens: int, params: Params, limits: Limits) -> None:
    """Assert that a sequence that starts with `num_tokens` fits, and why it is as long."""
    assert 1 <= length.max_new_tokens <= params.max_new_tokens
    assert length.max_new_tokens >= params.sampling.min_new_tokens
    assert num_tokens + length.max_new_tokens <= limits.max_sequence_length
    assert length.token_limited == (length.max_new_tokens < params.max_new_tokens)
