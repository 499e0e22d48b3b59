"""One adapter, whatever it is: from its directory in the store to checked tensors."""

from dataclasses import dataclass

from tgis.adapters.lora import Lora, LoraRules, load_lora
from tgis.adapters.prompts import PromptRules, SoftPrompt, load_prompt
from tgis.adapters.store import Directory, Identity, Refused, Store
from tgis.types import AdapterKind

Adapter = SoftPrompt | Lora


@dataclass(frozen=True, slots=True)
class Rules:
    """What adapters must fit; None = the engine cannot serve such ones."""

    prompt: PromptRules | None
    lora: LoraRules | None


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """An adapter, and its files as they were when it was read."""

    kind: AdapterKind
    adapter: Adapter
    identity: Identity


def load(store: Store, adapter_id: str, rules: Rules, known: Identity | None) -> Loaded | None:
    """Read and check an adapter; None if its files are still those of `known`.

    Raises:
        Refused: there is none of this id, or it breaks a rule.
    """
    with store.open(adapter_id) as directory:
        identity = directory.identity()
        if identity == known:
            return None
        kind = directory.kind()
        adapter = read(directory, kind, rules)
        if directory.identity() != identity:
            raise Refused("its files are changing; try again", kind=kind)
        return Loaded(kind, adapter, identity)


def read(directory: Directory, kind: AdapterKind, rules: Rules) -> Adapter:
    """Read and check the adapter of a directory.

    Raises:
        Refused: the engine does not serve its kind, or it breaks a rule.
    """
    if kind is AdapterKind.LORA:
        if rules.lora is None:
            raise Refused("this model's engine does not support LoRA", kind=kind)
        return load_lora(directory, rules.lora)
    if rules.prompt is None:
        raise Refused("this model's engine does not support soft prompts", kind=kind)
    return load_prompt(directory, rules.prompt)
