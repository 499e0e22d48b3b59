"""Streams: what the core says becomes pieces, whoever reads them and however late."""

import asyncio
import math
from dataclasses import dataclass, field

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tokenizers import decoders, models, pre_tokenizers

from tgis.errors import GenerationFailed, OutOfMemory, Unavailable
from tgis.front.streams import Job, Piece, Stream, Streams
from tgis.observe.metrics import Limits, Metrics
from tgis.text.detokenize import Detokenizer
from tgis.types import (
    NO_DETAILS,
    DetailParams,
    FinishReason,
    ModelKind,
    SamplingParams,
    TokenDetails,
    TokenOut,
)
from tgis.wire import (
    Add,
    DraftCounts,
    Failed,
    FailureKind,
    Gauges,
    InputDetails,
    Out,
    SchedulerCounts,
    StepStats,
)

EOS = 256


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Ids 0 to 255 in the order of the byte-level alphabet, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


@dataclass
class FakeLink:
    added: list[Add] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    error: Unavailable | None = None
    holds: list[tuple[int, bool]] = field(default_factory=list)

    def hold(self, seq_id: int, held: bool) -> None:
        self.holds.append((seq_id, held))

    def add(self, request: Add) -> None:
        if self.error:
            raise self.error
        self.added.append(request)

    def abort(self, seq_ids: list[int]) -> None:
        self.aborted += seq_ids


@dataclass
class House:
    streams: Streams
    link: FakeLink
    metrics: Metrics

    def open(self, **changes: object) -> Stream:
        values = {
            "token_ids": [1, 2, 3],
            "sampling": SamplingParams(),
            "details": NO_DETAILS,
            "max_new_tokens": 100,
            "token_limited": False,
            "stop_sequences": (),
            "include_stop_sequence": True,
            "arrival": 0.0,
        }
        return self.streams.open(Job(**(values | changes)))  # type: ignore[arg-type]

    def say(
        self,
        stream: Stream,
        text: str,
        finish: FinishReason = FinishReason.NOT_FINISHED,
        inputs: list[TokenDetails] | None = None,
    ) -> None:
        """The core emits `text` byte by byte, one step each."""
        tokens = ids(text)
        for i, token in enumerate(tokens):
            last = finish if i == len(tokens) - 1 else FinishReason.NOT_FINISHED
            details = [InputDetails(stream.seq_id, inputs)] if inputs and not i else []
            out = TokenOut(stream.seq_id, token, last, TokenDetails(-1.0, 1))
            self.streams.on_out(Out([out], details, [], None, Gauges()))

    def end(self, stream: Stream, finish: FinishReason) -> None:
        out = TokenOut(stream.seq_id, EOS if finish is FinishReason.EOS_TOKEN else -1, finish)
        self.streams.on_out(Out([out], [], [], None, Gauges()))


def make_house() -> House:
    metrics = Metrics(Limits(512, 511, 8))
    detokenizer = Detokenizer(
        TOKENIZER, ModelKind.DECODER_ONLY, eos_token_ids=[EOS], output_special_tokens=False
    )
    streams = Streams(detokenizer, metrics)
    link = FakeLink()
    streams.link = link  # type: ignore[assignment]
    return House(streams, link, metrics)


@pytest.fixture
def house() -> House:
    return make_house()


async def read_all(stream: Stream) -> list[Piece]:
    pieces: list[Piece] = []
    while not pieces or pieces[-1].finish is FinishReason.NOT_FINISHED:
        pieces += await stream.next()
    return pieces


async def test_an_answer_is_its_pieces(house: House) -> None:
    with house.open() as one, house.open() as other:
        reading = asyncio.create_task(read_all(one))
        collecting = asyncio.create_task(other.collect())
        await asyncio.sleep(0)
        for stream in (one, other):
            house.say(stream, "Grüße, 世界!")
            house.end(stream, FinishReason.EOS_TOKEN)
        pieces, answer = await reading, await collecting
    assert "".join(piece.text for piece in pieces) == answer.text == "Grüße, 世界!"
    assert pieces[-1].finish is answer.finish is FinishReason.EOS_TOKEN
    assert pieces[-1].num_generated == answer.num_generated == len(ids("Grüße, 世界!")) + 1
    assert len(house.streams) == 0
    assert house.link.aborted == []


async def test_what_a_slow_reader_has_not_taken_is_merged(house: House) -> None:
    with house.open() as stream:
        house.say(stream, "abc" * 1000)
        (piece,) = await stream.next()
        assert piece.text == "abc" * 1000
        assert piece.num_generated == 3000


async def test_token_lists_keep_one_token_a_piece(house: House) -> None:
    with house.open(details=DetailParams(output=True)) as stream:
        house.say(stream, "héé", FinishReason.MAX_TOKENS)
        pieces = await read_all(stream)
    assert [piece.num_generated for piece in pieces] == [1, 2, 3, 4, 5]
    assert [piece.token.token_id for piece in pieces if piece.token] == ids("héé")
    assert [piece.text for piece in pieces] == ["h", "", "é", "", "é"]


