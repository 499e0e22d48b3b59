"""LoRA in every family against `transformers` with merged weights."""

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.models.lora_twins import HEADS, Merged, logits, merged, random_lora, targets
from tests.models.twins import (
    CONFIGS,
    SLOT_TOKENS,
    Twin,
    load_engine,
    make_twin,
    random_ids,
    save_checkpoint,
)
from torch import Tensor

from tgis.adapters.lora import LoraTarget
from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.plan import KvCopy, Row, StepPlan, Want

pytestmark = pytest.mark.usefixtures("single_thread")

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
# A family each, and the layouts and topologies within one; the others differ in what LoRA is not.
QUICK = {"llama", "gpt_neox", "bloom", "falcon-40b", "gpt_bigcode", "gpt2", "mpt-odd-heads", "opt"}
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
PLAIN = 0


@pytest.fixture(scope="module", params=NAMES)
def twin(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Twin]:
    path = tmp_path_factory.mktemp(request.param)
    save_checkpoint(path, CONFIGS[request.param])
    return make_twin(path)


@pytest.fixture(scope="module")
def models(twin: Twin) -> dict[int, Merged]:
    """By handle: the plain model, and two with adapters of everything, of mixed ranks."""
    found = targets(twin.engine)
    made = {PLAIN: twin.oracle}
    for handle, ranks in ((1, (4,)), (2, (1, 16, 3, 8))):
        lora = random_lora(found.values(), ranks, seed=handle)
        twin.engine.attach(handle, lora)
        made[handle] = merged(twin.oracle, lora, found)
    return made


