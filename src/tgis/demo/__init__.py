"""A small story-telling model of our own, so that a first request needs no download."""

from __future__ import annotations

from pathlib import Path


def model_dir() -> Path:
    """The folder of the bundled model: configuration, weights and tokenizer."""
    return Path(__file__).parent / "model"
