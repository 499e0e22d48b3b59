"""Every family against `transformers` on the card: float32, float16 and bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.models.block_twins import load_blocks
from tests.models.twins import CONFIGS, SLOT_TOKENS, random_ids, save_checkpoint
from torch import Tensor

from tgis.engines.plan import Row, StepPlan, Want

CARD = torch.device("cuda", 0)


def oracle(path: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(CARD).eval()


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids], device=CARD)).logits[0].float()
    return logits


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.fixture(params=CONFIGS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.backends.cuda.matmul.allow_tf32 = False
    save_checkpoint(tmp_path, CONFIGS[request.param])
    return tmp_path


def test_float32(path: Path) -> None:
    """Whole, in chunks beside another sequence, and greedily token by token."""
    model, engine = oracle(path, torch.float32), load_blocks(path, device=CARD)
    ids, other = random_ids(1, 50), random_ids(2, 30)
    expected = logits_of(model, ids)
    whole = engine.forward(StepPlan([Row(0, 0, ids, 0, Want.ALL)]))
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-3)
    parts = []
    for start, stop in ((0, 17), (17, 18), (18, 50)):
        beside = Row(1, 1, other[start // 2 : stop // 2], start // 2, Want.NOTHING)
        rows = [Row(0, 2, ids[start:stop], start, Want.ALL)]
        plan = StepPlan(rows + ([beside] if beside.token_ids else []))
        parts.append(engine.forward(plan).clone())
    torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-3)
    while len(ids) < SLOT_TOKENS - 8:
        logits = engine.forward(StepPlan([Row(0, 0, ids[-1:], len(ids) - 1, Want.LAST)]))
        ids.append(int(logits.argmax()))
    assert ids[50:] == logits_of(model, ids)[49:-1].argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_within_their_own_error(path: Path, dtype: torch.dtype) -> None:
    ids = random_ids(12, 50)
    exact = logits_of(oracle(path, torch.float32), ids)
    theirs = rms(logits_of(oracle(path, dtype), ids) - exact)
    engine = load_blocks(path, dtype, CARD)
    ours = rms(engine.forward(StepPlan([Row(0, 0, ids, 0, Want.ALL)])) - exact)
    assert 0 < ours < 1.25 * theirs
