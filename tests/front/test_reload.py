"""Values that follow their files, by whatever way these change."""

import os
from pathlib import Path

import pytest

from tgis.front.reload import BadFileError, Watched
from tgis.observe.metrics import Limits, Metrics


def make(contents: list[bytes]) -> list[bytes]:
    if b"bad" in contents:
        raise BadFileError("it is bad")
    return contents


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Limits(16, 8, 4))


def watch(metrics: Metrics, *paths: Path) -> tuple[Watched[list[bytes]], list[list[bytes]]]:
    told: list[list[bytes]] = []
    return Watched("tls", paths, make, metrics, told.append), told


def reloads(metrics: Metrics, result: str) -> float:
    start = f'tgi_credentials_reload_count_total{{file="tls",result="{result}"}} '
    (line,) = [x for x in metrics.render().decode().splitlines() if x.startswith(start)]
    return float(line.split()[-1])


def settle(path: Path) -> None:
    """Make a file look as if it had not changed for long."""
    os.utime(path, (1e9, 1e9))


def test_nothing_happens_while_nothing_changes(tmp_path: Path, metrics: Metrics) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    watched, told = watch(metrics, path)
    for _ in range(3):
        watched.refresh()
    settle(path)
    watched.refresh()
    path.write_bytes(b"1")  # another time stamp, the same contents
    watched.refresh()
    assert watched.value == [b"1"]
    assert not told
    assert reloads(metrics, "success") == 0


@pytest.mark.parametrize("settled", [False, True])
def test_rewritten_in_place(tmp_path: Path, metrics: Metrics, settled: bool) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    if settled:
        settle(path)
    watched, told = watch(metrics, path)
    for text in (b"2", b"3", b"4"):  # of one size, within the granularity of time stamps
        path.write_bytes(text)
        watched.refresh()
        assert watched.value == [text]
    assert told == [[b"2"], [b"3"], [b"4"]]
    assert reloads(metrics, "success") == 3


def test_renamed_over(tmp_path: Path, metrics: Metrics) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    settle(path)
    watched, _ = watch(metrics, path)
    (tmp_path / "new").write_bytes(b"2")
    settle(tmp_path / "new")  # nothing but the inode tells
    (tmp_path / "new").rename(path)
    watched.refresh()
    assert watched.value == [b"2"]


def test_link_swapped_as_kubernetes_does(tmp_path: Path, metrics: Metrics) -> None:
    for name in ("..1", "..2"):
        (tmp_path / name).mkdir()
        for file in ("a", "b"):
            (tmp_path / name / file).write_bytes((file + name).encode())
            settle(tmp_path / name / file)
    (tmp_path / "..data").symlink_to("..1")
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.symlink_to(f"..data/{path.name}")
    watched, told = watch(metrics, *paths)
    assert watched.value == [b"a..1", b"b..1"]
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    watched.refresh()
    assert watched.value == [b"a..2", b"b..2"]
    assert len(told) == 1


def test_what_cannot_be_used_keeps_the_old_and_counts_once(
    tmp_path: Path, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"1")
    watched, told = watch(metrics, path)
    path.write_bytes(b"bad")
    for _ in range(3):
        watched.refresh()
    assert watched.value == [b"1"]
    assert reloads(metrics, "failure") == 1
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "it is bad" in record.getMessage()
    path.unlink()
    watched.refresh()
    assert watched.value == [b"1"]
    assert reloads(metrics, "failure") == 2
    path.write_bytes(b"2")
    watched.refresh()
    assert watched.value == [b"2"]
    assert told == [[b"2"]]


@pytest.mark.parametrize("content", [b"bad", None])
def test_there_must_be_a_first_value(
    tmp_path: Path, metrics: Metrics, content: bytes | None
) -> None:
    path = tmp_path / "f"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadFileError, match="it is bad" if content else "cannot read"):
        watch(metrics, path)
