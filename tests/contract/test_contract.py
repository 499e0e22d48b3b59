"""Every case against a real server: all at once, one by one, and inside batches.

What a request gets must not depend on its neighbours, so all three see the same answers.
"""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.contract import golden
from tests.contract.cases import DEMO, CaseFile, Json, case_files, flags, weights_of
from tests.contract.compare import (
    difference,
    error_difference,
    outcome_difference,
    single_request,
    stream_difference,
)
from tests.contract.oracle import Limits
from tests.contract.oracle.text import Text
from tests.kit.client import AsyncClient, Status, connect
from tests.kit.server import Server, run_server

FILES = {file.name: file for file in case_files()}
ORDER_SEED = 20240611
AT_ONCE = 80  # RPCs under way at the same time
# Neighbours inside a batch: short, so that whatever the case asks for fits them too.
NEIGHBOURS = ("The", "Lily and Tom went to the", "")
SEPARATORS = {"tiny-t5": "\n\n"}  # between input and output, by model

Outcome = tuple[str, str | None]  # name, and what is wrong


@dataclass(frozen=True)
class Served:
    """A case file and the server that runs with its model and settings."""

    file: CaseFile
    server: Server


@pytest.fixture(scope="module", params=FILES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = FILES[request.param]
    model = file.model(tmp_path_factory.mktemp(file.name))
    if model is None:
        pytest.skip(f"the model {file.content['model']} is not here")
    if weights_of(model) != file.content["made_by"]["weights"]:
        pytest.fail(f"other weights: python -m tests.contract.generate {file.name}")
    if model == DEMO and file.limits == Limits():
        yield Served(file, request.getfixturevalue("demo_server"))
    else:
        with run_server(model, *flags(file.limits)) as server:
            yield Served(file, server)


def report(problems: list[Outcome]) -> None:
    """Fail with one line for each (name, problem) that is one."""
    lines = [f"{name}: {problem}" for name, problem in problems if problem is not None]
    assert not lines, f"{len(lines)} of {len(problems)} wrong\n" + "\n".join(lines)


def method_of(case: Json) -> str:
    return str(case.get("method", "Generate"))


def stream_request(case: Json) -> Json | None:
    """The case as a stream, if it is one or has exactly one input."""
    if method_of(case) == "GenerateStream":
        request: Json = case["request"]
        return request
    if method_of(case) == "Generate" and len(case["request"].get("requests", [])) == 1:
        return single_request(case["request"])
    return None


def judge_stream(
    file: CaseFile, case: Json, outcome: tuple[list[Json], Status | None]
) -> str | None:
    messages, status = outcome
    if "error" in case:
        return error_difference(status, case["error"]) or (
            f"{len(messages)} messages before the error" if messages else None
        )
    if status is not None:
        return f"{status} after {len(messages)} messages"
    request = stream_request(case)
    assert request is not None
    unary = case["response"]["responses"][0]
    return stream_difference(messages, request, unary, SEPARATORS.get(file.content["model"], ""))


async def run_shuffled(runs: list[Coroutine[Any, Any, Outcome]]) -> None:
    """Run all, many at the same time, in an order that has nothing to do with the file's."""
    random.Random(ORDER_SEED).shuffle(runs)
    gate = asyncio.Semaphore(AT_ONCE)

    async def run(job: Coroutine[Any, Any, Outcome]) -> Outcome:
        async with gate:
            return await job

    report(await asyncio.gather(*map(run, runs)))


async def run_unary(client: AsyncClient, case: Json) -> Outcome:
    found = await client.call(method_of(case), case["request"])
    return f"{case['name']} (unary)", outcome_difference(found, case)


async def run_stream(client: AsyncClient, file: CaseFile, case: Json, request: Json) -> Outcome:
    outcome = await client.stream(request)
    return f"{case['name']} (stream)", judge_stream(file, case, outcome)


async def run_all_at_once(served: Served) -> None:
    async with connect(served.server.grpc) as client:
        runs = []
        for case in served.file.cases:
            if method_of(case) != "GenerateStream":
                runs.append(run_unary(client, case))
            if (request := stream_request(case)) is not None:
                runs.append(run_stream(client, served.file, case, request))
        await run_shuffled(runs)


async def test_all_at_once_and_shuffled(served: Served) -> None:
    await run_all_at_once(served)
    status, body = served.server.get("/metrics")
    assert status == 200
    assert "tgi_request_count" in body


async def test_one_after_the_other(served: Served) -> None:
    problems = []
    async with connect(served.server.grpc) as client:
        for case in served.file.cases:
            if method_of(case) != "GenerateStream":
                problems.append(await run_unary(client, case))
            if (request := stream_request(case)) is not None:
                problems.append(await run_stream(client, served.file, case, request))
    report(problems)


def in_batch(case: Json) -> Json | None:
    """The case's only input at both ends of a batch, if it has one and is answered."""
    inputs = case["request"].get("requests", [])
    if method_of(case) != "Generate" or len(inputs) != 1 or "response" not in case:
        return None
    neighbours = [{"text": text} for text in NEIGHBOURS]
    return case["request"] | {"requests": [*inputs, *neighbours, *inputs]}


async def run_in_batch(client: AsyncClient, case: Json, request: Json) -> Outcome:
    found = await client.call("Generate", request)
    if isinstance(found, Status):
        return case["name"], str(found)
    both = [found["responses"][0], found["responses"][-1]]
    return case["name"], difference(both, case["response"]["responses"] * 2)


async def test_inside_batches(served: Served) -> None:
    requests = [(case, in_batch(case)) for case in served.file.cases]
    async with connect(served.server.grpc) as client:
        await run_shuffled(
            [run_in_batch(client, case, request) for case, request in requests if request]
        )


async def test_random_seeds(served: Served) -> None:
    """Without a seed every input gets its own: the one that the answer was made with."""
    inputs = [{"text": "Once upon a time"}] * 5
    num_tokens = min(24, served.file.limits.effective_new_tokens)

    def request(count: int, **seed: str) -> Json:
        sampling = {"temperature": 5.0, **seed}
        stopping = {"maxNewTokens": num_tokens, "minNewTokens": num_tokens}
        params = {"method": "SAMPLE", "sampling": sampling, "stopping": stopping}
        return {"requests": inputs[:count], "params": params}

    async with connect(served.server.grpc) as client:
        found = await client.call("Generate", request(5))
        assert not isinstance(found, Status), found
        responses = found["responses"]
        seeds = [response["seed"] for response in responses]
        assert len(set(seeds)) == len({response["text"] for response in responses}) == 5
        assert all(0 <= int(seed) < 2**32 for seed in seeds)
        for seed, response in zip(seeds, responses, strict=True):
            again = await client.call("Generate", request(1, seed=seed))
            assert again == {"responses": [response]}


async def run_recorded(client: AsyncClient, text: Text, row: golden.Row) -> Outcome:
    found = await client.call("Generate", golden.request_of(row))
    assert not isinstance(found, Status), found
    (response,) = found["responses"]
    tokens = [text.token(token["id"]) for token in row["tokens"]]
    assert [token.get("text", "") for token in response["tokens"]] == tokens
    inputs = [text.token(token_id) for token_id, _, _ in row["input"]]
    assert [token["text"] for token in response["inputTokens"]] == inputs
    if not golden.is_on_edge(row):
        check_recorded_details(text, response, row)
    return row["text"], None


def check_recorded_details(text: Text, response: Json, row: golden.Row) -> None:
    for found, token in zip(response["tokens"], row["tokens"], strict=True):
        assert found.get("logprob", 0) == approx(token["logprob"])
        golden.check_rank(found["rank"], token["rank"])
        if golden.candidates_bind(row):
            golden.check_top(
                [(top.get("text", ""), top.get("logprob", 0)) for top in found["topTokens"]],
                [(text.token(token_id), logprob) for token_id, logprob in token["top"]],
            )
    for found, (_, logprob, rank) in zip(response["inputTokens"], row["input"], strict=True):
        expected = "NaN" if logprob is None else approx(logprob)
        assert found.get("logprob", 0) == expected
        assert found.get("rank", 0) == rank


def approx(logprob: float) -> Any:
    return pytest.approx(logprob, abs=golden.LOGPROB_TOLERANCE)


async def test_answers_recorded_from_tgis(served: Served, shared_dir: Path) -> None:
    rows = golden.recorded_rows(shared_dir, served.file.name)
    if not rows:
        pytest.skip("nothing was recorded with this model and these settings")
    directory = served.file.original
    assert directory is not None
    text = Text(directory, causal=True, show_special=False)  # for the names of tokens only
    async with connect(served.server.grpc) as client:
        await run_shuffled([run_recorded(client, text, row) for row in rows])


def test_the_suite_is_complete() -> None:
    """Enough cases, none without an expectation, every way to end and to fail among them."""
    cases = [case for file in FILES.values() for case in file.cases]
    assert len(cases) >= 150
    assert all(("response" in case) != ("error" in case) for case in cases)
    for file in FILES.values():
        names = [case["name"] for case in file.cases]
        assert len(set(names)) == len(names)
    reasons = {
        response["stopReason"]
        for case in cases
        for response in case.get("response", {}).get("responses", [])
        if method_of(case).startswith("Generate")
    }
    assert reasons == {"MAX_TOKENS", "EOS_TOKEN", "STOP_SEQUENCE", "TOKEN_LIMIT"}
    messages = {case["error"]["message"] for case in cases if "error" in case}
    assert len(messages) >= 20
