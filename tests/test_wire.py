"""Framing: however the bytes arrive, the same messages come out."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgis.types import (
    DetailParams,
    FinishReason,
    ModelInfo,
    ModelKind,
    SamplingParams,
    TokenDetails,
    TokenOut,
)
from tgis.wire import (
    MAX_FRAME_BYTES,
    Abort,
    Add,
    Beat,
    Decoder,
    Failed,
    FailureKind,
    Gauges,
    InputDetails,
    Loading,
    Out,
    Ready,
    ToCore,
    ToFront,
    encode,
)

TO_CORE = [
    Add(1, [1, 2, 3], SamplingParams(seed=2**64 - 1), DetailParams(top_n=3), 5, math.inf, 1.5),
    Abort([1, 2**40]),
]
DETAILS = TokenDetails(-0.5, 2, ((7, -0.5), (9, -math.inf)))
TO_FRONT = [
    Loading(5, 10),
    Ready(ModelInfo(ModelKind.DECODER_ONLY, "e", "float32", 10, 20, 19, 100, 4)),
    Out(
        [TokenOut(1, 5, FinishReason.EOS_TOKEN, DETAILS), TokenOut(2, -1, FinishReason.TIME_LIMIT)],
        [InputDetails(1, [DETAILS])],
        [(1, 2.5)],
        None,
        Gauges(num_running=3),
    ),
    Failed(3, FailureKind.OUT_OF_MEMORY, "no room"),
    Beat(0.25, Gauges()),
]


@given(st.lists(st.integers(1, 40), max_size=60))
def test_any_cut_of_the_bytes_gives_the_same_messages(cuts: list[int]) -> None:
    for union, messages in ((ToCore, TO_CORE), (ToFront, TO_FRONT)):
        data = b"".join(encode(message) for message in messages)
        decoder: Decoder[object] = Decoder(union)
        received: list[object] = []
        for cut in cuts:
            received += decoder.feed(data[:cut])
            data = data[cut:]
        received += decoder.feed(data)
        assert received == messages


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_waits_for_more(data: bytes) -> None:
    decoder: Decoder[object] = Decoder(ToFront)
    try:
        messages = decoder.feed(data)
    except msgspec.DecodeError:
        return
    assert all(isinstance(message, msgspec.Struct) for message in messages)


def test_a_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(msgspec.DecodeError, match=str(MAX_FRAME_BYTES + 1)):
        Decoder(ToFront).feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
