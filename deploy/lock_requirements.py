"""Writes deploy/requirements.txt: what the server needs at run time, in the installed versions.

The container image installs these versions. `--check` changes nothing and says whether every
dependency of pyproject.toml is there in a version that it allows.
"""

import argparse
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "deploy" / "requirements.txt"
EXTRAS = ("otlp",)  # of ours that the image has
HEADER = "# Made by deploy/lock_requirements.py: do not edit.\n"


def direct() -> list[Requirement]:
    """The project's own requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [
        line for extra in EXTRAS for line in project["optional-dependencies"][extra]
    ]
    return [Requirement(line) for line in lines]


def closure() -> dict[str, str]:
    """Every package that is needed, directly or not, with its installed version."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(item.name, extra) for item in direct() for extra in ("", *item.extras)]
    while todo:
        name, extra = todo.pop()
        if (canonicalize_name(name), extra) in seen:
            continue
        seen.add((canonicalize_name(name), extra))
        found[canonicalize_name(name)] = Version(version(name)).public  # 2.13.0+cpu: any build
        for item in map(Requirement, requires(name) or ()):
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                todo += [(item.name, wanted) for wanted in ("", *item.extras)]
    return found


def locked() -> dict[str, str]:
    """What the file says."""
    lines = (line for line in LOCK.read_text().splitlines() if not line.startswith("#"))
    return dict(line.split("==") for line in lines)


def problems() -> list[str]:
    """Dependencies that the file lacks, or has in a version that is not allowed."""
    have = locked()
    return [
        f"{LOCK.name}: {item} is {have.get(canonicalize_name(item.name), 'missing')};"
        f" run deploy/{Path(__file__).name}"
        for item in direct()
        if not item.specifier.contains(have.get(canonicalize_name(item.name), ""))
    ]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with pyproject.toml")
    if parser.parse_args().check:
        print("\n".join(found := problems()))
        return bool(found)
    lines = [f"{name}=={number}\n" for name, number in sorted(closure().items())]
    LOCK.write_text(HEADER + "".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
