"""Every rule at its bound from both sides, the order of the rules, and what leaves."""

import math
import struct

import msgspec
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.oracle import check_length, check_params, verdict

from tgis.errors import InvalidRequest
from tgis.front.params import Length, Limits, Params
from tgis.front.validate import RULES, fit_length, validate
from tgis.proto import generation_pb2 as pb
from tgis.types import NO_DETAILS, DetailParams, SamplingParams

LIMITS = Limits(max_new_tokens=169, max_sequence_length=200)
UINT32_MAX = 2**32 - 1
NAN, INF = math.nan, math.inf

TEMPERATURE = "temperature must be >= 0.05"
TOP_P = "top_p must be > 0.0 and <= 1.0"
TYPICAL_P = "typical_p must be <= 1.0"
TOP_K = "top_k must be strictly positive"
MAX_NEW = "max_new_tokens must be <= 169"
MIN_NEW = "min_new_tokens must be <= max_new_tokens"
REPETITION = "repetition_penalty must be > 0.0"
LENGTH = "length_penalty must be >= 1.0 and <= 10.0"
STOPS = "can specify at most 6 non-empty stop sequences, each not more than 240 UTF8 bytes"
DETAILS = "must request input and/or generated tokens to request extra token detail"


def below(value: float) -> float:
    """The float32 just below a positive `value`."""
    return step(value, -1)


def above(value: float) -> float:
    """The float32 just above a positive `value`."""
    return step(value, +1)


def step(value: float, by: int) -> float:
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return float(struct.unpack("<f", struct.pack("<I", bits + by))[0])


def sample(**fields) -> pb.Parameters:
    return pb.Parameters(method=pb.SAMPLE, sampling=pb.SamplingParameters(**fields))


def stopping(**fields) -> pb.Parameters:
    return pb.Parameters(stopping=pb.StoppingCriteria(**fields))


def decoding(**fields) -> pb.Parameters:
    return pb.Parameters(decoding=pb.DecodingParameters(**fields))


def response(**fields) -> pb.Parameters:
    return pb.Parameters(response=pb.ResponseOptions(**fields))


def length_penalty(decay: float, start: int = 0) -> pb.Parameters:
    return decoding(length_penalty={"decay_factor": decay, "start_index": start})


def merged(*parts: pb.Parameters) -> pb.Parameters:
    whole = pb.Parameters()
    for part in parts:
        whole.MergeFrom(part)
    return whole


def over_the_wire(raw: pb.Parameters) -> pb.Parameters:
    return pb.Parameters.FromString(raw.SerializeToString())


def accept(raw: pb.Parameters | None, limits: Limits = LIMITS) -> Params:
    return validate(raw and over_the_wire(raw), limits)


def refusal(raw: pb.Parameters, limits: Limits = LIMITS) -> str:
    with pytest.raises(InvalidRequest) as caught:
        validate(over_the_wire(raw), limits)
    return str(caught.value)


# ---- each rule, both sides of its bound ----

