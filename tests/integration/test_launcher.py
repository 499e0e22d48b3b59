"""The line with which TGIS's own suite starts its server, given to us as it is."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.kit.client import Status, connect_blocking
from tests.kit.server import Server, free_ports, scrubbed_environment

LINE = """
--model-name {model} --num-shard 1 --dtype-str float32 --deployment-framework {engine}
--port {port} --master-port {master} --shard-uds-path {uds} --max-batch-size 8
--max-waiting-tokens 10 --max-sequence-length 200 --max-new-tokens 169 --output-special-tokens
"""


@pytest.mark.parametrize("engine", ["hf_accelerate", "tgis_native"])
def test_the_reference_line_starts_and_stops(
    demo_model_dir: Path, tmp_path: Path, engine: str
) -> None:
    port, grpc_port, master = free_ports(3)
    line = LINE.format(
        model=demo_model_dir, engine=engine, port=port, master=master, uds=tmp_path / "uds"
    )
    env = scrubbed_environment(tmp_path) | {
        "ESTIMATE_MEMORY": "manual",
        "PREFIX_STORE_PATH": str(tmp_path),
        "GRPC_PORT": str(grpc_port),
    }
    log_path = tmp_path / "launcher.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "text-generation-launcher", *line.split()],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(process, f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{port}", log_path)
    try:
        server.wait_ready()
        with connect_blocking(server.grpc) as client:
            info = client.call("ModelInfo", {})
            answer = client.call("Generate", {"requests": [{"text": "Once upon a time"}]})
        assert info == {"maxSequenceLength": 200, "maxNewTokens": 169}
        assert not isinstance(answer, Status)
        assert answer["responses"][0]["generatedTokenCount"] == 20
        assert server.get("/metrics")[0] == 200
        assert server.stop() == 0
    finally:
        if process.poll() is None:
            server.kill()
