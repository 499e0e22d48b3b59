"""One sequence inside the core."""

from dataclasses import dataclass, field

from tgis.types import TokenDetails
from tgis.wire import Add


@dataclass(slots=True, eq=False)
class Sequence:
    """What the core knows of one request.

    There is no prefill state and no decode state: `num_computed` tokens of `token_ids` have their
    keys and values in the cache, and a step computes some of the rest. Chunked prefill, prefix
    hits and resumption after preemption are all that one sentence.
    """

    uid: int  # unique in this core; `request.seq_id` is only unique per client
    request: Add
    client: int  # the connection that asked
    token_ids: list[int]  # prompt, then generated
    num_prompt: int
    min_length: int  # of `token_ids`, before which no token ends it
    max_length: int  # of `token_ids`
    deadline: float
    arrival: float
    salt: bytes = b""  # only sequences of equal salt may share cached prefixes
    num_computed: int = 0
    slot: int = -1  # -1 = holds no memory
    room: int = 0  # tokens that the memory it holds has room for
    block_table: list[int] = field(default_factory=list)  # `blocks` layout only
    prefix_names: list[bytes] = field(default_factory=list)  # filled in by kv.prefix
    started: bool = False  # has left the queue once
    input_details: list[TokenDetails] = field(default_factory=list)

    @classmethod
    def of(cls, uid: int, request: Add, client: int) -> "Sequence":
        """A waiting sequence."""
        num_prompt = len(request.token_ids)
        return cls(
            uid,
            request,
            client,
            list(request.token_ids),
            num_prompt,
            num_prompt + request.sampling.min_new_tokens,
            num_prompt + request.max_new_tokens,
            request.deadline,
            request.arrival,
        )

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
