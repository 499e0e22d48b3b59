"""A step on another device waits for nothing: on `meta` there is nothing that could be waited for.

Whatever reads a tensor there (`item`, `tolist`, `nonzero`, a copy to the CPU) raises.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests.models.twins import CONFIGS, random_ids, save_checkpoint
from torch import Tensor

from tgis.adapters.prompts import SoftPrompt
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.placement import Placement
from tgis.engines.plan import Row, StepPlan, Want
from tgis.models.attention.backends import BACKENDS, Chosen
from tgis.models.attention.flex import make_flex

pytestmark = pytest.mark.usefixtures("single_thread")

META = torch.device("meta")
NAMES = ("llama", "mistral", "qwen3", "bloom", "gpt2", "falcon-11b", "gemma", "mpt-odd-heads")


def engine_of(path: Path, dtype: torch.dtype, quantize: str | None = None) -> native.NativeEngine:
    config = json.loads((path / "config.json").read_text())
    placement = Placement(META, "blocks", "reference")
    engine = native.load(path, config, dtype, quantize=quantize, placement=placement)
    engine.allocate(CacheShape(20, engine.caps.kv_granule, 96))
    return engine


def steps(prompt: int = 0) -> Sequence[StepPlan]:
    """A prefill, a mixed step, a decoding one, and one that wants nothing."""
    tables = [[3, 1, 7], [2, 9, 4, 5]]
    first = Row(0, 0, random_ids(0, 20), 0, Want.LAST, tables[0], prompt=prompt)
    chunk = Row(1, 1, random_ids(1, 33), 0, Want.ALL, tables[1])
    decode = Row(0, 0, [5], 20, Want.LAST, tables[0], prompt=prompt)
    other = Row(1, 1, [6], 33, Want.LAST, tables[1])
    quiet = Row(1, 1, [6, 7], 34, Want.NOTHING, tables[1])
    return [StepPlan(rows) for rows in ([first], [decode, chunk], [decode, other], [quiet])]


def run(engine: native.NativeEngine, prompt: int = 0) -> None:
    for plan in steps(prompt):
        logits = engine.forward(plan)
        assert logits.device == META
        assert logits.dtype == torch.float32
        assert logits.shape == (plan.num_logits, engine.caps.vocab_size)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, CONFIGS[name])
    engine = engine_of(tmp_path, torch.float16)
    assert engine.caps.device == "meta"
    engine.attach(1, SoftPrompt(torch.zeros(7, CONFIGS[name].hidden_size, dtype=torch.float16)))
    run(engine)
    run(engine, prompt=1)


def test_quantised_weights_are_there_too(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama"])
    for quantize in ("int8", "int4"):
        run(engine_of(tmp_path, torch.bfloat16, quantize))


def test_flex_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel aside, whose part only copies its shape here."""

    def flex(q: Tensor, *_: object, **options: object) -> Tensor:
        assert options["block_mask"] is not None
        return torch.empty_like(q)

    chosen = Chosen("flex", make_flex(flex), BACKENDS["flex"].block_tokens, True)
    monkeypatch.setattr(native, "choose_backend", lambda *_: chosen)
    for name in ("qwen2-window", "bloom"):
        save_checkpoint(tmp_path / name, CONFIGS[name])
        run(engine_of(tmp_path / name, torch.bfloat16))


def test_a_hidden_read_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama"])
    engine = engine_of(tmp_path, torch.float16)

    def reads(q: Tensor, *_: object, **__: object) -> Tensor:
        return q * q[0, 0, 0].item()

    monkeypatch.setattr("tgis.models.kernels.reference.attend", reads)
    with pytest.raises(RuntimeError, match="meta"):
        run(engine)
