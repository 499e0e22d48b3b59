"""Reading documents, holding some out, and keeping the ones worth learning from."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .speech import NAME, repair_speech

WORD = re.compile(r"[A-Za-z']+")
SENTENCE_BREAK = re.compile(r'(?<=[.!?])["\s]+')
DOUBLED_WORD = re.compile(r"\b(?!very\b|had\b|so\b|that\b)(\w+) \1\b", re.IGNORECASE)
WRONG_ARTICLE = re.compile(r"\ban [b-df-gj-np-tv-z]|\ba [aei]")
# "Tim thanked Tim", "Tim and Tim": one character met as two.
SELF_MEETING = re.compile(
    rf"\b({NAME})(?:,? (?:said|asked|replied|and|thanked|saw|hugged|named|told|with|was|smiled"
    r"|agreed|felt|loved|liked)|'s (?:mom|mommy|dad|friend) named)\W+(?:\w+ ){0,2}\1\b"
)

RARE_WORD_COUNT = 6
REPEATED_RUN = 6
SHORT_RUN = 4
REPETITION_WEIGHT = 5.0
SHORTEST_DOCUMENT = 350
COMMON_WORD_SURPRISE = 2.0


@dataclass(frozen=True, slots=True)
class Split:
    """Documents for learning and documents the model never sees."""

    train: list[str]
    held_out: list[str]


def read_documents(paths: Iterable[Path], separator: str) -> list[str]:
    """All documents of the files (plain or gzip), stripped, in order and without duplicates."""
    documents: dict[str, None] = {}
    for path in paths:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        for piece in text.split(separator):
            if document := piece.strip():
                documents[document] = None
    return list(documents)


def split_documents(documents: Iterable[str], held_out_share: float) -> Split:
    """Hold out a share chosen by each document's checksum, so that it never depends on order."""
    limit = held_out_share * 2**32
    split = Split([], [])
    for document in documents:
        held_out = zlib.crc32(document.encode("utf-8")) < limit
        (split.held_out if held_out else split.train).append(document)
    return split


def words_of(document: str) -> list[str]:
    """The document's words in lower case."""
    return WORD.findall(document.lower())


class Critic:
    """Judges documents by what usually goes wrong in synthetic stories."""

    def __init__(self, reference: Sequence[str]) -> None:
        self._uses: Counter[str] = Counter()
        self._documents: Counter[str] = Counter()
        for document in reference:
            words = words_of(document)
            self._uses.update(words)
            self._documents.update(set(words))
        self._size = len(reference)

    def is_sound(self, document: str) -> bool:
        """Whether the document has none of the defects that can be seen by rule."""
        return not (
            len(document) < SHORTEST_DOCUMENT
            or document[-1] not in '.!"'
            or document.count('"') % 2
            or DOUBLED_WORD.search(document)
            or WRONG_ARTICLE.search(document)
            or SELF_MEETING.search(document)
            or self._has_odd_word(document)
            or _repeats_itself(document)
        )

    def disorder(self, document: str) -> float:
        """Incoherence and monotony in one number; the lowest come first in training's end."""
        runs = _runs(words_of(document), SHORT_RUN)
        repeated = 1.0 - len(set(runs)) / max(1, len(runs))
        return self.wandering(document) + REPETITION_WEIGHT * repeated

    def wandering(self, document: str) -> float:
        """How much the document brings up unusual things once and drops them; low is coherent."""
        words = words_of(document)
        stems = Counter(_stem(word) for word in words)
        dropped = (word for word in words if stems[_stem(word)] == 1)
        return sum(self._surprise(word) for word in dropped) / max(1, len(words))

    def _has_odd_word(self, document: str) -> bool:
        return any(self._uses[word] < RARE_WORD_COUNT for word in words_of(document))

    def _surprise(self, word: str) -> float:
        rarity = math.log(self._size / max(1, self._documents[word]))
        return max(0.0, rarity - COMMON_WORD_SURPRISE)


def _stem(word: str) -> str:
    """A crude stem: enough to see that "jumped" and "jumping" are one thing."""
    return re.sub(r"('s|ing|ed|es|s|y)$", "", word) if len(word) > 4 else word


def _repeats_itself(document: str) -> bool:
    """Whether a whole sentence or a long run of words occurs twice: the seed of endless loops."""
    sentences = [s for s in SENTENCE_BREAK.split(document) if len(s.split()) >= 4]
    runs = _runs(words_of(document), REPEATED_RUN)
    return len(set(sentences)) < len(sentences) or len(set(runs)) < len(runs)


def _runs(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def curate(documents: Sequence[str], critic: Critic) -> list[str]:
    """The sound documents, mended where that is possible, the most coherent first."""
    mended = (repair_speech(document) for document in documents)
    sound = (document for document in mended if document and critic.is_sound(document))
    return sorted(sound, key=critic.disorder)