def kind(name: str) -> str:
    """A target's name without the number of its block."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def by_kind(found: dict[str, LoraTarget]) -> dict[str, LoraTarget]:
    """One target of each kind, of the last block."""
    return {kind(name): target for name, target in found.items()}


def test_every_target_alone(twin: Twin) -> None:
    found = targets(twin.engine)
    ids = random_ids(1, 12)
    plain = twin.expected(ids)
    for number, target in enumerate(by_kind(found).values(), start=10):
        lora = random_lora([target], seed=number)
        twin.engine.attach(number, lora)
        computed = twin.step(Row(0, 0, ids, 0, Want.ALL, lora=number))
        twin.engine.detach(number)
        expected = logits(merged(twin.oracle, lora, found), ids)
        assert (expected - plain).abs().max() > 0.01, target.name  # else nothing is tested
        torch.testing.assert_close(computed, expected, **TOLERANCE, msg=target.name)


def test_what_a_family_offers(twin: Twin) -> None:
    """All matrices but norms and tables of positions."""
    names = {
        name
        for name, module in twin.oracle.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2
    }
    positions = {name for name in names if kind(name).endswith(("wpe", "embed_positions"))}
    offered = set(targets(twin.engine))
    assert offered - set(HEADS) == names - positions - set(HEADS)
    assert len(offered & set(HEADS)) == 1


def test_mixed_rows(twin: Twin, models: dict[int, Merged]) -> None:
    handles = [1, PLAIN, 2, 1, 2]
    wants = [Want.ALL, Want.LAST, Want.LAST, Want.ALL, Want.NOTHING]
    keep = {Want.ALL: slice(None), Want.LAST: slice(-1, None), Want.NOTHING: slice(0)}
    rows = [
        Row(n, 4 - n, random_ids(n, 3 + 5 * n), 0, want, lora=handle)
        for n, (handle, want) in enumerate(zip(handles, wants, strict=True))
    ]
    expected = [logits(models[row.lora], row.token_ids)[keep[row.want]] for row in rows]
    torch.testing.assert_close(twin.step(*rows), torch.cat(expected), **TOLERANCE)


def test_chunks_and_a_copied_prefix(twin: Twin, models: dict[int, Merged]) -> None:
    ids = random_ids(3, 30)
    parts = [
        twin.step(Row(0, 0, ids[start:stop], start, Want.ALL, lora=1), *others)
        for start, stop, others in (
            (0, 11, ()),
            (11, 12, (Row(1, 1, random_ids(4, 9), 0, Want.NOTHING, lora=2),)),
            (12, 30, (Row(1, 1, random_ids(5, 1), 9, Want.NOTHING, lora=2),)),
        )
    ]
    torch.testing.assert_close(torch.cat(parts), logits(models[1], ids), **TOLERANCE)
    other = [*ids[:20], *random_ids(6, 5)]
    found = twin.step(Row(2, 2, other[20:], 20, Want.ALL, lora=1), copies=[KvCopy(0, 2, 20)])
    torch.testing.assert_close(found, logits(models[1], other)[20:], **TOLERANCE)


def test_decoding_in_changing_company(twin: Twin, models: dict[int, Merged]) -> None:
    """Steps of one token a row, with and without adapters, in batches of the same size."""
    sequences = {slot: random_ids(slot, 20) for slot in range(4)}
    for slot, ids in sequences.items():
        handle = slot % 3
        twin.step(Row(slot, slot, ids[:8], 0, Want.NOTHING, lora=handle))
    expected = {slot: logits(models[slot % 3], ids) for slot, ids in sequences.items()}
    at = dict.fromkeys(sequences, 8)
    for slots in [(0, 3), (1, 2), (2, 0), (0, 3), (3, 1)]:
        rows = [Row(s, s, [sequences[s][at[s]]], at[s], Want.LAST, lora=s % 3) for s in slots]
        last = torch.stack([expected[s][at[s]] for s in slots])
        torch.testing.assert_close(twin.step(*rows), last, **TOLERANCE)
        at.update({s: at[s] + 1 for s in slots})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_within_their_own_error(
    twin: Twin, models: dict[int, Merged], dtype: torch.dtype
) -> None:
    """Not much farther from float32 than `transformers` of this type with merged weights."""
    engine = load_engine(twin.path, dtype)
    lora = random_lora(targets(engine).values(), (1, 16, 3, 8), seed=2)
    engine.attach(2, lora)
    ids = random_ids(12, 40)
    exact = logits(models[2], ids)
    ours = Twin(twin.path, twin.oracle, engine).step(Row(0, 0, ids, 0, Want.ALL, lora=2))
    rough = merged(twin.oracle, lora, targets(engine)).to(dtype)
    assert 0 < rms(ours - exact) < 1.5 * rms(logits(rough, ids) - exact)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(path, CONFIGS["llama"])
    return make_twin(path)


@pytest.mark.parametrize("quantize", ["int8-dynamic"])
def test_on_quantised_layers(tmp_path: Path, quantize: str) -> None:
    """Additions are computed from the same rows that the quantised layer reads."""
    save_checkpoint(tmp_path, CONFIGS["llama-aligned"])
    twin = make_twin(tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    engine = native.load(tmp_path, config, torch.bfloat16, quantize=quantize)
    engine.allocate(CacheShape(2, SLOT_TOKENS))
    lora = random_lora(targets(engine).values())
    ids = random_ids(1, 40)
    exact = logits(merged(twin.oracle, lora, targets(engine)), ids)
    engine.attach(1, lora)
    rows = [Row(n, n, ids, 0, Want.ALL, lora=1 - n) for n in range(2)]
    adapted, plain = engine.forward(StepPlan(rows)).split(len(ids))
    assert rms(adapted - exact) < 0.1 * rms(exact)
    assert rms(plain - exact) > 0.5 * rms(exact)
    assert rms(plain - twin.expected(ids)) < 0.1 * rms(exact)


def test_detaching_frees_the_memory(llama: Twin) -> None:
    lora = random_lora(targets(llama.engine).values())
    llama.engine.attach(5, lora)
    held = weakref.ref(llama.engine._loras[5])
    llama.step(Row(0, 0, [1, 2], 0, Want.LAST, lora=5))
    llama.engine.detach(5)
    gc.collect()
    assert held() is None
    with pytest.raises(KeyError):
        llama.step(Row(0, 0, [1, 2], 0, Want.LAST, lora=5))


def test_a_step_without_adapters_is_what_it_was(llama: Twin) -> None:
    """To the bit: also beside attached adapters, and after steps with them."""
    rows = [Row(n, n, random_ids(n, 5 + n), 0, Want.LAST) for n in range(3)]
    before = llama.step(*rows)
    llama.engine.attach(6, random_lora(targets(llama.engine).values()))
    llama.step(Row(3, 3, random_ids(1, SLOT_TOKENS - 1), 0, Want.LAST, lora=6))
    assert torch.equal(llama.step(*rows), before)
    llama.engine.detach(6)


def test_as_many_adapters_as_rows(llama: Twin) -> None:
    """Handles need not be small or dense."""
    found = targets(llama.engine)
    loras = {n << 32 | 7: random_lora(found.values(), (n + 1,), seed=n) for n in range(6)}
    for handle, lora in loras.items():
        llama.engine.attach(handle, lora)
    rows = [Row(n, n, random_ids(n, 4), 0, Want.ALL, lora=h) for n, h in enumerate(loras)]
    models = [merged(llama.oracle, lora, found) for lora in loras.values()]
    expected = [logits(m, row.token_ids) for m, row in zip(models, rows, strict=True)]
    torch.testing.assert_close(llama.step(*rows), torch.cat(expected), **TOLERANCE)
    for handle in loras:
        llama.engine.detach(handle)
