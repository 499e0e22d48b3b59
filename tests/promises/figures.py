"""What a promise is, what is measured of it, and the command that every script here is."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "promises"


@dataclass(frozen=True)
class Figure:
    """One number and the limit that was promised.

    Attributes:
        limit: None = the figure says something, but nothing was promised of it.
        least: the limit is a lower one.
        steady: does not depend on what else the machine does; a test may insist on it.
    """

    what: str
    value: float
    limit: float | None = None
    unit: str = ""
    least: bool = False
    steady: bool = True

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        if self.limit is None:
            return True
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        bound = ""
        if self.limit is not None:
            bound = f"  ({'>=' if self.least else '<='} {self.limit:g}{self.unit})"
        verdict = "" if self.holds else "  DOES NOT HOLD"
        return f"{self.what}: {self.value:.4g}{self.unit}{bound}{verdict}"


@dataclass(frozen=True)
class Promise:
    """A script.

    Attributes:
        name: of its module.
        measure: full form? -> figures.
    """

    name: str
    title: str
    measure: Callable[[bool], Sequence[Figure]]

    def run(self, full: bool) -> list[Figure]:
        """Measure, and print each figure."""
        start = time.monotonic()
        figures = list(self.measure(full))
        for figure in figures:
            print(f"  {figure}", flush=True)
        print(f"  {time.monotonic() - start:.0f} s")
        return figures

    def main(self) -> None:
        """The command; exits with 1 if a promise does not hold."""
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--full", action="store_true", help="the whole, which takes longer")
        parser.add_argument("--save", action="store_true", help=f"keep the figures in {RESULTS}")
        args = parser.parse_args()
        print(self.title, flush=True)
        figures = self.run(args.full)
        if args.save:
            RESULTS.mkdir(parents=True, exist_ok=True)
            record = {
                "name": self.name,
                "title": self.title,
                "full": args.full,
                "figures": [asdict(figure) for figure in figures],
            }
            (RESULTS / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        sys.exit(not all(figure.holds for figure in figures))


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
