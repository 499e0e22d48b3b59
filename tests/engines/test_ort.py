"""The ONNX Runtime engine: the files of every layout give what Transformers gives."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

pytest.importorskip("onnxruntime", reason="the extra tgis[ort] is not installed")
pytest.importorskip("onnx_ir", reason="the extra tgis[ort] is not installed")

import onnx_ir
from tests.engines.hf_models import START, Sequences, generate, random_ids, save_model
from tests.engines.onnx_files import CONFIGS, Exported, changed, joining_and_leaving, load, make
from tests.engines.test_hf import Loaded, check_any_company

from tgis.config import Config
from tgis.engines import ort
from tgis.engines.base import CacheShape
from tgis.engines.onnx_export import Options
from tgis.engines.onnx_merge import merge_decoders
from tgis.engines.plan import Row, StepPlan, Want
from tgis.engines.registry import load_engine
from tgis.errors import ConfigError, ModelError
from tgis.hub import onnx_files
from tgis.hub.resolve import resolve
from tgis.models.collectives import Group

# Exporting takes seconds, and mostly of importing.
pytestmark = [pytest.mark.timeout(240), pytest.mark.usefixtures("single_thread")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make(tmp_path_factory.mktemp("llama"), CONFIGS["llama"])


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return make(tmp_path_factory.mktemp("t5"), CONFIGS["t5"], Options(merge_graphs=True))


@pytest.fixture(params=["llama", pytest.param("t5", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest) -> Exported:
    found: Exported = request.getfixturevalue(request.param)
    return found


def test_sequences_that_join_and_leave(exported: Exported) -> None:
    joining_and_leaving(exported.model, exported.engine())


@pytest.mark.parametrize("seed", range(3))
def test_a_row_is_the_same_in_any_company(exported: Exported, seed: int) -> None:
    check_any_company(Loaded("", exported.model, exported.engine()), seed)


def test_what_the_engine_says_of_itself(exported: Exported) -> None:
    config = Config(model_name=str(exported.path), deployment_framework=ort.NAME)
    told: list[tuple[int, int]] = []
    engine = load_engine(config, resolve(config), lambda *call: told.append(call))
    assert engine.caps.name == ort.NAME
    assert engine.caps.dtype == "float32"
    assert engine.caps.kv_layout == "padded"
    is_t5 = exported.model.config.is_encoder_decoder
    # Keys and values; a T5 layer has them twice, and keeps what it has read.
    expected = (2 * 2 * 4 * 8 + 32) * 4 if is_t5 else 2 * 2 * 2 * 8 * 4
    assert engine.caps.kv_bytes_per_token == expected
    assert engine.caps.max_positions == (None if is_t5 else 128)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] > 0


def test_logits_of_every_position(llama: Exported) -> None:
    engine = llama.engine()
    prompts = [list(random_ids(20 + number, length)) for number, length in enumerate((4, 13, 7))]
    wants = [Want.ALL, Want.LAST, Want.ALL]
    rows = [Row(n, n, prompts[n], 0, wants[n]) for n in range(3)]
    found = engine.forward(StepPlan(rows))
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = llama.model(torch.tensor([row.token_ids])).logits[0]
        expected.append(logits if row.want is Want.ALL else logits[-1:])
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-4)


def test_a_step_that_fails_can_be_tried_again(
    llama: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama.engine()
    sequences = Sequences(engine, False)
    for slot in range(2):
        sequences.add(slot, random_ids(slot, 4 + 3 * slot))
    for _ in range(3):
        sequences.step(range(2))
    sequences.add(2, random_ids(2, 5))
    plan = StepPlan([sequences.row(slot) for slot in range(3)])
    real, calls = torch.empty, list[object]()

    def fail(*call: Any, **options: Any) -> torch.Tensor:
        calls.append(call)
        if len(calls) == 8:  # what is new has been computed
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return real(*call, **options)

    monkeypatch.setattr("tgis.engines.ort_graph.torch.empty", fail)
    with pytest.raises(MemoryError, match="you tried"):
        engine.forward(plan)
    monkeypatch.undo()
    for _ in range(4):
        sequences.step([2, 0, 1])
    for slot, length in ((0, 4), (1, 7), (2, 5)):
        count = len(sequences.logits[slot])
        tokens, _ = generate(llama.model, random_ids(slot, length), count)
        assert sequences.tokens[slot][-count:] == tokens


def test_no_memory_within_onnx_runtime(llama: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llama.engine()

    class Session:
        def __init__(self, real: Any) -> None:
            self.io_binding = real.io_binding

        def run_with_iobinding(self, _binding: object) -> None:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 9")

    graph = engine._network._first
    monkeypatch.setattr(graph, "_session", Session(graph._session))
    with pytest.raises(MemoryError, match="of size 9"):
        engine.forward(StepPlan([Row(0, 0, [5, 6], 0, Want.LAST)]))


def test_a_sequence_longer_than_the_model(llama: Exported) -> None:
    with pytest.raises(ConfigError, match="129 tokens are longer than the model's 128 positions"):
        llama.engine().allocate(CacheShape(1, 129))


def test_decoders_in_two_files_and_merged(llama: Exported, tmp_path: Path) -> None:
    """The layouts of older Optimum."""
    two = tmp_path / "two"
    shutil.copytree(llama.path, two)
    shutil.copy(two / onnx_files.SINGLE, two / onnx_files.FIRST)
    (two / onnx_files.SINGLE).rename(two / onnx_files.LATER)
    joining_and_leaving(llama.model, load(two))
    merged = merge_decoders(
        onnx_ir.load(two / onnx_files.FIRST), onnx_ir.load(two / onnx_files.LATER)
    )
    onnx_ir.save(merged, two / onnx_files.MERGED)
    size = (two / onnx_files.LATER).stat().st_size
    assert (two / onnx_files.MERGED).stat().st_size < 1.6 * size, "weights are there once"
    (two / onnx_files.FIRST).unlink()
    (two / onnx_files.LATER).unlink()
    joining_and_leaving(llama.model, load(two))


def test_half_precision_files(llama: Exported, tmp_path: Path) -> None:
    """The files' own types count; keys and values stay in them."""

    def halve(graph: Any) -> None:
        half = onnx_ir.DataType.FLOAT16
        for value in [*graph.graph.inputs, *graph.graph.outputs]:
            if value.dtype is not onnx_ir.DataType.FLOAT:
                continue
            value.dtype = half
            before, uses = value.producer(), list(value.uses())
            to = onnx_ir.DataType.FLOAT if before is None else half
            cast = onnx_ir.node("Cast", [value], attributes={"to": to})
            cast.outputs[0].dtype = to
            cast.outputs[0].shape = value.shape
            if before is None:
                for use in uses:
                    use.node.replace_input_with(use.idx, cast.outputs[0])
                graph.graph.insert_before(graph.graph[0], cast)
            else:
                graph.graph.append(cast)
                name = value.name
                value.name, cast.outputs[0].name = f"{name}.wide", name
                value.dtype = onnx_ir.DataType.FLOAT
                graph.graph.outputs[graph.graph.outputs.index(value)] = cast.outputs[0]

    engine = load(changed(llama.path, tmp_path / "half", onnx_files.SINGLE, halve))
    assert engine.caps.dtype == "float16"
    assert engine.caps.kv_bytes_per_token == 2 * 2 * 2 * 8 * 2
    sequences = Sequences(engine, False)
    sequences.add(0, random_ids(0, 9))
    for _ in range(4):
        sequences.step([0])
    _, logits = generate(llama.model, random_ids(0, 9), 4)
    torch.testing.assert_close(torch.stack(sequences.logits[0]), logits, rtol=0, atol=0.05)


