"""A `tokenizer.json` for every model: its own, or one converted from older tokenizer files.

The conversion runs `transformers` in a process of its own, offline, so the caller never pays for
the import:

    python -m tgis.hub.fast_tokenizer SOURCE_DIRECTORY TARGET_FILE [--trust-remote-code]
"""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

from tgis.errors import ModelError
from tgis.hub.sentencepiece_bpe import build_bpe
from tgis.hub.tokenizer_settings import kept_bos

_SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "spm.model")
_VOCABULARIES = ("tokenizer.model", *_SENTENCEPIECE, "vocab.json", "vocab.txt")
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
_TIMEOUT = 600.0  # seconds; the largest vocabularies take a minute


def ensure_fast_tokenizer(model_dir: Path, cache_dir: Path | None, trust_remote_code: bool) -> Path:
    """Return a directory with the model's `tokenizer.json` and the settings that go with it.

    It is the model's own where that has the file, else a new temporary one within `cache_dir`
    (None: where the system keeps such); it is the caller's to remove.

    Raises:
        ModelError: there is none, and none can be made.
    """
    if (model_dir / "tokenizer.json").is_file():
        return model_dir
    target = Path(tempfile.mkdtemp(prefix="tgis-tokenizer-", dir=cache_dir))
    try:
        convert(model_dir, target, trust_remote_code)
        for name in _SETTINGS:
            if (model_dir / name).is_file():
                shutil.copyfile(model_dir / name, target / name)
    except BaseException:
        shutil.rmtree(target)
        raise
    return target


def convert(model_dir: Path, target: Path, trust_remote_code: bool) -> None:
    """Make `tokenizer.json` in the directory `target` from the model's older tokenizer files.

    Raises:
        ModelError: they are missing, or of a kind that cannot be converted.
    """
    found = [name for name in _VOCABULARIES if (model_dir / name).is_file()]
    if not found and not trust_remote_code:  # code of the model's own may name files as it likes
        raise ModelError(
            f"No existing fast tokenizer (tokenizer.json) found in {model_dir}, nor a file to make"
            f" one from ({', '.join(_VOCABULARIES)})"
        )
    if found and set(found) <= set(_SENTENCEPIECE) and find_spec("sentencepiece") is None:
        raise ModelError(
            f"No existing fast tokenizer (tokenizer.json) found in {model_dir}; to make one from"
            f" {found[0]} install the Python package sentencepiece"
        )
    command = [sys.executable, "-m", __spec__.name, str(model_dir), str(target / "tokenizer.json")]
    if trust_remote_code:
        command.append("--trust-remote-code")
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"converting the tokenizer in {model_dir} took too long") from None
    if done.returncode != 0:
        cause = done.stdout.strip() or f"the converter ended with code {done.returncode}"
        raise ModelError(f"cannot make tokenizer.json from the files in {model_dir}: {cause}")


def _load(source: Path, trust_remote_code: bool) -> Tokenizer:
    """Make a fast tokenizer.

    Raises:
        ModelError: the model's class has none.
        Exception: whatever a library or the model's own code raises.
    """
    if (source / "tokenizer.model").is_file() and (built := build_bpe(source)) is not None:
        return built
    from transformers import AutoTokenizer

    options = {"add_bos_token": True} if kept_bos(source) else {}
    loaded = AutoTokenizer.from_pretrained(
        str(source), local_files_only=True, trust_remote_code=trust_remote_code, **options
    )
    if not loaded.is_fast:
        raise ModelError(f"{type(loaded).__name__} has no fast version")
    tokenizer: Tokenizer = loaded.backend_tokenizer
    return tokenizer


def _check_size(source: Path, num_tokens: int) -> None:
    """Refuse what transformers makes up where it finds no vocabulary.

    Raises:
        ModelError: the model has far more tokens.
    """
    path = source / "config.json"
    wanted = json.loads(path.read_bytes()).get("vocab_size") if path.is_file() else None
    if isinstance(wanted, int) and 2 * num_tokens < wanted:
        raise ModelError(f"they give {num_tokens} tokens, but the model has {wanted}")


def main(source: str, target: str, *flags: str) -> int:
    """Convert in this process; the cause of a failure goes to stdout, as one line."""
    try:
        tokenizer = _load(Path(source), "--trust-remote-code" in flags)
        _check_size(Path(source), tokenizer.get_vocab_size())
        tokenizer.save(target)
    except Exception as error:  # whatever a library or the model's own code raises
        print(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
