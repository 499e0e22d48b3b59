"""The options that begin with --ray."""

import importlib.util

import pytest

from tgis.cluster.options import HELP, RayOptions, require_ray, take_options
from tgis.errors import ConfigError


def test_words_are_split() -> None:
    words = ["model", "--ray", "--ray-replicas=1:3", "--port", "0", "--ray-routing", "prefix"]
    rest, options = take_options([*words, "--ray-cpus", "0.5", "--ray-address=auto"])
    assert rest == ["model", "--port", "0"]
    expected = RayOptions(
        address="auto", min_replicas=1, max_replicas=3, routing="prefix", cpus=0.5
    )
    assert options == expected


def test_without_ray_nothing_is_taken() -> None:
    assert take_options(["--port", "0"]) == (["--port", "0"], None)


def test_one_number_of_replicas() -> None:
    _, options = take_options(["--ray", "--ray-replicas", "4"])
    assert options is not None
    assert (options.min_replicas, options.max_replicas) == (4, 4)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--ray", "--ray-replica", "2"], "--ray-replica: unknown option; expected one of --ray-"),
        (["--ray", "--ray-replicas"], "--ray-replicas: has no value"),
        (["--ray", "--ray-replicas", "two"], "--ray-replicas='two': not a number"),
        (["--ray", "--ray-replicas", "0"], "--ray-replicas: out of range; expected N or MIN:MAX"),
        (["--ray", "--ray-replicas", "3:2"], "--ray-replicas: out of range"),
        (["--ray", "--ray-replicas", "1.5"], "--ray-replicas='1.5': not a number"),
        (["--ray", "--ray-routing", "random"], "expected least-loaded or prefix"),
        (["--ray", "--ray-target-requests", "0"], "expected a number above 0"),
        (["--ray", "--ray-gpus", "-1"], "--ray-gpus: out of range"),
        (["--ray-gpus", "1"], "--ray-gpus: has no effect without --ray"),
    ],
)
def test_bad_words(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        take_options(words)
    assert text in str(caught.value)


def test_help_lists_every_option() -> None:
    for name in ("address", "replicas", "routing", "cpus", "gpus", "target-requests"):
        assert f"--ray-{name} " in HELP


def test_without_the_package_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'tgis\[ray\]'"):
        require_ray()
