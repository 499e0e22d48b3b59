"""Every native family through real servers of one, two and four ranks."""

from pathlib import Path
from typing import Any

import pytest
from tests.engines import test_native_seq2seq as t5
from tests.engines.test_ranks import EIGHT_HEADS, eight_heads
from tests.integration.test_sharded import ALL_DETAILS, ask, close_to
from tests.kit.client import Json, Status
from tests.kit.server import Server, run_server
from tests.models.twins import save_checkpoint

pytestmark = pytest.mark.slow

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROMPTS = ["Once upon a time", "The dog and the cat went to the park"]
SEEDED = {"method": "SAMPLE", "sampling": {"temperature": 0.7, "topK": 20, "seed": 5}}


def save(name: str, path: Path, demo: Path) -> None:
    """A random checkpoint with the demo model's tokenizer."""
    if name in t5.CONFIGS:
        config = t5.CONFIGS[name].to_dict() | {"num_heads": 8, "vocab_size": 2048}
        t5.save(type(t5.CONFIGS[name])(**config), path)
    else:
        config = eight_heads(name).to_dict() | {"vocab_size": 2048}
        save_checkpoint(path, type(eight_heads(name))(**config))
    for file in TOKENIZER:
        (path / file).write_bytes((demo / file).read_bytes())


def answers(server: Server) -> list[Any]:
    """Greedy with all details, and sampled."""
    stopping = {"maxNewTokens": 10, "minNewTokens": 10}
    found: list[Json] = []
    for params in ({"response": ALL_DETAILS}, SEEDED):
        request = {
            "requests": [{"text": text} for text in PROMPTS],
            "params": {"stopping": stopping, **params},
        }
        answer = ask(server, lambda client, request=request: client.call("Generate", request))
        assert not isinstance(answer, Status), answer
        found.append(answer)
    return found


@pytest.mark.parametrize("name", [*EIGHT_HEADS, "t5", "mt5"])
def test_answers_are_the_same(demo_model_dir: Path, tmp_path: Path, name: str) -> None:
    save(name, tmp_path, demo_model_dir)
    found = []
    for num_shard in ("1", "2", "4"):
        with run_server(tmp_path, "--num-shard", num_shard) as server:
            found.append(answers(server))
    whole, *split = found
    assert len(whole[0]["responses"][0]["tokens"]) == 10
    for other in split:
        assert close_to(whole, other), (whole, other)
