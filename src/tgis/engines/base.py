"""The engine seam: what the core may know about an engine, and nothing more.

An engine knows token ids, positions and slots. It knows no text, no requests, no sampling and no
scheduling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from tgis.engines.plan import StepPlan
from tgis.types import ModelKind

if TYPE_CHECKING:
    import torch

    from tgis.adapters.load import Adapter
    from tgis.adapters.lora import LoraTargets

KvLayout = Literal["rows", "blocks", "padded"]


@dataclass(frozen=True, slots=True)
class EngineCaps:
    """What an engine can do; the core chooses its strategies by this, never by type."""

    name: str
    kind: ModelKind
    kv_layout: KvLayout
    chunked_prefill: bool
    vocab_size: int
    max_positions: int | None  # None = no limit of its own
    kv_bytes_per_token: int  # keys and values of one token over all layers, in each rank
    dtype: str  # of the weights' arithmetic, a torch name such as "bfloat16"
    kv_granule: int = 1  # tokens of a row that the operating system commits at a time (`rows`)
    device: str = "cpu"  # type of the device whose memory holds weights and cache
    ranks_here: int = 1  # processes with a part of the model that share this machine's memory
    # Bytes available on the machine of other ranks that has least, for as many ranks as are here.
    memory_elsewhere: int | None = None
    # Size of the embeddings that a soft prompt may give instead of token ids; None = it cannot.
    soft_prompt_size: int | None = None
    lora_targets: "LoraTargets | None" = None  # the weights to which LoRA may add; None = it cannot
    # A row may compute several tokens of which some are not kept: later rows begin before them.
    verifies_drafts: bool = False


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The room for keys and values: `num_slots` slots of at most `slot_tokens` tokens each.

    In the `blocks` layout the slots are blocks, of which a sequence has several.
    """

    num_slots: int
    slot_tokens: int
    longest: int = 0  # tokens of a sequence at most, where slots are blocks; 0 = slot_tokens
    max_running: int = 0  # sequences of a step at most; 0 = nothing is prepared for such steps


class Engine(Protocol):
    """One loaded model. Called from one thread only."""

    caps: EngineCaps

    def allocate(self, shape: CacheShape) -> None:
        """Make the key/value cache, before the first `forward`; another replaces it."""

    def forward(self, plan: StepPlan) -> "torch.Tensor":
        """Run one step.

        Returns:
            Logits as float32 [plan.num_logits, vocab_size], in the order of the plan's rows (and of
            the tokens within a row that wants all); valid until the next call.

        Raises:
            MemoryError: no memory for this step.

        After an error the cache holds what it held, but for what the plan's rows were to write; the
        same rows may be tried again, in smaller plans.
        """

    def attach(self, handle: int, adapter: "Adapter") -> None:
        """From now on rows may name this adapter, of a kind that `caps` says is possible.

        Its tensors are of this model's sizes and dtype. Handles are never used twice.

        Raises:
            MemoryError: no memory for it; nothing has changed.
        """

    def detach(self, handle: int) -> None:
        """No row will name this adapter any more."""

    def release(self, slots: Sequence[int]) -> None:
        """The memory behind these slots may be given back to the operating system."""

    def close(self) -> None:
        """Free everything."""
