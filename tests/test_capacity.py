"""The calculator against the models' own files, the server's measurements and the scheduler."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from benchmarks.scheduler_sim import Cost as SimulatedCost
from benchmarks.scheduler_sim import make_scheduler, simulate
from benchmarks.traces import Arrival

from tgis.capacity import Cost, Load, Machine, Plan, gap, make_plan, rate, read_shape
from tgis.demo import model_dir
from tgis.engines import native_seq2seq
from tgis.errors import ConfigError, ModelError
from tgis.hub.headers import read_headers
from tgis.hub.resolve import read_json

MACHINE = Machine(memory=8 << 30, kv_share=0.5, max_running=128, step_tokens=512)
LOAD = Load(requests_per_second=50, prompt_tokens=150, new_tokens=100)
COST = Cost(step=0.008, row=0.0006, prompt_token=0.00025, context_token=4e-7)


def plan(load: Load = LOAD, machine: Machine = MACHINE, **more: float) -> Plan:
    return make_plan(read_shape(model_dir(), "float32", "demo"), COST, load, machine, **more)


def test_the_shape_is_that_of_the_files(tmp_path: Path) -> None:
    shape = read_shape(model_dir(), "float32", "demo")
    tensors = read_headers(model_dir()).values()
    assert shape.num_parameters == sum(math.prod(info.shape) for info in tensors)
    assert shape.weight_bytes == 4 * shape.num_parameters
    (tmp_path / "config.json").write_bytes((model_dir() / "config.json").read_bytes())
    computed = read_shape(tmp_path, "bfloat16", "demo").num_parameters
    assert computed == pytest.approx(shape.num_parameters, rel=0.02)


def test_a_family_that_is_not_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(ModelError, match="'unheard_of' is not known"):
        read_shape(tmp_path, "bfloat16", "it")


@pytest.mark.parametrize(("prompt", "new"), [(50, 20), (150, 100), (400, 60)])
def test_capacity_is_what_the_scheduler_reaches(prompt: int, new: int) -> None:
    """All requests at once, so that the batch is always full."""
    running = 32
    arrivals = [
        Arrival(0.0, list(range(n << 12, (n << 12) + prompt)), new, new) for n in range(640)
    ]
    scheduler = make_scheduler("paged:64", 64 * (prompt + new), running, False)
    report = simulate(scheduler, iter(arrivals), SimulatedCost())
    reached = len(arrivals) / max(life.last for life in report.lives)
    expected = rate(COST, Load(1, prompt, new), running)
    assert reached == pytest.approx(expected, rel=0.1)


def test_measured_costs_explain_what_was_measured() -> None:
    shape = read_shape(model_dir(), "bfloat16", "demo")
    cost = Cost.measured(shape, one_stream=100.0, many_streams=1200.0, first_token=0.028)
    load = Load(1, 128, 128)
    alone = 0.028 + 127 * (cost.step + cost.row + 192 * cost.context_token)
    assert 128 / alone == pytest.approx(100.0, rel=0.02)
    step = cost.step + 32 * (cost.row + 192 * cost.context_token)
    assert 4096 / (32 * 0.028 + 127 * step) == pytest.approx(1200.0, rel=0.02)
    assert gap(cost, load, 32) > step


@pytest.mark.parametrize("figures", [(100.0, 50.0, 0.028), (100.0, 1e6, 0.028), (100.0, 1200.0, 9)])
def test_figures_that_contradict_each_other(figures: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="contradict each other"):
        Cost.measured(read_shape(model_dir(), "bfloat16", "demo"), *figures)


def test_replicas_are_as_many_as_the_load_needs() -> None:
    found = plan()
    per_replica = LOAD.requests_per_second / found.replicas
    assert per_replica <= 0.7 * found.capacity
    assert LOAD.requests_per_second / (found.replicas - 1) > 0.7 * found.capacity
    assert found.capacity == rate(COST, LOAD, found.running)
    inside = rate(COST, LOAD, found.load_running)
    assert inside == pytest.approx(per_replica)
    assert 0 < found.load_running < found.running
    assert plan(utilisation=1.0).replicas < found.replicas


def test_a_wanted_gap_bounds_the_batch() -> None:
    found = plan(wanted_gap=0.03)
    assert found.gap <= 0.03 < gap(COST, LOAD, found.running + 1)
    assert found.replicas > plan().replicas
    with pytest.raises(ConfigError, match="one sequence alone takes"):
        plan(wanted_gap=0.001)


def test_memory_bounds_the_batch() -> None:
    shape = read_shape(model_dir(), "float32", "demo")
    free = plan().weight_bytes + plan().step_bytes
    small = Machine(free + 2 * 1000 * shape.kv_bytes_per_token, 0.5, 128, 512)
    found = plan(machine=small)
    assert found.kv_tokens == 1000
    assert found.most_running == found.running == 4
    with pytest.raises(ConfigError, match="do not fit; more memory"):
        plan(machine=Machine(free, 0.5, 128, 512))
    with pytest.raises(ConfigError, match="less than one sequence has"):
        plan(machine=Machine(free + 2 * 200 * shape.kv_bytes_per_token, 0.5, 128, 512))


def test_shards_share_the_weights() -> None:
    whole, halves = plan(), plan(machine=Machine(8 << 30, 0.5, 128, 512, num_shards=2))
    assert halves.weight_bytes == whole.weight_bytes // 2
    assert halves.kv_tokens > 1.9 * whole.kv_tokens


def test_cached_prompts_need_fewer_replicas() -> None:
    assert plan(Load(50, 150, 100, cached_share=0.8)).replicas < plan().replicas


T5 = {
    "vocab_size": 131,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 60,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 6,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (transformers.T5Config, {}),
        (transformers.T5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
        (transformers.MT5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ],
)
def test_an_encoder_decoder(tmp_path: Path, kind: Any, more: Any) -> None:
    """Its parameters are those of Transformers' model, its keys and values those of the engine."""
    model = transformers.AutoModelForSeq2SeqLM.from_config(kind(**T5, **more))
    if "tie_word_embeddings" in more:  # as in T5 1.1's files, whatever Transformers ties
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    shape = read_shape(tmp_path / "whole", "float32", "it")
    computed = read_shape(tmp_path, "float32", "it")
    assert computed.num_parameters == pytest.approx(model.num_parameters(), rel=0.02)
    assert shape.num_parameters == model.num_parameters()
    assert shape.step_parameters == computed.step_parameters
    linear = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    made_by_input = [name for name in linear if re.search(r"EncDecAttention\.[kv]$", name)]
    encoder = [name for name in linear if name.startswith("encoder.")]
    expected = sum(linear[name] for name in encoder + made_by_input)
    assert shape.prompt_parameters == expected
    assert shape.step_parameters == sum(linear.values()) - expected
    engine = native_seq2seq.load(
        tmp_path / "whole", read_json(tmp_path / "whole" / "config.json", "it"), torch.float32
    )
    assert shape.kv_bytes_per_token == engine.caps.kv_bytes_per_token
    half = read_shape(tmp_path / "whole", "bfloat16", "it")
    wide = sum(number for name, number in linear.items() if name.endswith(".wo"))
    assert half.weight_bytes == 2 * (shape.num_parameters + wide)


def test_inputs_of_an_encoder_decoder_are_not_cached(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", **T5}))
    shape = read_shape(tmp_path, "float32", "it")
    assert make_plan(shape, COST, LOAD, MACHINE).replicas > 1
    with pytest.raises(ConfigError, match="--cached: an encoder-decoder's inputs are not cached"):
        make_plan(shape, COST, Load(50, 150, 100, cached_share=0.5), MACHINE)