REFUSED = [
    (sample(temperature=below(0.05)), TEMPERATURE),
    (sample(temperature=0.02), TEMPERATURE),
    (sample(temperature=1e-45), TEMPERATURE),
    (sample(temperature=-0.05), TEMPERATURE),
    (sample(temperature=-1), TEMPERATURE),
    (sample(temperature=NAN), TEMPERATURE),
    (sample(temperature=INF), TEMPERATURE),
    (sample(temperature=-INF), TEMPERATURE),
    (sample(top_p=above(1)), TOP_P),
    (sample(top_p=-1e-45), TOP_P),
    (sample(top_p=-0.5), TOP_P),
    (sample(top_p=NAN), TOP_P),
    (sample(top_p=INF), TOP_P),
    (sample(top_p=-INF), TOP_P),
    (sample(typical_p=above(1)), TYPICAL_P),
    (sample(typical_p=NAN), TYPICAL_P),
    (sample(typical_p=INF), TYPICAL_P),
    (sample(typical_p=-INF), TYPICAL_P),
    (sample(top_k=2**31), TOP_K),
    (sample(top_k=UINT32_MAX), TOP_K),
    (stopping(max_new_tokens=170), MAX_NEW),
    (stopping(max_new_tokens=UINT32_MAX), MAX_NEW),
    (stopping(max_new_tokens=10, min_new_tokens=11), MIN_NEW),
    (stopping(min_new_tokens=21), MIN_NEW),
    (stopping(max_new_tokens=169, min_new_tokens=UINT32_MAX), MIN_NEW),
    (decoding(repetition_penalty=-1e-45), REPETITION),
    (decoding(repetition_penalty=-1), REPETITION),
    (decoding(repetition_penalty=NAN), REPETITION),
    (decoding(repetition_penalty=INF), REPETITION),
    (length_penalty(below(1)), LENGTH),
    (length_penalty(above(10)), LENGTH),
    (length_penalty(0), LENGTH),
    (length_penalty(-1), LENGTH),
    (length_penalty(NAN), LENGTH),
    (length_penalty(INF), LENGTH),
    (decoding(length_penalty={"start_index": 5}), LENGTH),
    (stopping(stop_sequences=["a"] * 7), STOPS),
    (stopping(stop_sequences=["a", ""]), STOPS),
    (stopping(stop_sequences=["x" * 241]), STOPS),
    (stopping(stop_sequences=["é" * 121]), STOPS),  # 121 characters, 242 bytes
    (stopping(stop_sequences=["x" * 239 + "é"]), STOPS),  # 240 characters, 241 bytes
    (response(token_logprobs=True), DETAILS),
    (response(token_ranks=True), DETAILS),
    (response(top_n_tokens=1), DETAILS),
    (response(input_text=True, token_logprobs=True), DETAILS),
    (response(generated_tokens=True, top_n_tokens=11), "top_n_tokens (11) must be <= 10"),
    (
        response(input_tokens=True, top_n_tokens=UINT32_MAX),
        "top_n_tokens (4294967295) must be <= 10",
    ),
]

ACCEPTED = [
    sample(temperature=0.05),
    sample(temperature=above(0.05)),
    sample(temperature=3.4028234663852886e38),
    sample(top_p=1),
    sample(top_p=below(1)),
    sample(top_p=1e-9),
    sample(top_p=1e-45),
    sample(typical_p=1),
    sample(typical_p=-3.4e38),
    sample(top_k=2**31 - 1),
    sample(top_k=1),
    sample(seed=0),
    sample(seed=2**64 - 1),
    stopping(max_new_tokens=169, min_new_tokens=169),
    stopping(min_new_tokens=20),
    stopping(max_new_tokens=1, min_new_tokens=1),
    stopping(time_limit_millis=UINT32_MAX),
    decoding(repetition_penalty=1e-45),
    decoding(repetition_penalty=100),
    length_penalty(1),
    length_penalty(10),
    length_penalty(1.01, start=UINT32_MAX),
    stopping(stop_sequences=["a"] * 6),
    stopping(stop_sequences=["x" * 240, "é" * 120]),
    response(token_logprobs=True, token_ranks=True, input_tokens=True),
    response(top_n_tokens=10, generated_tokens=True),
    response(generated_tokens=True, input_tokens=True),
    pb.Parameters(truncate_input_tokens=UINT32_MAX),
    decoding(format=pb.DecodingParameters.TEXT),
]


def spell(value: object) -> str:
    return str(value).replace("\n", " ")[:60]


@pytest.mark.parametrize(("raw", "text"), REFUSED, ids=spell)
def test_refused(raw, text):
    assert refusal(raw) == text
    assert verdict(over_the_wire(raw), LIMITS) == text  # the slow twin agrees


@pytest.mark.parametrize("raw", ACCEPTED, ids=spell)
def test_accepted(raw):
    check_params(accept(raw), LIMITS)
    assert verdict(over_the_wire(raw), LIMITS) is None


def test_default_of_min_new_tokens_rule_follows_a_small_limit():
    small = Limits(max_new_tokens=5, max_sequence_length=200)
    assert accept(stopping(min_new_tokens=5), small).max_new_tokens == 5
    assert refusal(stopping(min_new_tokens=6), small) == MIN_NEW
    assert refusal(stopping(max_new_tokens=6), small) == "max_new_tokens must be <= 5"


# ---- guided decoding is refused, never ignored ----

GUIDED = {
    "format": {"format": pb.DecodingParameters.JSON},
    "json_schema": {"json_schema": ""},
    "regex": {"regex": "[a-z]+"},
    "choice": {"choice": {"choices": ["a", "b"]}},
    "grammar": {"grammar": "root ::= 'a'"},
}


