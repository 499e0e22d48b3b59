"""The commands of `text-generation-server` that fetch and convert model files (operations §6)."""

import os
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, MutableMapping
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from tgis.config import Config, parse
from tgis.errors import ConfigError, ModelError
from tgis.hub.resolve import locate
from tgis.hub.weight_files import has_safetensors

_META = (".json", ".py", ".model", ".md")
_MAX_WORKERS = 64
# Vocabularies of models without tokenizer.json that are none of TGIS's files.
_TOKENIZER_TEXTS = ("vocab.txt", "merges.txt")
_VARIABLES = (
    "HF_HUB_CACHE",
    "TRANSFORMERS_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HOME",
    "HOME",
    "TRUST_REMOTE_CODE",
)


def settings(environ: MutableMapping[str, str]) -> Config:
    """The settings that concern model files; nothing else of the environment matters here."""
    config = parse([], {name: environ[name] for name in _VARIABLES if name in environ})
    for note in config.notes:
        if note.level == "warning":
            print(note.text, file=sys.stderr)
    return config


def download_weights(arguments: Namespace, environ: MutableMapping[str, str]) -> int:
    """Fetch a model's files; convert weights and tokenizer where the hub has none of ours."""
    extensions = _extensions(arguments.extension)
    _check(arguments, environ)
    config = settings(environ)
    if not config.hf_hub_cache:
        raise ConfigError("HF_HUB_CACHE is not set, nor are HF_HOME and HOME; set one of them")
    environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # the library would fetch and send more
    from tgis.hub.download import choose, fetch, look_up

    name = arguments.model_name
    repository = look_up(name, arguments.revision, arguments.token)

    def get(files: list[str]) -> Path:
        print(f"Downloading {len(files)} files for model {name}", flush=True)
        return fetch(repository, files, Path(config.hf_hub_cache), arguments.workers)

    try:
        files = choose(repository.files, extensions)
        snapshot = get(files)
        if arguments.auto_convert and ".safetensors" in extensions:
            binaries = choose(repository.files, (".bin",))
            asked = ".bin" in extensions
            _ensure_safetensors(snapshot, files, None if asked else lambda: get(binaries))
        if arguments.auto_convert:
            texts = [file for file in _TOKENIZER_TEXTS if file in repository.files]
            if texts and not (snapshot / "tokenizer.json").exists():
                get(texts)
            _convert_tokenizer(name, snapshot, None, config.trust_remote_code)
    except KeyboardInterrupt:
        print("interrupted; what has come is kept, run the command again", file=sys.stderr)
        raise
    return 0


def _ensure_safetensors(
    snapshot: Path, files: list[str], get_binaries: Callable[[], Path] | None
) -> None:
    """Convert weights if the snapshot has no safetensors.

    Args:
        snapshot: the model's directory.
        files: what came from the hub.
        get_binaries: fetches `.bin` weights, unless they were among `files`.
    """
    if has_safetensors(snapshot):
        if not any(file.endswith(".safetensors") for file in files):
            print(
                ".safetensors weights not found on hub, but were found locally. Remove them first"
                " to re-convert"
            )
        return
    if get_binaries:
        print(".safetensors weights not found, downloading pytorch weights to convert...")
        get_binaries()
    print(".safetensors weights not found, converting from pytorch weights...", flush=True)
    from tgis.hub.convert import convert_weights

    convert_weights(snapshot, _report)


def convert_to_safetensors(arguments: Namespace, environ: MutableMapping[str, str]) -> int:
    """Make safetensors of `.bin` weights."""
    model_dir = locate(arguments.model_name, arguments.revision, settings(environ).hf_hub_cache)
    from tgis.hub.convert import convert_weights

    convert_weights(model_dir, _report)
    return 0


def convert_to_fast_tokenizer(arguments: Namespace, environ: MutableMapping[str, str]) -> int:
    """Make tokenizer.json of older tokenizer files."""
    config = settings(environ)
    model_dir = locate(arguments.model_name, arguments.revision, config.hf_hub_cache)
    _convert_tokenizer(
        arguments.model_name, model_dir, arguments.output_path, config.trust_remote_code
    )
    return 0


def convert_to_onnx(arguments: Namespace, environ: MutableMapping[str, str]) -> int:
    """Make ONNX files of a model, with its configuration and tokenizer."""
    config = settings(environ)
    model_dir = locate(arguments.model_name, arguments.revision, config.hf_hub_cache)
    from tgis.engines.onnx_export import Options, export

    options = Options(arguments.merge_graphs, arguments.optimize, arguments.provider)
    source = msgspec.structs.replace(config, model_name=str(model_dir))
    export(source, Path(arguments.target), options, _report)
    return 0


def _convert_tokenizer(
    name: str, model_dir: Path, output_path: str | None, trust_remote_code: bool
) -> None:
    if (model_dir / "tokenizer.json").exists():
        print(f"Model {name} already has a fast tokenizer")
        return
    target = model_dir if output_path is None else Path(output_path)
    if not target.is_dir():
        raise ConfigError(f"--output-path: Output path {output_path} must exist and be a directory")
    from tgis.hub.fast_tokenizer import convert

    try:
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=target) as made:
            convert(model_dir, Path(made), trust_remote_code)
            Path(made, "tokenizer.json").replace(target / "tokenizer.json")
        for settings in ("tokenizer_config.json", "special_tokens_map.json"):
            if (model_dir / settings).exists() and not (target / settings).exists():
                shutil.copyfile(model_dir / settings, target / settings)
    except OSError as error:
        raise ModelError(f"cannot write the tokenizer to {target}: {error.strerror}") from None
    print(f"Saved tokenizer to {target}")


def _report(line: str) -> None:
    print(line, flush=True)


def _extensions(text: str) -> list[str]:
    """TGIS: a list, or a single extension of weights that brings those of all other files."""
    extensions = [part.strip() for part in text.split(",")]
    for extension in extensions:
        if len(extension) < 2 or not extension.startswith("."):
            raise ConfigError(
                f"--extension={text!a}: {extension!a} is no extension; expected a list such as"
                " .safetensors,.json"
            )
    if len(extensions) == 1 and extensions[0] not in _META:
        extensions += _META
    return extensions


def _check(arguments: Namespace, environ: MutableMapping[str, str]) -> None:
    """What the libraries would only notice with a traceback."""
    if not 1 <= arguments.workers <= _MAX_WORKERS:
        raise ConfigError(
            f"--workers={arguments.workers}: expected an integer from 1 to {_MAX_WORKERS}"
        )
    token = arguments.token
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("--token: that is no token; expected one such as hf_...")
    if os.path.isdir(arguments.model_name) and arguments.model_name.startswith((".", "/", "~")):
        raise ConfigError(f"{arguments.model_name}: that is a directory, not a model on the hub")
    if endpoint := environ.get("HF_ENDPOINT"):
        try:
            parts = urlsplit(endpoint)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != -1
        except ValueError:
            valid = False
        if not valid:
            raise ConfigError(f"HF_ENDPOINT={endpoint!a}: expected a URL such as https://host")
