"""A real server on the Transformers engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tests.contract import test_contract as contract
from tests.contract.cases import flags
from tests.engines.hf_models import CONFIGS, VOCAB, generate, save_model
from tests.kit.client import Json, connect
from tests.kit.server import run_server

WORDS = [f"w{number}" for number in range(VOCAB)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A model of a family that the native engine does not know, and a tokenizer of words."""
    path = tmp_path_factory.mktemp("gptj")
    model = save_model(path, CONFIGS["gptj"])
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path, model


def expected(model: Any, text: str, count: int) -> str:
    tokens, _ = generate(model, [WORDS.index(word) for word in text.split()], count)
    return " ".join(WORDS[token] for token in tokens)


@pytest.mark.timeout(180)
async def test_a_family_that_only_transformers_knows(saved: tuple[Path, Any]) -> None:
    path, model = saved
    torch.set_num_threads(1)
    texts = ["w5 w6 w7", "w9", " ".join(WORDS[20:50]), "w77 w3 w12 w101"]
    counts = [40, 25, 30, 3]

    def request(text: str, count: int) -> Json:
        return {"requests": [{"text": text}], "params": {"stopping": {"maxNewTokens": count}}}

    with run_server(path, "--threads", "1") as server:
        assert "(hf_transformers, float32)" in server.log()
        assert "GPTJForCausalLM: all sequences share a pass" in server.log()
        assert "[transformers]" not in server.log()
        async with connect(server.grpc) as client:
            jobs = (
                client.call("Generate", request(text, count))
                for text, count in zip(texts, counts, strict=True)
            )
            answers = await asyncio.gather(*jobs)
            found = [answer["responses"][0]["text"].strip() for answer in answers]  # type: ignore[index]
    wanted = [expected(model, text, count) for text, count in zip(texts, counts, strict=True)]
    assert found == wanted


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["tiny-t5", "stories260K"])
async def test_the_contract_holds(name: str) -> None:
    file = contract.FILES[name]
    if file.original is None:
        pytest.skip(f"the model {file.content['model']} is not here")
    engine = ("--deployment-framework", "hf_transformers")
    with run_server(file.original, *flags(file.limits), *engine) as server:
        served = contract.Served(file, server)
        await contract.test_all_at_once_and_shuffled(served)
        await contract.test_inside_batches(served)
