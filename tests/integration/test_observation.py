"""Metrics and log lines of a real server, compared with what was sent and what came back."""

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from tests.kit.client import REQUESTS
from tests.kit.processes import children, wait_until
from tests.kit.server import Server, run_server

from tgis.observe.table import TABLE
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc as pb_grpc

MAX_CONCURRENT = 8
MAX_BATCH = 4
MAX_NEW_TOKENS = 900
FLAGS = (
    *("--max-concurrent-requests", str(MAX_CONCURRENT), "--max-batch-size", str(MAX_BATCH)),
    *("--max-new-tokens", str(MAX_NEW_TOKENS), "--max-sequence-length", "1000"),
    *("--no-prefix-caching", "--metrics-compat", "--log-format", "json"),
)
SECRET = "Zanzibar"  # in inputs, never in errors or metrics
PROMPTS = ("Once upon a time", "The little dog", "\x1b[31mA red\nball in 日本 " + "x" * 60)

Samples = dict[str, float]


@dataclass
class Sent:
    """What was asked of the server, and what it answered."""

    before: Samples = field(default_factory=dict)
    after: Samples = field(default_factory=dict)
    finished: list[tuple[str, pb.GenerationResponse]] = field(default_factory=list)
    max_new_tokens: list[int] = field(default_factory=list)
    raw_lengths: list[int] = field(default_factory=list)
    tokenized: list[int] = field(default_factory=list)
    trailers: list[dict[str, str]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)

    def grown(self, name: str) -> float:
        return self.after[name] - self.before[name]

    def of(self, *stop_reasons: str) -> int:
        return sum(
            pb.StopReason.Name(item.stop_reason) in stop_reasons for _, item in self.finished
        )


