"""Stop sequences: the matcher against the rules written down as plainly as possible, on bytes."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgis.text.stops import StopMatcher

Outcome = tuple[str, str | None]


def reference(chunks: list[str], stops: list[str], include: bool, start: int = 0) -> Outcome:
    """The whole text shown, and the stop sequence; chunks before `start` cannot complete one."""
    seen = b""
    for number, chunk in enumerate(chunks):
        old, seen = len(seen), seen + chunk.encode()
        for stop in stops if number >= start and chunk else []:
            raw = stop.encode()
            at = seen.rfind(raw, max(0, old + 1 - len(raw)))
            if at >= 0:
                return seen[: at + len(raw) if include else at].decode(), stop
    return seen.decode(), None


def run(matcher: StopMatcher, chunks: list[str], start: int = 0) -> tuple[list[str], str | None]:
    released: list[str] = []
    for number, chunk in enumerate(chunks):
        fed = matcher.feed(chunk, number >= start)
        released.append(fed.release)
        if fed.matched is not None:
            assert matcher.flush() == ""
            return released, fed.matched
    return [*released, matcher.flush()], None


def splits(text: str) -> Iterator[list[str]]:
    """Every way to cut a text into chunks that are not empty."""
    for cuts in range(1 << max(0, len(text) - 1)):
        chunks, last = [], 0
        for at in range(1, len(text)):
            if cuts >> (at - 1) & 1:
                chunks.append(text[last:at])
                last = at
        yield [*chunks, text[last:]]


thorough = settings(max_examples=200, deadline=None, derandomize=True)
# Few letters, so that sequences occur, overlap and repeat; of 1, 2, 3 and 4 bytes.
words = st.text("abé€😀", max_size=9)
stop_lists = st.lists(st.text("abé€😀", min_size=1, max_size=4), max_size=6)


@thorough
@given(words, stop_lists, st.booleans(), st.integers(0, 4))
def test_equals_the_reference_over_every_split(
    text: str, stops: list[str], include: bool, start: int
) -> None:
    for chunks in splits(text):
        released, matched = run(StopMatcher(stops, include), chunks, start)
        assert ("".join(released), matched) == reference(chunks, stops, include, start)


@thorough
@given(st.lists(words), st.lists(st.text(min_size=1, max_size=80), max_size=6), st.booleans())
def test_equals_the_reference_with_empty_chunks_and_long_sequences(
    chunks: list[str], stops: list[str], include: bool
) -> None:
    stops.append(("".join(chunks))[3:9] or "x")
    released, matched = run(StopMatcher(stops, include), chunks)
    assert ("".join(released), matched) == reference(chunks, stops, include)


@thorough
@given(st.lists(words), stop_lists)
def test_holds_exactly_what_may_still_become_a_stop_sequence(
    chunks: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops, include=False)
    text = shown = ""
    for chunk in chunks:
        fed = matcher.feed(chunk)
        if fed.matched is not None:
            return
        text, shown = text + chunk, shown + fed.release
        beginnings = [stop[:n] for stop in stops for n in range(1, len(stop))]
        undecided = max((len(b) for b in beginnings if text.endswith(b)), default=0)
        assert len(text) - len(shown) == undecided


@thorough
@given(st.lists(words), stop_lists)
def test_holds_nothing_when_the_sequence_is_included(chunks: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops, include=True)
    for chunk in chunks:
        fed = matcher.feed(chunk)
        if fed.matched is not None:
            return
        assert fed.release == chunk
    assert matcher.flush() == ""


@pytest.mark.parametrize(
    ("chunks", "stops", "include", "expected"),
    [
        (["I am", " confused"], ["confu"], True, ("I am confu", "confu")),
        (["I am", " confused"], ["confu"], False, ("I am ", "confu")),
        (["a\n", "\nb"], ["\n\n"], False, ("a", "\n\n")),
        (["abc"], ["c", "b"], False, ("ab", "c")),  # the first requested, not the first in the text
        (["xbxb!"], ["xb"], False, ("xb", "xb")),  # the last in the window
        (["xbxb!"], ["xb"], True, ("xbxb", "xb")),
        (["caf", "é!"], ["é"], False, ("caf", "é")),
        (["aa", "", "b"], ["ab"], False, ("a", "ab")),
        (["aa", "ac"], ["aab"], False, ("aaac", None)),
        (["abab", "abc"], ["ababc"], False, ("ab", "ababc")),
        (["ab"], [], False, ("ab", None)),
    ],
)
def test_cases(chunks: list[str], stops: list[str], include: bool, expected: Outcome) -> None:
    released, matched = run(StopMatcher(stops, include), chunks)
    assert ("".join(released), matched) == expected


def test_what_was_completed_while_disabled_never_matches() -> None:
    matcher = StopMatcher(["stop"], include=False)
    assert matcher.feed("a stop", enabled=False) == ("a stop", None)
    assert matcher.feed("", enabled=True) == ("", None)
    assert matcher.feed(" s") == (" ", None)
    assert matcher.feed("top") == ("", "stop")


def test_what_was_begun_while_disabled_matches() -> None:
    matcher = StopMatcher(["stop"], include=False)
    assert matcher.feed("a sto", enabled=False) == ("a ", None)
    assert matcher.feed("p") == ("", "stop")


def test_held_text_is_released_at_the_end() -> None:
    matcher = StopMatcher(["\n\nHuman:"], include=False)
    assert matcher.feed("Yes.\n") == ("Yes.", None)
    assert matcher.feed("\nHum") == ("", None)
    assert matcher.flush() == "\n\nHum"
    assert matcher.flush() == ""
