"""Renaming characters, so that the model learns to carry a name on instead of knowing two."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence


def _names(*lines: str) -> tuple[str, ...]:
    return tuple(name for line in lines for name in line.split())


GIRLS = _names(
    "Lily Lucy Amy Sue Mia Anna Emma Sara Molly Ella Jane Kate Nora Zoe Alice Ruby Clara Ivy Eva",
    "Julia Maria Nina Sophie Hannah Olivia Chloe Leah Tina Betty Wendy Susan Laura Maya Nancy",
    "Fiona Greta Heidi Iris Olga Paula Rita Vera Yara Ada",
)
BOYS = _names(
    "Timmy Tim Tom Max Bob Benny Jack Ben Sam Leo Joe Billy Bobby Tommy Jimmy Andy Danny Peter",
    "Paul Adam Alex Daniel David Eric Finn George Harry Henry Hugo Ian Jacob James John Kevin",
    "Luke Mark Nick Noah Oliver Oscar Ryan Simon Theo Victor Walter Will",
)
KNOWN = re.compile(r"\b(?:" + "|".join(GIRLS + BOYS) + r")\b")


class Renamer:
    """Gives the characters of some documents new names of the same kind."""

    def __init__(self, share: float, seed: int) -> None:
        self._share = share
        self._random = random.Random(seed)

    def __call__(self, document: str) -> str:
        """The document as it is, or with every known name replaced consistently."""
        present = sorted(set(KNOWN.findall(document)))
        if not present or self._random.random() >= self._share:
            return document
        chosen: dict[str, str] = {}
        for name in present:
            pool = GIRLS if name in GIRLS else BOYS
            chosen[name] = self._pick(pool, {*present, *chosen.values()})
        return KNOWN.sub(lambda found: chosen[found.group()], document)

    def _pick(self, pool: Sequence[str], taken: set[str]) -> str:
        return self._random.choice([name for name in pool if name not in taken])