def samples(server: Server) -> Samples:
    """Every sample by its name and labels, as in `name{a="b"}`."""
    lines = [x for x in server.get("/metrics")[1].splitlines() if not x.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def params(tokens: int, **more: Any) -> dict[str, Any]:
    return {"stopping": {"maxNewTokens": tokens, "minNewTokens": tokens} | more}


class Traffic:
    """Sends requests of each kind and notes what comes back."""

    def __init__(self, server: Server, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.stub = pb_grpc.GenerationServiceStub(channel)
        self.sent = Sent()

    async def run(self) -> Sent:
        self.sent.before = samples(self.server)
        await self.generate(params(5), PROMPTS[0])
        await self.generate(params(7), *PROMPTS)
        await self.generate({"stopping": {"maxNewTokens": 3}}, PROMPTS[1], correlation="corr-1")
        await self.stub.Generate(pb.BatchedGenerationRequest())
        await self.stream(params(9), PROMPTS[0], correlation="corr-2")
        await self.stream({"stopping": {"maxNewTokens": 60, "stopSequences": [" "]}}, PROMPTS[0])
        await self.fill_the_sequence()
        await self.tokenize(*PROMPTS)
        await self.tokenize()
        await self.refused()
        await self.cancelled()
        await self.timed_out()
        await self.cores_death()
        self.sent.after = samples(self.server)
        return self.sent

    def request(self, method: str, content: dict[str, Any]) -> Any:
        return ParseDict(content, REQUESTS[method]())

    async def generate(
        self, parameters: dict[str, Any], *texts: str, correlation: str = ""
    ) -> pb.BatchedGenerationResponse:
        content = {"requests": [{"text": text} for text in texts], "params": parameters}
        metadata = [("x-correlation-id", correlation)] if correlation else []
        call = self.stub.Generate(self.request("Generate", content), metadata=metadata)
        response = await call
        self.sent.trailers.append(dict(await call.trailing_metadata()))
        for item in response.responses:
            self.sent.finished.append(("single" if len(texts) == 1 else "batch", item))
            self.sent.max_new_tokens.append(parameters["stopping"]["maxNewTokens"])
            self.sent.raw_lengths.append(item.input_token_count)
        return response

    async def stream(
        self, parameters: dict[str, Any], text: str, correlation: str = "", truncate: int = 0
    ) -> pb.GenerationResponse:
        content = {"request": {"text": text}, "params": parameters}
        metadata = [("x-correlation-id", correlation)] if correlation else []
        call = self.stub.GenerateStream(self.request("GenerateStream", content), metadata=metadata)
        messages = [message async for message in call]
        self.sent.trailers.append(dict(await call.trailing_metadata()))
        last = messages[-1]
        last.input_token_count = messages[0].input_token_count
        last.text = "".join(message.text for message in messages)
        self.sent.finished.append(("stream", last))
        self.sent.max_new_tokens.append(parameters["stopping"]["maxNewTokens"])
        self.sent.raw_lengths.append(last.input_token_count)
        return last

    async def fill_the_sequence(self) -> None:
        """Ask for more than the sequence has room for."""
        text = "The dog ran. " * 400
        parameters = {"stopping": {"maxNewTokens": 800, "minNewTokens": 10}}
        call = self.generate({**parameters, "truncateInputTokens": 990}, text)
        (item,) = (await call).responses
        assert (item.input_token_count, item.generated_token_count) == (990, 10)
        await self.tokenize(text)
        self.sent.raw_lengths[-1] = self.sent.tokenized[-1]

    async def tokenize(self, *texts: str) -> None:
        request = pb.BatchedTokenizeRequest(requests=[pb.TokenizeRequest(text=t) for t in texts])
        answer = await self.stub.Tokenize(request)
        self.sent.tokenized.append(sum(item.token_count for item in answer.responses))

    async def fails(self, call: Any, code: str) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call if not hasattr(call, "__aiter__") else call.read())
        assert caught.value.code().name == code
        details = caught.value.details() or ""
        assert SECRET not in details
        return details

    async def refused(self) -> None:
        """Four requests with invalid parameters, one without an input, two that are too many."""
        text = {"text": SECRET}
        wrong = {"sampling": {"topP": 2.0}, "method": "SAMPLE"}
        for bad in (wrong, params(MAX_NEW_TOKENS + 1)):
            single = self.request("GenerateStream", {"request": text, "params": bad})
            await self.fails(self.stub.GenerateStream(single), "INVALID_ARGUMENT")
            batch = self.request("Generate", {"requests": [text, text], "params": bad})
            await self.fails(self.stub.Generate(batch), "INVALID_ARGUMENT")
        empty = pb.SingleGenerationRequest()
        await self.fails(self.stub.GenerateStream(empty), "INVALID_ARGUMENT")
        many = self.request("Generate", {"requests": [text] * (MAX_CONCURRENT + 1)})
        for _ in range(2):
            await self.fails(self.stub.Generate(many), "RESOURCE_EXHAUSTED")

    async def begin(self, text: str = PROMPTS[0]) -> Any:
        """A long stream, of which the first token has come."""
        content = {"request": {"text": text}, "params": params(MAX_NEW_TOKENS)}
        call = self.stub.GenerateStream(self.request("GenerateStream", content))
        messages = [await call.read()]
        while not messages[-1].generated_token_count:
            messages.append(await call.read())
        self.sent.raw_lengths.append(messages[0].input_token_count)
        self.sent.max_new_tokens.append(MAX_NEW_TOKENS)
        return call

    async def settled(self, name: str, value: float) -> None:
        await asyncio.to_thread(wait_until, lambda: samples(self.server)[name] == value)

    async def cancelled(self) -> None:
        """Three streams and a batch of two, all left by their clients."""
        name = 'tgi_request_failure_total{err="cancelled"}'
        start = self.sent.before[name]
        for _ in range(3):
            (await self.begin()).cancel()
        content = {"requests": [{"text": "a"}, {"text": "b"}], "params": params(MAX_NEW_TOKENS)}
        validated = "tgi_request_max_new_tokens_count"
        number = samples(self.server)[validated]
        batch = self.stub.Generate(self.request("Generate", content))
        waiting = asyncio.ensure_future(batch)
        await self.settled(validated, number + 2)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await self.settled(name, start + 5)
        for text in ("a", "b"):
            await self.tokenize(text)
            self.sent.raw_lengths.append(self.sent.tokenized[-1])
            self.sent.max_new_tokens.append(MAX_NEW_TOKENS)

    async def timed_out(self) -> None:
        """A request whose time is over before there is room for it in the batch."""
        holding = [await self.begin() for _ in range(MAX_BATCH)]
        response = await self.generate(params(5, timeLimitMillis=1), PROMPTS[0])
        assert response.responses[0].generated_token_count == 0
        name = 'tgi_request_failure_total{err="cancelled"}'
        number = samples(self.server)[name]
        for call in holding:
            call.cancel()
        await self.settled(name, number + MAX_BATCH)

    async def rest_of(self, call: Any) -> None:
        while await call.read() is not grpc.aio.EOF:
            pass

    async def cores_death(self) -> None:
        """A stream that loses its core, and requests while there is none."""
        call = await self.begin()
        os.kill(children(self.server.process.pid)["tgis.core"], signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError):
            await self.rest_of(call)
        content = {"requests": [{"text": "a"}], "params": params(5)}
        await self.fails(self.stub.Generate(self.request("Generate", content)), "UNAVAILABLE")
        single = {"request": {"text": "a"}, "params": params(5)}
        stream = self.stub.GenerateStream(self.request("GenerateStream", single))
        await self.fails(stream, "UNAVAILABLE")
        self.sent.max_new_tokens += [5, 5]
        self.sent.raw_lengths += [self.sent.tokenized[-1]] * 2  # "a" is as long as "b"
        await asyncio.to_thread(self.server.wait_ready)


@pytest.fixture(scope="module")
def sent(demo_model_dir: Path) -> Iterator[Sent]:
    with run_server(demo_model_dir, *FLAGS) as server:

        async def traffic() -> Sent:
            async with grpc.aio.insecure_channel(server.grpc) as channel:
                return await Traffic(server, channel).run()

        sent = asyncio.run(traffic())
        sent.log = [json.loads(line) for line in server.log().splitlines()]
        yield sent


COUNTS = {
    'tgi_request_count{kind="single"}': 5,
    'tgi_request_count{kind="batch"}': 1 + 1 + 2 + 2 + 1,
    'tgi_request_count{kind="stream"}': 2 + 2 + 1 + 3 + MAX_BATCH + 2,
    "tgi_request_input_count": 5 + (3 + 2 * 2 + 2 * 9 + 2) + 14,
    'tgi_request_failure{err="validation"}': 4,
    'tgi_request_failure{err="conc_limit"}': 2,
    'tgi_request_failure{err="cancelled"}': 5 + MAX_BATCH,
    'tgi_request_failure{err="timeout"}': 1,
    'tgi_request_failure{err="generate"}': 2,
    'tgi_request_failure{err="unknown"}': 1,
    'tgi_request_failure{err="queue_full"}': 0,
    "tgi_tokenize_request_count": 5,
    "tgi_tokenize_request_input_count": 6,
    "tgi_core_lost_count": 1,
    "tgi_prompt_load_failure": 0,
    'tgi_auth_failure{reason="no_key"}': 0,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counters(sent: Sent, name: str) -> None:
    assert sent.grown(total(name)) == COUNTS[name]


def total(name: str) -> str:
    base, brace, labels = name.partition("{")
    return base + "_total" + brace + labels


def test_both_names_of_each_counter_agree(sent: Sent) -> None:
    counters = {spec.name for spec in TABLE if spec.kind == "counter"}
    plain = [name for name in sent.after if name.partition("{")[0] in counters]
    assert len(plain) >= len(counters)
    for name in plain:
        assert sent.after[name] == sent.after[total(name)], name


def test_success_by_stop_reason_and_kind(sent: Sent) -> None:
    expected: dict[str, int] = {}
    for kind, item in sent.finished:
        reason = pb.StopReason.Name(item.stop_reason)
        name = f'tgi_request_success_total{{stop_reason="{reason}",kind="{kind}"}}'
        expected[name] = expected.get(name, 0) + 1
    found = {
        name: sent.grown(name)
        for name in sent.after
        if name.startswith("tgi_request_success_total{") and sent.grown(name)
    }
    assert found == expected
    for reason in ("MAX_TOKENS", "TOKEN_LIMIT", "STOP_SEQUENCE"):
        assert sent.of(reason), reason
    assert sent.of("TIME_LIMIT") == 1


def test_sizes(sent: Sent) -> None:
    done = [item for _, item in sent.finished]
    generated = sum(item.generated_token_count for item in done)
    inputs = sum(item.input_token_count for item in done)
    assert sent.grown("tgi_request_generated_tokens_sum") == generated
    assert sent.grown("tgi_request_total_tokens_sum") == generated + inputs
    assert sent.grown("tgi_request_max_new_tokens_count") == len(sent.max_new_tokens)
    assert sent.grown("tgi_request_max_new_tokens_sum") == sum(sent.max_new_tokens)
    assert sent.grown("tgi_request_raw_input_length_sum") == sum(sent.raw_lengths)
    assert sent.grown("tgi_tokenize_request_tokens_sum") == sum(sent.tokenized)


def test_how_often_each_was_observed(sent: Sent) -> None:
    done = len(sent.finished)
    for name in (
        "tgi_request_duration",
        "tgi_request_generated_tokens",
        "tgi_request_total_tokens",
        "tgi_request_inference_duration",
        "tgi_request_mean_time_per_token_duration",
    ):
        assert sent.grown(f"{name}_count") == done, name
    valid = len(sent.max_new_tokens)
    for name in ("tgi_request_input_length", "tgi_request_raw_input_length"):
        assert sent.grown(f"{name}_count") == valid, name
    rpcs = 5 + 1 + 2 + 3 + 1 + MAX_BATCH + 1 + 1  # that got through validation
    assert sent.grown("tgi_request_validation_duration_count") == rpcs
    assert sent.grown("tgi_tokenize_request_duration_count") == 5
    assert sent.grown("tgi_tokenize_request_tokens_count") == 5
    # Those that timed out in the queue or found no core have not been in a batch.
    batched = sent.grown("tgi_request_queue_duration_count")
    assert valid - 5 <= batched <= valid - 3  # two were cancelled wherever they were
    assert sent.grown("tgi_request_time_to_first_token_duration_count") <= batched


def test_tokens_one_by_one(sent: Sent) -> None:
    tokens = sent.grown("tgi_request_time_to_first_token_duration_count") + sent.grown(
        "tgi_request_inter_token_duration_count"
    )
    finished = sum(item.generated_token_count for _, item in sent.finished)
    assert tokens > finished  # some belong to what was cancelled
    name = f'vllm:generation_tokens_total{{model_name="{model_name(sent)}"}}'
    assert sent.grown(name) == tokens


def test_times_are_of_one_request(sent: Sent) -> None:
    whole = sent.grown("tgi_request_duration_sum")
    assert 0 < sent.grown("tgi_request_inference_duration_sum") < whole
    assert sent.grown("tgi_request_validation_duration_sum") > 0
    assert sent.grown("tgi_request_queue_duration_sum") > 0


def test_steps(sent: Sent) -> None:
    for method in ("prefill", "next_token"):
        labels = f'{{method="{method}"}}'
        begun = sent.grown(f"tgi_batch_inference_count_total{labels}")
        assert begun > 0
        assert sent.grown(f"tgi_batch_inference_success_total{labels}") == begun
        assert sent.grown(f"tgi_batch_inference_batch_size_count{labels}") == begun
        for part in ("", "forward_", "tokproc_"):
            name = f"tgi_batch_inference_{part}duration_count"
            assert sent.grown(f'{name}{{method="{method}",makeup="single_only"}}') == begun, name
    failures = [name for name in sent.after if name.startswith("tgi_batch_inference_failure")]
    assert len(failures) == 2 * 6
    assert not any(sent.grown(name) for name in failures)


def test_gauges_of_an_idle_server(sent: Sent) -> None:
    for name in ("tgi_queue_size", "tgi_kv_cache_usage", "tgi_tls_certificate_expiry_seconds"):
        assert sent.after[name] == 0, name
    assert sent.after['tgi_health_state{state="ready"}'] == 1
    assert sum(sent.after[n] for n in sent.after if n.startswith("tgi_health_state")) == 1


def model_name(sent: Sent) -> str:
    (name,) = {
        x.partition('"')[2].rpartition('"')[0]
        for x in sent.after
        if x.startswith("vllm:num_requests_waiting")
    }
    return name


def test_user_text_is_not_in_metrics(sent: Sent) -> None:
    assert not any(SECRET in name for name in sent.after)


# ---- the log of the same traffic ----


def lines(sent: Sent, start: str) -> list[dict[str, Any]]:
    return [line for line in sent.log if line["message"].startswith(start)]


def test_completion_lines(sent: Sent) -> None:
    reasons = {"MAX_TOKENS": "MaxTokens", "TOKEN_LIMIT": "TokenLimit"}
    reasons |= {"STOP_SEQUENCE": "StopSequence", "TIME_LIMIT": "TimeLimit", "EOS_TOKEN": "EosToken"}
    kinds = {"single": "Request", "stream": "Streaming response"}
    found = [line["message"] for line in sent.log if " tokens before " in line["message"]]
    for kind, item in sent.finished:
        reason = reasons[pb.StopReason.Name(item.stop_reason)]
        start = f"{kinds.get(kind, 'Sub-request ')}"
        rest = f"generated {item.generated_token_count} tokens before {reason},"
        rest += f" output {len(item.text.encode())} bytes:"
        assert any(text.startswith(start) and rest in text for text in found), rest
    assert sum(text.startswith("Sub-request 2 from batch of 3 ") for text in found) == 1
    assert sum("before Cancelled" in text for text in found) == 5 + MAX_BATCH


def test_levels_of_completion_lines(sent: Sent) -> None:
    for line in sent.log:
        if " tokens before " in line["message"]:
            quiet = not any(word in line["message"] for word in ("TokenLimit", "Cancelled"))
            assert line["level"] == ("INFO" if quiet else "WARN")


def test_fields_of_completion_lines(sent: Sent) -> None:
    (line,) = (x for x in sent.log if x.get("span", {}).get("correlation_id") == "corr-2")
    span = line["span"]
    assert span["name"] == "generate_stream"
    assert span["input"] == [PROMPTS[0]]
    assert span["input_bytes"] == [len(PROMPTS[0])]
    assert span["params"] == "stopping { max_new_tokens: 9 min_new_tokens: 9 }"
    for name in ("validation_time", "queue_time", "inference_time", "time_per_token", "total_time"):
        assert float(span[name].removesuffix("ms")) > 0
    assert span["input_toks"] > 0
    assert span["request_id"] > 0


def test_correlation_ids_come_back(sent: Sent) -> None:
    found = [item["x-correlation-id"] for item in sent.trailers if "x-correlation-id" in item]
    assert found == ["corr-1", "corr-2"]


def test_user_text_is_cut(sent: Sent) -> None:
    assert not any("x" * 40 in json.dumps(line) for line in sent.log)
    (line,) = lines(sent, "Sub-request 2 from batch of 3")
    shown = line["span"]["input"][2]
    assert shown.startswith("\x1b[31mA red\nball in 日本 x")
    assert shown.endswith("x...")


def test_failures_are_one_line_each_and_no_traceback(sent: Sent) -> None:
    errors = [line for line in sent.log if line["target"] == "tgis.front.requests"]
    errors = [line for line in errors if line["level"] == "ERROR"]
    assert len(errors) == 4 + 1 + 2 + 3
    assert sum(line["message"] == "Model is overloaded" for line in errors) == 2
    assert (
        sum(line["message"].startswith("Streaming response failed after") for line in errors) == 1
    )
    assert not any("exception" in line for line in sent.log)
    assert not any(SECRET in line["message"] for line in sent.log)
