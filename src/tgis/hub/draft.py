"""The small model that drafts for another one: found, and compared with it by its vocabulary."""

import json
from pathlib import Path
from typing import Any

import msgspec

from tgis.config import Config
from tgis.config.speculation import OFF, PROMPT_LOOKUP
from tgis.errors import ConfigError, ModelError
from tgis.hub.fast_tokenizer import ensure_fast_tokenizer
from tgis.hub.resolve import resolve
from tgis.types import ModelFiles, ModelKind


def resolve_draft(config: Config, tokenizer: Path, directory: Path) -> ModelFiles | None:
    """The model that `--speculate` names, if it names one.

    Args:
        tokenizer: directory with the large model's tokenizer.json.
        directory: for files that must be made.

    Raises:
        ConfigError: it is not there, broken, no decoder, or its tokens are others; one line.
    """
    name = config.speculate
    if name in (OFF, PROMPT_LOOKUP):
        return None
    asked = msgspec.structs.replace(
        config, model_name=name, revision=None, deployment_framework=None
    )
    try:
        files = resolve(asked)
        own = ensure_fast_tokenizer(Path(files.path), directory, config.trust_remote_code)
    except ModelError as error:
        raise ConfigError(f"--speculate={name}: {error}") from None
    if files.kind is not ModelKind.DECODER_ONLY:
        raise ConfigError(f"--speculate={name}: a model of type {files.model_type} has an encoder")
    if config.num_shard > 1:
        raise ConfigError(
            f"--speculate={name}: a draft model does not go with num_shard = {config.num_shard};"
            f" {PROMPT_LOOKUP} does"
        )
    _compare(name, _vocabulary(tokenizer), _vocabulary(own))
    return files


def _compare(name: str, large: dict[str, int], small: dict[str, int]) -> None:
    """Only tokens that both know may be missing in neither, and each has the same id in both."""
    num_different = sum(large.get(token) != number for token, number in small.items())
    num_missing = len(large.keys() - small.keys())
    if num_different or num_missing:
        raise ConfigError(
            f"--speculate={name}: its vocabulary is another one: of the model's {len(large)} tokens"
            f" it lacks {num_missing}, and {num_different} of its {len(small)} have other ids or"
            " are unknown to the model"
        )


def _vocabulary(directory: Path) -> dict[str, int]:
    """Token -> id, as tokenizer.json has them."""
    values: dict[str, Any] = json.loads((directory / "tokenizer.json").read_bytes())
    vocab = values["model"].get("vocab", {})
    if isinstance(vocab, list):  # unigram: [token, score]
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    return {**vocab, **{item["content"]: item["id"] for item in values.get("added_tokens", [])}}