async def test_a_stop_sequence_ends_the_stream_and_tells_the_core(house: House) -> None:
    with house.open(stop_sequences=("END",), include_stop_sequence=False) as stream:
        house.say(stream, "the END of")
        pieces = await read_all(stream)
    assert "".join(piece.text for piece in pieces) == "the "
    assert pieces[-1].finish is FinishReason.STOP_SEQUENCE
    assert pieces[-1].stop_sequence == "END"
    assert pieces[-1].num_generated == 7
    assert house.link.aborted == [stream.seq_id]


async def test_no_stop_before_min_new_tokens(house: House) -> None:
    sampling = SamplingParams(min_new_tokens=5)
    with house.open(stop_sequences=("b",), sampling=sampling) as stream:
        house.say(stream, "abababab")
        pieces = await read_all(stream)
    assert "".join(piece.text for piece in pieces) == "ababab"


async def test_a_limit_on_the_last_token_beats_a_stop_sequence(house: House) -> None:
    with house.open(stop_sequences=("end",), include_stop_sequence=False) as stream:
        house.say(stream, "the end", FinishReason.MAX_TOKENS)
        answer = await stream.collect()
    assert (answer.text, answer.finish) == ("the end", FinishReason.MAX_TOKENS)
    assert answer.stop_sequence == ""


async def test_a_lowered_limit_is_called_token_limit(house: House) -> None:
    with house.open(token_limited=True) as stream:
        house.say(stream, "x", FinishReason.MAX_TOKENS)
        assert (await stream.collect()).finish is FinishReason.TOKEN_LIMIT


async def test_time_limit_before_the_first_token(house: House) -> None:
    with house.open() as stream:
        house.end(stream, FinishReason.TIME_LIMIT)
        answer = await stream.collect()
    assert (answer.num_generated, answer.text) == (0, "")
    assert answer.finish is FinishReason.TIME_LIMIT


async def test_an_incomplete_character_at_the_end_is_dropped(house: House) -> None:
    tokens = ids("a世")
    with house.open() as stream:
        for i, token in enumerate(tokens[:-1]):
            finish = FinishReason.MAX_TOKENS if i == len(tokens) - 2 else FinishReason.NOT_FINISHED
            out = TokenOut(stream.seq_id, token, finish)
            house.streams.on_out(Out([out], [], [], None, Gauges()))
        answer = await stream.collect()
    assert answer.text == "a"
    assert answer.num_generated == len(tokens) - 1


async def test_input_details_are_there_with_the_first_piece(house: House) -> None:
    details = DetailParams(input=True, logprobs=True)
    inputs = [TokenDetails(-0.5, 0), TokenDetails(-0.25, 0)]
    with house.open(details=details) as stream:
        house.say(stream, "\x00a"[1:], inputs=inputs)
        await stream.next()
        assert stream.input_details == inputs


@pytest.mark.parametrize(
    ("kind", "error"),
    [(FailureKind.GENERATION, GenerationFailed), (FailureKind.OUT_OF_MEMORY, OutOfMemory)],
)
async def test_a_failure_comes_after_what_was_generated(
    house: House, kind: FailureKind, error: type[Exception]
) -> None:
    with house.open() as stream:
        house.say(stream, "ab")
        house.streams.on_failed(Failed(stream.seq_id, kind, "cause"))
        (piece,) = await stream.next()
        assert piece.text == "ab"
        expected = "Request failed during generation: Error after generating 2 tokens: cause"
        with pytest.raises(error, match=expected):
            await stream.next()
    assert house.link.aborted == []


async def test_a_lost_core_ends_every_stream(house: House) -> None:
    opened = [house.open() for _ in range(5)]
    waiting = [asyncio.create_task(stream.collect()) for stream in opened]
    await asyncio.sleep(0)
    house.streams.on_lost()
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, Unavailable)
        assert result.retry_after_ms > 0
    assert len(house.streams) == 0


async def test_nothing_is_kept_of_a_request_that_the_core_cannot_take(house: House) -> None:
    house.link.error = Unavailable("not ready")
    with pytest.raises(Unavailable):
        house.open()
    assert len(house.streams) == 0


async def test_leaving_early_aborts(house: House) -> None:
    with house.open() as stream:
        house.say(stream, "ab")
    assert house.link.aborted == [stream.seq_id]
    house.say(stream, "late")
    assert len(house.streams) == 0
    assert math.isinf(house.link.added[0].deadline)


class Broken:
    def add(self, token_id: int) -> str:
        raise ZeroDivisionError


