"""The text by which weights are quantised, and by which the result is judged."""

from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tgis.errors import ConfigError, ModelError

HELD_OUT = 0.1  # of the text: its end
MOST_HELD_OUT = 32  # windows


class Texts(NamedTuple):
    """Windows of token ids, all of equal length."""

    calibration: list[Tensor]
    held_out: list[Tensor]


def read_texts(model_dir: Path, file: Path, most: int, length: int) -> Texts:
    """Cut a text file into windows.

    Args:
        model_dir: holds tokenizer.json.
        file: UTF-8 text.
        most: windows to calibrate with.
        length: tokens of a window.

    Raises:
        ConfigError: the file cannot be read, or is too short.
        ModelError: the tokenizer cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"--calibration-file={file}: {why}") from None
    ids = torch.tensor(_tokenizer(model_dir).encode(text, add_special_tokens=False).ids)
    split = len(ids) - int(len(ids) * HELD_OUT)
    texts = Texts(
        _windows(ids[:split], length)[:most], _windows(ids[split:], length)[:MOST_HELD_OUT]
    )
    if not texts.calibration or not texts.held_out:
        raise ConfigError(
            f"--calibration-file={file}: its {len(ids)} tokens are too few: the last"
            f" {HELD_OUT:.0%} are held out, and both parts need at least --sample-length ="
            f" {length} tokens"
        )
    return texts


def _tokenizer(model_dir: Path) -> Tokenizer:
    path = model_dir / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own
        raise ModelError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _windows(ids: Tensor, length: int) -> list[Tensor]:
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
