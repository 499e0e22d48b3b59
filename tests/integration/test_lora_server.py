"""LoRA through real servers: mixed in a batch, found in a store, loaded while others are served."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.kit.client import Json, Status, connect_blocking
from tests.kit.server import Server, run_server
from tests.models.lora_twins import merged, random_lora, targets

from tgis.adapters.lora import Lora
from tgis.engines import native

pytestmark = pytest.mark.slow

PROMPTS = ["Once upon a time there was a little dog", "Lily and Tom went to the park"]
RANKS = {"first": (4,), "team/second": (8, 3), "third": (1,)}
NEW_TOKENS = 10


def save(lora: Lora, path: Path, embeddings: set[str]) -> None:
    """In PEFT's layout; every module with an alpha that is its rank."""
    path.mkdir(parents=True)
    tensors, ranks = {}, {}
    for name, (a, b) in lora.pairs.items():
        ends = ("_embedding_A", "_embedding_B") if name in embeddings else (".A", ".B")
        for end, tensor in zip(ends, (a, b), strict=True):
            end = f"_{end[1]}.weight" if end.startswith(".") else end
            tensors[f"base_model.model.{name}.lora{end}"] = tensor
        ranks[name] = len(a)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "rank_pattern": ranks, "alpha_pattern": ranks}
    (path / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def expected(demo_model_dir: Path, store: Path) -> dict[str, list[list[int]]]:
    """By adapter, "" for none: what `transformers` with merged weights generates."""
    config = json.loads((demo_model_dir / "config.json").read_text())
    found = targets(native.load(demo_model_dir, config, torch.float32))
    plain = transformers.AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32)
    models = {"": plain.eval()}
    for seed, (name, ranks) in enumerate(RANKS.items(), start=1):
        lora = random_lora(found.values(), ranks, seed)
        for _, b in lora.pairs.values():
            b *= 0.5
        save(lora, store / name, {t.name for t in found.values() if t.is_embedding})
        models[name] = merged(plain, lora, found)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_dir)
    return {
        name: [generate(model, tokenizer(text)["input_ids"]) for text in PROMPTS]
        for name, model in models.items()
    }


@torch.no_grad()
def generate(model: Any, ids: list[int]) -> list[int]:
    start = len(ids)
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([ids])).logits[0, -1]
        logits[model.config.eos_token_id] = -torch.inf  # `minNewTokens`
        ids = [*ids, int(logits.argmax())]
    return ids[start:]


def ask(server: Server, name: str, text: str, tokens: int = NEW_TOKENS) -> Json | Status:
    request = {
        "requests": [{"text": text}],
        "params": {
            "stopping": {"maxNewTokens": tokens, "minNewTokens": tokens},
            "response": {"generatedTokens": True},
        },
    }
    if name:
        request["adapterId"] = name
    with connect_blocking(server.grpc) as client:
        return client.call("Generate", request)


def words(answer: Json | Status) -> list[str]:
    assert not isinstance(answer, Status), answer
    return [token["text"] for token in answer["responses"][0]["tokens"]]


@pytest.fixture(scope="module", params=["1", "2"], ids="ranks={}".format)
def server(
    request: pytest.FixtureRequest,
    demo_model_dir: Path,
    store: Path,
    expected: dict[str, list[list[int]]],
) -> Iterator[Server]:
    options = ("--dtype-str", "float32", "--num-shard", request.param)
    with run_server(demo_model_dir, *options, "--prefix-store-path", str(store)) as running:
        yield running


def test_adapters_in_one_batch(
    server: Server, demo_model_dir: Path, expected: dict[str, list[list[int]]]
) -> None:
    """Every adapter and none on the same prompts, twice: prefixes are not mixed up either."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model_dir)
    asked = [(name, n) for name in expected for n in range(len(PROMPTS))] * 2
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda one: ask(server, one[0], PROMPTS[one[1]]), asked))
    assert len({tuple(ids) for found in expected.values() for ids in found}) == 8
    for (name, n), answer in zip(asked, answers, strict=True):
        assert words(answer) == tokenizer.convert_ids_to_tokens(expected[name][n]), name


def test_an_adapter_is_loaded_while_others_are_served(
    server: Server, store: Path, expected: dict[str, list[list[int]]]
) -> None:
    alone = words(ask(server, "first", PROMPTS[0], 60))
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(ask, server, "first", PROMPTS[0], 60)
        (store / "late").unlink(missing_ok=True)  # of the server before
        (store / "late").symlink_to("third", target_is_directory=True)
        late = words(ask(server, "late", PROMPTS[1]))
        assert words(running.result()) == alone
    assert late == words(ask(server, "third", PROMPTS[1]))


def test_refusals_name_what_is_wrong(server: Server, store: Path) -> None:
    (store / "dora").mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "use_dora": True}
    (store / "dora" / "adapter_config.json").write_text(json.dumps(config))
    answer = ask(server, "dora", PROMPTS[0])
    assert answer == Status(
        "INVALID_ARGUMENT",
        "can't retrieve adapter with id 'dora': option use_dora = True is not supported",
    )
