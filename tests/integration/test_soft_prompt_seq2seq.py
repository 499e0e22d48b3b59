"""Soft prompts of an encoder-decoder model through a real server, against `transformers`."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.integration.test_soft_prompt_server import ask, words
from tests.kit.client import Status
from tests.kit.server import Server, run_server
from torch import Tensor

pytestmark = pytest.mark.slow

TEXT = "A little dog went to the park"
TOKENS = 6
LENGTH = 64
PROMPTS = {"": (0, 0), "both": (4, 6), "encoder": (0, 6), "decoder": (4, 0)}  # rows of each part


class Model:
    """A model, prompts for it in a store, and what must come out."""

    def __init__(self, path: Path, store: Path) -> None:
        self.path, self.store = path, store
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        auto = transformers.AutoModelForSeq2SeqLM
        self.model = auto.from_pretrained(path, dtype=torch.float32).eval()
        table = self.model.get_input_embeddings().weight.detach()
        torch.manual_seed(0)
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (decoder, encoder) in PROMPTS.items():
            pair = [torch.randn(n, table.shape[1]) * 2 * table.std() for n in (decoder, encoder)]
            self.parts[name] = (pair[0], pair[1])
            if name:
                (store / name).mkdir(parents=True)
                for file, rows in zip(("decoder.pt", "encoder.pt"), pair, strict=True):
                    if len(rows):
                        torch.save(rows, store / name / file)

    @torch.no_grad()
    def expected(self, name: str) -> list[str]:
        decoder, encoder = self.parts[name]
        look_up, config = self.model.get_input_embeddings(), self.model.config
        source = torch.cat([encoder, look_up(torch.tensor(self.ids))])
        ids = [config.decoder_start_token_id]
        for _ in range(TOKENS):
            target = torch.cat([decoder, look_up(torch.tensor(ids))])
            out = self.model(inputs_embeds=source[None], decoder_inputs_embeds=target[None])
            scores = out.logits[0, -1]
            scores[config.eos_token_id] = -math.inf
            ids.append(int(scores.argmax()))
        tokens: list[str] = self.tokenizer.convert_ids_to_tokens(ids[1:])
        return tokens

    @property
    def ids(self) -> list[int]:
        ids: list[int] = self.tokenizer(TEXT)["input_ids"]
        return ids


@pytest.fixture(scope="module")
def model(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(shared_dir / "models" / "tiny-t5", tmp_path_factory.mktemp("t5") / "store")


ENGINES: dict[str, tuple[str, ...]] = {
    "native": (),
    "split": ("--num-shard", "3"),  # of three heads
    "transformers": ("--deployment-framework", "hf_transformers"),
}


@pytest.fixture(scope="module", params=list(ENGINES))
def server(request: pytest.FixtureRequest, model: Model) -> Iterator[Server]:
    flags = ("--threads", "1", "--max-sequence-length", str(LENGTH), *ENGINES[request.param])
    with run_server(model.path, *flags, "--prefix-store-path", str(model.store)) as running:
        yield running


def stopping(tokens: int) -> dict[str, Any]:
    return {"minNewTokens": tokens, "maxNewTokens": tokens}


def test_both_parts_one_and_none_in_one_batch(server: Server, model: Model) -> None:
    options = {"generatedTokens": True, "inputTokens": True}

    def one(name: str) -> Any:
        return ask(server, name, TEXT, stopping=stopping(TOKENS), response=options)

    names = [*PROMPTS] * 2
    with ThreadPoolExecutor(len(names)) as threads:
        answers = list(threads.map(one, names))
    expected = {name: model.expected(name) for name in PROMPTS}
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    own = model.tokenizer.convert_ids_to_tokens(model.ids)
    for name, answer in zip(names, answers, strict=True):
        assert words(answer) == expected[name], name
        (response,) = answer["responses"]
        assert response["inputTokenCount"] == len(model.ids)
        shown = [token["text"] for token in response["inputTokens"]]
        assert shown == [model.tokenizer.pad_token] * PROMPTS[name][1] + own


@pytest.mark.parametrize("name", ["both", "encoder", "decoder"])
def test_limits(server: Server, model: Model, name: str) -> None:
    decoder, encoder = PROMPTS[name]
    length, count = decoder + encoder + bool(decoder), len(model.ids)
    room = LENGTH - length - count
    answer = ask(server, name, TEXT, stopping=stopping(room))
    assert answer["responses"][0]["generatedTokenCount"] == room
    assert ask(server, name, TEXT, stopping=stopping(room + 1)) == Status(
        "INVALID_ARGUMENT",
        f"input tokens ({count}) plus prefix length ({length}) plus min_new_tokens ({room + 1})"
        f" must be <= {LENGTH}",
    )
