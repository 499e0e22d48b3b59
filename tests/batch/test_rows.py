"""Lines to requests, answers to lines."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgis.batch.rows import Malformed, answer, encode, failure, parse_line, parse_params
from tgis.proto import generation_pb2 as pb

COMMON = parse_params(
    {"method": "SAMPLE", "stopping": {"max_new_tokens": 9, "stop_sequences": ["a"]}}
)


def parse(row: Any) -> pb.BatchedGenerationRequest:
    return parse_line(json.dumps(row).encode(), COMMON).request


def test_a_row_is_a_request_with_the_common_parameters() -> None:
    request = parse({"text": "Grüße"})
    assert [item.text for item in request.requests] == ["Grüße"]
    assert request.params == COMMON


def test_what_a_row_says_comes_before_what_is_common() -> None:
    own = {"method": "GREEDY", "stopping": {"stopSequences": ["b"]}}
    params = parse({"text": "x", "params": own}).params
    assert params.method == pb.GREEDY
    assert list(params.stopping.stop_sequences) == ["b"]
    assert params.stopping.max_new_tokens == 9
    assert list(COMMON.stopping.stop_sequences) == ["a"]


@pytest.mark.parametrize("value", [7, "seven", {"a": [1]}, [None], False, 0])
def test_the_id_comes_back_as_it_is(value: Any) -> None:
    prompt = parse_line(json.dumps({"id": value, "text": "x"}).encode(), COMMON)
    response = pb.GenerationResponse(text="y", stop_reason=pb.EOS_TOKEN, input_token_count=2)
    row = json.loads(encode(answer(3, prompt, response)))
    expected = {"line": 3, "id": value, "text": "y", "stop_reason": "EOS_TOKEN"}
    assert row == expected | {"input_token_count": 2}
    assert json.loads(encode(failure(3, prompt, "UNKNOWN", "m"))) == {
        "line": 3,
        "id": value,
        "error": {"code": "UNKNOWN", "message": "m"},
    }


def test_an_answer_without_text_has_an_empty_one() -> None:
    prompt = parse_line(b'{"text": "x"}', COMMON)
    row = answer(1, prompt, pb.GenerationResponse(stop_reason=pb.MAX_TOKENS))
    assert row == {"line": 1, "text": "", "stop_reason": "MAX_TOKENS"}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{", "not JSON: "),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'"text"', "not a JSON object"),
        (b"{}", '"text": missing or not a string'),
        (b'{"text": 7}', '"text": missing or not a string'),
        (b'{"text": "\\ud800"}', '"text": cannot be encoded as UTF-8'),
        (b'{"text": "x", "prompt": "x"}', "unknown field 'prompt'; expected id, params, text"),
        (b'{"text": "x", "params": 7}', '"params": not an object'),
        (b'{"text": "x", "params": {"topk": 7}}', "topk"),
        (b'{"text": "x", "params": {"sampling": {"topK": -1}}}', "params: "),
        (b'{"text": "x", "params": {"method": "BEAM"}}', "params: "),
    ],
)
def test_malformed_lines_say_why(line: bytes, part: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_line(line, COMMON)
    assert part in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_line_is_a_row_or_malformed(line: bytes) -> None:
    try:
        prompt = parse_line(line, COMMON)
    except Malformed:
        return
    assert len(prompt.request.requests) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["method", "stopping", "sampling", "x"]), JSON))
def test_any_parameters_are_parameters_or_malformed(params: dict[str, Any]) -> None:
    line = json.dumps({"text": "x", "params": params}).encode()
    with contextlib.suppress(Malformed):
        parse_line(line, COMMON)