@pytest.mark.parametrize("field", GUIDED)
def test_guided_fields_are_refused_by_name(field):
    text = f"guided decoding is not supported: decoding.{field} must not be set"
    assert refusal(decoding(**GUIDED[field])) == text


def test_unknown_response_format_is_refused():
    assert "decoding.format" in refusal(decoding(format=7))


# ---- order: of two broken rules the first is told ----

BREAKING = {  # one request for each rule, in the order of the specification
    "temperature": sample(temperature=0.01),
    "top_p": sample(top_p=2),
    "typical_p": sample(typical_p=2),
    "top_k": sample(top_k=2**31),
    "max_new_tokens": stopping(max_new_tokens=200),
    "min_new_tokens": stopping(min_new_tokens=300),
    "repetition_penalty": decoding(repetition_penalty=-1),
    "length_penalty": length_penalty(0.5),
    "number of stop_sequences": stopping(stop_sequences=["a"] * 7),
    "token details": response(token_logprobs=True),
    "size of stop_sequences": stopping(stop_sequences=[""]),
    "top_n_tokens": response(top_n_tokens=11, input_tokens=True),
    "guided": decoding(regex="a"),
}


def test_rules_are_in_the_order_of_the_specification():
    assert [rule.name for rule in RULES] == list(BREAKING)


@pytest.mark.parametrize("first", BREAKING)
def test_first_broken_rule_is_told(first):
    names = list(BREAKING)
    text = refusal(BREAKING[first])
    for later in names[names.index(first) + 1 :]:
        if {first, later} == {"token details", "top_n_tokens"}:
            continue  # the details of one are the cure of the other; see below
        for parts in ((first, later), (later, first)):
            raw = merged(*(BREAKING[name] for name in parts))
            assert refusal(raw) == text


def test_token_details_before_top_n():
    assert refusal(response(top_n_tokens=11)) == DETAILS


def test_no_message_repeats_user_text():
    raw = merged(stopping(stop_sequences=["SECRET" * 50]), decoding(grammar="SECRET"))
    assert "SECRET" not in refusal(raw)
    assert "SECRET" not in refusal(decoding(grammar="SECRET"))


# ---- greedy ----


def test_no_parameters_are_all_defaults():
    expected = Params(
        sampling=SamplingParams(),
        seed=None,
        details=NO_DETAILS,
        max_new_tokens=20,
        time_limit=None,
        stop_sequences=(),
        include_stop_sequence=True,
        input_text=False,
        truncate_input_tokens=0,
    )
    assert accept(None) == expected
    assert accept(pb.Parameters()) == expected


NONSENSE = pb.SamplingParameters(temperature=-1, top_p=7, typical_p=NAN, top_k=2**31, seed=4)


@pytest.mark.parametrize("method", [pb.GREEDY, 2, 77, -1, 2**31 - 1, -(2**31)])
def test_all_methods_but_sample_ignore_sampling(method):
    raw = pb.Parameters(method=method, sampling=NONSENSE)
    assert accept(raw) == accept(None)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_explicit_zero_temperature_is_greedy(zero):
    params = accept(sample(temperature=zero, top_k=3, top_p=0.5, typical_p=0.5, seed=9))
    assert params == accept(None)


def test_explicit_zero_temperature_does_not_hide_other_faults():
    assert refusal(sample(temperature=0.0, top_p=2)) == TOP_P


def test_temperature_zero_of_a_client_without_presence_is_unset():
    """The oldest clients declare `float temperature = 1`, and so never send 0.0."""
    file = descriptor_pb2.FileDescriptorProto(name="old.proto", package="old", syntax="proto3")
    old = file.message_type.add(name="SamplingParameters")
    old.field.add(name="temperature", number=1, type=2, label=1)
    old.field.add(name="top_k", number=2, type=13, label=1)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    old_type = message_factory.GetMessageClass(pool.FindMessageTypeByName("old.SamplingParameters"))
    for temperature, expected in ((0.0, 1.0), (0.5, 0.5)):
        wire = old_type(temperature=temperature, top_k=3).SerializeToString()
        raw = pb.Parameters(method=pb.SAMPLE, sampling=pb.SamplingParameters.FromString(wire))
        assert accept(raw).sampling == SamplingParams(do_sample=True, temperature=expected, top_k=3)


