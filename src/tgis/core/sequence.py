"""One sequence inside the core."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tgis.core.resident import Resident
from tgis.types import AdapterKind, TokenDetails
from tgis.wire import Add

Opening = Callable[[Add], tuple[list[int], list[int]]]
"""How sequences begin, the one place where the kinds of model differ: request -> the tokens from
which a decoder goes on, and those that an encoder reads before."""


def decoder_only(request: Add) -> tuple[list[int], list[int]]:
    """The input is the beginning of the sequence."""
    return list(request.token_ids), []


def encoder_decoder(start_id: int) -> Opening:
    """The input is read by an encoder; the decoder begins with a token of its own."""
    return lambda request: ([start_id], request.token_ids)


@dataclass(slots=True, eq=False)
class Sequence:
    """What the core knows of one request.

    There is no prefill state and no decode state: `num_computed` tokens of `token_ids` have their
    keys and values in the cache, and a step computes some of the rest. Chunked prefill, prefix
    hits and resumption after preemption are all that one sentence.

    The tokens of a soft prompt stand at the beginning of `token_ids` and `encoder_ids` as pads:
    they take positions and memory as others do, but nobody ever asks for these ids.
    """

    uid: int  # unique in this core; `request.seq_id` is only unique per client
    request: Add
    client: int  # the connection that asked
    token_ids: list[int]  # prompt, then generated
    encoder_ids: list[int]  # input of an encoder; empty = none
    num_prompt: int
    min_length: int  # of `token_ids`, before which no token ends it
    max_length: int  # of `token_ids`
    deadline: float
    arrival: float
    salt: bytes = b""  # only sequences of equal salt may share cached prefixes
    num_computed: int = 0
    slot: int = -1  # -1 = holds no memory
    room: int = 0  # tokens that the memory it holds has room for
    num_written: int = 0  # tokens of this memory that were written at any time, drafts included
    block_table: list[int] = field(default_factory=list)  # `blocks` layout only
    prefix_names: list[bytes] = field(default_factory=list)  # filled in by kv.prefix
    started: bool = False  # has left the queue once
    held: bool = False  # nothing is computed of it now, because its client does not keep up
    sampled_alone: bool = False  # choosing its token among others has failed
    input_details: list[TokenDetails] = field(default_factory=list)
    adapter: Resident | None = None
    num_virtual: int = 0  # of `token_ids`, those of a soft prompt
    prompt: int = 0  # handle of the adapter, if it is a soft prompt
    lora: int = 0  # ... if it is LoRA

    @classmethod
    def of(
        cls,
        uid: int,
        request: Add,
        client: int,
        opening: Opening = decoder_only,
        adapter: Resident | None = None,
        pad_id: int = 0,
    ) -> "Sequence":
        """A waiting sequence."""
        token_ids, encoder_ids = opening(request)
        if adapter is not None:
            token_ids = [pad_id] * adapter.num_decoder + token_ids
            encoder_ids = [pad_id] * adapter.num_encoder + encoder_ids
        num_prompt = len(token_ids)
        seq = cls(
            uid,
            request,
            client,
            token_ids,
            encoder_ids,
            num_prompt,
            num_prompt + request.sampling.min_new_tokens,
            num_prompt + request.max_new_tokens,
            request.deadline,
            request.arrival,
        )
        if adapter is not None:
            seq.adapter, seq.salt, seq.num_virtual = adapter, adapter.salt, adapter.num_decoder
            if adapter.kind is AdapterKind.LORA:
                seq.lora = adapter.handle
            else:
                seq.prompt = adapter.handle
        if request.tenant:
            seq.salt = bytes([len(request.tenant)]) + request.tenant + seq.salt
        return seq

    @property
    def real_ids(self) -> list[int]:
        """Tokens so far, without those of a soft prompt."""
        return self.token_ids[self.num_virtual :] if self.num_virtual else self.token_ids

    @property
    def size(self) -> int:
        """Tokens whose keys and values it needs, all known ones computed."""
        return len(self.token_ids) + len(self.encoder_ids)

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        """Tokens that must be computed before the next one can be chosen."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_remaining(self) -> int:
        """Tokens that it may still generate."""
        return self.max_length - len(self.token_ids)

    @property
    def wants_input_details(self) -> bool:
        """Whether logits of prompt positions are still to be looked at."""
        details = self.request.details
        asked = details.input and bool(details.logprobs or details.ranks or details.top_n)
        return asked and len(self.input_details) < self.num_prompt - 1
