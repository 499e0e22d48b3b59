"""Models from a hub on loopback into the cache, whatever happens on the way."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from tests.hub.test_resolve import found
from tests.kit.hub_server import COMMIT, Hub, Repo, run_hub
from tests.kit.processes import wait_until
from tests.models.twins import CONFIGS, save_checkpoint

from tgis.cli.server import main
from tgis.config import Config
from tgis.engines.registry import load_engine
from tgis.hub import download as module
from tgis.hub import transfer
from tgis.hub.download import choose, fetch, look_up
from tgis.hub.resolve import locate, resolve

NAME = "some-org/some-model"
ADDRESS = "{repo_id}/resolve/{revision}/{filename}"
BIG = bytes(range(256)) * 400
WEIGHTS = "model.safetensors"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    WEIGHTS: BIG,
    "README.md": b"# x",
    "training_args.bin": b"?",
    "notes.txt": b"?",
    "onnx/model.safetensors": b"?",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with run_hub({NAME: Repo(dict(FILES))}) as hub:
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0))
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
            monkeypatch.delenv(name, raising=False)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hub"


def download(*arguments: str, name: str = NAME) -> int:
    return main(["download-weights", name, *arguments])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, name: str = NAME) -> str:
    """The one line that says why a download failed."""
    capsys.readouterr()
    assert download(*arguments, name=name) == 1
    *_, line = capsys.readouterr().err.splitlines()
    prefix = f"text-generation-server: Model {name}: "
    assert line.startswith((prefix, "text-generation-server: "))
    return line.removeprefix(prefix).removeprefix("text-generation-server: ")


def root(cache: Path) -> Path:
    return cache / ("models--" + NAME.replace("/", "--"))


def partial(hub: Hub, cache: Path) -> Path:
    path = root(cache) / "blobs" / hub.repos[NAME].etag(WEIGHTS)
    return path.with_name(path.name + ".incomplete")


def test_tgis_chooses_these_files() -> None:
    files = ["a.safetensors", "a.bin", "training_args.bin", "my_arguments.json", "x.json", "a.md"]
    assert choose(files, (".safetensors", ".json")) == ["a.safetensors", "x.json"]
    assert choose(files, (".bin",)) == ["a.bin"]
    assert choose(files, (".h5",)) == []


@pytest.mark.parametrize(
    ("extension", "files"),
    [
        (None, [WEIGHTS, "README.md", "config.json", "tokenizer.json"]),
        (".bin", ["README.md", "config.json", "tokenizer.json"]),
        (".safetensors,.json", [WEIGHTS, "config.json", "tokenizer.json"]),
        (".json", ["config.json", "tokenizer.json"]),
        (".h5,.json", ["config.json", "tokenizer.json"]),
    ],
)
def test_a_model_comes_into_the_cache(
    hub: Hub,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    extension: str | None,
    files: list[str],
) -> None:
    assert download(*(["--extension", extension] if extension else [])) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        f"Downloading {len(files)} files for model {NAME}",
        f"Model {NAME} already has a fast tokenizer",
    ]
    snapshot = locate(NAME, None, str(cache))
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(files)
    for name in files:
        assert (snapshot / name).read_bytes() == FILES[name]
        link = (snapshot / name).readlink()
        assert link == Path("../../blobs", hub.repos[NAME].etag(name))


def test_the_librarys_own_functions_know_the_cache(hub: Hub, cache: Path) -> None:
    assert download() == 0
    before = len(hub.seen)
    path = huggingface_hub.hf_hub_download(NAME, WEIGHTS, revision=COMMIT, cache_dir=cache)
    assert len(hub.seen) == before
    assert Path(path).read_bytes() == BIG
    theirs = huggingface_hub.snapshot_download(NAME, cache_dir=cache / "theirs")
    for link in locate(NAME, None, str(cache)).iterdir():
        assert link.readlink() == Path(theirs, link.name).readlink()
    info = huggingface_hub.scan_cache_dir(cache)
    assert [str(warning) for warning in info.warnings if "theirs" not in str(warning)] == []
    (repo,) = info.repos
    assert (repo.repo_id, repo.refs.keys()) == (NAME, {"main"})


def test_a_second_run_fetches_nothing(hub: Hub) -> None:
    assert download() == 0
    hub.seen.clear()
    assert download() == 0
    assert [seen.path for seen in hub.seen] == [f"/api/models/{NAME}/revision/main"]


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", COMMIT])
def test_a_revision(hub: Hub, cache: Path, revision: str) -> None:
    hub.repos[NAME].revisions = ("v1.0", "refs/pr/3")
    assert download("--revision", revision) == 0
    assert (locate(NAME, revision, str(cache)) / WEIGHTS).read_bytes() == BIG
    refs = [path for path in root(cache).glob("refs/**/*") if path.is_file()]
    assert [path.relative_to(root(cache) / "refs").as_posix() for path in refs] == (
        [] if revision == COMMIT else [revision]
    )


def test_a_cut_connection_is_resumed_where_it_was_cut(hub: Hub, cache: Path) -> None:
    hub.faults.cut[WEIGHTS] = [30_000, 20_000, 10_000]
    assert download() == 0
    assert hub.gets(WEIGHTS)[1::2] == ["", "bytes=30000-", "bytes=50000-", "bytes=60000-"]
    assert (locate(NAME, None, str(cache)) / WEIGHTS).read_bytes() == BIG


def test_what_has_come_outlives_a_failed_run(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults.cut[WEIGHTS] = [30_000, 0, 0, 0]
    text = refusal(capsys)
    assert text.startswith(f"cannot reach {hub.endpoint}: ")
    assert text.endswith("what has come is kept, run the command again to go on")
    assert partial(hub, cache).read_bytes() == BIG[:30_000]
    assert not (root(cache) / "refs").exists()
    hub.seen.clear()
    hub.faults.cut.clear()
    assert download() == 0
    assert hub.gets(WEIGHTS) == ["bytes=30000-"] * 2
    assert (locate(NAME, None, str(cache)) / WEIGHTS).read_bytes() == BIG


def test_an_overloaded_hub_is_asked_again(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.status[WEIGHTS] = [503, 429]
    assert download() == 0
    hub.repos[NAME].commit = "f" * 40
    hub.repos[NAME].files[WEIGHTS] = BIG * 2
    hub.faults.status[WEIGHTS] = [503] * 9
    assert "answers with status 503" in refusal(capsys, "--revision", "main")


def write_partial(hub: Hub, cache: Path, content: bytes) -> None:
    path = partial(hub, cache)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "ranges"),
    [
        (BIG[:5000], ["bytes=5000-"]),
        (BIG, []),
        (b"?" * 5000, ["bytes=5000-", ""]),
        (b"?" * len(BIG), [""]),
        (BIG + b"?", [""]),
    ],
    ids=["a part", "all", "another part", "other bytes", "too much"],
)
def test_what_an_earlier_run_left(hub: Hub, cache: Path, content: bytes, ranges: list[str]) -> None:
    write_partial(hub, cache, content)
    assert download() == 0
    assert hub.gets(WEIGHTS)[::2] == ranges
    assert (locate(NAME, None, str(cache)) / WEIGHTS).read_bytes() == BIG


@pytest.mark.parametrize("fault", ["no_ranges", "no_size"])
def test_a_server_without_ranges_or_sizes(hub: Hub, cache: Path, fault: str) -> None:
    write_partial(hub, cache, BIG[:5000])
    getattr(hub.faults, fault).add(WEIGHTS)
    assert download() == 0
    assert (locate(NAME, None, str(cache)) / WEIGHTS).read_bytes() == BIG


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_other_bytes_than_promised_are_not_kept(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    hub.faults.corrupt.add(name)
    etag = hub.repos[NAME].etag(name)
    assert refusal(capsys) == (
        f"{name}: the hub sent {len(FILES[name])} bytes that do not match their checksum {etag};"
        " they are deleted, run the command again"
    )
    assert not list(root(cache).glob(f"blobs/{etag}*"))
    assert download() == 0
    assert (locate(NAME, None, str(cache)) / name).read_bytes() == FILES[name]


def test_fewer_bytes_than_promised(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.short.add(WEIGHTS)
    text = f"{WEIGHTS}: the hub sent {len(BIG) // 2} bytes and ended, but promised {len(BIG)}; "
    assert refusal(capsys).startswith(text)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("nobody/nothing", [], "not found on {hub}, or private; check the name, or give a token"),
        ("nobody/nothing", ["--token", "known"], "not found on {hub}, or private; check the name"),
        ("a/private", [], "not found on {hub}, or private; check the name, or give a token that"),
        ("a/gated", [], "it is gated; accept its terms at {hub}/a/gated and give a token of that"),
        ("a/gated", ["--token", "other"], "it is gated; accept its terms at {hub}/a/gated and"),
        (NAME, ["--token", "bad"], "{hub} refuses the token; give a valid one with HF_TOKEN or"),
        (NAME, ["--revision", "v9"], "it has no revision v9; --revision must be a branch, a tag"),
        ("a/b/c", [], "that is no name of a model on the hub; expected NAME or ORGANISATION/NAME"),
        ("a/holes", [], "{hub} lists the file gone.json at revision main, but does not have it"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    hub: Hub,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    arguments: list[str],
    text: str,
) -> None:
    hub.repos |= {
        "a/private": Repo(dict(FILES), private=True, readers=("known",)),
        "a/gated": Repo(dict(FILES), gated=True, readers=("known",)),
        "a/other": Repo({}, readers=("other",)),
        "a/holes": Repo({"gone.json": b"{}"}),
    }
    hub.faults.missing.add("gone.json")
    assert refusal(capsys, *arguments, name=name).startswith(text.format(hub=hub.endpoint))
    assert not list(cache.glob("models--*/snapshots/*/*"))
    assert not list(cache.glob("models--*/refs"))


@pytest.mark.parametrize("source", ["--token", "HF_TOKEN"])
def test_the_token_goes_to_the_hub_alone(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    hub.repos[NAME].private = hub.repos[NAME].gated = True
    hub.repos[NAME].readers = ("secret",)
    if source == "HF_TOKEN":
        monkeypatch.setenv(source, "secret")
    assert download(*(["--token", "secret"] if source == "--token" else [])) == 0
    tokens = {(seen.host.partition(":")[0], seen.token) for seen in hub.seen}
    assert tokens == {("127.0.0.1", "secret"), ("localhost", "")}


def test_no_network(
    monkeypatch: pytest.MonkeyPatch,
    hub: Hub,
    capsys: pytest.CaptureFixture[str],
    free_port: int,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port}")
    text = refusal(capsys)
    assert text.startswith(f"cannot reach http://127.0.0.1:{free_port}: ConnectError: ")
    assert "check the network, proxy and HF_ENDPOINT" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal(capsys) == "HF_HUB_OFFLINE is set; unset it to download"


def test_the_old_revision_serves_until_the_new_one_is_complete(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert download() == 0
    old = locate(NAME, None, str(cache))
    hub.repos[NAME] = Repo({**FILES, WEIGHTS: b"new" * 1000}, commit="f" * 40)
    hub.faults.cut[WEIGHTS] = [10, 0, 0, 0]
    refusal(capsys)
    assert locate(NAME, None, str(cache)) == old
    assert download() == 0
    assert (locate(NAME, None, str(cache)) / WEIGHTS).read_bytes() == b"new" * 1000


def test_two_downloads_at_once_share_the_work(hub: Hub, cache: Path) -> None:
    repository = look_up(NAME, None, None)
    threads = [
        threading.Thread(target=fetch, args=(repository, [WEIGHTS], cache, 1)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hub.gets(WEIGHTS)) == 2  # the hub's answer and where it redirects to
    assert (locate_weights(cache)).read_bytes() == BIG
    assert not list(root(cache).glob("blobs/*.incomplete"))


def locate_weights(cache: Path) -> Path:
    return root(cache) / "snapshots" / COMMIT / WEIGHTS


def test_two_files_of_one_content(hub: Hub, cache: Path) -> None:
    hub.repos[NAME].files["copy.safetensors"] = BIG
    assert download() == 0
    snapshot = locate(NAME, None, str(cache))
    assert (snapshot / "copy.safetensors").read_bytes() == (snapshot / WEIGHTS).read_bytes() == BIG


def test_a_file_system_without_links(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert download() == 0
    path = locate(NAME, None, str(cache)) / WEIGHTS
    assert path.read_bytes() == BIG
    assert not path.is_symlink()


def test_files_too_large_for_plain_http_are_left_to_the_library(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(*args: object, **settings: object) -> str:
        calls.append(args)
        return huggingface_hub.hf_hub_download(*args, **settings)

    monkeypatch.setattr(module, "hf_hub_download", record)
    monkeypatch.setattr(module, "constants", SimpleNamespace(MAX_HTTP_DOWNLOAD_SIZE=len(BIG) - 1))
    assert download() == 0
    assert calls == [(NAME, WEIGHTS)]
    assert (locate(NAME, None, str(cache)) / WEIGHTS).read_bytes() == BIG


@pytest.mark.parametrize("revision", ["../../../x", "/x", "a/../b"])
def test_a_revision_is_no_path(hub: Hub, revision: str, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos[NAME].revisions = (revision,)
    assert "has no revision" in refusal(capsys, "--revision", revision)


def test_a_hub_that_names_paths(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = hub.repos[NAME]
    monkeypatch.setattr(Repo, "etag", lambda self, path: "../../../etag")
    assert "gives it no usable ETag" in refusal(capsys)
    repo.commit = "../../x"
    assert "does not answer as a hub does" in refusal(capsys)
    assert not cache.exists() or not list(cache.glob("**/etag*"))


# Weights that the hub has in PyTorch's format only


def pytorch_model(tmp_path: Path) -> dict[str, bytes]:
    path = tmp_path / "source"
    path.mkdir()
    save_checkpoint(path, CONFIGS["llama"])
    from safetensors.torch import load_file

    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    (path / WEIGHTS).unlink()
    return {file.name: file.read_bytes() for file in path.iterdir()} | {"tokenizer.json": b"{}"}


def test_pytorch_weights_are_fetched_converted_and_loaded(
    hub: Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos[NAME].files = pytorch_model(tmp_path) | {"training_args.bin": b"?"}
    count = len(hub.repos[NAME].files) - 2
    assert download() == 0
    fetched = [
        f"Downloading {count} files for model {NAME}",
        ".safetensors weights not found, downloading pytorch weights to convert...",
        f"Downloading 1 files for model {NAME}",
        ".safetensors weights not found, converting from pytorch weights...",
        "Converting pytorch_model.bin (1 of 1)",
        f"Model {NAME} already has a fast tokenizer",
    ]
    assert capsys.readouterr().out.splitlines() == fetched
    config = Config(model_name=NAME, hf_hub_cache=str(cache), dtype="float32")
    engine = load_engine(config, resolve(config))
    assert engine.caps.vocab_size == 131
    assert download() == 0
    assert capsys.readouterr().out.splitlines() == [
        fetched[0],
        ".safetensors weights not found on hub, but were found locally. Remove them first to"
        " re-convert",
        fetched[-1],
    ]


def test_pytorch_weights_that_were_asked_for(
    hub: Hub, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos[NAME].files = pytorch_model(tmp_path)
    assert download("--extension", ".bin,.json", "--no_auto_convert") == 0
    assert capsys.readouterr().out == f"Downloading 4 files for model {NAME}\n"
    assert download("--extension", ".safetensors,.bin,.json") == 0
    assert ".safetensors weights not found, downloading" not in capsys.readouterr().out
    assert found(NAME, cache).weights == (WEIGHTS,)


def test_the_texts_that_a_tokenizer_is_made_of_come_too(
    hub: Hub, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "once", "upon"]
    del hub.repos[NAME].files["tokenizer.json"]
    hub.repos[NAME].files |= {
        "vocab.txt": "\n".join(words).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "BertTokenizer"}',
        "config.json": b'{"model_type": "bert", "vocab_size": 7}',
    }
    assert download() == 0
    snapshot = locate(NAME, None, str(cache))
    assert f"Saved tokenizer to {snapshot}" in capsys.readouterr().out
    assert (snapshot / "tokenizer.json").is_file()


# Whole processes


def command(hub: Hub, cache: Path) -> tuple[list[str], dict[str, str]]:
    program = [sys.executable, "-m", "tgis.cli.server", "download-weights", NAME]
    env = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(cache), "HOME": str(cache.parent)}
    return program, env


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_download_goes_on(
    hub: Hub, cache: Path, number: signal.Signals, code: int
) -> None:
    hub.faults.stall[WEIGHTS] = 40_000
    program, env = command(hub, cache)
    with subprocess.Popen(program, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert hub.stalled.wait(60)
        try:
            wait_until(lambda: partial(hub, cache).stat().st_size == 40_000)
        finally:
            process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "Traceback" not in errors
    if number == signal.SIGINT:
        assert errors.endswith("interrupted; what has come is kept, run the command again\n")
    assert partial(hub, cache).read_bytes() == BIG[:40_000]
    hub.faults.stall.clear()
    hub.seen.clear()
    assert download() == 0
    assert hub.gets(WEIGHTS) == ["bytes=40000-"] * 2
    assert (locate(NAME, None, str(cache)) / WEIGHTS).read_bytes() == BIG


def test_a_disk_that_fills_up(hub: Hub, cache: Path) -> None:
    program, env = command(hub, cache)
    limited = ["bash", "-c", 'ulimit -f 50; exec "$@"', "-", *program]  # of 1024 bytes
    done = subprocess.run(limited, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"text-generation-server: no room in {root(cache) / 'blobs'}: ")
    assert line.endswith("what has come is kept, run the command again to go on")
    assert partial(hub, cache).read_bytes() == BIG[: 50 * 1024]
    assert download() == 0
    assert hub.gets(WEIGHTS)[-1] == "bytes=51200-"


@pytest.mark.parametrize("known", [True, False], ids=["known before", "noticed on the way"])
def test_a_disk_that_is_too_small(hub: Hub, cache: Path, known: bool) -> None:
    if not known:
        hub.faults.no_size.add(WEIGHTS)
    program, env = command(hub, cache)
    cache.mkdir()
    mount = f'mount -t tmpfs -o size=64k tmpfs {cache} || exit 77; "$@"; code=$?;'
    mount += f" find {cache} -name '*.incomplete' | wc -l; exit $code"
    isolated = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "-", *program]
    env["PATH"] = os.environ["PATH"]
    done = subprocess.run(isolated, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this system lets nobody mount a file system of their own")
    assert done.returncode == 1
    assert f"no room in {root(cache) / 'blobs'}: " in done.stderr
    assert ("bytes are needed, " in done.stderr) is known
    begun = int(done.stdout.splitlines()[-1])  # a small file may have been on its way too
    assert begun == 0 if known else begun >= 1
