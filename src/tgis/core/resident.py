"""What the core keeps of a loaded adapter; its tensors are the engine's."""

from dataclasses import dataclass

from tgis.adapters.store import Identity
from tgis.types import AdapterKind


@dataclass(slots=True, eq=False)
class Resident:
    """A loaded adapter.

    Attributes:
        num_decoder: positions of the decoder that a soft prompt takes.
        num_encoder: the same of an encoder.
        num_input: of both, those before the input.
        length: tokens that it takes of the sequence length.
        salt: tells prefixes that were computed with it from others.
        holders: lookups and sequences that need it.
    """

    adapter_id: str
    handle: int
    kind: AdapterKind
    identity: Identity
    num_bytes: int
    num_decoder: int = 0
    num_encoder: int = 0
    num_input: int = 0
    length: int = 0
    salt: bytes = b""
    holders: int = 0
