import json
import subprocess
import sys
from pathlib import Path

import pytest

from tgis import __version__
from tgis.cli.launcher import main as launcher
from tgis.cli.main import COMMANDS, main

HEAVY = {"torch", "grpc", "transformers", "tokenizers", "prometheus_client", "huggingface_hub"}
HEAVY |= {"numpy", "google.protobuf", "uvloop", "asyncio", "aiohttp"}


def run(*argv: str, env: dict[str, str] | None = None, log: Path | None = None):
    """A command as a process of its own, with nothing from the tester's environment."""
    environ = {"TERMINATION_LOG_DIR": str(log or "/dev/null"), **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", *argv],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_the_commands(capsys):
    for argv in ([], ["--help"], ["-h"], ["help"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == launcher(["-V"]) == 0
    assert (
        capsys.readouterr().out == f"tgis {__version__}\ntext-generation-launcher {__version__}\n"
    )


@pytest.mark.parametrize(
    ("word", "hint"),
    [("sevre", "did you mean serve?"), ("xyz", "expected one of"), ("\n", "expected one of")],
)
def test_an_unknown_command(word, hint, capsys):
    assert main([word]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tgis: {word!a}: unknown command; {hint}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "chat", "health"])
def test_a_wrong_argument_of_a_client_is_one_line(command, capsys):
    assert main([command, "--bogus", "--port", "x"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--port: x: must be from 1 to 65535" in err
    assert f"tgis {command} --help" in err


@pytest.mark.parametrize(
    "argv",
    [
        ("tgis.cli.main", "generate", "--help"),
        ("tgis.cli.main", "--help"),
        ("tgis.cli.main", "serve", "--help"),
        ("tgis.cli.main", "serve", "--print-config"),
        ("tgis.cli.launcher", "--help"),
        ("tgis.cli.launcher", "--port", "x"),
    ],
    ids=" ".join,
)
def test_help_and_errors_import_nothing_heavy(argv):
    code = (
        "import json, runpy, sys\n"
        "module, sys.argv = sys.argv[1], sys.argv[1:]\n"
        "try: runpy.run_module(module, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        env={"TERMINATION_LOG_DIR": "/dev/null"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modules = set(json.loads(done.stdout.splitlines()[-1]))
    assert "tgis.cli" in modules
    assert not HEAVY & modules


def test_print_config_of_a_process():
    done = run(
        "tgis.cli.main",
        "serve",
        "some/model",
        "--print-config",
        env={"GRPC_PORT": "9000", "HF_HOME": "/f"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["model_name"] == ["some/model", "--model-name"]
    assert rows["grpc_port"] == ["9000", "GRPC_PORT"]
    assert rows["host"] == ["127.0.0.1", "default"]


def test_the_launcher_has_defaults_of_its_own():
    done = run("tgis.cli.launcher", "--print-config")
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert rows["model_name"] == ["bigscience/bloom-560m", "default"]
    assert rows["host"] == ["0.0.0.0", "default"]


@pytest.mark.parametrize(
    ("module", "name", "argv", "env", "message"),
    [
        (
            "tgis.cli.launcher",
            "text-generation-launcher",
            [],
            {"MAX_NEW_TOKENS": "-1"},
            "--max-new-tokens=-1 (environment variable MAX_NEW_TOKENS): max_new_tokens (-1) at"
            " least 1; expected an integer from 1 to 2147483647",
        ),
        (
            "tgis.cli.launcher",
            "text-generation-launcher",
            ["--grpc-prot", "1"],
            {},
            "--grpc-prot: unknown setting; did you mean --grpc-port?",
        ),
        (
            "tgis.cli.main",
            "tgis serve",
            ["serve", "--port", "1", "--grpc-port=1"],
            {},
            "--port=1 and --grpc-port=1: cannot be the same; choose another for one",
        ),
        (
            "tgis.cli.main",
            "tgis serve",
            ["serve", "--print-config", "--tls-key-path", "/no/key"],
            {},
            "--tls-key-path=/no/key: couldn't load key from /no/key; expected the path of a"
            " readable file",
        ),
    ],
)
def test_a_wrong_setting_ends_the_process(module, name, argv, env, message, tmp_path):
    log = tmp_path / "log"
    done = run(module, *argv, env=env, log=log)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{name}: {message}\n"
    assert log.read_text() == f"{message}\n"


@pytest.mark.parametrize("model", ["/etc/hostname", "/", "no-such/model"])
def test_a_wrong_model_ends_the_process(model, tmp_path):
    log = tmp_path / "log"
    done = run("tgis.cli.main", "serve", model, log=log)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("tgis serve: "))
    message = line.removeprefix("tgis serve: ")
    assert message.startswith(f"Failed to resolve config path: Model {model} not found: ")
    assert log.read_text() == f"{message}\n"
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "tgis.cli.main", "serve", "--help"]
    with subprocess.Popen(
        command, env={}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
