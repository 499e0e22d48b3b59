"""The terminal commands and the examples against a small server on a socket of the loopback."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tests.kit.certificates import make_certificate

from tgis.cli import healthcheck
from tgis.cli.main import main
from tgis.proto import generation_pb2 as pb
from tgis.proto import generation_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
PIECES = [" was", " a", " dög🙂"]


class Service(generation_pb2_grpc.GenerationServiceServicer):
    """Says the same three pieces to everybody and keeps the requests."""

    def __init__(self) -> None:
        self.requests = []
        self.keys = []
        self.error: tuple[grpc.StatusCode, str] | None = None

    def _note(self, request, context) -> None:
        self.requests.append(request)
        self.keys.append(dict(context.invocation_metadata()).get("x-api-key"))
        if self.error is not None:
            context.abort(*self.error)

    def Generate(self, request, context):
        self._note(request, context)
        answer = pb.GenerationResponse(
            input_token_count=4,
            generated_token_count=3,
            text="".join(PIECES),
            stop_reason=pb.EOS_TOKEN,
            seed=7,
        )
        return pb.BatchedGenerationResponse(responses=[answer] * len(request.requests))

    def GenerateStream(self, request, context):
        self._note(request, context)
        echo = request.request.text if request.params.response.input_text else ""
        yield pb.GenerationResponse(input_token_count=4, seed=7, text=echo)
        for count, text in enumerate(PIECES, start=1):
            reason = pb.EOS_TOKEN if count == len(PIECES) else pb.NOT_FINISHED
            yield pb.GenerationResponse(generated_token_count=count, text=text, stop_reason=reason)

    def ModelInfo(self, request, context):
        self.keys.append(dict(context.invocation_metadata()).get("x-api-key"))
        return pb.ModelInfoResponse(max_sequence_length=1000, max_new_tokens=150)


class Here:
    """The running server."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.service = Service()
        self.health = health.HealthServicer()
        self._server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self.service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if credentials is None:
            self.port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            self.port = self._server.add_secure_port("127.0.0.1:0", credentials)
        self._server.start()

    @property
    def params(self) -> pb.Parameters:
        return self.service.requests[-1].params

    def run(self, *words: str) -> int:
        return main([*words, "--port", str(self.port)])

    def stop(self) -> None:
        self._server.stop(None).wait()


@pytest.fixture
def here():
    server = Here()
    yield server
    server.stop()


# ---- generate ----


def test_generate_streams_to_stdout(here, capsys):
    assert here.run("generate", "There") == 0
    assert capsys.readouterr() == (" was a dög🙂\n", "")
    (request,) = here.service.requests
    assert request == pb.SingleGenerationRequest(
        request=pb.GenerationRequest(text="There"),
        params=pb.Parameters(
            sampling=pb.SamplingParameters(),
            stopping=pb.StoppingCriteria(max_new_tokens=150),
            decoding=pb.DecodingParameters(),
        ),
    )


@pytest.mark.parametrize("how", [(), ("--no-stream",)])
def test_generate_with_a_key(here, tmp_path, capsys, how):
    path = tmp_path / "key"
    path.write_text("a secret\n")
    assert here.run("generate", "There", "--api-key-file", str(path), *how) == 0
    assert here.service.keys == ["a secret"] * 2  # asked for its limits, then generated
    capsys.readouterr()


@pytest.mark.parametrize("content", ["", "\n", "two\nlines", "schlüssel", None])
def test_a_wrong_file_of_a_key_is_one_line(here, tmp_path, capsys, content):
    path = tmp_path / "key"
    if content is not None:
        path.write_text(content)
    assert here.run("generate", "There", "--api-key-file", str(path)) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert str(path) in err
    assert not here.service.keys


def test_generate_without_stream(here, capsys):
    assert here.run("generate", "There", "--no-stream", "--echo", "--stats") == 0
    out, err = capsys.readouterr()
    assert out == "There was a dög🙂\n"
    assert err.startswith("[4 + 3 tokens, EOS_TOKEN, seed 7, ")
    assert isinstance(here.service.requests[0], pb.BatchedGenerationRequest)