def rename_input(graph: Any) -> None:
    graph.graph.inputs[1].name = "mask"


def drop_caches(graph: Any) -> None:
    del graph.graph.outputs[1:]


def rename_outputs(graph: Any) -> None:
    graph.graph.outputs[0].name = "scores"


def other_opset(graph: Any) -> None:
    graph.graph.opset_imports[""] = 99


def open_heads(graph: Any) -> None:
    graph.graph.inputs[3].shape = onnx_ir.Shape(["n", "heads", "past", 8])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (rename_input, "model.onnx asks for mask, an input that is not in Optimum's layout"),
        (drop_caches, "model.onnx has no output present.0.key"),
        (rename_outputs, "model.onnx has no input or output logits"),
        (other_opset, "model.onnx: ONNX Runtime .* cannot load it: .*Opset 99"),
        (open_heads, r"past_key_values.0.key has the shape \[n, heads, past, 8\], which is none"),
    ],
)
def test_files_of_another_layout(llama: Exported, tmp_path: Path, change: Any, text: str) -> None:
    path = changed(llama.path, tmp_path / "changed", onnx_files.SINGLE, change)
    with pytest.raises(ModelError, match=text) as refused:
        load(path)
    assert str(refused.value).startswith(f"Model {path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
def test_truncated_files(llama: Exported, tmp_path: Path, part: float) -> None:
    path = tmp_path / "cut"
    shutil.copytree(llama.path, path)
    content = (path / onnx_files.SINGLE).read_bytes()
    (path / onnx_files.SINGLE).write_bytes(content[: int(part * len(content))])
    with pytest.raises(ModelError, match=r"model.onnx: ONNX Runtime \S+ cannot load it: ") as cut:
        load(path)
    assert "\n" not in str(cut.value)


def test_missing_files_name_the_command(tmp_path: Path) -> None:
    save_model(tmp_path / "plain", CONFIGS["llama"])
    text = "no ONNX files .*model.onnx.* `text-generation-server convert-to-onnx .*plain TARGET`"
    with pytest.raises(ModelError, match=text):
        load(tmp_path / "plain")


def test_files_in_a_folder_of_their_own(llama: Exported, tmp_path: Path) -> None:
    """As on the Hub, with variants beside the plain file."""
    path = tmp_path / "hub"
    shutil.copytree(llama.path, path)
    (path / "onnx").mkdir()
    (path / onnx_files.SINGLE).rename(path / "onnx" / onnx_files.SINGLE)
    (path / "onnx" / "model_quantized.onnx").write_bytes(b"not to be opened")
    joining_and_leaving(llama.model, load(path))
    (path / "onnx" / onnx_files.SINGLE).rename(path / "onnx" / "model_quantized.onnx")
    joining_and_leaving(llama.model, load(path))


def test_without_the_library(llama: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    text = r"DEPLOYMENT_FRAMEWORK = hf_optimum_ort needs ONNX Runtime .*pip install 'tgis\[ort\]'"
    with pytest.raises(ConfigError, match=text):
        load(llama.path)


def test_a_start_token_is_needed(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIGS["t5"])
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / name).read_text())
        assert content.pop("decoder_start_token_id") == START
        (tmp_path / name).write_text(json.dumps(content | {"bos_token_id": None}))
    with pytest.raises(ModelError, match=r"config.json has no decoder_start_token_id"):
        load(tmp_path)


def test_models_are_not_split(llama: Exported) -> None:
    config = Config(model_name=str(llama.path), deployment_framework=ort.NAME, num_shard=2)
    group = cast(Group, SimpleNamespace(shard=SimpleNamespace(world_size=2)))
    text = "num_shard = 2: DEPLOYMENT_FRAMEWORK = hf_optimum_ort does not split models"
    with pytest.raises(ModelError, match=text):
        load_engine(config, resolve(config), group=group)
