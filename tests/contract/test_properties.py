"""Random requests: a stream adds up to the unary response, a batch changes nothing, the oracle
agrees.
"""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tests.contract.cases import Json
from tests.contract.compare import difference, single_request, stream_difference
from tests.contract.generate import NARROWEST
from tests.contract.oracle import Oracle
from tests.contract.oracle.logits import Margins
from tests.contract.strategies import params, texts
from tests.kit.client import Client, Status

Property = Callable[..., None]


def random_requests(examples: int) -> Callable[[Property], Property]:
    """As many random examples; the same ones in every run."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def generate(client: Client, inputs: list[str], chosen: Json) -> list[Json]:
    request = {"requests": [{"text": text} for text in inputs], "params": chosen}
    found = client.call("Generate", request)
    assert not isinstance(found, Status), found
    responses: list[Json] = found["responses"]
    assert len(responses) == len(inputs)
    return responses


def check_stream_equals_unary(client: Client, text: str, chosen: Json) -> None:
    (unary,) = generate(client, [text], chosen)
    request = single_request({"requests": [{"text": text}], "params": chosen})
    messages, status = client.stream(request)
    assert status is None
    assert stream_difference(messages, request, unary) is None


def check_batch_equals_alone(client: Client, inputs: list[str], chosen: Json) -> None:
    together = generate(client, inputs, chosen)
    for text, found in zip(inputs, together, strict=True):
        assert difference(found, generate(client, [text], chosen)[0]) is None


def check_oracle_agrees(client: Client, oracle: Oracle, text: str, chosen: Json) -> None:
    request = {"requests": [{"text": text}], "params": chosen}
    oracle.margins = Margins()
    try:
        expected = oracle.generate(request)
    except ValueError:  # text that the api does not define
        assume(False)
    assume(min(oracle.margins.narrowest.values(), default=1) >= NARROWEST)
    assert difference({"responses": generate(client, [text], chosen)}, expected) is None


inputs = st.lists(texts, min_size=2, max_size=10)


@random_requests(60)
@given(text=texts, chosen=params())
def test_stream_equals_unary(demo_client: Client, text: str, chosen: Any) -> None:
    check_stream_equals_unary(demo_client, text, chosen)


@random_requests(25)
@given(inputs=inputs, chosen=params())
def test_batch_equals_alone(demo_client: Client, inputs: list[str], chosen: Any) -> None:
    check_batch_equals_alone(demo_client, inputs, chosen)


@random_requests(25)
@given(text=texts, chosen=params())
def test_oracle_agrees(demo_client: Client, demo_oracle: Oracle, text: str, chosen: Any) -> None:
    check_oracle_agrees(demo_client, demo_oracle, text, chosen)


@pytest.mark.slow
@pytest.mark.timeout(900)
@random_requests(2000)
@given(text=texts, chosen=params())
def test_many_streams_equal_unary(demo_client: Client, text: str, chosen: Any) -> None:
    check_stream_equals_unary(demo_client, text, chosen)


@pytest.mark.slow
@pytest.mark.timeout(900)
@random_requests(500)
@given(inputs=inputs, chosen=params())
def test_many_batches_equal_alone(demo_client: Client, inputs: list[str], chosen: Any) -> None:
    check_batch_equals_alone(demo_client, inputs, chosen)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@random_requests(600)
@given(text=texts, chosen=params())
def test_oracle_agrees_often(
    demo_client: Client, demo_oracle: Oracle, text: str, chosen: Any
) -> None:
    check_oracle_agrees(demo_client, demo_oracle, text, chosen)
