"""The engine seam of the native engine; what it computes is tested in `tests/models`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.twins import CONFIGS, SLOT_TOKENS, load_engine, random_ids, save_checkpoint

from tgis.engines import native
from tgis.engines.base import CacheShape, Engine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(path, CONFIGS["llama"])
    return path


def config_of(path: Path, **changes: Any) -> dict[str, Any]:
    return {**json.loads((path / "config.json").read_text()), **changes}


def test_caps(path: Path) -> None:
    engine: Engine = native.load(path, config_of(path), torch.bfloat16)
    assert engine.caps.name == "tgis_native"
    assert engine.caps.kv_layout == "rows"
    assert engine.caps.dtype == "bfloat16"
    assert engine.caps.vocab_size == 131
    assert engine.caps.max_positions is None
    assert engine.caps.kv_bytes_per_token == 2 * 3 * 2 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_come_in_the_order_of_the_plan(path: Path, dtype: torch.dtype) -> None:
    engine = load_engine(path, dtype)
    rows = [
        Row(7, 5, random_ids(1, 3), 0, Want.ALL),
        Row(3, 0, random_ids(2, 9), 0, Want.NOTHING),
        Row(9, 2, random_ids(3, 1), 0, Want.LAST),
        Row(1, 1, random_ids(4, 6), 0, Want.LAST),
    ]
    plan = StepPlan(rows)
    logits = engine.forward(plan)
    assert logits.dtype == torch.float32
    assert logits.shape == (plan.num_logits, 131) == (5, 131)
    alone = [engine.forward(StepPlan([row])) for row in rows]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(logits, torch.cat(alone), rtol=0, atol=tolerance)


def test_a_step_that_wants_nothing(path: Path) -> None:
    logits = load_engine(path).forward(StepPlan([Row(0, 0, [1, 2], 0, Want.NOTHING)]))
    assert logits.shape == (0, 131)


def test_the_last_position_of_a_slot(path: Path) -> None:
    engine = load_engine(path)
    engine.forward(StepPlan([Row(0, 0, random_ids(1, SLOT_TOKENS - 1), 0, Want.NOTHING)]))
    logits = engine.forward(StepPlan([Row(0, 0, [1], SLOT_TOKENS - 1, Want.LAST)]))
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "row", [Row(0, 0, [131], 0, Want.LAST), Row(0, 0, [1], SLOT_TOKENS, Want.LAST)]
)
def test_a_plan_out_of_bounds_raises(path: Path, row: Row) -> None:
    with pytest.raises(IndexError):
        load_engine(path).forward(StepPlan([row]))


def test_a_failed_allocation_is_a_memory_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = StepPlan([Row(0, 0, [1, 2], 0, Want.LAST)])
    engine = load_engine(path)
    expected = engine.forward(plan)
    with monkeypatch.context() as patch:
        patch.setattr("tgis.models.decoder.Decoder._embed", lambda *_: torch.empty(1 << 50))
        with pytest.raises(MemoryError, match="you tried to allocate"):
            engine.forward(plan)
    with monkeypatch.context() as patch:
        patch.setattr("tgis.models.decoder.Decoder._embed", lambda *_: torch.ones(2, 3))
        with pytest.raises((RuntimeError, ValueError)):
            engine.forward(plan)
    assert torch.equal(engine.forward(plan), expected)


def test_sequences_longer_than_the_positions(path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    engine = native.load(path, config_of(path, rope_parameters=rope), torch.float32)
    assert engine.caps.max_positions == 128
    message = "sequences of 129 tokens are longer than the model's 128 positions"
    with pytest.raises(ConfigError, match=message):
        engine.allocate(CacheShape(1, 129))
    engine.allocate(CacheShape(1, 128))


def test_quantised_weights_are_refused_by_name(path: Path) -> None:
    quantized = config_of(path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"quant_method = 'fp8' is not supported \(only gptq, awq"):
        native.load(path, quantized, torch.float32)


def test_progress_reaches_the_size_of_the_weights(path: Path) -> None:
    calls: list[tuple[int, int]] = []
    native.load(path, config_of(path), torch.float32, lambda *call: calls.append(call))
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1][0] == calls[-1][1] > 0


def test_closing_frees_the_cache(path: Path) -> None:
    engine = load_engine(path)
    engine.close()
    engine.release([0])
    with pytest.raises(AssertionError):
        engine.forward(StepPlan([Row(0, 0, [1], 0, Want.LAST)]))


LOAD = """
import json, sys
from pathlib import Path
import torch
from tgis.engines import native

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

path, dtype, ratio = Path(sys.argv[1]), getattr(torch, sys.argv[2]), float(sys.argv[3])
before = memory("VmRSS")
engine = native.load(path, json.loads((path / "config.json").read_text()), dtype)
grown = memory("VmHWM") - before
weights = (path / "model.safetensors").stat().st_size * ratio
assert grown <= weights * 1.15 + 100e6, (grown, weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "ratio"), [("float32", 1.0), ("bfloat16", 0.5)])
@pytest.mark.parametrize("shape", [{}, {"vocab_size": 64000, "tie_word_embeddings": True}])
def test_loading_needs_no_second_copy(
    tmp_path: Path, dtype: str, ratio: float, shape: dict[str, Any]
) -> None:
    """Not even of a table that is embeddings and head and two fifths of the weights."""
    config = CONFIGS["llama"].to_dict() | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "vocab_size": 16000,
        "num_attention_heads": 16,
        "head_dim": 64,
        **shape,
    }
    save_checkpoint(tmp_path, type(CONFIGS["llama"])(**config))
    command = [sys.executable, "-c", LOAD, str(tmp_path), dtype, str(ratio)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
