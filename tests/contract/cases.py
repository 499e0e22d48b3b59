"""The case files: reading and writing them, and the models that they are for.

A file is a mapping:

    model    "demo", or the name of a directory under the shared models
    patch    optional: {file of the model: {key: value}}, changes in its JSON files
    server   settings that differ from `Limits`, by the field's name
    made_by  what made the expectations
    cases    list of {name, why?, method?, request, response | error}

`method` is Generate unless given. `request` is proto3 JSON and written by hand; the rest of a case
is written by `python -m tests.contract.generate`, never by hand and never by the server.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tests.contract.oracle import Limits

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).parent / "cases"
DEMO = ROOT / "src" / "tgis" / "demo" / "model"

Json = dict[str, Any]
BATCH_SIZE = 8
FLOW_WIDTH = 96  # mappings that fit on a line are written on one


@dataclass(frozen=True)
class CaseFile:
    """One file of cases."""

    path: Path
    content: Json

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def cases(self) -> list[Json]:
        cases: list[Json] = self.content["cases"]
        return cases

    @property
    def limits(self) -> Limits:
        """The server's settings, as the oracle takes them."""
        return Limits(**self.content.get("server", {}))

    @property
    def original(self) -> Path | None:
        """The model's directory; None if it is missing."""
        return model_directory(self.content["model"])

    def model(self, scratch: Path) -> Path | None:
        """The directory to serve: the original, or a patched copy in `scratch`."""
        original, patches = self.original, self.content.get("patch")
        if original is None or not patches:
            return original
        target = scratch / self.name
        shutil.copytree(original, target, copy_function=shutil.copyfile)
        target.chmod(0o755)
        for name, changes in patches.items():
            changed = json.loads((target / name).read_text()) | changes
            (target / name).write_text(json.dumps(changed))
        return target


def flags(limits: Limits) -> list[str]:
    """The settings on a server's command line."""
    named = {
        "max-batch-size": BATCH_SIZE,
        "threads": 1,  # the models are too small to share out
        "max-sequence-length": limits.max_sequence_length,
        "max-new-tokens": limits.max_new_tokens,
        "max-concurrent-requests": limits.max_concurrent_requests,
        "default-include-stop-seqs": str(limits.default_include_stop_seqs).lower(),
    }
    pairs = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    return pairs + ["--output-special-tokens"] * limits.output_special_tokens


def model_directory(name: str) -> Path | None:
    """Where a model of that name is; None if it is not here."""
    shared = Path(os.environ.get("TGIS_SHARED", ROOT.parent / "shared"))
    path = DEMO if name == "demo" else shared / "models" / name
    return path if (path / "model.safetensors").exists() else None


def weights_of(directory: Path) -> str:
    """A name of a model's weights: expectations hold for these only."""
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()[:16]


def case_files() -> list[CaseFile]:
    """All files, by name."""
    return [read(path) for path in sorted(CASES.glob("*.yaml"))]


def read(path: Path) -> CaseFile:
    """One file."""
    return CaseFile(path, yaml.safe_load(path.read_text()))


def write(file: CaseFile) -> None:
    """Write a file; the same content always gives the same bytes."""
    text = yaml.dump(file.content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    file.path.write_text(text.replace("\n- name:", "\n\n- name:"))


class _Dumper(yaml.SafeDumper):
    """Writes small mappings and lists on one line, and shares nothing by reference."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _represent(dumper: _Dumper, data: Any) -> yaml.Node:
    if isinstance(data, dict):
        node = dumper.represent_mapping("tag:yaml.org,2002:map", data.items())
    else:
        node = dumper.represent_sequence("tag:yaml.org,2002:seq", data)
    node.flow_style = "name" not in data and len(json.dumps(data)) <= FLOW_WIDTH
    return node


_Dumper.add_representer(dict, _represent)
_Dumper.add_representer(list, _represent)