async def test_a_token_without_text_fails_its_stream_alone(house: House) -> None:
    with house.open() as bad, house.open() as good:
        house.say(bad, "ab")
        bad._text = Broken()  # type: ignore[assignment]
        tokens = [TokenOut(stream.seq_id, ids("c")[0]) for stream in (bad, good)]
        house.streams.on_out(Out(tokens, [], [], None, Gauges()))
        assert house.link.aborted == [bad.seq_id]
        house.end(good, FinishReason.EOS_TOKEN)
        assert (await good.collect()).text == "c"
        assert (await bad.next())[0].text == "ab"
        with pytest.raises(GenerationFailed, match="after generating 3 tokens: ZeroDivisionError"):
            await bad.next()


async def test_generation_waits_for_a_client_that_leaves_lists_of_tokens_unread(
    house: House,
) -> None:
    with house.open(details=DetailParams(output=True, logprobs=True)) as stream:
        while not house.link.holds:
            house.say(stream, "a")
        house.say(stream, "abc")  # was under way
        assert house.link.holds == [(stream.seq_id, True)]
        pieces = await stream.next()
        assert len(pieces) == stream.num_generated < 200
        assert house.link.holds == [(stream.seq_id, True), (stream.seq_id, False)]
        house.end(stream, FinishReason.EOS_TOKEN)
        await read_all(stream)
    assert len(house.link.holds) == 2


async def test_text_alone_and_collected_answers_never_wait(house: House) -> None:
    with house.open() as plain, house.open(details=DetailParams(output=True)) as unary:
        answer = asyncio.create_task(unary.collect())
        await asyncio.sleep(0)
        for stream in (plain, unary):
            house.say(stream, "a" * 500)
            house.end(stream, FinishReason.EOS_TOKEN)
        assert len((await answer).tokens) == 501
    assert not house.link.holds


async def messages(stream: Stream, house: House, steps: list[list[TokenOut]]) -> list[Piece]:
    """What a reader takes that is never late, of the pieces that are worth a message."""
    pieces: list[Piece] = []
    for tokens in steps:
        house.streams.on_out(Out(tokens, [], [], None, Gauges()))
        if stream._has_news():
            pieces += await stream.next()
    return [piece for piece in pieces if piece.text or piece.token or piece.finish]


@given(
    text=st.text("abé世 ", min_size=1, max_size=30),
    sizes=st.lists(st.integers(1, 9), max_size=20),
    lists=st.booleans(),
    inputs=st.booleans(),
    stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
)
async def test_tokens_of_one_step_get_the_messages_that_they_get_one_by_one(
    text: str, sizes: list[int], lists: bool, inputs: bool, stops: list[str]
) -> None:
    """As many as there are steps without speculative decoding, each with its own count."""
    house = make_house()
    details = DetailParams(output=lists, input=inputs)
    said = []
    for together in (False, True):
        with house.open(details=details, stop_sequences=tuple(stops)) as stream:
            tokens = [TokenOut(stream.seq_id, i) for i in ids(text)]
            tokens.append(TokenOut(stream.seq_id, EOS, FinishReason.EOS_TOKEN))
            rest, steps = tokens[1:], [tokens[:1]]
            for size in sizes if together else ():
                steps.append(rest[:size])
                rest = rest[size:]
            steps += [[token] for token in rest]
            pieces = await messages(stream, house, [step for step in steps if step])
            for piece in pieces:
                if piece.token is not None:
                    piece.token = replace(piece.token, seq_id=0)
            said.append(pieces)
    assert said[0] == said[1]


async def test_tokens_of_one_step_are_merged_too_for_a_slow_reader(house: House) -> None:
    with house.open() as stream:
        for _ in range(100):
            tokens = [TokenOut(stream.seq_id, i) for i in ids("abcd")]
            house.streams.on_out(Out(tokens, [], [], None, Gauges()))
        pieces = await stream.next()
    assert "".join(piece.text for piece in pieces) == "abcd" * 100
    assert len(pieces) == 4
    assert pieces[-1].num_generated == 400


async def test_what_follows_a_stop_sequence_in_its_step_is_ignored(house: House) -> None:
    with house.open(stop_sequences=("b",)) as stream:
        tokens = [TokenOut(stream.seq_id, i) for i in ids("abcd")]
        house.streams.on_out(Out(tokens, [], [], None, Gauges()))
        answer = await stream.collect()
    assert (answer.text, answer.num_generated) == ("ab", 2)
    assert answer.finish is FinishReason.STOP_SEQUENCE
    assert house.link.aborted == [stream.seq_id]


async def test_drafts_are_counted(house: House) -> None:
    step = StepStats(0.1, 0.1, 0.0, 0, 0, 1, 0, 1, 0, 0, SchedulerCounts(), DraftCounts(2, 9, 5))
    house.streams.on_out(Out([], [], [], step, Gauges()))
    text = house.metrics.render().decode()
    for name, number in (("draft_count", 2), ("draft_tokens", 9), ("accepted_tokens", 5)):
        assert f"tgi_speculation_{name}_total {number}.0" in text
