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
