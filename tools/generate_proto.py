"""Write the Python code of `proto/generation.proto` into `src/tgis/proto/`.

    python tools/generate_proto.py

Needs grpcio-tools (in the `dev` extra). The generator stamps its code with the versions that it
came with and the code then refuses any older runtime. The code itself is the same for all the
versions that `pyproject.toml` allows, so the stamps are set to the oldest of them.
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "proto" / "generation.proto"
TARGET = ROOT / "src" / "tgis" / "proto"

GENERATOR = "1.85.1"  # the grpcio-tools that wrote what is committed
OLDEST_PROTOBUF = (6, 31, 0)
OLDEST_GRPC = "1.80.0"

_PROTOBUF_STAMP = re.compile(r"(Domain\.PUBLIC,)\s+\d+,\s+\d+,\s+\d+,")
_PROTOBUF_COMMENT = re.compile(r"(# Protobuf Python Version: ).*")
_GRPC_STAMP = re.compile(r"(GRPC_GENERATED_VERSION = ).*")
_IMPORT = re.compile(r"^import (generation_pb2) as ", re.MULTILINE)


def run_protoc(*options: str) -> None:
    """Run the compiler on the contract.

    Raises:
        RuntimeError: the compiler failed; its own words are on stderr.
    """
    from grpc_tools import protoc

    if protoc.main(["protoc", f"-I{SOURCE.parent}", *options, SOURCE.name]) != 0:
        raise RuntimeError(f"protoc failed on {SOURCE}")


def generate(target: Path) -> list[Path]:
    """Write the generated modules into the folder `target` and return their paths."""
    run_protoc(*(f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")))
    paths = sorted(target.glob("generation_pb2*.py*"))
    for path in paths:
        path.write_text(_adapt(path.read_text()))
    return paths


def _adapt(code: str) -> str:
    """Set the stamps, and import the sibling module from our package."""
    protobuf = ",\n    ".join(map(str, OLDEST_PROTOBUF))
    code = _PROTOBUF_STAMP.sub(rf"\1\n    {protobuf},", code)
    code = _PROTOBUF_COMMENT.sub(rf"\g<1>{'.'.join(map(str, OLDEST_PROTOBUF))}", code)
    code = _GRPC_STAMP.sub(rf"\g<1>'{OLDEST_GRPC}'", code)
    return _IMPORT.sub(r"from tgis.proto import \1 as ", code)


def main() -> int:
    """Generate next to the package, then move over, so that a failure changes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        for path in generate(Path(folder)):
            (TARGET / path.name).write_text(path.read_text())
            print(f"wrote src/tgis/proto/{path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
