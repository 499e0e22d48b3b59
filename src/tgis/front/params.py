"""What a request asks for, once it has been checked: values of these types cannot be wrong."""

import msgspec

from tgis.types import DetailParams, SamplingParams


class Limits(msgspec.Struct, frozen=True):
    """What the server allows one sequence."""

    max_new_tokens: int
    max_sequence_length: int  # input, soft prompt and generated tokens together
    default_include_stop_seqs: bool = True


class Params(msgspec.Struct, frozen=True):
    """The checked parameters of one request; made by `tgis.front.validate.validate` only.

    They are shared by all inputs of the request.
    """

    sampling: SamplingParams  # final but for the seed of an input whose client gave none
    seed: int | None  # the client's, uint64; None = none given, or greedy
    details: DetailParams
    max_new_tokens: int  # before `fit_length`
    time_limit: float | None  # seconds
    stop_sequences: tuple[str, ...]  # at most 6, each of 1 to 240 UTF-8 bytes
    include_stop_sequence: bool
    input_text: bool  # the output text begins with the input
    truncate_input_tokens: int  # keep the last so many; 0 = all


class Length(msgspec.Struct, frozen=True):
    """How far one input of a request may be continued."""

    max_new_tokens: int  # at least 1
    token_limited: bool  # lowered to what the sequence length leaves: TOKEN_LIMIT at the end
