import mmap
from pathlib import Path

import pytest
import torch

from tgis.errors import ModelError
from tgis.models.kv_cache import RowsCache

SLOT_TOKENS = 4096
MIB = 1 << 20


def make_cache(num_slots: int = 4, slot_tokens: int = SLOT_TOKENS) -> RowsCache:
    return RowsCache(
        num_layers=2,
        num_slots=num_slots,
        num_kv_heads=2,
        slot_tokens=slot_tokens,
        head_dim=64,
        dtype=torch.float32,
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_terabytes_of_slots_cost_nothing_until_written() -> None:
    before = resident_bytes()
    cache = make_cache(num_slots=1024, slot_tokens=1 << 20)
    assert sum(layer.k.nbytes + layer.v.nbytes for layer in cache.layers) == 1 << 41
    cache.layers[1].v[1023, 1, -1] = 1.0
    assert resident_bytes() - before < 16 * MIB


def test_released_slots_give_their_memory_back_and_others_keep_theirs() -> None:
    cache = make_cache()
    for layer in cache.layers:
        for values in (layer.k, layer.v):
            for slot in range(4):
                values[slot] = slot + 1.0
    full = resident_bytes()
    cache.release([1, 3])
    freed = full - resident_bytes()
    assert freed > 0.95 * cache.layers[0].k[0].nbytes * 8
    for layer in cache.layers:
        for values in (layer.k, layer.v):
            assert [float(values[slot].mean()) for slot in range(4)] == [1.0, 0.0, 3.0, 0.0]


def test_a_copy_takes_the_prefix_and_nothing_else() -> None:
    cache = make_cache()
    for n, layer in enumerate(cache.layers):
        layer.k[0], layer.v[0] = 10.0 + n, 20.0 + n
        layer.k[2], layer.v[2] = 1.0, 2.0
    cache.copy(source=0, target=2, num_tokens=5)
    for n, layer in enumerate(cache.layers):
        for values, copied, kept in ((layer.k, 10.0 + n, 1.0), (layer.v, 20.0 + n, 2.0)):
            assert values[2, :, :5].eq(copied).all()
            assert values[2, :, 5:].eq(kept).all()
            assert values[[1, 3]].eq(0).all()


@pytest.mark.parametrize("slot_tokens", [1, 16, 17, 100])
def test_heads_begin_on_pages(slot_tokens: int) -> None:
    cache = make_cache(slot_tokens=slot_tokens)
    assert slot_tokens <= cache.slot_tokens == -(-slot_tokens // 16) * 16
    for values in (cache.layers[1].k, cache.layers[1].v):
        for head in (values[0, 0], values[0, 1], values[3, 1]):
            assert head.data_ptr() % mmap.PAGESIZE == 0


@pytest.mark.parametrize("num_slots", [1 << 36, 1 << 62])
def test_more_than_the_address_space(num_slots: int) -> None:
    with pytest.raises(ModelError, match=r"no address space for a key/value cache of \d+ bytes"):
        make_cache(num_slots=num_slots)