def test_greedy_keeps_penalties_and_minimum():
    raw = merged(
        decoding(repetition_penalty=2.5),
        length_penalty(1.5, start=8),
        stopping(min_new_tokens=3),
    )
    assert accept(raw).sampling == SamplingParams(
        repetition_penalty=2.5,
        length_penalty_start=8,
        length_penalty_decay=1.5,
        min_new_tokens=3,
    )


# ---- sampling ----


def test_sample_without_sampling_message():
    params = accept(pb.Parameters(method=pb.SAMPLE))
    assert params.sampling == SamplingParams(do_sample=True)
    assert params.seed is None


def test_sampling_values_arrive():
    raw = sample(temperature=0.5, top_k=7, top_p=0.25, typical_p=0.75, seed=2**64 - 1)
    params = accept(raw)
    assert params.sampling == SamplingParams(
        do_sample=True, temperature=0.5, top_k=7, top_p=0.25, typical_p=0.75, seed=2**64 - 1
    )
    assert params.seed == 2**64 - 1


def test_explicit_seed_zero_is_a_seed():
    assert accept(sample(seed=0)).seed == 0


@pytest.mark.parametrize(
    "raw",
    [
        sample(top_p=0),
        sample(top_p=1),
        sample(typical_p=0),
        sample(typical_p=-0.5),
        sample(typical_p=1),
        sample(top_k=0),
        sample(temperature=1),
        merged(sample(), decoding(repetition_penalty=1)),
        merged(sample(), decoding(repetition_penalty=0)),
        merged(sample(), length_penalty(1, start=50)),
    ],
    ids=spell,
)
def test_off_has_one_spelling(raw):
    assert accept(raw).sampling == SamplingParams(do_sample=True)


# ---- stopping, response ----


def test_default_max_new_tokens_is_20_or_the_limit():
    assert accept(None, Limits(max_new_tokens=20, max_sequence_length=99)).max_new_tokens == 20
    assert accept(None, Limits(max_new_tokens=19, max_sequence_length=99)).max_new_tokens == 19
    assert accept(stopping(max_new_tokens=1)).max_new_tokens == 1


def test_time_limit_is_in_seconds():
    assert accept(stopping(time_limit_millis=0)).time_limit is None
    assert accept(stopping(time_limit_millis=1)).time_limit == 0.001
    assert accept(stopping(time_limit_millis=2500)).time_limit == 2.5


@pytest.mark.parametrize("default", [True, False])
def test_include_stop_sequence_defaults_to_the_server_setting(default):
    limits = Limits(20, 99, default_include_stop_seqs=default)
    assert accept(None, limits).include_stop_sequence is default
    for explicit in (True, False):
        raw = stopping(include_stop_sequence=explicit)
        assert accept(raw, limits).include_stop_sequence is explicit


def test_stop_sequences_keep_order_and_repetition():
    stops = ["b", "a", "b", "né🙂"]
    assert accept(stopping(stop_sequences=stops)).stop_sequences == tuple(stops)


def test_details_arrive():
    raw = response(
        input_text=True,
        generated_tokens=True,
        input_tokens=True,
        token_logprobs=True,
        token_ranks=True,
        top_n_tokens=10,
    )
    params = accept(raw)
    assert params.details == DetailParams(
        logprobs=True, ranks=True, top_n=10, output=True, input=True
    )
    assert params.input_text


def test_truncation_arrives():
    assert accept(pb.Parameters(truncate_input_tokens=7)).truncate_input_tokens == 7


# ---- length ----


def with_lengths(max_new_tokens: int, min_new_tokens: int = 0) -> Params:
    return accept(stopping(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens))


@pytest.mark.parametrize(
    ("num_input", "prefix", "max_new", "expected"),
    [
        (186, 0, 100, Length(14, token_limited=True)),
        (100, 0, 100, Length(100, token_limited=False)),  # equality is not limited
        (101, 0, 100, Length(99, token_limited=True)),
        (94, 7, 100, Length(99, token_limited=True)),
        (199, 0, 1, Length(1, token_limited=False)),
        (199, 0, 2, Length(1, token_limited=True)),
        (192, 7, 1, Length(1, token_limited=False)),
        (1, 0, 169, Length(169, token_limited=False)),
        (0, 1, 169, Length(169, token_limited=False)),
    ],
)
def test_length_budget(num_input, prefix, max_new, expected):
    assert fit_length(num_input, prefix, with_lengths(max_new), LIMITS) == expected


