"""SentencePiece BPE models (LLaMA, Gemma, ...) as fast tokenizers.

Merges are ranked by the scores of the pieces that they make. In LLaMA's vocabulary the order of
ids differs from that for runs of spaces, which must merge last.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tgis.errors import ModelError

_SPACE = "▁"
_BPE = 2  # TrainerSpec.ModelType
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type


def build_bpe(directory: Path) -> Tokenizer | None:
    """Build the tokenizer that `tokenizer.model` in a directory describes, None if that is no BPE.

    Of tokenizer_config.json `add_bos_token` (true if not there), `add_eos_token`, `legacy` and
    `added_tokens_decoder` count, of added_tokens.json everything.

    Raises:
        ModelError: the files contradict each other.
    """
    from transformers.utils import sentencepiece_model_pb2_new as pb2

    proto = pb2.ModelProto()
    proto.ParseFromString((directory / "tokenizer.model").read_bytes())
    if proto.trainer_spec.model_type != _BPE:
        return None
    settings = _read(directory / "tokenizer_config.json")
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    vocabulary = {text: number for number, (text, _, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges({text: score for text, score, kind in pieces if kind == _NORMAL}),
            unk_token=next(text for text, _, kind in pieces if kind == _UNKNOWN),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    _set_spaces(tokenizer, proto.normalizer_spec, settings.get("legacy") is not False)
    for text, _, kind in pieces:
        if kind in (_UNKNOWN, _CONTROL):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    _add_tokens(tokenizer, directory, settings)
    trained = proto.trainer_spec
    bos = _end(settings, "bos", trained.bos_piece, default=True)
    eos = _end(settings, "eos", trained.eos_piece, default=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*bos, *eos}],
    )
    return tokenizer


def _end(settings: dict[str, Any], role: str, trained: str, default: bool) -> list[str]:
    """Return the token that goes before ("bos") or after ("eos") every text, if any."""
    if not settings.get(f"add_{role}_token", default):
        return []
    token = settings.get(f"{role}_token")
    return [(token.get("content") if isinstance(token, dict) else token) or trained]


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make a piece, best first."""
    ranked = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                ranked.append((score, len(left), len(right), left, right))
    ranked.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in ranked]


def _set_spaces(tokenizer: Tokenizer, spec: Any, legacy: bool) -> None:
    """Say how a text's spaces become ▁ and back.

    Without `legacy`, ▁ is put before the text only, not after special tokens in it.
    """
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if legacy:
        if spec.add_dummy_prefix:
            steps.append(normalizers.Prepend(_SPACE))
        steps.append(normalizers.Replace(" ", _SPACE))
    else:
        scheme = "first" if spec.add_dummy_prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme, split=False)
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _add_tokens(tokenizer: Tokenizer, directory: Path, settings: dict[str, Any]) -> None:
    """Add the tokens that came after the SentencePiece model was trained."""
    added = {
        number: AddedToken(text) for text, number in _read(directory / "added_tokens.json").items()
    }
    for number, token in settings.get("added_tokens_decoder", {}).items():
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        values = {flag: bool(token.get(flag)) for flag in flags}
        added[int(number)] = AddedToken(token["content"], **values)
    for number, token in sorted(added.items()):
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != number:
            raise ModelError(f"token {number} cannot be added: the numbers before it are missing")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return content
