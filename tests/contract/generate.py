"""Write the expectations of all case files: `python -m tests.contract.generate [file ...]`.

They come from the oracle alone. A case whose answer hangs on a rounding error is refused: on
another machine, or in another batch, it could come out differently and still be right.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.contract.cases import CaseFile, Json, case_files, weights_of, write
from tests.contract.oracle import VERSION, Oracle, RejectedError
from tests.contract.oracle.logits import Margins

NARROWEST = 1e-4
HEAD = ("model", "patch", "server")
BY_HAND = ("name", "why", "method", "request")


class RefusedError(Exception):
    """The case is not fit to be an expectation."""


def answer(oracle: Oracle, case: Json) -> Json:
    """The `response` or `error` of one case.

    Raises:
        RefusedError: some decision of the case is closer than a rounding error.
    """
    methods = {
        "Generate": oracle.generate,
        "GenerateStream": oracle.start_stream,
        "Tokenize": oracle.tokenize,
        "ModelInfo": oracle.model_info,
    }
    oracle.margins = Margins()
    try:
        response = methods[case.get("method", "Generate")](case["request"])
    except RejectedError as error:
        found = {"code": error.code, "message": error.message}
        return {"error": found if error.exact else found | {"exact": False}}
    narrow = {kind: m for kind, m in oracle.margins.narrowest.items() if m < NARROWEST}
    if narrow:
        raise RefusedError(f"too close to call: {narrow}")
    return {"response": response}


def regenerate(file: CaseFile, scratch: Path) -> list[str]:
    """Answer every case and write the file; returns complaints about cases that were refused."""
    directory = file.model(scratch)
    if directory is None:
        return [f"{file.name}: the model is not here, nothing written"]
    oracle = Oracle(directory, file.limits)
    complaints = []
    cases = []
    for case in file.cases:
        by_hand = {key: case[key] for key in BY_HAND if key in case}
        try:
            cases.append(by_hand | answer(oracle, case))
        except (RefusedError, ValueError) as error:
            cases.append(by_hand)
            complaints.append(f"{file.name}: {case['name']}: {error}")
        _report(case["name"], oracle.margins)
    head = {key: file.content[key] for key in HEAD if key in file.content}
    made_by: dict[str, Any] = {
        "oracle": VERSION,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "weights": weights_of(directory),
    }
    if not complaints:
        write(CaseFile(file.path, head | {"made_by": made_by, "cases": cases}))
    return complaints


def _report(name: str, margins: Margins) -> None:
    kind, margin = min(
        margins.narrowest.items(), key=lambda item: item[1], default=("none", math.inf)
    )
    print(f"  {margin:9.2g} {kind:16} {name}")


def main() -> int:
    """Returns the exit code: 1 if a case was refused (its file is then left as it was)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="*", help="names of case files; all if none is given")
    wanted = parser.parse_args().file
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for file in case_files():
            if not wanted or file.name in wanted:
                print(file.name)
                complaints += regenerate(file, Path(scratch))
    print(*complaints, sep="\n", file=sys.stderr)
    return bool(complaints)


if __name__ == "__main__":
    sys.exit(main())
