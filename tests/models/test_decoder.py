"""Every family against `transformers`: alone, batched, chunked, cached, greedy, in bfloat16."""

from collections.abc import Iterator

import pytest
import torch
from tests.models.twins import (
    CONFIGS,
    Twin,
    load_engine,
    make_twin,
    random_ids,
    save_checkpoint,
)

from tgis.engines.plan import KvCopy, Row, Want

pytestmark = pytest.mark.usefixtures("single_thread")

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module", params=CONFIGS)
def twin(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Twin]:
    path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(path, CONFIGS[request.param])
    return make_twin(path)


def test_one_sequence(twin: Twin) -> None:
    ids = random_ids(1, 50)
    expected = twin.expected(ids)
    assert expected.std() > 0.1  # else nothing is tested
    torch.testing.assert_close(twin.all_logits(ids), expected, **TOLERANCE)


def test_batch_of_mixed_lengths(twin: Twin) -> None:
    sequences = [random_ids(n, n) for n in (1, 17, 2, 40, 9)]
    wants = [Want.ALL, Want.LAST, Want.LAST, Want.ALL, Want.NOTHING]
    rows = [
        Row(n, 4 - n, ids, 0, want)
        for n, (ids, want) in enumerate(zip(sequences, wants, strict=True))
    ]
    keep = {
        Want.ALL: slice(None),
        Want.LAST: slice(-1, None),
        Want.NOTHING: slice(0),
    }
    expected = [twin.expected(row.token_ids)[keep[row.want]] for row in rows]
    torch.testing.assert_close(twin.step(*rows), torch.cat(expected), **TOLERANCE)


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 30, 1, 14], [33, 2, 15]], ids=str)
def test_chunked_prefill(twin: Twin, chunks: list[int]) -> None:
    ids = random_ids(3, sum(chunks))
    start, parts = 0, []
    for length in chunks:
        parts.append(twin.all_logits(ids[start : start + length], slot=2, start=start))
        start += length
    torch.testing.assert_close(torch.cat(parts), twin.expected(ids), **TOLERANCE)


def test_decoding_beside_a_prefill(twin: Twin) -> None:
    """Rows at different lengths advance by one token while another row's prompt is computed."""
    sequences = {slot: random_ids(slot, 20 + 7 * slot) for slot in range(3)}
    prompts = {slot: 10 + 7 * slot for slot in sequences}
    for slot, ids in sequences.items():
        twin.step(Row(slot, slot, ids[: prompts[slot]], 0, Want.NOTHING))
    sequences[4] = random_ids(9, 30)
    expected = {slot: twin.expected(ids) for slot, ids in sequences.items()}
    for step in range(10):
        parts = {slot: (at + step, at + step + 1) for slot, at in prompts.items()}
        parts[4] = (3 * step, 3 * step + 3)
        order = (0, 4, 1, 2)
        rows = [Row(s, s, sequences[s][slice(*parts[s])], parts[s][0], Want.LAST) for s in order]
        last = torch.stack([expected[s][parts[s][1] - 1] for s in order])
        torch.testing.assert_close(twin.step(*rows), last, **TOLERANCE)


def test_a_slot_is_used_again(twin: Twin) -> None:
    twin.all_logits(random_ids(4, 60), slot=1)
    twin.engine.release([1])
    for seed in (5, 6):  # with and without giving the memory back in between
        ids = random_ids(seed, 20)
        torch.testing.assert_close(twin.all_logits(ids, slot=1), twin.expected(ids), **TOLERANCE)


def test_a_copied_prefix(twin: Twin) -> None:
    ids = random_ids(7, 40)
    twin.all_logits(random_ids(8, 50), slot=3)  # what the target held before
    twin.all_logits(ids, slot=0)
    other = [*ids[:25], *random_ids(9, 10)]
    rows = (
        Row(1, 3, other[25:], 25, Want.ALL),
        Row(0, 0, random_ids(10, 1), 40, Want.LAST),
    )
    logits = twin.step(*rows, copies=[KvCopy(0, 3, 25)])
    torch.testing.assert_close(logits[:-1], twin.expected(other)[25:], **TOLERANCE)
    whole = twin.expected([*ids, *rows[1].token_ids])
    torch.testing.assert_close(logits[-1], whole[-1], **TOLERANCE)


def test_greedy_tokens(twin: Twin) -> None:
    ids = random_ids(11, 8)
    logits = twin.all_logits(ids)[-1:]
    while len(ids) < 72:
        ids.append(int(logits.argmax()))
        logits = twin.step(Row(0, 0, ids[-1:], len(ids) - 1, Want.LAST))
    expected = twin.expected(ids)[7:-1].argmax(-1)
    assert ids[8:] == expected.tolist()


@torch.no_grad()
def test_bfloat16_within_its_own_error(twin: Twin) -> None:
    """As far from float32 as `transformers` in bfloat16 is, not much farther."""
    ids = random_ids(12, 50)
    exact = twin.expected(ids)
    computed = load_engine(twin.path, torch.bfloat16)
    ours = rms_error(Twin(twin.path, twin.oracle, computed).all_logits(ids), exact)
    rough = type(twin.oracle).from_pretrained(twin.path, dtype=torch.bfloat16)
    theirs = rms_error(rough(torch.tensor([ids])).logits[0].float(), exact)
    assert 0 < ours < 1.25 * theirs


def rms_error(computed: torch.Tensor, exact: torch.Tensor) -> float:
    return float((computed - exact).square().mean().sqrt())
