"""Soft prompts through real servers: what PEFT and `transformers` generate, mixed in one batch."""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tests.kit.client import Json, Status, connect_blocking
from tests.kit.server import Server, run_server
from torch import Tensor

TEXTS = ["They said that", "It was"]
TOKENS = 8
LENGTH = 128  # of a sequence
PENALTY = 1.3

EOS = 1  # of the demo model; impossible before `minNewTokens`

Next = Callable[[list[int]], Tensor]
"""Token ids of input and output -> scores of the next one."""


def greedy(following: Next, ids: list[int], penalty: float = 1.0) -> list[int]:
    """Penalties meet real tokens alone."""
    start = len(ids)
    for _ in range(TOKENS):
        scores = following(ids).clone()
        scores[EOS] = -math.inf
        seen = torch.tensor(sorted(set(ids)))
        own = scores[seen]
        scores[seen] = torch.where(own < 0, own * penalty, own / penalty)
        ids = [*ids, int(scores.argmax())]
    return ids[start:]


def train(path: Path, out: Path) -> Any:
    """A prompt that PEFT trains for a few steps and saves."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(4)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    tuned = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1)
    ids = torch.arange(3, 40)[None] * 7
    for _ in range(5):
        loss = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.save_pretrained(str(out))
    return tuned.eval()


class Decoder:
    """The demo model, its store of prompts, and what must come out."""

    def __init__(self, path: Path, root: Path) -> None:
        self.path, self.store = path, root / "store"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.model.eval()
        assert self.model.config.eos_token_id == EOS
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the libraries tell each other
            self.tuned = train(path, self.store / "peft")
        table = self.model.get_input_embeddings().weight.detach()
        ids = self.ids("Tim was sad and angry. He did not like the big")[1:]
        self.prompt = table[ids] + 0.1 * table[ids[::-1]]
        (self.store / "team" / "plain").mkdir(parents=True)
        torch.save(self.prompt, self.store / "team" / "plain" / "decoder.pt")
        (self.store / "linked").symlink_to("team/plain")
        self.next: dict[str, Next] = {
            "": lambda ids: self.scores(None, ids)[-1],
            "peft": self._tuned,
            "team/plain": lambda ids: self.scores(self.prompt, ids)[-1],
        }
        self.next["linked"] = self.next["team/plain"]

    @torch.no_grad()
    def _tuned(self, ids: list[int]) -> Tensor:
        own = torch.tensor([ids])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.tuned(input_ids=own, attention_mask=torch.ones_like(own))
        scores: Tensor = out.logits[0, -1]
        return scores

    @torch.no_grad()
    def scores(self, prompt: Tensor | None, ids: list[int]) -> Tensor:
        embeddings = self.model.get_input_embeddings()(torch.tensor(ids))
        spliced = embeddings if prompt is None else torch.cat([prompt, embeddings])
        scores: Tensor = self.model(inputs_embeds=spliced[None]).logits[0]
        return scores

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids


@pytest.fixture(scope="module")
def decoder(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder(demo_model_dir, tmp_path_factory.mktemp("prompts"))


def ask(server: Server, prefix: str, text: str, method: str = "Generate", **params: Any) -> Any:
    request = {
        "params": {
            "stopping": {"maxNewTokens": TOKENS, "minNewTokens": TOKENS},
            "response": {"generatedTokens": True},
            **params,
        },
        "requests": [{"text": text}],
    }
    if prefix:
        request["prefixId"] = prefix
    with connect_blocking(server.grpc) as client:
        return client.call(method, request)


def words(answer: Json | Status) -> list[str]:
    assert not isinstance(answer, Status), answer
    return [token["text"] for token in answer["responses"][0]["tokens"]]


ENGINES = {
    "native": (),
    "split": ("--num-shard", "2"),
    "transformers": ("--deployment-framework", "hf_transformers"),
}
SLOW = ("split", "transformers")


@pytest.fixture(
    scope="module",
    params=[
        name if name not in SLOW else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES
    ],
)
def server(request: pytest.FixtureRequest, decoder: Decoder) -> Iterator[Server]:
    flags = ("--threads", "1", "--max-sequence-length", str(LENGTH), *ENGINES[request.param])
    with run_server(decoder.path, *flags, "--prefix-store-path", str(decoder.store)) as running:
        yield running


def test_prompts_mixed_in_one_batch(server: Server, decoder: Decoder) -> None:
    """All prompts and none on the same texts, twice: cached prefixes are not mixed up either."""
    asked = [(name, text) for name in decoder.next for text in TEXTS] * 2
    expected = {
        pair: greedy(decoder.next[pair[0]], decoder.ids(pair[1])) for pair in dict.fromkeys(asked)
    }
    for text in TEXTS:
        said = {tuple(expected[name, text]) for name in decoder.next}
        assert len(said) == 3, "prompts must make a difference"
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda pair: ask(server, *pair), asked))
    for pair, answer in zip(asked, answers, strict=True):
        assert words(answer) == decoder.tokenizer.convert_ids_to_tokens(expected[pair]), pair
        assert answer["responses"][0]["inputTokenCount"] == len(decoder.ids(pair[1]))


def test_the_repetition_penalty_does_not_meet_virtual_tokens(
    server: Server, decoder: Decoder
) -> None:
    expected = greedy(decoder.next["team/plain"], decoder.ids(TEXTS[0]), PENALTY)
    answer = ask(server, "team/plain", TEXTS[0], decoding={"repetitionPenalty": PENALTY})
    assert words(answer) == decoder.tokenizer.convert_ids_to_tokens(expected)


def test_details_of_input_tokens(server: Server, decoder: Decoder) -> None:
    """Virtual tokens come first and look like pads; real ones have the scores before them."""
    options = {"inputTokens": True, "tokenLogprobs": True, "tokenRanks": True, "topNTokens": 2}
    answer = ask(server, "team/plain", TEXTS[0], response=options)
    (response,) = answer["responses"]
    ids, count = decoder.ids(TEXTS[0]), len(decoder.prompt)
    tokens = response["inputTokens"]
    assert len(tokens) == count + len(ids)
    assert len({token["text"] for token in tokens[:count]}) == 1
    assert tokens[0]["logprob"] == "NaN"
    names = decoder.tokenizer.convert_ids_to_tokens(ids)
    assert [token["text"] for token in tokens[count:]] == names
    logprobs = decoder.scores(decoder.prompt, ids).log_softmax(-1)
    for place, (token, info) in enumerate(zip(ids, tokens[count:], strict=True)):
        before = logprobs[count + place - 1]
        assert math.isclose(info["logprob"], float(before[token]), abs_tol=1e-3)
        assert info["rank"] == 1 + int((before > before[token]).sum())
        assert len(info["topTokens"]) >= 2


def test_limits_include_the_prompt(server: Server, decoder: Decoder) -> None:
    count, most = len(decoder.ids(TEXTS[0])), len(decoder.prompt)
    room = LENGTH - count - most
    answer = ask(
        server, "team/plain", TEXTS[0], stopping={"minNewTokens": room, "maxNewTokens": room}
    )
    assert answer["responses"][0]["stopReason"] == "MAX_TOKENS"
    more = {"minNewTokens": room + 1, "maxNewTokens": room + 1}
    assert ask(server, "team/plain", TEXTS[0], stopping=more) == Status(
        "INVALID_ARGUMENT",
        f"input tokens ({count}) plus prefix length ({most}) plus min_new_tokens ({room + 1})"
        f" must be <= {LENGTH}",
    )
    long = "dog " * LENGTH
    number = len(decoder.ids(long))
    assert ask(server, "team/plain", long) == Status(
        "INVALID_ARGUMENT",
        f"input tokens ({number}) plus prefix length ({most}) must be < {LENGTH}",
    )


RETRIEVE = "can't retrieve prompt prefix with id '{}': "
WRONG = {
    "none": RETRIEVE + 'prefix id "{}" not found',
    "team": RETRIEVE + 'prefix id "{}" not found',
    "team/none": RETRIEVE + 'prefix id "{}" not found',
    "/etc": RETRIEVE + "Invalid prefix id {}",
    "../store/peft": RETRIEVE
    + "Invalid prefix id {}, must contain only alphanumeric, _ and - and /",
    "bad": RETRIEVE + "Prefix contains non-finite elements",
    "wide": RETRIEVE + "Prefix embedding tensor dim 9 does not match model ({size})",
    "long": RETRIEVE + "Invalid prefix embedding length of 65",
    "ia3": RETRIEVE + "adapter type IA3 is not currently supported",
}


def spoil(decoder: Decoder) -> int:
    """Directories that will not do; returns the size of embeddings."""
    size = decoder.prompt.shape[1]
    for name, tensor in {
        "bad": torch.full((2, size), torch.nan),
        "wide": torch.zeros(2, 9),
        "long": torch.zeros(65, size),
    }.items():
        (decoder.store / name).mkdir(exist_ok=True)
        torch.save(tensor, decoder.store / name / "decoder.pt")
    (decoder.store / "ia3").mkdir(exist_ok=True)
    (decoder.store / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    return size


def test_what_will_not_do_is_named_wherever_it_is_asked_for(
    server: Server, decoder: Decoder
) -> None:
    size = spoil(decoder)
    for prefix, text in WRONG.items():
        expected = Status("INVALID_ARGUMENT", text.format(prefix, prefix, size=size))
        assert ask(server, prefix, TEXTS[0]) == expected, prefix
        with connect_blocking(server.grpc) as client:
            tokenize = {"requests": [{"text": "a"}], "prefixId": prefix}
            assert client.call("Tokenize", tokenize) == expected
    with connect_blocking(server.grpc) as client:
        good = {"requests": [{"text": "a"}], "prefixId": "peft", "adapterId": ""}
        assert not isinstance(client.call("Tokenize", good), Status)
        both = {"requests": [{"text": "a"}], "prefixId": "peft", "adapterId": "none"}
        text = "can't retrieve adapter with id 'none': directory does not exist"
        assert client.call("Tokenize", both) == Status("INVALID_ARGUMENT", text)
        for adapter_id, text in {
            "ia3": "adapter type IA3 is not currently supported",
            "team": "can't retrieve adapter with id 'team': invalid adapter:"
            " no adapter_config.json found",
            "a.b": "Invalid adapter id 'a.b', must contain only alphanumeric, _ and - and /",
            "/a": "Invalid adapter id '/a', must contain only alphanumeric, _ and - and /",
        }.items():
            request = {"requests": [{"text": "a"}], "adapterId": adapter_id}
            assert client.call("Tokenize", request) == Status("INVALID_ARGUMENT", text)


def test_replaced_and_removed_while_the_server_runs(server: Server, decoder: Decoder) -> None:
    place = decoder.store / "changing"
    place.mkdir()
    other = decoder.prompt.flip(0) * 2
    try:
        for prompt in (decoder.prompt, other):
            torch.save(prompt, place / "new.tmp")
            (place / "new.tmp").rename(place / "decoder.pt")
            ids = decoder.ids(TEXTS[1])
            expected = greedy(lambda ids, p=prompt: decoder.scores(p, ids)[-1], ids)
            found = words(ask(server, "changing", TEXTS[1]))
            assert found == decoder.tokenizer.convert_ids_to_tokens(expected)
    finally:
        shutil.rmtree(place)
    answer = ask(server, "changing", TEXTS[1])
    assert isinstance(answer, Status)
    assert 'prefix id "changing" not found' in answer.message


def test_metrics(server: Server) -> None:
    def value(name: str) -> float:
        lines = server.get("/metrics")[1].splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    before = value("tgi_prompt_load_failure")
    loads = value("tgi_prompt_load_duration_count")
    ask(server, "none", TEXTS[0])
    ask(server, "peft", TEXTS[0])
    ask(server, "peft", TEXTS[0])
    assert value("tgi_prompt_load_failure_total") == before + 1
    assert value("tgi_prompt_load_duration_count") <= loads + 1