def test_stats_of_a_stream(here, capsys):
    assert here.run("generate", "There", "--stats") == 0
    assert capsys.readouterr().err.startswith("[4 + 3 tokens, EOS_TOKEN, seed 7, ")


def test_generate_reads_stdin(here, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("from\na file"))
    assert here.run("generate") == 0
    assert here.service.requests[0].request.text == "from\na file"


def test_all_parameters_are_sent(here):
    options = (
        "--max-new-tokens 30 --min-new-tokens 5 --temperature 0.5 --top-k 3 --top-p 0.25"
        " --typical-p 0.75 --seed 18446744073709551615 --repetition-penalty 1.5 --stop a --stop b"
        " --time-limit 2.5"
    )
    assert here.run("generate", "x", *options.split()) == 0
    assert here.params == pb.Parameters(
        method=pb.SAMPLE,
        sampling=pb.SamplingParameters(
            temperature=0.5, top_k=3, top_p=0.25, typical_p=0.75, seed=2**64 - 1
        ),
        stopping=pb.StoppingCriteria(
            max_new_tokens=30,
            min_new_tokens=5,
            time_limit_millis=2500,
            stop_sequences=["a", "b"],
        ),
        decoding=pb.DecodingParameters(repetition_penalty=1.5),
    )


@pytest.mark.parametrize("option", [["--sample"], ["--seed", "0"], ["--temperature", "0.0"]])
def test_any_sampling_option_samples(here, option):
    assert here.run("generate", "x", *option) == 0
    assert here.params.method == pb.SAMPLE


def test_minimum_above_our_default_length(here):
    assert here.run("generate", "x", "--min-new-tokens", "151") == 0
    assert here.params.stopping.max_new_tokens == 151  # for the server to judge


# ---- what goes wrong ----


def only_line(err: str) -> str:
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("command", [["generate", "x"], ["generate", "x", "--no-stream"]])
def test_errors_of_the_server_are_one_line(here, capsys, command):
    here.service.error = (grpc.StatusCode.INVALID_ARGUMENT, "top_p must be\n> 0.0")
    assert here.run(*command) == 1
    assert only_line(capsys.readouterr().err) == "tgis: INVALID_ARGUMENT: top_p must be > 0.0"


@pytest.mark.parametrize("command", [["generate", "x"], ["health"]])
def test_no_server(free_port, capsys, command):
    assert main([*command, "--port", str(free_port)]) == 1
    line = only_line(capsys.readouterr().err)
    assert line == (
        f"tgis: no answer from 127.0.0.1:{free_port}: Failed to connect to remote host:"
        " Connection refused; `tgis serve` starts a server"
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--top-k", "-1"], "SamplingParameters"),
        (["--seed", str(2**64)], "SamplingParameters"),
        (["--max-new-tokens", "-5"], "StoppingCriteria"),
        (["--time-limit", "-1"], "StoppingCriteria"),
        (["--tls-ca", "/no/such/file"], "/no/such/file: No such file"),
    ],
)
def test_arguments_that_cannot_be_sent(here, capsys, options, told):
    assert here.run("generate", "x", *options) == 1
    assert told in only_line(capsys.readouterr().err)
    assert not here.service.requests


def test_text_that_is_not_unicode(here, capsys):
    assert here.run("generate", "\udcff") == 1
    assert "GenerationRequest" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x"])
def test_impossible_port(capsys, port):
    assert main(["health", "--port", port]) == 2
    assert f"{port}: must be from 1 to 65535" in only_line(capsys.readouterr().err)


# ---- chat ----


def test_chat_continues_the_text_so_far(here, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("One\n\nTwo\n/new\nThree\n/quit\nnever\n"))
    assert here.run("chat") == 0
    answer = "".join(PIECES)
    assert [request.request.text for request in here.service.requests] == [
        "One",
        f"One{answer}",
        f"One{answer}{answer}\nTwo",
        "Three",
    ]
    assert capsys.readouterr().out.splitlines() == [answer] * 4
    assert here.params.truncate_input_tokens == 850  # the model's length less what is generated
    assert here.params.sampling.temperature == pytest.approx(0.7)