def test_minimum_may_fill_the_sequence():
    length = fit_length(198, 0, with_lengths(100, min_new_tokens=2), LIMITS)
    assert length == Length(2, token_limited=True)


@pytest.mark.parametrize(
    ("num_input", "prefix", "min_new", "text"),
    [
        (200, 0, 0, "input tokens (200) plus prefix length (0) must be < 200"),
        (193, 7, 0, "input tokens (193) plus prefix length (7) must be < 200"),
        (10**7, 0, 0, "input tokens (10000000) plus prefix length (0) must be < 200"),
        # the first of the two rules is told
        (200, 0, 150, "input tokens (200) plus prefix length (0) must be < 200"),
        (
            69,
            0,
            150,
            "input tokens (69) plus prefix length (0) plus min_new_tokens (150) must be <= 200",
        ),
        (
            44,
            7,
            150,
            "input tokens (44) plus prefix length (7) plus min_new_tokens (150) must be <= 200",
        ),
    ],
)
def test_too_long(num_input, prefix, min_new, text):
    params = with_lengths(169, min_new_tokens=min_new)
    with pytest.raises(InvalidRequest) as caught:
        fit_length(num_input, prefix, params, LIMITS)
    assert str(caught.value) == text


def test_nothing_to_continue_is_refused():
    with pytest.raises(InvalidRequest, match="at least one token"):
        fit_length(0, 0, with_lengths(5), LIMITS)


@given(
    num_input=st.integers(0, 220),
    prefix=st.integers(0, 20),
    max_new=st.integers(1, 169),
    data=st.data(),
)
def test_length_either_fits_or_is_refused(num_input, prefix, max_new, data):
    min_new = data.draw(st.integers(0, max_new))
    params = with_lengths(max_new, min_new)
    used = num_input + prefix
    fits = 0 < used <= LIMITS.max_sequence_length - max(1, min_new)
    if fits:
        length = fit_length(num_input, prefix, params, LIMITS)
        check_length(length, num_input + prefix, params, LIMITS)
    else:
        with pytest.raises(InvalidRequest):
            fit_length(num_input, prefix, params, LIMITS)


# ---- any parameters whatever ----

uint32s = st.sampled_from([0, 1, 10, 11, 20, 21, 169, 170, 2**31, UINT32_MAX]) | st.integers(
    0, UINT32_MAX
)
floats = st.sampled_from([0.0, 0.05, 1.0, 10.0, NAN, INF, -INF]) | st.floats(width=32)


@st.composite
def parameters(draw) -> pb.Parameters:
    def optional(strategy):
        return draw(st.none() | strategy)

    guided = optional(st.sampled_from(sorted(GUIDED)))
    decay = optional(floats)
    return pb.Parameters(
        method=draw(st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1])),
        sampling=pb.SamplingParameters(
            temperature=optional(floats),
            top_k=draw(uint32s),
            top_p=draw(floats),
            typical_p=draw(floats),
            seed=optional(st.integers(0, 2**64 - 1)),
        ),
        stopping=pb.StoppingCriteria(
            max_new_tokens=draw(uint32s),
            min_new_tokens=draw(uint32s),
            time_limit_millis=draw(uint32s),
            stop_sequences=draw(
                st.lists(
                    st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
                    | st.sampled_from(["x" * 240, "x" * 241]),
                    max_size=8,
                )
            ),
            include_stop_sequence=optional(st.booleans()),
        ),
        response=pb.ResponseOptions(
            input_tokens=draw(st.booleans()),
            generated_tokens=draw(st.booleans()),
            token_logprobs=draw(st.booleans()),
            top_n_tokens=draw(uint32s),
        ),
        decoding=pb.DecodingParameters(
            repetition_penalty=draw(floats),
            length_penalty=None if decay is None else {"decay_factor": decay},
            **(GUIDED[guided] if guided else {}),
        ),
    )


@given(raw=parameters())
def test_any_parameters_are_valid_or_refused_as_the_oracle_says(raw):
    expected = verdict(raw, LIMITS)
    if expected is None:
        params = validate(raw, LIMITS)
        check_params(params, LIMITS)
        assert msgspec.convert(msgspec.to_builtins(params), Params) == params
    else:
        assert refusal(raw) == expected


def test_params_are_frozen():
    with pytest.raises(AttributeError):
        accept(None).max_new_tokens = 5
