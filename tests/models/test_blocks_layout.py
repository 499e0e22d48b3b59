"""Every family against `transformers` with keys and values in blocks."""

from collections.abc import Iterator

import pytest
import torch
import transformers
from tests.models.block_twins import load_blocks
from tests.models.test_decoder import (
    TOLERANCE,
    test_a_slot_is_used_again,
    test_batch_of_mixed_lengths,
    test_chunked_prefill,
    test_decoding_beside_a_prefill,
    test_greedy_tokens,
    test_one_sequence,
)
from tests.models.twins import CONFIGS, Twin, load_engine, random_ids, save_checkpoint

from tgis.engines.plan import KvCopy, Row, StepPlan, Want

pytestmark = pytest.mark.usefixtures("single_thread")

__all__ = [
    "test_a_slot_is_used_again",
    "test_batch_of_mixed_lengths",
    "test_chunked_prefill",
    "test_decoding_beside_a_prefill",
    "test_greedy_tokens",
    "test_one_sequence",
]


QUICK = ("llama-mqa", "mistral", "qwen2-window", "qwen3", "falcon-40b", "mpt-odd-heads", "opt")
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


@pytest.fixture(scope="module", params=NAMES)
def twin(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Twin]:
    path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(path, CONFIGS[request.param])
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Twin(path, oracle.eval(), load_blocks(path))  # type: ignore[arg-type]


def test_a_shared_prefix(twin: Twin) -> None:
    """Two sequences read the same blocks, and write their own behind them."""
    ids = random_ids(7, 40)
    twin.all_logits(ids, slot=0)
    other = [*ids[:32], *random_ids(9, 10)]
    rows = (Row(1, 3, other[32:], 32, Want.ALL), Row(0, 0, random_ids(10, 1), 40, Want.LAST))
    logits = twin.step(*rows, copies=[KvCopy(0, 3, 32)])
    torch.testing.assert_close(logits[:-1], twin.expected(other)[32:], **TOLERANCE)
    whole = twin.expected([*ids, *rows[1].token_ids])
    torch.testing.assert_close(logits[-1], whole[-1], **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_as_in_rows(twin: Twin, dtype: torch.dtype) -> None:
    ids = random_ids(12, 50)
    plan = StepPlan([Row(0, 0, ids, 0, Want.ALL)])
    rows, blocks = load_engine(twin.path, dtype).forward(plan), load_blocks(twin.path, dtype)
    error = (blocks.forward(plan) - rows).square().mean().sqrt()
    assert error <= 0.02 * rows.square().mean().sqrt()
