"""Prompt lookup: what is found is what a plain search finds."""

from hypothesis import given
from hypothesis import strategies as st
from tests.kit.scheduling import request

from tgis.core.drafts import RUN, Occurrences, PromptLookup
from tgis.core.sequence import Sequence

FEW_WORDS = st.lists(st.integers(0, 3), max_size=60)


def search(ids: list[int], places: int = 16, longest: int = 32) -> int:
    """The slow twin: of the last places with an equal run, the one with the longest, else -1."""
    ends = [e for e in range(RUN, len(ids)) if ids[e - RUN : e] == ids[len(ids) - RUN :]]
    best, most = -1, 0
    for end in reversed(ends[-places:]):
        length = 0
        while length < min(longest, end) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        if length > most:
            best, most = end, length
    return best


@given(FEW_WORDS, st.lists(st.integers(1, 9), max_size=20))
def test_found_as_a_plain_search_finds(ids: list[int], steps: list[int]) -> None:
    occurrences = Occurrences()
    size = 0
    for step in [*steps, len(ids)]:
        size = min(size + step, len(ids))
        occurrences.extend(ids[:size])
        occurrences._distance = 0  # following a copy is another test
        if size >= RUN:
            assert occurrences.find(ids[:size]) == search(ids[:size])


def lookup(ids: list[int], num_tokens: int, num_virtual: int = 0) -> list[int]:
    seq = Sequence.of(1, request(1, prompt=ids), 0)
    seq.num_virtual = num_virtual
    (draft,) = PromptLookup().draft([(seq, num_tokens)])
    return draft


def test_what_stood_behind_the_longest_equal_run() -> None:
    ids = [9, 1, 2, 3, 50, 51, 52, 8, 1, 2, 3, 60, 61, 9, 1, 2, 3]
    assert lookup(ids, 3) == [50, 51, 52]  # the earlier one, whose run is longer
    assert lookup(ids[1:], 2) == [60, 61]  # the later one of equals


def test_repetition_goes_on_beyond_the_end() -> None:
    assert lookup([7, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_nothing_that_has_not_occurred() -> None:
    assert lookup(list(range(20)), 4) == []
    assert lookup([1, 2], 4) == []


def test_the_tokens_of_a_soft_prompt_are_no_tokens() -> None:
    assert lookup([0, 0, 0, 0, 0, 0], 2) == [0, 0]
    assert lookup([0, 0, 0, 0, 0, 0, 5, 6], 2, num_virtual=6) == []


def test_a_copy_that_differs_in_a_token_is_followed() -> None:
    source = list(range(100, 140))
    seq = Sequence.of(1, request(1, prompt=[*source, 5, *source[:6]]), 0)
    drafter = PromptLookup()
    assert drafter.draft([(seq, 4)]) == [source[6:10]]
    seq.token_ids += [*source[6:8], 77]  # instead of source[8]
    assert drafter.draft([(seq, 4)]) == [source[9:13]]
    seq.token_ids += range(200, 240)
    assert drafter.draft([(seq, 4)]) == [[]]


def test_a_sequence_that_has_ended_is_forgotten() -> None:
    seq = Sequence.of(3, request(1, prompt=[1, 2, 3, 1, 2, 3]), 0)
    drafter = PromptLookup()
    drafter.draft([(seq, 2)])
    assert drafter._occurrences
    drafter.forget(3)
    drafter.forget(4)
    assert not drafter._occurrences
