"""Writes deploy/requirements*.txt: what the server and each extra need, in the installed versions.

The container image installs these versions: those of requirements.txt, and for each name in its
argument EXTRAS those of requirements-NAME.txt, which has only what is not in the first. Extras that
are not installed here keep the file they have. `--check` changes nothing and says whether every
dependency of pyproject.toml is there in a version that it allows.
"""

import argparse
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("otlp",)  # extras of ours that every image has
OPTIONAL = ("ort", "fms", "bitsandbytes", "ray")  # those that it has if asked
HEADER = "# Made by deploy/lock_requirements.py: do not edit.\n"


def lock_of(extra: str) -> Path:
    """The file of an extra; "" is what every image has."""
    return ROOT / "deploy" / f"requirements{extra and '-'}{extra}.txt"


def direct(extra: str) -> list[Requirement]:
    """The project's own requirements."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    if extra:
        return [Requirement(line) for line in optional[extra]]
    always = (line for name in ALWAYS for line in optional[name])
    return [Requirement(line) for line in (*project["dependencies"], *always)]


def closure(extra: str) -> dict[str, str]:
    """Every package that is needed, directly or not, with its installed version."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(item.name, name) for item in direct(extra) for name in ("", *item.extras)]
    while todo:
        name, wanted = todo.pop()
        if (canonicalize_name(name), wanted) in seen:
            continue
        seen.add((canonicalize_name(name), wanted))
        found[canonicalize_name(name)] = Version(version(name)).public  # 2.13.0+cpu: any build
        for item in map(Requirement, requires(name) or ()):
            if item.marker is None or item.marker.evaluate({"extra": wanted}):
                todo += [(item.name, other) for other in ("", *item.extras)]
    return found


def locked(extra: str) -> dict[str, str]:
    """What the file says."""
    lines = lock_of(extra).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def problems() -> list[str]:
    """Dependencies that a file lacks, or has in a version that is not allowed."""
    common = locked("")
    found = []
    for extra in ("", *OPTIONAL):
        have = common | locked(extra)
        found += [
            f"{lock_of(extra).name}: {item} is {have.get(canonicalize_name(item.name), 'missing')};"
            f" run deploy/{Path(__file__).name}"
            for item in direct(extra)
            if not item.specifier.contains(have.get(canonicalize_name(item.name), ""))
        ]
        if extra and (twice := sorted(common.keys() & locked(extra).keys())):
            found.append(f"{lock_of(extra).name}: {twice[0]} is in requirements.txt already")
    return found


def write(extra: str, packages: dict[str, str]) -> None:
    """Make a file anew."""
    lines = [f"{name}=={number}\n" for name, number in sorted(packages.items())]
    lock_of(extra).write_text(HEADER + "".join(lines))


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare with pyproject.toml")
    if parser.parse_args().check:
        print("\n".join(found := problems()))
        return bool(found)
    common = closure("")
    write("", common)
    for extra in OPTIONAL:
        try:
            packages = closure(extra)
        except PackageNotFoundError as error:
            print(f"{lock_of(extra).name} stays as it is: {error.name} is not installed")
            continue
        write(extra, {name: packages[name] for name in packages.keys() - common.keys()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
