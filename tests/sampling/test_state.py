from tgis.sampling.state import SeenIds, SequenceState
from tgis.types import NO_DETAILS, SamplingParams


def test_seen_ids_are_distinct_and_real() -> None:
    seen = SeenIds([5, 5, 1, 10, -1], vocab_size=10)
    assert sorted(seen.ids) == [1, 5]
    for token in [5, 7, 7, *range(10)] * 3:
        seen.add(token)
    assert sorted(seen.ids) == list(range(10))


def test_seen_ids_grow() -> None:
    seen = SeenIds([], vocab_size=5000)
    for token in range(4999, -1, -1):
        seen.add(token)
    assert sorted(seen.ids) == list(range(5000))


def test_state_keeps_what_its_parameters_need() -> None:
    plain = SequenceState(SamplingParams(), NO_DETAILS, [1], 10)
    assert plain.seen is None
    assert plain.noise is None
    full = SequenceState(
        SamplingParams(do_sample=True, repetition_penalty=1.5), NO_DETAILS, [1], 10
    )
    assert full.noise is not None
    assert full.seen is not None
    full.advance(4)
    assert full.num_generated == 1
    assert sorted(full.seen.ids) == [1, 4]


def test_a_state_goes_back_to_its_mark() -> None:
    params = SamplingParams(do_sample=True, seed=3, repetition_penalty=1.5)
    state = SequenceState(params, NO_DETAILS, [1, 2], 1000)
    for token_id in range(62):
        state.advance(token_id)
    mark, seen = state.mark(), sorted(state.seen.ids)
    for token_id in (2, 500, 501, 502):  # the buffer grows on the way
        state.advance(token_id)
    state.rewind(mark)
    assert (state.num_generated, sorted(state.seen.ids)) == (62, seen)
    state.advance(501)
    assert sorted(state.seen.ids) == [*seen, 501]
