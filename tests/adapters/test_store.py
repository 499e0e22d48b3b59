"""The store of adapters: no id leads out of it, and no change of a file goes unseen."""

import contextlib
import os
import random
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgis.adapters.store import Refused, Store, is_valid_id
from tgis.types import AdapterKind, Cause

opened: list[Any] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append(arguments[0])


sys.addaudithook(_note)


@contextlib.contextmanager
def opens() -> Iterator[list[Any]]:
    """What is opened in the block, as the audit hook sees it."""
    global opened
    opened = []
    try:
        yield opened
    finally:
        opened = None


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store beside things that are nobody's business."""
    store = tmp_path / "store"
    (store / "good" / "nested").mkdir(parents=True)
    (store / "good" / "decoder.pt").write_bytes(b"inside")
    (store / "good" / "nested" / "decoder.pt").write_bytes(b"nested")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "decoder.pt").write_bytes(b"outside")
    (tmp_path / "store-2").mkdir()
    (tmp_path / "store-2" / "decoder.pt").write_bytes(b"outside")
    (store / "link_in").symlink_to("good/nested")
    (store / "link_out").symlink_to(secret)
    (store / "link_sideways").symlink_to("../store-2")
    (store / "loop").symlink_to("loop")
    (store / "file").write_bytes(b"not a directory")
    (store / "linked_file").mkdir()
    (store / "linked_file" / "decoder.pt").symlink_to(secret / "decoder.pt")
    (store / "shared_file").mkdir()
    (store / "shared_file" / "decoder.pt").symlink_to("../good/decoder.pt")
    return store


def read(root: Path, adapter_id: str) -> bytes:
    with Store(str(root)).open(adapter_id) as directory:
        return directory.read("decoder.pt", 100)


def test_directories_nested_ones_and_links_inside(root: Path) -> None:
    assert read(root, "good") == b"inside"
    assert read(root, "good/") == b"inside"
    assert read(root, "good//nested") == b"nested"
    assert read(root, "link_in") == b"nested"
    assert read(root, "shared_file") == b"inside"


@pytest.mark.parametrize(
    "adapter_id", ["link_out", "link_sideways", "loop", "file", "none", "good/none", "-", "_"]
)
def test_what_is_not_a_directory_of_the_store(root: Path, adapter_id: str) -> None:
    with pytest.raises(Refused) as refused:
        read(root, adapter_id)
    assert refused.value.cause is Cause.MISSING
    assert "directory does not exist" in str(refused.value)


def test_a_file_that_is_a_link_out(root: Path) -> None:
    with opens() as seen, pytest.raises(Refused, match=r"decoder.pt cannot be read"):
        read(root, "linked_file")
    assert not any("secret" in str(path) for path in seen)


def test_a_root_that_is_not_there_or_is_a_link(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused):
        read(tmp_path / "none", "good")
    (tmp_path / "link").symlink_to(root)
    assert read(tmp_path / "link", "good") == b"inside"


def hostile_ids(count: int) -> Iterator[str]:
    """Traversals, absolute ones, links, NUL, unicode dots, long ones, and noise."""
    chance = random.Random(9)
    parts = [
        *("..", ".", "...", "~", "\0", "link_out", "link_sideways", "linked_file", "loop", "good"),
        *("․․", "．．", "‥", "%2e%2e", "\\..\\", "secret", "store-2", "etc", "passwd", "proc"),
        *("\n", "💥", "ﬀ", "é", "\ud800", " ", "a" * 300, "decoder.pt", "file", ""),
    ]
    yield from ("/etc/passwd", "/", "//", "a" * (1 << 20), "/" * (1 << 20), "../" * 400_000, "")
    for _ in range(count):
        pieces = chance.choices(parts, k=chance.randint(1, 6))
        yield chance.choice(("/", "", "//", "/../")).join(pieces)


def test_hostile_ids_open_nothing_outside(root: Path, tmp_path: Path) -> None:
    """Every open is of the root itself, or of one name in a directory opened before."""
    store, outside = Store(str(root)), 0
    with opens() as seen:
        for adapter_id in hostile_ids(10_000):
            with contextlib.suppress(Refused), store.open(adapter_id) as directory:
                with contextlib.suppress(Refused):
                    assert directory.read("decoder.pt", 100) != b"outside"
                outside += directory.identity() == ()
    names = {str(path) for path in seen if not isinstance(path, int)}  # not what is open already
    assert names <= {str(root), *(p.name for p in root.rglob("*"))}
    assert not names & {"link_out", "link_sideways", "loop"}


