"""The Dockerfile as data: its stages, and what each inherits."""

import io
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[2]
DEVICES = ("cpu", "cuda")


@dataclass
class Stage:
    """One FROM, with its instructions in order as (name, text)."""

    name: str
    parent: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        """The texts of one kind of instruction."""
        return [text for name, text in self.steps if name == instruction]


def _content() -> bytes:
    return (ROOT / "Dockerfile").read_bytes()


def arguments() -> dict[str, str]:
    """Every ARG with its default."""
    steps = DockerfileParser(fileobj=io.BytesIO(_content())).structure
    pairs = (step["value"].partition("=") for step in steps if step["instruction"] == "ARG")
    return {name: text.strip('"') for name, _, text in pairs}


def stages(device: str) -> dict[str, Stage]:
    """The stages by name, as built for a device."""
    found: dict[str, Stage] = {}
    for step in DockerfileParser(fileobj=io.BytesIO(_content())).structure:
        instruction, text = step["instruction"], step["value"].replace("${DEVICE}", device)
        if instruction == "FROM":
            parent, _, name = text.partition(" AS ")
            found[name] = stage = Stage(name, parent)
        elif found and instruction != "COMMENT":
            stage.steps.append((instruction, text))
    return found


def lineage(name: str, device: str) -> list[Stage]:
    """A stage and all that it is built on, the base first."""
    known = stages(device)
    line = []
    while name in known:
        line.insert(0, known[name])
        name = known[name].parent
    return line


def environment(name: str, device: str) -> dict[str, str]:
    """What ENV instructions leave in a stage; ${NAME} stays as it is."""
    pairs = (
        word.partition("=")
        for stage in lineage(name, device)
        for text in stage.of("ENV")
        for word in shlex.split(text)
    )
    return {key: value for key, _, value in pairs}


def command(text: str) -> list[str]:
    """The words of an ENTRYPOINT, CMD or HEALTHCHECK in exec form."""
    words = json.loads(re.sub(r"^.*?CMD\s+", "", text))
    assert isinstance(words, list), f"{text}: not in exec form"
    return words
