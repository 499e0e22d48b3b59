"""`text-generation-server` as people call it; what its commands do is tested in `tests/hub`."""

import json
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.test_main import HEAVY
from tests.kit.client import connect_blocking
from tests.kit.hub_server import Repo, run_hub
from tests.kit.server import Server, free_ports, scrubbed_environment

from tgis import __version__
from tgis.cli.server import COMMANDS, launcher_flags, main
from tgis.config import parse

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "once", "upon"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the tester's; the cache is below `tmp_path`."""
    for name in ("HF_HOME", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRUST_REMOTE_CODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TERMINATION_LOG_DIR", str(tmp_path / "log"))


def bert(path: Path) -> Path:
    """A directory with the old files of a tokenizer."""
    path.mkdir(parents=True)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    (path / "config.json").write_text('{"model_type": "bert", "vocab_size": 7}')
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return path


def refusal(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one line on stderr."""
    assert main(argv) == code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("text-generation-server: ")
    return line.removeprefix("text-generation-server: ")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-V"], ["serve", "-h"], ["download_weights", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert f"text-generation-server {__version__}\n" in out


@pytest.mark.parametrize("argv", [["--help"], ["download-weights", "--help"], ["quantize", "x"]])
def test_help_and_errors_import_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from tgis.cli.server import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["nothing"], "argument COMMAND: invalid choice: 'nothing' (choose from "),
        (["quantize", "m"], "the following arguments are required: OUTPUT_DIR; "),
        (["quantize", "m", "out", "--act-order"], "--calibration-file: name a text file of the"),
        (["quantize", "m", "out", "--bits", "3"], "--bits=3: expected a number from 4 to 8"),
        (["quantize", "m", "out", "--group-size", "0"], "--group-size=0: expected a positive"),
        (["quantize", "m", "out", "--percdamp", "0"], "--percdamp=0.0: expected a number from"),
        (["convert-to-onnx", "m"], "the following arguments are required: TARGET; "),
        (["download-weights"], "the following arguments are required: MODEL_NAME; text-generation"),
        (["download-weights", "m", "--bogus"], "unrecognized arguments: --bogus; "),
        (["download-weights", "m", "--rev", "x"], "unrecognized arguments: --rev x; "),
        (["download-weights", "m", "--extension", "bin"], "--extension='bin': 'bin' is no exten"),
        (["download-weights", "m", "--extension", ".bin,"], "--extension='.bin,': '' is no exten"),
        (["download-weights", "m", "--workers", "0"], "--workers=0: expected an integer from 1 to"),
        (["download-weights", "m", "--workers", "x"], "argument --workers: invalid int value: 'x'"),
        (["download-weights", "m", "--token", "a\nb"], "--token: that is no token; expected one"),
        (["download-weights", "/tmp"], "/tmp: that is a directory, not a model on the hub"),
        (["serve", "m"], "the following arguments are required: DEPLOYMENT_FRAMEWORK; "),
        (["serve", "m", "tgis_native", "--sharded"], "RANK must be set when sharded is True"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], text: str
) -> None:
    assert refusal(capsys, *argv).startswith(text)


@pytest.mark.parametrize(
    "endpoint", ["hub.example", "ftp://x", "http://", "http://[x", "http://a:b"]
)
def test_a_wrong_endpoint(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    text = refusal(capsys, "download-weights", "m")
    assert text == f"HF_ENDPOINT='{endpoint}': expected a URL such as https://host"


def test_caches_that_contradict_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_CACHE", "/other")
    text = "TRANSFORMERS_CACHE and HF_HUB_CACHE env vars can't be set to different values"
    assert text in refusal(capsys, "convert-to-safetensors", "m")


# convert-to-safetensors


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    text = refusal(capsys, "convert-to-safetensors", "no/model", code=1)
    assert text.startswith("Failed to resolve config path: Model no/model not found")


@pytest.mark.parametrize("command", ["convert-to-safetensors", "convert_to_safetensors"])
def test_nothing_to_convert_is_no_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    snapshot = bert(tmp_path / "hub" / "models--a--b" / "snapshots" / COMMIT)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "v2").write_text(COMMIT)
    assert main([command, "a/b", "--revision", "v2"]) == 0
    assert capsys.readouterr().out == "No pytorch .bin files found to convert\n"


# convert-to-fast-tokenizer


def test_a_model_with_a_fast_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = bert(tmp_path / "m")
    (path / "tokenizer.json").touch()
    assert main(["convert-to-fast-tokenizer", str(path), "--output-path", "/no/where"]) == 0
    assert capsys.readouterr().out == f"Model {path} already has a fast tokenizer\n"


def test_a_tokenizer_is_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, target = bert(tmp_path / "m"), tmp_path / "out"
    target.mkdir()
    assert main(["convert_to_fast_tokenizer", str(path), "--output_path", str(target)]) == 0
    assert capsys.readouterr().out == f"Saved tokenizer to {target}\n"
    made = {file.name for file in target.iterdir()}
    assert made >= {"tokenizer.json", "tokenizer_config.json"}
    assert not {name for name in made if name.startswith(".")}


def test_no_tokenizer_can_be_made(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = bert(tmp_path / "m")
    text = refusal(capsys, "convert-to-fast-tokenizer", str(path), "--output-path=/no/where")
    assert text == "--output-path: Output path /no/where must exist and be a directory"
    (path / "vocab.txt").unlink()
    text = refusal(capsys, "convert-to-fast-tokenizer", str(path), code=1)
    assert text.startswith(f"No existing fast tokenizer (tokenizer.json) found in {path}")
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "tokenizer_config.json"]


# serve


def parsed(*argv: str) -> Namespace:
    """The arguments of `serve`, as its `run` gets them."""
    from argparse import ArgumentParser

    parser = ArgumentParser()
    add_arguments: Callable[[ArgumentParser], None] | None = COMMANDS["serve"].add_arguments
    assert add_arguments
    add_arguments(parser)
    return parser.parse_args(argv)


def test_options_of_serve_are_settings_of_the_server() -> None:
    argv = "some/model tgis_native --dtype bfloat16 --revision v2 --max-sequence-length 99"
    argv += " --max-new-tokens 7 --max-batch-size 3 --batch-safety-margin 11 --uds-path /u"
    argv += " --cuda-process-memory-fraction 0.5 --sharded"
    environ = {"WORLD_SIZE": "2", "RANK": "1", "PORT": "1234", "MAX_NEW_TOKENS": "8"}
    config = parse(launcher_flags(parsed(*argv.split())), environ)
    assert (config.model_name, config.deployment_framework) == ("some/model", "tgis_native")
    assert (config.dtype, config.revision) == ("bfloat16", "v2")
    assert (config.rank, config.num_shard) == (1, 2)
    assert (config.max_sequence_length, config.max_new_tokens) == (99, 7)
    assert (config.max_batch_size, config.batch_safety_margin) == (3, 11)
    assert (config.cuda_process_memory_fraction, config.shard_uds_path) == (0.5, "/u")
    assert config.port == 1234


def test_options_that_are_not_given_stay_the_servers() -> None:
    flags = launcher_flags(parsed("m", "tgis_native"))
    assert flags == ["--model-name=m", "--deployment-framework=tgis_native"]


def test_a_shard_must_be_told_where_the_others_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv = ["serve", "m", "tgis_native", "--sharded"]
    values = {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in values.items():
        assert refusal(capsys, *argv) == f"{name} must be set when sharded is True"
        assert (tmp_path / "log").read_text() == f"{name} must be set when sharded is True\n"
        monkeypatch.setenv(name, value)
    assert main(argv) == 2
    text = "text-generation-server serve: RANK=2: at most 1 with WORLD_SIZE=2\n"
    assert capsys.readouterr().err == text


def test_a_wrong_setting_of_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "tgis_native", "--dtype", "float3"]) == 2
    text = "text-generation-server serve: --dtype=float3: Unrecognized data type: float3; expected"
    assert capsys.readouterr().err.startswith(text)


@pytest.mark.slow
def test_a_downloaded_model_is_served(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "models" / "stories260K"
    files = {path.name: path.read_bytes() for path in source.iterdir() if path.is_file()}
    program = [sys.executable, "-m", "tgis.cli.server"]
    env = scrubbed_environment(tmp_path) | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    with run_hub({"some/stories": Repo(files)}) as hub:
        subprocess.run(
            [*program, "download-weights", "some/stories", "--extension", ".safetensors,.json"],
            env=env | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"},
            check=True,
        )
    grpc_port, http_port = free_ports(2)
    command = [*program, "serve", "some/stories", "tgis_native", "--max-new-tokens", "9"]
    env |= {"GRPC_PORT": str(grpc_port), "PORT": str(http_port)}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"127.0.0.1:{grpc_port}"
    server = Server(process, address, f"http://127.0.0.1:{http_port}", tmp_path / "server.log")
    try:
        server.wait_ready()
        with connect_blocking(address) as client:
            info = client.call("ModelInfo", {"modelId": "some/stories"})
        assert info["maxNewTokens"] == 9
        assert server.stop() == 0
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