def test_chat_survives_an_error(here, monkeypatch, capsys):
    here.service.error = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Model is overloaded")
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n"))
    assert here.run("chat") == 0
    assert len(here.service.requests) == 2
    assert capsys.readouterr().err == "tgis: RESOURCE_EXHAUSTED: Model is overloaded\n" * 2


# ---- health ----

STATUSES = health_pb2.HealthCheckResponse


@pytest.mark.parametrize(
    ("status", "name", "code"),
    [(STATUSES.SERVING, "SERVING", 0), (STATUSES.NOT_SERVING, "NOT_SERVING", 1)],
)
def test_health(here, capsys, status, name, code):
    here.health.set("fmaas.GenerationService", status)
    assert here.run("health") == code
    assert capsys.readouterr().out == f"{name}\n"
    assert healthcheck.main(["--server-url", f"localhost:{here.port}", "--insecure"]) == code
    assert capsys.readouterr().out == f"health check... status: {name}\n"


def test_healthcheck_of_another_service(here, capsys):
    url = f"127.0.0.1:{here.port}"
    assert healthcheck.main(["--server-url", url, "--service-name", ""]) == 0
    assert healthcheck.main(["--server-url", url, "--service-name", "nothing"]) == 1
    assert "failed: NOT_FOUND" in capsys.readouterr().out


def test_healthcheck_without_server(free_port, capsys):
    assert healthcheck.main(["--server-url", f"localhost:{free_port}", "--timeout", "2"]) == 1
    assert "Connection refused" in capsys.readouterr().out


# ---- TLS ----


def test_tls(tmp_path, capsys):
    cert, key = make_certificate(tmp_path)
    pair = [(key.read_bytes(), cert.read_bytes())]
    server = Here(grpc.ssl_server_credentials(pair))
    try:
        trusting = ["--host", "localhost", "--tls-ca", str(cert)]
        assert server.run("generate", "There", *trusting) == 0
        assert capsys.readouterr().out == " was a dög🙂\n"
        url = f"localhost:{server.port}"
        assert healthcheck.main(["--server-url", url, "--secure", "--tls-ca", str(cert)]) == 1
        assert "NOT_FOUND" in capsys.readouterr().out
        assert server.run("health", "--host", "localhost") == 1  # no TLS
        assert "Socket closed" in only_line(capsys.readouterr().err)
    finally:
        server.stop()


# ---- quick help, and the examples ----


@pytest.mark.parametrize("words", [["generate"], ["chat"], ["health"]])
def test_help_imports_no_grpc(words):
    script = (
        "import sys\n"
        "from tgis.cli.main import main\n"
        "try:\n"
        f"    main({[*words, '--help']})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert 'grpc' not in sys.modules\n"
        "import tgis.cli.healthcheck\n"
        "assert 'grpc' not in sys.modules\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "--port" in run.stdout


def run_example(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / name, *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_example_generate(here):
    run = run_example("generate.py", "There", "Here", "--server", f"localhost:{here.port}")
    assert run.returncode == 0, run.stderr
    stats = "  [3 tokens, EOS_TOKEN, seed 7]"
    assert run.stdout == f"There was a dög🙂\n{stats}\n\nHere was a dög🙂\n{stats}\n\n"


def test_example_stream(here):
    run = run_example("stream.py", "There", "--server", f"localhost:{here.port}")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "There was a dög🙂\n  [3 tokens, EOS_TOKEN]\n"


@pytest.mark.parametrize("name", ["generate.py", "stream.py"])
def test_example_without_server(free_port, name):
    run = run_example(name, "There", "--server", f"localhost:{free_port}")
    assert run.returncode == 1
    assert "UNAVAILABLE" in run.stderr
    assert "Traceback" not in run.stderr
