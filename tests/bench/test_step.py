"""`tgis bench step` on the demo model."""

import asyncio

import pytest
import torch

from tgis.bench.parts import PARTS, Sums, Timed, inside_engine
from tgis.bench.step import WARM_UP, StepBench, header, line
from tgis.cli.main import main
from tgis.config import Config
from tgis.errors import ConfigError
from tgis.models import kernels


@pytest.fixture(params=["bfloat16", "float32"])
def bench(request: pytest.FixtureRequest) -> StepBench:
    return StepBench(Config(dtype=request.param, threads=1))


def test_parts_make_up_the_step(bench: StepBench) -> None:
    result = asyncio.run(bench.run(rows=3, context=40, steps=8, profile=True))
    assert len(result.seconds) == 8
    parts = result.parts
    assert parts is not None
    assert list(parts) == list(PARTS)
    in_step = sum(seconds for part, seconds in parts.items() if part != "front")
    assert in_step == pytest.approx(sum(result.seconds) / 8)
    expected = set(PARTS) - ({"small kernels"} if "PyTorch" in kernels.describe() else set())
    assert {part for part, seconds in parts.items() if seconds > 0} == expected


def test_nothing_is_left_behind(bench: StepBench) -> None:
    for rows, context in ((2, 20), (1, 300), (4, 9)):
        result = asyncio.run(bench.run(rows, context, steps=3, profile=False))
        assert (result.rows, result.context, len(result.seconds)) == (rows, context, 3)
        assert result.parts is None
        assert bench._core.check() is None
        assert not bench._core._by_uid


def test_limits_are_said_before_anything_is_computed(bench: StepBench) -> None:
    with pytest.raises(ConfigError, match=r"--rows = 1000: at most 128"):
        asyncio.run(bench.run(1000, 8, 1, profile=False))
    with pytest.raises(ConfigError, match=r"--context = 1020: .* max_sequence_length \(1024\)"):
        asyncio.run(bench.run(1, 1020, 9, profile=False))


def test_the_table(bench: StepBench) -> None:
    for profile in (False, True):
        result = asyncio.run(bench.run(2, WARM_UP, 3, profile))
        columns = header(profile).splitlines()[0].count("|")
        assert line(result).count("|") == columns
        assert line(result).startswith("| 2 | 4 | ")


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--rows", "1", "2", "--steps", "2", "--threads", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("demo in ")
    assert [row.split(" | ")[0] for row in printed[3:]] == ["| 1", "| 2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("bench", "say what: tgis bench step"),
        ("bench step --rows 0", "0: must be at least 1"),
        ("bench step --bogus 1", "--bogus"),
        ("bench step --rows 4 --max-batch-size 2", "--rows = 4: at most 2"),
    ],
)
def test_wrong_arguments_are_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) != 0
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_stand_in_passes_on_and_counts() -> None:
    class Thing:
        size = 3

        def double(self, x: int) -> int:
            return 2 * x

        def fail(self) -> None:
            raise KeyError

    sums = Sums(float)
    timed = Timed(Thing(), "part", sums)
    assert timed.size == 3
    assert not sums
    assert [timed.double(2), timed.double(3)] == [4, 6]
    once = sums["part"]
    assert once > 0
    with pytest.raises(KeyError):
        timed.fail()
    assert sums["part"] > once


def test_the_last_layer_of_each_step_is_the_head() -> None:
    sums = Sums(float)
    x, small, large = torch.ones(64, 64), torch.ones(64, 64), torch.ones(20_000, 64)
    with inside_engine(sums, 3):
        for _ in range(3):
            torch.nn.functional.linear(x, small)
            torch.nn.functional.linear(x, large)
    assert sums["head"] > sums["linears"] > 0
