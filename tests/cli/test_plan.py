"""`tgis plan`: what it prints and refuses."""

import json
import re
from pathlib import Path

import pytest
from benchmarks.models import shape_config

from tgis.cli.plan import plan
from tgis.errors import ConfigError, ModelError

NUMBER = r"\d[\d,.]*"


def test_prints_a_plan_for_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(["--qps", "1000", "--memory", "4GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    values = {line[:42].strip(): line[42:] for line in lines}
    assert int(values["replicas for this load"]) >= 1
    assert values["weights of a process"].endswith(" MiB")


def test_measured_figures_count(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--qps", "100", "--memory", "4GiB", "--first-token-ms", "28"]
    plan([*words, "--one-stream", "100", "--streams-32", "1200"])
    slow = capsys.readouterr().out
    plan([*words[:-1], "14", "--one-stream", "200", "--streams-32", "2400"])
    fast = capsys.readouterr().out
    replicas = [
        int(next(line for line in out.splitlines() if line.startswith("replicas"))[42:])
        for out in (slow, fast)
    ]
    assert replicas[0] == pytest.approx(2 * replicas[1], abs=1)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--qps"),
        (["--qps", "0"], "must be a number above 0"),
        (["--qps", "nan"], "must be a number above 0"),
        (["--qps", "1", "--memory", "lots"], "expected a number of bytes such as 4GiB"),
        (["--qps", "1", "--cached", "1.5"], "must be a number from 0 to 1"),
        (["--qps", "1", "--num-shard", "0"], "must be an integer from 1"),
        (["--qps", "1", "--one-stream", "5"], "give all three or none"),
        (["--qps", "1", "--memory", "1"], "more memory, a smaller dtype, or --num-shard"),
        (["--qps", "1", "--gap-ms", "0.00001"], "one sequence alone takes"),
    ],
)
def test_bad_words(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(words)
    assert text in str(caught.value)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="/no/model not found"):
        plan(["--qps", "1", "--model", "/no/model"])


def test_the_guide_shows_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    command = re.search(r"^tgis plan --model MODEL (.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    shown = re.search(r"^```\n(parameters .*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert command is not None
    assert shown is not None
    (tmp_path / "config.json").write_text(json.dumps(shape_config("M")))
    words = command[1].replace("\\\n", " ").split()
    assert plan(["--model", str(tmp_path), *words]) == 0
    printed = capsys.readouterr().out
    assert re.sub(NUMBER, "", printed) == re.sub(NUMBER, "", shown[1])
    # The guide's are of stored weights, which has the norms too.
    figures = [
        [float(text.replace(",", "")) for text in re.findall(NUMBER, page)]
        for page in (printed, shown[1])
    ]
    assert figures[0] == pytest.approx(figures[1], rel=0.01)
