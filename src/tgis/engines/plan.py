"""What an engine is told to do in one step. Pure data; the scheduler makes it, engines obey it."""

from dataclasses import dataclass, field
from enum import IntEnum


class Want(IntEnum):
    """Which logits a row asks for."""

    NOTHING = 0  # a chunk in the middle of a prompt
    LAST = 1  # those after its last new token
    ALL = 2  # those after every new token (details of input tokens, drafts)


@dataclass(slots=True)
class Row:
    """One sequence's share of a step: compute `token_ids` at positions `start`, `start`+1, ..."""

    seq_id: int
    slot: int  # where its keys and values live; fixed from admission to release
    token_ids: list[int]
    start: int  # tokens of the sequence whose keys and values are already there
    want: Want
    block_table: list[int] = field(default_factory=list)  # its blocks (`blocks` layout)
    encoder_ids: list[int] | None = None  # what an encoder is to read before, if anything
    # Handles of adapters that have been attached; 0 = none. The first positions of a row with a
    # soft prompt (and of what its encoder reads) take their embeddings from it; their ids mean
    # nothing.
    prompt: int = 0
    lora: int = 0
    num_drafts: int = 0  # of `token_ids`, the last ones that nobody has chosen yet

    def drop_drafts(self) -> None:
        """Compute only what is known."""
        if self.num_drafts:
            del self.token_ids[-self.num_drafts :]
            self.num_drafts, self.want = 0, Want.LAST

    @property
    def num_tokens(self) -> int:
        """New tokens that it computes, those of an encoder included."""
        return len(self.token_ids) + len(self.encoder_ids or ())

    @property
    def num_logits(self) -> int:
        """Rows of the logits tensor that belong to it."""
        return len(self.token_ids) if self.want is Want.ALL else self.want.value


@dataclass(frozen=True, slots=True)
class KvCopy:
    """Copy the first `num_tokens` cached tokens of one slot to another before the step."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class StepPlan:
    """One step: copies first, then all rows at once. The order of `rows` is binding."""

    rows: list[Row]
    copies: list[KvCopy] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """New tokens that the step computes."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_logits(self) -> int:
        """Rows of the logits tensor that the step returns."""
        return sum(row.num_logits for row in self.rows)
