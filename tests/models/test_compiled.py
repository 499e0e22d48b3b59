"""Compiled decoders against `transformers`, and against themselves uncompiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.models.lora_twins import random_lora, targets
from tests.models.twins import CONFIGS, Twin, load_engine, make_twin, random_ids, save_checkpoint

from tgis.clib import BuildError
from tgis.engines.plan import Row, StepPlan, Want
from tgis.models import compiled as compiling
from tgis.models.compiled import Compiled
from tgis.models.compiler import LIBRARY, Description
from tgis.models.decoder import Decoder
from tgis.models.spec import Norm

# Compilers take minutes where many share the cores.
pytestmark = [pytest.mark.usefixtures("single_thread"), pytest.mark.timeout(600)]

# A topology, norm, activation, multiplier and kind of positions each; to compile one takes seconds.
SLOW = ("gpt_neox", "bloom", "gpt_bigcode", "granite", "falcon-11b")
NAMES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", params=NAMES)
def twin(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Twin:
    path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(path, CONFIGS[request.param])
    made = make_twin(path)
    assert made.engine.compile(cache)
    return made


def test_steps_of_all_kinds(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of prompts beside sequences that decode; one row and many; with and without logits."""
    monkeypatch.delattr(Decoder, "_network")  # which would compute uncompiled
    sequences = {slot: random_ids(slot, 40) for slot in range(4)}
    expected = {slot: twin.expected(ids) for slot, ids in sequences.items()}
    steps: list[list[tuple[int, int, int, Want]]] = [
        [(0, 0, 1, Want.LAST)],
        [(0, 1, 2, Want.LAST)],
        [(0, 2, 3, Want.NOTHING)],
        [(1, 0, 20, Want.NOTHING)],
        [(1, 20, 30, Want.LAST), (0, 3, 4, Want.LAST), (2, 0, 9, Want.ALL)],
        [(0, 4, 5, Want.LAST), (1, 30, 31, Want.LAST), (2, 9, 10, Want.LAST)],
        [(3, 0, 40, Want.ALL)],
        [(2, 10, 40, Want.LAST), (1, 31, 40, Want.NOTHING)],
        [(0, 5, 9, Want.ALL)],
    ]
    for step in steps:
        rows = [Row(s, s, sequences[s][a:b], a, want) for s, a, b, want in step]
        firsts = {Want.ALL: 0, Want.LAST: -1}
        parts = [
            expected[s][a:b][firsts[want] :] for s, a, b, want in step if want is not Want.NOTHING
        ]
        found = twin.step(*rows)
        wanted = torch.cat(parts) if parts else torch.empty(0, found.shape[1])
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-4)


def test_greedy_tokens(twin: Twin) -> None:
    ids = random_ids(11, 8)
    logits = twin.all_logits(ids)[-1:]
    while len(ids) < 60:
        ids.append(int(logits.argmax()))
        logits = twin.step(Row(0, 0, ids[-1:], len(ids) - 1, Want.LAST))
    expected = twin.expected(ids)[7:-1].argmax(-1)
    assert ids[8:] == expected.tolist()


def test_adapters_need_no_compilation(twin: Twin) -> None:
    found = targets(twin.engine)
    for handle in (1, 2):
        twin.engine.attach(handle, random_lora(found.values(), (4, 8), seed=handle))
    plan = StepPlan(
        [
            Row(0, 0, random_ids(1, 7), 0, Want.LAST, lora=1),
            Row(1, 1, random_ids(2, 1), 0, Want.LAST),
            Row(2, 2, random_ids(3, 5), 0, Want.ALL, lora=2),
        ]
    )
    with_adapters = twin.engine.forward(plan).clone()
    assert twin.engine.deviation(plan) < 1e-5
    for row in plan.rows:
        row.lora = 0
    assert (twin.engine.forward(plan)[0] - with_adapters[0]).abs().max() > 0.01
    twin.engine.detach(1)
    twin.engine.detach(2)


