"""Promise 10: nothing is unpickled, nobody else is called, nothing is written where it should not.

The hook of `tests/kit/audit.py` watches every test and every server that a test starts, and makes
the suite fail. Here it watches a server at work; in full, the whole quick suite runs once more in a
network namespace in which nothing else can be reached, where the system allows that.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kit import audit
from tests.kit.client import connect_blocking
from tests.kit.server import run_server

from .figures import ROOT, Figure, Promise
from .house import DEMO

ADAPTER_IDS = ["nobody", "../../etc/passwd", "/etc/passwd", "a\0b", "x" * 5000]


def watched_server(record: Path) -> int:
    """Requests of all kinds to a server that is watched; how many were answered."""
    answered = 0
    with tempfile.TemporaryDirectory(prefix="tgis-store-") as store:
        env = {"PREFIX_STORE_PATH": store}
        with run_server(DEMO, "--threads", "1", env=env) as server:
            with connect_blocking(server.grpc) as client:
                requests = [{"requests": [{"text": "Once upon a time"}]}]
                requests += [requests[0] | {"prefixId": name} for name in ADAPTER_IDS]
                requests += [requests[0] | {"adapterId": name} for name in ADAPTER_IDS]
                for request in requests:
                    client.call("Generate", request)
                    answered += 1
                client.stream({"request": {"text": "Once upon a time"}})
                client.call("Tokenize", {"requests": [{"text": "Once"}], "returnTokens": True})
                client.call("ModelInfo", {"modelId": "x"})
            for path in ("/health", "/health?deep=1", "/metrics", "/nothing"):
                server.get(path)
                answered += 1
    return answered


def caught(record: Path) -> int:
    """How many entries the hook makes of five misdeeds; of the pickle, which names a class, two."""
    misdeeds = """
import os, pickle, socket
from pathlib import Path
for misdeed in (
    lambda: pickle.loads(pickle.dumps(Path)),
    lambda: socket.create_connection(("192.0.2.1", 80), 0.01),
    lambda: socket.getaddrinfo("host.invalid", 80),
    lambda: open(Path.home() / "tgis-misdeed", "w"),
    lambda: os.mkdir(Path.home() / "tgis-misdeed-too"),
):
    try:
        misdeed()
    except OSError:
        pass
"""
    with tempfile.TemporaryDirectory() as home:
        places = {"HOME": Path(home) / "home", "TMPDIR": Path(home) / "tmp"}
        for place in places.values():
            place.mkdir()
        env = os.environ | {variable: str(place) for variable, place in places.items()}
        env |= {audit.VARIABLE: str(record), "PYTHONPATH": str(audit.SITE)}
        subprocess.run([sys.executable, "-c", misdeeds], check=True, env=env)
    return len(audit.faults(record))


def namespace() -> list[str]:
    """The command that enters a network of nobody else; empty where that is not allowed."""
    enter = ["unshare", *([] if os.getuid() == 0 else ["--map-root-user"]), "--net"]
    enter += ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        allowed = subprocess.run([*enter, "true"], check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        return []
    return enter if allowed else []


def suite(record: Path) -> list[Figure]:
    """The quick tests, watched, without a network."""
    enter = namespace()
    command = [*enter, sys.executable, "-m", "pytest", "-q", "-m", "not slow"]
    env = os.environ | {audit.VARIABLE: str(record)}
    result = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = result.stdout.splitlines()
    last = lines[-1]
    print("\n".join(f"  {line}" for line in lines if line.startswith("FAILED") or line is last))
    for fault in audit.faults(record):
        print(f"  {fault}")
    failed = [word for word in last.split(", ") if "failed" in word or "error" in word]
    return [
        Figure("whole suite: tests that fail", sum(int(word.split()[0]) for word in failed), 0),
        Figure("... in a network namespace of its own", bool(enter), None),
        Figure("... misdeeds", len(audit.faults(record)), 0),
    ]


def measure(full: bool) -> list[Figure]:
    """See the module."""
    with tempfile.TemporaryDirectory() as name:
        records = [Path(name) / str(number) for number in range(3)]
        for record in records:
            record.touch()
        before = os.environ.get(audit.VARIABLE)
        os.environ[audit.VARIABLE] = str(records[0])
        try:
            answered = watched_server(records[0])
        finally:
            os.environ.pop(audit.VARIABLE)
            if before is not None:
                os.environ[audit.VARIABLE] = before
        figures = [
            Figure("requests to a server that is watched", answered, None),
            Figure("... misdeeds of it", len(audit.faults(records[0])), 0),
            Figure(
                "entries that the hook makes of five misdeeds", caught(records[1]), 6, least=True
            ),
        ]
        for fault in audit.faults(records[0]):
            print(f"  {fault}")
        return figures + (suite(records[2]) if full else [])


PROMISE = Promise("supply_chain", "no pickles, no calls abroad, no stray files", measure)

if __name__ == "__main__":
    PROMISE.main()
