"""Settings of speculative decoding."""

from typing import Annotated

from tgis.config.model import ModelSettings
from tgis.config.setting import Kind, Setting, between

SPECULATION = "Speculative decoding"

OFF, PROMPT_LOOKUP = "off", "prompt-lookup"


def _read_drafts(text: str) -> str:
    """One of the words in any case, else the name of a model as it stands."""
    word = text.strip().lower()
    if word in (OFF, PROMPT_LOOKUP):
        return word
    if not text.strip() or not text.isprintable():
        raise ValueError
    return text


class SpeculationSettings(ModelSettings, frozen=True, kw_only=True):
    """A part of `Config`."""

    speculate: Annotated[
        str,
        Setting(
            SPECULATION,
            "where drafts of several tokens a step come from (native engine)",
            kind=Kind(
                f"{OFF}, {PROMPT_LOOKUP}, or a small model of the same vocabulary: a directory, or"
                " a name in the cache",
                _read_drafts,
            ),
        ),
    ] = OFF
    speculate_tokens: Annotated[
        int,
        Setting(
            SPECULATION,
            "tokens of one draft at most",
            check=between(1, 15, noun="an integer"),
        ),
    ] = 8
    speculate_max_batch_size: Annotated[
        int,
        Setting(
            SPECULATION,
            "sequences in a step beyond which there are no drafts",
            check=between(1, 1024, noun="an integer"),
            aliases={"speculator_max_batch_size": ""},
        ),
    ] = 16