def test_an_error_keeps_its_type(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = twin.engine._decoder.blocks[1].mlp_out

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise MemoryError("no room")

    plan = StepPlan([Row(0, 0, random_ids(1, 3), 0, Want.LAST)])
    before = twin.engine.forward(plan).clone()
    with monkeypatch.context() as patch:
        patch.setattr(layer, "layer", fails)
        with pytest.raises(MemoryError, match="no room"):
            twin.engine.forward(plan)
    assert torch.equal(twin.engine.forward(plan), before)


def test_what_was_compiled_is_found_again(
    twin: Twin, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "_compile", None)
    again = load_engine(twin.path)
    assert not again.compile(cache)
    plan = StepPlan([Row(0, 0, random_ids(1, 3), 0, Want.LAST)])
    assert torch.equal(again.forward(plan), twin.engine.forward(plan))


def test_a_broken_file_is_made_anew(
    twin: Twin, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = cache / compiling._digest(compiling._describe(twin.engine._decoder))
    made = counting_copies(good, monkeypatch)
    kept = tmp_path / good.name
    kept.mkdir()
    killed = tmp_path / "making-0"
    killed.mkdir()
    os.utime(killed, (0, 0))
    (kept / LIBRARY).write_bytes((good / LIBRARY).read_bytes()[:1000])
    engine = load_engine(twin.path)
    assert engine.compile(tmp_path)
    assert not engine.compile(tmp_path)
    assert len(made) == 1
    assert [path.name for path in tmp_path.iterdir()] == [good.name]


def counting_copies(good: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Instead of compiling take what is there; returns where it was put."""
    made: list[Path] = []

    def copy(about: Description, into: Path) -> None:
        for path in good.iterdir():
            (into / path.name).write_bytes(path.read_bytes())
        made.append(into)

    monkeypatch.setattr(compiling, "_compile", copy)
    return made


def test_a_place_that_cannot_be_written(
    twin: Twin,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    good = cache / compiling._digest(compiling._describe(twin.engine._decoder))
    made = counting_copies(good, monkeypatch)
    (tmp_path / "file").touch()
    engine = load_engine(twin.path)
    with caplog.at_level("INFO", compiling.__name__):
        assert engine.compile(tmp_path / "file" / "cache")
    (line,) = caplog.messages
    assert line.endswith("Not a directory; what is compiled is not kept")
    assert not made[0].exists()
    assert twin.engine.deviation(StepPlan([Row(0, 0, [1, 2], 0, Want.LAST)])) < 1e-5


def test_the_compiler_is_not_imported(twin: Twin, cache: Path) -> None:
    """So nothing can be compiled in a process that serves, and no start pays for the import."""
    code = f"""
import sys, json, pathlib, torch
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.plan import Row, StepPlan, Want
path = pathlib.Path({str(twin.path)!r})
engine = native.load(path, json.loads((path / "config.json").read_text()), torch.float32)
engine.allocate(CacheShape(2, 96))
for is_compiled in (False, True):
    if is_compiled:
        assert not engine.compile(pathlib.Path({str(cache)!r}))
    for ids in ([1, 2, 3], [4], [5]):
        engine.forward(StepPlan([Row(0, 0, ids, 0, Want.LAST)]))
print(sorted({{"torch._dynamo", "torch._inductor", "sympy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIGS["llama"])
    decoder = load_engine(tmp_path)._decoder
    library = tmp_path / LIBRARY
    library.write_bytes(b"no library")
    with pytest.raises(BuildError, match=r"^compiled code cannot be loaded: .*file too short$"):
        Compiled(decoder, library)


@pytest.mark.slow
def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = Norm("layer", 1e-5)
    about = Description("float32", 1, "shared", 8, 24, 8, 16, 32, norm, "gelu", False, 1.0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"^no C\+\+ compiler \(g\+\+ or clang\+\+\) on the path$"):
        compiling._compile(about, tmp_path)
    assert list(tmp_path.iterdir()) == []
