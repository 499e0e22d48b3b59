"""A few tokens of a sequence in one step: what drafts and the tokens chosen behind them rely on.

In bfloat16 on AMX each token's logits are, bit for bit, those of a step of that token alone.
"""

from pathlib import Path

import pytest
import torch
from tests.models.twins import CONFIGS, SLOT_TOKENS, llama, random_ids, save_checkpoint

from tgis.core.drafting import MOST_TOKENS, SCALED_TOKENS
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.native import NativeEngine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.models import kernels

ALIGNED = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 160}
MODELS = {
    "llama-aligned": CONFIGS["llama-aligned"],
    "llama-mqa": llama(**ALIGNED, num_key_value_heads=1),
    "mistral": CONFIGS["mistral"].__class__(
        **{**CONFIGS["mistral"].to_diff_dict(), **ALIGNED, "num_key_value_heads": 2}
    ),
}
MOST = 16
PROMPTS = (3, 29, 50, 1, 17, 32, 8, 9)
STEPS = (
    (1, MOST, 2, 0, 0, 0, 0, 0),
    (5, 3, 9, 1, 1, 0, 0, 0),
    (MOST, 0, 0, 0, 0, 0, 0, 0),
    (9, 9, 9, 9, 9, 9, 9, 9),
    (MOST,) * len(PROMPTS),
)
assert max(map(sum, STEPS)) == MOST_TOKENS


def has_amx() -> bool:
    return kernels.amx_linear(0, 64, 64, None, None, torch.bfloat16, torch.bfloat16) is not None


def prefilled(path: Path, config: dict[str, object], **changes: object) -> NativeEngine:
    values = {"dtype": torch.bfloat16} | changes
    engine = native.load(path, config, **values)  # type: ignore[arg-type]
    engine.allocate(CacheShape(len(PROMPTS), SLOT_TOKENS))
    rows = [Row(i, i, random_ids(i, n), 0, Want.LAST) for i, n in enumerate(PROMPTS)]
    engine.forward(StepPlan(rows))
    return engine


def compare(path: Path, name: str, most_tokens: int = MOST_TOKENS, **changes: object) -> float:
    """The largest difference between tokens in runs of any length and tokens one by one."""
    config = MODELS[name].to_dict()
    save_checkpoint(path, MODELS[name])
    together, alone = prefilled(path, config, **changes), prefilled(path, config, **changes)
    worst = 0.0
    for lengths in (step for step in STEPS if sum(step) <= most_tokens):
        tokens = [random_ids(50 + i, n) for i, n in enumerate(lengths)]
        rows = [Row(i, i, ids, PROMPTS[i], Want.ALL) for i, ids in enumerate(tokens) if ids]
        logits = together.forward(StepPlan(rows))
        expected = [
            alone.forward(StepPlan([Row(i, i, [token], PROMPTS[i] + j, Want.LAST)])).clone()
            for i, ids in enumerate(tokens)
            for j, token in enumerate(ids)
        ]
        worst = max(worst, float((logits - torch.cat(expected)).abs().max()))
    return worst


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("quantize", [None, "int8-dynamic"])
def test_bfloat16_is_rounded_alike(tmp_path: Path, name: str, quantize: str | None) -> None:
    if not has_amx():
        pytest.skip("linear layers of few rows are ours only on AMX")
    assert compare(tmp_path, name, quantize=quantize) == 0.0


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_weight_only_layers_are_rounded_alike_in_smaller_steps(
    tmp_path: Path, quantize: str
) -> None:
    if not has_amx():
        pytest.skip("linear layers of few rows are ours only on AMX")
    assert compare(tmp_path, "llama-aligned", SCALED_TOKENS, quantize=quantize) == 0.0


@pytest.mark.parametrize("name", sorted(MODELS))
def test_float32_differs_by_roundings(tmp_path: Path, name: str) -> None:
    assert compare(tmp_path, name, dtype=torch.float32) < 1e-5
