"""Sums and gathers over ranks, and steps in which a rank fails."""

from collections.abc import Iterator

import pytest
import torch
from tests.kit.ranks import Ranks, connected, listening
from torch import Tensor

from tgis.models.collectives import Exchange, Group, GroupError, RankError
from tgis.models.parallel import Shard, VocabularyTable

LOOPBACK = "0100007F"


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    with connected(request.param) as ranks:
        yield ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums(ranks: Ranks, dtype: torch.dtype) -> None:
    size = len(ranks.groups)

    @torch.inference_mode()
    def run(group: Group) -> Tensor:
        x = torch.full((3, 5), float(group.shard.rank + 1), dtype=dtype)
        y = group.sum_(x)
        assert y.data_ptr() == x.data_ptr()
        return y

    for result in ranks.each(run):
        assert torch.equal(result, torch.full((3, 5), size * (size + 1) / 2, dtype=dtype))


@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("num_columns", [6, 7])
def test_gathers_columns_on_the_first_rank(ranks: Ranks, num_rows: int, num_columns: int) -> None:
    whole = torch.randn(num_rows, num_columns).bfloat16()

    def run(group: Group) -> Tensor:
        return group.gather(whole[:, slice(*group.shard.blocks(num_columns))], num_columns)

    first, *_ = ranks.each(run)
    assert isinstance(first, Tensor)
    assert torch.equal(first, whole)
    assert first.is_contiguous()


def test_a_rank_alone() -> None:
    group, x = Group(), torch.randn(2, 3)
    assert group.sum_(x) is x
    assert group.gather(x, 3) is x
    with pytest.raises(ValueError, match="as it is"), group.step([]):
        raise ValueError("as it is")
    assert group.num_entered == 0


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize(("error", "seen"), [(MemoryError, MemoryError), (ValueError, RankError)])
def test_a_step_that_fails_on_one_rank(
    ranks: Ranks, failing: int, done: int, error: type[Exception], seen: type[Exception]
) -> None:
    sums = [Exchange((4, 3), torch.float32), Exchange((2, 3), torch.bfloat16)]

    def run(group: Group) -> Tensor:
        with group.step([*sums, Exchange((2, 6), torch.float32)]):
            for number, (shape, dtype) in enumerate(sums):
                if group.shard.rank == failing and number == done:
                    raise error("here")
                group.sum_(torch.ones(shape, dtype=dtype))
            if group.shard.rank == failing and done == 2:
                raise error("here")
            first, last = group.shard.blocks(6)
            return group.gather(torch.ones(2, last - first), 6)

    results = ranks.each(run)
    assert type(results[failing]) is error
    if failing != 0:
        assert type(results[0]) is seen
        assert f"rank {failing}" in str(results[0])
    for x in ranks.each(lambda group: group.sum_(torch.tensor([1.0]))):  # the group goes on
        assert torch.equal(x, torch.tensor([float(len(ranks.groups))]))
    assert len({group.num_entered for group in ranks.groups}) == 1


def test_a_rank_that_does_not_come() -> None:
    with connected(2, timeout=0.3) as ranks:
        absent, error = ranks.each(
            lambda group: group.sum_(torch.ones(1)) if group.shard.rank else torch.ones(1)
        )
        assert isinstance(absent, Tensor)
        assert isinstance(error, GroupError)
        assert "Timed out" in str(error)
        assert "\n" not in str(error)


def test_nothing_listens_beyond_loopback(ranks: Ranks) -> None:
    assert LOOPBACK in listening()
    assert listening() <= {LOOPBACK, "0000000000000000FFFF00000100007F"}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_vocabulary_in_parts(world_size: int) -> None:
    table = torch.randn(7, 3)
    ids = torch.tensor([0, 6, 3, 3, 1], dtype=torch.int32)
    shards = [Shard(rank, world_size) for rank in range(world_size)]
    parts = [VocabularyTable(table[slice(*s.blocks(7))], s, 7) for s in shards]
    assert torch.equal(sum(part(ids) for part in parts), table[ids.long()])
    assert sum(part.num_rows for part in parts) == 7
    for part in parts:
        assert part(ids[:0]).shape == (0, 3)
        for wrong in (7, -1):
            with pytest.raises(IndexError, match="index out of range"):
                part(torch.tensor([1, wrong], dtype=torch.int32))
