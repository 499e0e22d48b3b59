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
    num_computed: int = 0
    slot: int = -1  # -1 = holds no memory
    started: bool = False  # has left the queue once
    input_details: list[TokenDetails] = field(default_factory=list)

    @classmethod
    def of(cls, uid: int, request: Add, client: int) -> "Sequence":
        """A waiting sequence."""
        return cls(uid, request, client, list(request.token_ids), len(request.token_ids))

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
        return self.request.max_new_tokens - self.num_generated

    @property
    def wants_input_details(self) -> bool:
        """Whether logits of prompt positions are still to be looked at."""
        details = self.request.details
        asked = details.input and bool(details.logprobs or details.ranks or details.top_n)
        return asked and len(self.input_details) < self.num_prompt - 1
