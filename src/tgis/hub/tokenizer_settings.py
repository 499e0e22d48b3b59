"""What a model's files say of its tokenizer's class and of its BOS token.

TGIS keeps the BOS token of a truncated input where the tokenizer has a true `add_bos_token`. That
is an attribute of some tokenizer classes only: for the others the files may say what they like.
"""

import json
from pathlib import Path
from typing import Any

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


def kept_bos(directory: Path) -> str | None:
    """Return the BOS token if a truncated input keeps it; the files may all be missing.

    Raises:
        ModelError: one is no JSON object.
    """
    settings = _read_json(directory / "tokenizer_config.json")
    model_type = str(_read_json(directory / "config.json").get("model_type"))
    class_name = settings.get("tokenizer_class") or _CLASS_OF_MODEL.get(model_type)
    if (usual := _BOS.get(str(class_name).removesuffix("Fast"))) is None:
        return None
    adds_bos, usual_bos = usual
    special = _read_json(directory / "special_tokens_map.json")
    bos = settings.get("bos_token") or special.get("bos_token") or usual_bos
    if isinstance(bos, dict):
        bos = bos.get("content")
    return bos if settings.get("add_bos_token", adds_bos) and isinstance(bos, str) else None


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
