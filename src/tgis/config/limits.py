"""The length limits that hold, from the settings and the model together."""

import msgspec

from tgis.config.service import Config, Note
from tgis.errors import ConfigError
from tgis.types import ModelFiles

DEFAULT_MAX_SEQUENCE_LENGTH = 2048


class Limits(msgspec.Struct, frozen=True):
    """Token limits of one sequence, and what the log should say about them."""

    max_sequence_length: int
    max_new_tokens: int
    max_prompt_length: int  # virtual tokens of a soft prompt
    notes: tuple[Note, ...]


def effective_limits(config: Config, files: ModelFiles) -> Limits:
    """TGIS's rules: the setting, else the model's own, else 2048 (operations §4 and §2).

    Args:
        config: the settings.
        files: the model.

    Raises:
        ConfigError: the limit of soft prompts does not fit.
    """
    model_max_length = files.max_length
    if config.max_sequence_length is not None:
        length, source = config.max_sequence_length, "user-defined"
    elif model_max_length is not None:
        length, source = model_max_length, "model"
    else:
        length, source = DEFAULT_MAX_SEQUENCE_LENGTH, "default"
    notes = [Note("info", f"Using {source} max_sequence_length: {length}")]
    if model_max_length is not None and length > model_max_length:
        text = f"max_sequence_length ({length}) is larger than the model's own ({model_max_length})"
        notes.append(Note("warning", text))
    new_tokens = min(config.max_new_tokens, length - 1)
    if new_tokens < config.max_new_tokens:
        text = (
            f"adjusting max_new_tokens ({config.max_new_tokens}) down to"
            f" max_sequence_length - 1 ({new_tokens})"
        )
        notes.append(Note("warning", text))
    _check_prefix_length(config, length)
    prompt = config.max_prompt_prefix_length or -(-length // 2)
    return Limits(length, new_tokens, prompt, tuple(notes))


def _check_prefix_length(config: Config, max_sequence_length: int) -> None:
    prefix, most = config.max_prompt_prefix_length, max_sequence_length - 1
    if prefix is not None and prefix > most:
        raise ConfigError(
            f"--max-prompt-prefix-length={prefix}: Value for the MAX_PROMPT_PREFIX_LENGTH"
            f" ({prefix}) cannot be larger than the max sequence length - 1 ({most});"
            f" expected an integer from 1 to {most}"
        )
