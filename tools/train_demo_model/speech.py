"""Who says what in a story, and taking back what nobody says: one's own name."""

from __future__ import annotations

import re

NAME = r"[A-Z][a-z]+"
SAYING = r"(?:said|asked|replied|shouted|thought|cried|answered|whispered|yelled|exclaimed)"
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SUBJECT = re.compile(rf"(?:(?:Then|But|So|And|Suddenly|Finally),? )?({NAME})\b(?!'s)")
ATTRIBUTION = re.compile(rf"\s*(?:{SAYING} ({NAME})\b(?!'s)|({NAME}) {SAYING})")
PRONOUNS = {"He", "She"}
# Sentences may begin with these words too; they name nobody.
NOBODY = frozenset(
    """
    The They Then But So And One When As After It Her His Suddenly Finally From Every In At On
    Once There This That All Soon While Just Now If Their Both Everyone We You
    """.split()  # noqa: SIM905 - a list of forty quoted words would be harder to read
)


class Speaker:
    """Follows a paragraph and says who speaks a quotation, or None where that is unclear."""

    def __init__(self) -> None:
        self._subject: str | None = None

    def of_quotation(self, before: str, after: str) -> str | None:
        """The speaker of what stands between two pieces of narration."""
        for sentence in SENTENCE_END.split(before.strip()):
            self._follow(sentence)
        if re.search(rf"\b{SAYING}\b", SENTENCE_END.split(before.strip())[-1]):
            return self._subject
        if found := ATTRIBUTION.match(after):
            name = found[1] or found[2]
            return None if name in NOBODY | PRONOUNS else name
        return None

    def _follow(self, sentence: str) -> None:
        found = SUBJECT.match(sentence)
        name = found[1] if found else None
        if name in PRONOUNS or not sentence:
            return
        self._subject = None if name in NOBODY else name


def repair_speech(document: str) -> str | None:
    """The document with nobody calling themselves by name, or None where that cannot be mended.

    "Thank you, Tim," says Tim in many a synthetic story; without the name it makes sense.
    """
    paragraphs = []
    for paragraph in document.split("\n"):
        speaker = Speaker()
        pieces = paragraph.split('"')
        for index in range(1, len(pieces) - 1, 2):
            name = speaker.of_quotation(pieces[index - 1], pieces[index + 1])
            speech = _without_address(pieces[index], name) if name else pieces[index]
            if speech is None:
                return None
            pieces[index] = speech
        paragraphs.append('"'.join(pieces))
    return "\n".join(paragraphs)


def _without_address(speech: str, name: str) -> str | None:
    speech = re.sub(rf",? \b{name}\b(?=[.,!?])", "", speech)
    if speech.startswith(f"{name}, "):
        rest = speech.removeprefix(f"{name}, ")
        speech = rest[:1].upper() + rest[1:]
    introduces = re.search(rf"(?:I'm|I am|name is) {name}\b", speech)
    unclear = re.search(rf"\b{name}\b", speech) and not introduces
    return speech if speech and not unclear else None
