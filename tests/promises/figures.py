"""What a promise is, what is measured of it, and the command that every script here is."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "promises"

# What a figure may miss its limit by in a test, which runs beside whatever else the machine does.
AT_LEISURE = 4.0  # times and rates
ONLY_SHOWN = math.inf  # what says nothing on a busy machine


@dataclass(frozen=True)
class Figure:
    """One number and the limit that was promised.

    Attributes:
        limit: None = the figure says something, but nothing was promised of it.
        least: the limit is a lower one.
        slack: by what factor a test lets it miss the limit; 1 = it depends on nothing else.
    """

    what: str
    value: float
    limit: float | None = None
    unit: str = ""
    least: bool = False
    slack: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self._within(1.0)

    @property
    def passes(self) -> bool:
        """The same for a test."""
        return self._within(self.slack)

    def _within(self, slack: float) -> bool:
        if self.limit is None:
            return True
        return self.value * slack >= self.limit if self.least else self.value <= self.limit * slack

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

    def main(self) -> None:
        """The command; exits with 1 if a promise does not hold."""
        parser = argparse.ArgumentParser(description=self.title)
        parser.add_argument("--full", action="store_true", help="the whole, which takes longer")
        parser.add_argument("--save", action="store_true", help=f"keep the figures in {RESULTS}")
        parser.add_argument("--lenient", action="store_true", help="allow for other work beside it")
        args = parser.parse_args()
        print(self.title, flush=True)
        start = time.monotonic()
        figures = list(self.measure(args.full))
        took = time.monotonic() - start
        for figure in figures:
            print(f"  {figure}")
        print(f"  {took:.0f} s")
        if args.save:
            RESULTS.mkdir(parents=True, exist_ok=True)
            record = {
                "name": self.name,
                "title": self.title,
                "full": args.full,
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "seconds": took,
                "figures": [asdict(figure) for figure in figures],
            }
            (RESULTS / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        good = all(figure.passes if args.lenient else figure.holds for figure in figures)
        sys.exit(not good)


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
