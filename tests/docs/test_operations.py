"""The commands of the operations guide do what it says."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.kit.server import free_ports, scrubbed_environment

from tgis.config.fields import FIELDS, flag_of
from tgis.observe.table import TABLE

GUIDE = Path(__file__).parents[2] / "docs" / "operations.md"
TEXT = GUIDE.read_text()
SECONDS = 600

# Every command is shown before it runs; the guide's own waiting is bounded by the time of the test.
BEGINNING = """\
set -eu -o pipefail
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
"""
ENDING = f"""
{sys.executable} call.py "$(cat key)"
kill -TERM $server
wait $server
echo "== end"
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def ports() -> dict[str, str]:
    grpc_port, http_port = free_ports(2)
    return {"8033": str(grpc_port), "3000": str(http_port)}


def on_free_ports(text: str, ports: dict[str, str]) -> str:
    return re.sub(r"\b(8033|3000)\b", lambda match: ports[match[0]], text)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
def test_every_command(tmp_path: Path, ports: dict[str, str]) -> None:
    for tool in ("bash", "curl", "jq", "openssl"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} command, which the guide uses")
    (python,) = blocks("python")
    (tmp_path / "call.py").write_text(on_free_ports(python, ports))
    parts = [on_free_ports(block, ports) for block in blocks("sh")]
    assert len(parts) > 8
    script = BEGINNING + "\n".join(
        f"echo '== block {number}'\n{part}" for number, part in enumerate(parts)
    )
    script += ENDING
    env = scrubbed_environment(tmp_path)
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    log = (tmp_path / "server.log").read_text()
    assert process.returncode == 0, output + log
    for expected in (
        "== end",
        "ready:",
        "\n200\n",
        "SERVING",
        "exit code 2",
        "max_new_tokens (0)",
        'tgi_request_success_total{stop_reason="MAX_TOKENS"',
        "vllm:num_requests_waiting{",
        "tokens before MaxTokens",
        "changed and is in use",
        "UNAUTHENTICATED",
        "notAfter=",
        "refused without a key",
    ):
        assert expected in output, f"{expected}\n{output}"


def test_metrics_that_are_named_exist() -> None:
    names = {spec.name for spec in TABLE}
    for found in re.findall(r"\btgi_[a-z_]+", "".join(TEXT.split("```")[::2])):
        assert found.removesuffix("_total") in names, found


def test_settings_that_are_named_exist() -> None:
    flags = {flag_of(name) for field in FIELDS.values() for name in field.names}
    flags |= {"--no-" + flag[2:] for flag in flags} | {"--print-config"}
    for found in re.findall(r"`(--[a-z-]+)", TEXT):
        assert found in flags, found


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        page = GUIDE.parent / file if file else GUIDE
        assert page.is_file(), target
        assert not anchor or anchor in anchors(page), target