@given(st.text(max_size=40) | st.text(alphabet="./\\\0a_-", max_size=40))
def test_valid_ids_have_no_dots_and_are_relative(adapter_id: str) -> None:
    if is_valid_id(adapter_id):
        assert not adapter_id.startswith("/")
        assert not set(adapter_id) & set(string.punctuation + string.whitespace + "\0") - set("_-/")


def test_a_directory_swapped_for_a_link_meanwhile(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between resolving and opening, `good` becomes a link to the outside."""
    real = os.path.realpath

    def swap(path: Any, **options: Any) -> str:
        found = real(path, **options)
        if found.endswith("good"):
            (root / "good").rename(tmp_path / "old")
            (root / "good").symlink_to(tmp_path / "secret")
        return found

    monkeypatch.setattr(os.path, "realpath", swap)
    with pytest.raises(Refused):
        read(root, "good")


def identity(root: Path, adapter_id: str = "good") -> Any:
    with Store(str(root)).open(adapter_id) as directory:
        return directory.identity()


def test_changes_are_seen(root: Path) -> None:
    first = identity(root)
    assert identity(root) == first
    file = root / "good" / "decoder.pt"
    times = file.stat()
    file.write_bytes(b"INSIDE")  # as long as before, and dated back
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = identity(root)
    assert second != first
    other = root / "good" / "new"
    other.write_bytes(b"INSIDE")
    other.rename(file)
    third = identity(root)
    assert third not in (first, second)
    (root / "good" / "encoder.pt").write_bytes(b"more")
    assert identity(root) != third
    file.unlink()
    (root / "good" / "encoder.pt").unlink()
    assert identity(root) == ()


def test_pipes_and_devices_are_not_opened(root: Path) -> None:
    os.mkfifo(root / "good" / "encoder.pt")
    with Store(str(root)).open("good") as directory, pytest.raises(Refused):
        directory.read("encoder.pt", 100)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"decoder.pt": ""}, AdapterKind.PROMPT),
        ({"encoder.pt": ""}, AdapterKind.PROMPT),
        ({"adapter_model.bin": ""}, AdapterKind.PROMPT),
        ({"adapter_model.safetensors": ""}, AdapterKind.PROMPT),
        ({"adapter_config.json": '{"peft_type": "PROMPT_TUNING"}'}, AdapterKind.PROMPT),
        ({"adapter_config.json": '{"peft_type": "LORA"}'}, AdapterKind.LORA),
        ({"adapter_config.json": '{"peft_type": "IA3"}'}, "IA3"),
        ({"adapter_config.json": '{"peft_type": null}'}, "None"),
        ({"adapter_config.json": '{"peft_type": ["LORA"]}'}, "None"),
        ({"adapter_config.json": "{}"}, "None"),
        ({"adapter_config.json": "[1]"}, "adapter_config.json is not a JSON object"),
        ({"adapter_config.json": "{"}, "adapter_config.json is not a JSON object"),
        ({"adapter_config.json": "[" * 100_000}, "adapter_config.json is not a JSON object"),
        ({"adapter_config.json": "\ufeff\ud800"}, "adapter_config.json is not a JSON object"),
        ({"adapter_config.json": " " * (2 << 20)}, "exceeds the limit"),
        ({"adapter_model.swp": "", "decoder.pt.swp": ""}, "no adapter_config.json found"),
        ({"adapter_model.txt": ""}, "no adapter_config.json found"),
        ({}, "no adapter_config.json found"),
    ],
)
def test_kinds(tmp_path: Path, files: dict[str, str], expected: AdapterKind | str) -> None:
    (tmp_path / "a").mkdir()
    for name, text in files.items():
        (tmp_path / "a" / name).write_bytes(text.encode(errors="surrogatepass"))
    with Store(str(tmp_path)).open("a") as directory:
        if isinstance(expected, AdapterKind):
            assert directory.kind() is expected
        else:
            with pytest.raises(Refused) as refused:
                directory.kind()
            assert expected in str(refused.value)


def test_ids(root: Path) -> None:
    """What leads out is listed too: whoever looks should see that it is not served."""
    assert list(Store(str(root)).ids()) == [
        *("good", "good/nested", "link_in", "link_out", "link_sideways"),
        *("linked_file", "shared_file"),
    ]
