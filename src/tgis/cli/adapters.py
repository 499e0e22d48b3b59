"""`tgis adapters`: what is in a store of soft prompts and LoRA adapters, and whether it is sound.

Works without a server. With `--model`, each adapter must fit that model, which is loaded for it;
without, files and options are checked as far as they can be by themselves.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tgis.errors import ConfigError

if TYPE_CHECKING:
    from tgis.adapters.load import Rules
    from tgis.adapters.prompts import SoftPrompt
    from tgis.adapters.store import Directory, Refused, Store

_MIB = 1 << 20
_MOST_ROWS = 1 << 16  # where no model says how many a prompt may have
_MOST_PATTERNS = 1 << 12
_MOST_BYTES = 1 << 34
Check = Callable[["Directory"], str]
"""Directory -> what the adapter is, on the rest of a line. Raises `Refused`."""


def add_parsers(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `adapters`; it sets `run`, which takes the arguments to an exit code."""
    parser = subparsers.add_parser(
        "adapters",
        help="list or check a store of soft prompts and LoRA adapters",
        description="The directory is what PREFIX_STORE_PATH names.",
    )
    actions = parser.add_subparsers(required=True, metavar="list|check")
    lister = actions.add_parser("list", help="one line for each adapter: its id and its kind")
    lister.set_defaults(run=_list)
    checker = actions.add_parser(
        "check", help="read every adapter; exit code 1 if one cannot be served"
    )
    checker.add_argument("--model", metavar="MODEL", help="a model that all of them must fit")
    checker.add_argument("--dtype", metavar="TYPE", help="of that model's weights in memory")
    checker.set_defaults(run=_check)
    for action in (lister, checker):
        action.add_argument("directory", help="the store")


def _list(arguments: argparse.Namespace) -> int:
    from tgis.adapters.store import Refused

    store = _store(arguments.directory)
    for adapter_id in store.ids():
        try:
            with store.open(adapter_id) as directory:
                what = directory.kind().name.lower()
        except Refused as error:
            what = f"bad: {_reason(error)}"
        print(f"{adapter_id}\t{what}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from tgis.adapters.store import Refused, is_valid_id

    store = _store(arguments.directory)
    check: Check = _by_itself
    if arguments.model:
        check = _fitting(_rules(arguments.model, arguments.dtype))
    num_bad = num_good = 0
    for adapter_id in store.ids():
        try:
            if not is_valid_id(adapter_id):
                raise Refused("requests cannot name it: only alphanumeric, _ and - and / may")
            with store.open(adapter_id) as directory:
                print(f"ok\t{adapter_id}\t{check(directory)}")
            num_good += 1
        except Refused as error:
            print(f"BAD\t{adapter_id}\t{_reason(error)}")
            num_bad += 1
    print(f"{num_good} ok, {num_bad} bad")
    return 1 if num_bad else 0


def _reason(error: "Refused") -> str:
    from tgis.types import Cause

    if error.cause is Cause.UNSUPPORTED:  # the message is the type
        return f"adapter type {error} is not currently supported"
    return str(error)


def _store(directory: str) -> "Store":
    from tgis.adapters.store import Store

    if not Path(directory).is_dir():
        raise ConfigError(f"{directory}: no such directory")
    return Store(directory)


def _rules(model: str, dtype: str | None) -> "Rules":
    """Those of a server of this model with default settings."""
    from tgis.config import effective_limits, parse
    from tgis.core.assembly import adapter_rules
    from tgis.engines.registry import load_engine
    from tgis.hub.resolve import resolve

    flags = ["--model-name", model, *(["--dtype", dtype] if dtype else [])]
    config = parse(flags, os.environ)
    files = resolve(config)
    engine = load_engine(config, files)
    limits = effective_limits(config, files)
    return adapter_rules(engine, limits.max_prompt_length, config.lora_cache_size_mb * _MIB)


def _fitting(rules: "Rules") -> Check:
    from tgis.adapters.load import read
    from tgis.adapters.prompts import SoftPrompt

    def check(directory: "Directory") -> str:
        adapter = read(directory, directory.kind(), rules)
        if isinstance(adapter, SoftPrompt):
            return _describe_prompt(adapter)
        return f"LoRA of {len(adapter.pairs)} modules, {adapter.num_bytes / _MIB:.3f} MiB"

    return check


def _by_itself(directory: "Directory") -> str:
    """What can be said without a model."""
    import torch

    from tgis.adapters.prompts import PromptRules, load_prompt
    from tgis.adapters.store import ENCODER
    from tgis.types import AdapterKind, ModelKind

    if directory.kind() is AdapterKind.LORA:
        return _lora_by_itself(directory)
    is_seq2seq = ENCODER in directory.names and directory.peft_file() is None
    kind = ModelKind.ENCODER_DECODER if is_seq2seq else ModelKind.DECODER_ONLY
    rules = PromptRules(kind, None, torch.float32, _MOST_ROWS)
    return _describe_prompt(load_prompt(directory, rules))


def _lora_by_itself(directory: "Directory") -> str:
    from tgis.adapters.lora_options import read_options, shown
    from tgis.adapters.store import Refused
    from tgis.adapters.tensors import stored_tensors
    from tgis.types import AdapterKind

    read_options(directory.config(), _MOST_PATTERNS)
    tensors = stored_tensors(directory, AdapterKind.LORA, _MOST_BYTES)
    for name, stored in tensors.items():
        if len(stored.shape) != 2:
            raise Refused(f"tensor {shown(name)} is no matrix")
        if not stored.rows(stored.shape[0]).isfinite().all():
            raise Refused(f"tensor {shown(name)} contains non-finite elements")
    return f"LoRA of {len(tensors)} tensors (--model checks whether they fit)"


def _describe_prompt(prompt: "SoftPrompt") -> str:
    parts = {"decoder": prompt.decoder, "encoder": prompt.encoder}
    sizes = [f"{name} {len(t)} x {t.shape[1]}" for name, t in parts.items() if t is not None]
    return f"soft prompt: {', '.join(sizes)}"
