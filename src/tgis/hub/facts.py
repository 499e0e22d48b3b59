"""What a model's small files say of it: its kind, its special tokens, its lengths."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgis.errors import ModelError
from tgis.types import ModelKind

# The first of these that holds an integer counts (TGIS operations §4).
LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_ENCODER_DECODER = """
    bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian
    mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma
    t5gemma2 umt5
"""
ENCODER_DECODER_TYPES = frozenset(_ENCODER_DECODER.split())


def read_facts(config: Mapping[str, Any], path: Path, name: str) -> dict[str, Any]:
    """The fields of `ModelFiles` that follow from the contents of files.

    Args:
        config: the contents of config.json.
        path: the model's directory.
        name: for messages.

    Raises:
        ModelError: config.json does not name a model type, or a special token is no token id.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ModelError(f"Model {name}: {path / 'config.json'}: model_type is missing")
    kind = _kind(config, model_type)
    tokens = _SpecialTokens(config, path, name)
    eos = tokens.ids("eos")
    start = tokens.first("decoder_start") if kind is ModelKind.ENCODER_DECODER else None
    bos, pad = tokens.first("bos"), tokens.first("pad")
    if kind is ModelKind.ENCODER_DECODER and start is None:
        start = bos
    return {
        "model_type": model_type,
        "kind": kind,
        "vocab_size": _integer(config, ("vocab_size",)),
        "max_length": _integer(config, LENGTH_KEYS, least=2),
        "eos_token_ids": eos,
        "bos_token_id": bos,
        "pad_token_id": pad if pad is not None else next(iter(eos), None),
        "decoder_start_token_id": start,
        "dtype": _dtype(config),
        "quantization": _quantization(config, path),
        "auto_map": bool(config.get("auto_map")),
    }


def remote_code_refusal(name: str) -> ModelError:
    """For an engine that would have to run the model's own code, without TRUST_REMOTE_CODE."""
    return ModelError(
        f"Model {name} comes with Python code of its own (auto_map in config.json), which is not"
        " run unless --trust-remote-code=true (TRUST_REMOTE_CODE) is set"
    )


def _kind(config: Mapping[str, Any], model_type: str) -> ModelKind:
    flag = config.get("is_encoder_decoder")
    if not isinstance(flag, bool):
        flag = model_type in ENCODER_DECODER_TYPES
    return ModelKind.ENCODER_DECODER if flag else ModelKind.DECODER_ONLY


def _sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """config.json and, for models of more than text, its part about text."""
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def _integer(config: Mapping[str, Any], keys: tuple[str, ...], least: int = 1) -> int | None:
    for section in _sections(config):
        for key in keys:
            value = section.get(key)
            if type(value) is int and value >= least:
                return value
    return None


def _dtype(config: Mapping[str, Any]) -> str | None:
    for section in _sections(config):
        value = section.get("dtype", section.get("torch_dtype"))
        if isinstance(value, str):
            return value.removeprefix("torch.")
    return None


def _quantization(config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """How the weights are quantised: in config.json, else in GPTQ's own file."""
    for section in _sections(config):
        if isinstance(value := section.get("quantization_config"), dict):
            return value
    gptq = _optional(path / "quantize_config.json")
    return {"quant_method": "gptq", **gptq} if gptq else None


class _SpecialTokens:
    """Ids of special tokens: config.json, else generation_config.json, else the tokenizer's."""

    def __init__(self, config: Mapping[str, Any], path: Path, name: str) -> None:
        self._sections = [*_sections(config), _optional(path / "generation_config.json")]
        self._path = path
        self._name = name

    def ids(self, role: str) -> tuple[int, ...]:
        """All ids of a role such as "eos"; empty if it has none.

        Raises:
            ModelError: it is given as something else than ids.
        """
        key = f"{role}_token_id"
        for section in self._sections:
            value = section.get(key)
            if value is None or value == -1:
                continue
            ids = tuple(value) if isinstance(value, list) else (value,)
            if not all(type(token) is int and token >= 0 for token in ids):
                raise ModelError(f"Model {self._name}: {key} in its configuration is no token id")
            if ids:
                return ids
        token = self._of_tokenizer(f"{role}_token")
        return () if token is None else (token,)

    def first(self, role: str) -> int | None:
        """The first id of a role."""
        return next(iter(self.ids(role)), None)

    def _of_tokenizer(self, key: str) -> int | None:
        settings = _optional(self._path / "tokenizer_config.json")
        token = settings.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        decoder = settings.get("added_tokens_decoder")
        if not isinstance(content, str):
            return None
        if isinstance(decoder, dict):
            for number, added in decoder.items():
                if isinstance(added, dict) and added.get("content") == content:
                    return int(number) if number.isdecimal() else None
        return _added_token(_optional(self._path / "tokenizer.json"), content)


def _added_token(tokenizer: Mapping[str, Any], content: str) -> int | None:
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and token.get("content") == content:
            number = token.get("id")
            return number if type(number) is int else None
    return None


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object from a file that need not be there; {} if it is not, or is no object."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
