"""What a model's files say of its tokenizer's class and of its BOS token.

TGIS keeps the BOS token of a truncated input where the tokenizer has a true `add_bos_token`. That
is an attribute of some tokenizer classes only: for the others the files may say what they like.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tgis.errors import ModelError

# The classes with the attribute: its value and the BOS token where the files give none.
_BOS = {
    "CodeLlamaTokenizer": (True, "<s>"),
    "CohereTokenizer": (True, "<BOS_TOKEN>"),
    "GPT2Tokenizer": (False, "<|endoftext|>"),
    "GPTNeoXTokenizer": (False, "<|endoftext|>"),
    "GemmaTokenizer": (True, "<bos>"),
    "LlamaTokenizer": (True, "<s>"),
}
# The class by config.json's model_type, where tokenizer_config.json names none.
_CLASS_OF_MODEL = {
    "cohere": "CohereTokenizer",
    "gemma": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "llama": "LlamaTokenizer",
    "mistral": "LlamaTokenizer",
    "mixtral": "LlamaTokenizer",
}


class TokenizerSettings(NamedTuple):
    """A tokenizer as its model's files describe it."""

    class_name: str | None  # as named; None if they do not name one
    usual_class: str | None  # of models of this type; None if unknown
    kept_bos: str | None  # the BOS token, if a truncated input keeps it


def read_tokenizer_settings(directory: Path) -> TokenizerSettings:
    """Read the configuration files of a model, which may all be missing.

    Raises:
        ModelError: one is no JSON object.
    """
    settings = _read_json(directory / "tokenizer_config.json")
    class_name = settings.get("tokenizer_class")
    usual_class = _CLASS_OF_MODEL.get(str(_read_json(directory / "config.json").get("model_type")))
    adds_bos, usual_bos = _BOS.get(str(class_name or usual_class).removesuffix("Fast"), (None, ""))
    if adds_bos is not None:
        adds_bos = settings.get("add_bos_token", adds_bos)
    special = _read_json(directory / "special_tokens_map.json")
    bos = settings.get("bos_token") or special.get("bos_token") or usual_bos
    if isinstance(bos, dict):
        bos = bos.get("content")
    return TokenizerSettings(
        class_name if isinstance(class_name, str) else None,
        usual_class,
        bos if adds_bos and isinstance(bos, str) else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"cannot read {path}: not a JSON object")
    return content
