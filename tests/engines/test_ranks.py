"""A model that is split over ranks computes what it computes alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.engines import test_native_seq2seq as t5
from tests.kit.ranks import Ranks, connected
from tests.models.twins import CONFIGS, NUM_SLOTS, SLOT_TOKENS, random_ids, save_checkpoint
from torch import Tensor

from tgis.engines import native, native_seq2seq
from tgis.engines.base import CacheShape, Engine
from tgis.engines.plan import KvCopy, Row, StepPlan, Want
from tgis.errors import ModelError
from tgis.hub.resolve import read_json
from tgis.models.collectives import Group, GroupError, RankError
from tgis.models.decoder import Block

STEPS = 6

EIGHT_HEADS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "llama-mqa": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 4},
    "qwen2": {"num_key_value_heads": 8},
    "qwen3": {},
    "granite": {},
    "gemma": {},
    "gpt_neox": {},
    "bloom": {},
    "falcon-7b": {},
    "falcon-40b": {"num_kv_heads": 2},
    "falcon-11b": {"num_kv_heads": 4},
    "falcon-rw": {},
    "gpt_bigcode": {},
    "gpt2": {},
    "mpt": {},
    "opt": {"word_embed_proj_dim": 64},
}
QUICK = {"llama", "falcon-40b", "gpt_bigcode", "bloom", "gpt_neox", "gpt2", "t5"}


def eight_heads(name: str) -> transformers.PretrainedConfig:
    """A family's network with sizes that four ranks divide."""
    config = CONFIGS[name]
    sizes = {"num_attention_heads": 8, "hidden_size": 64}
    own = {config.attribute_map.get(key, key): value for key, value in sizes.items()}
    return type(config)(**{**config.to_dict(), **own, **EIGHT_HEADS[name]})


def marked(names: Any) -> list[Any]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with connected(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with connected(4) as ranks:
        yield ranks


def load(path: Path, group: Group | None = None, dtype: torch.dtype = torch.float32) -> Engine:
    config = read_json(path / "config.json", "test")
    room = native_seq2seq if config["model_type"] in ("t5", "mt5") else native
    engine: Engine = room.load(path, config, dtype, group=group)
    engine.allocate(CacheShape(NUM_SLOTS, SLOT_TOKENS))
    return engine


def split(path: Path, ranks: Ranks, dtype: torch.dtype = torch.float32) -> list[Engine]:
    engines = ranks.each(lambda group: load(path, group, dtype))
    failure = next((e for e in engines if isinstance(e, Exception)), None)
    if failure is not None:
        raise failure
    return engines  # type: ignore[return-value]


def forward(engines: list[Engine], ranks: Ranks, plan: StepPlan) -> Tensor:
    """The first rank's logits; raises what it raised."""
    results = ranks.each(lambda group: engines[group.shard.rank].forward(plan))
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def agree(path: Path, ranks: Ranks) -> None:
    """Prompts in chunks, all logits, copied prefixes and a batch of greedy sequences."""
    alone, engines = load(path), split(path, ranks)

    def step(*rows: Row, copies: list[KvCopy] | None = None) -> Tensor:
        plan = StepPlan(list(rows), copies or [])
        expected, logits = alone.forward(plan), forward(engines, ranks, plan)
        assert logits.dtype == torch.float32
        assert logits.shape == expected.shape
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        if len(logits):
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        return logits

    prompt, has_encoder = random_ids(1, 11), isinstance(alone, native_seq2seq.NativeSeq2SeqEngine)
    source = random_ids(9, 13) if has_encoder else None
    step(Row(0, 0, prompt[:6], 0, Want.NOTHING, encoder_ids=source))
    step(Row(0, 0, prompt[6:], 6, Want.ALL))
    copies = [] if has_encoder else [KvCopy(0, 4, 8)]
    other = Row(2, 1, random_ids(2, 3), 0, Want.LAST, encoder_ids=source)
    if has_encoder:
        third = Row(1, 4, prompt, 0, Want.LAST, encoder_ids=source)
    else:
        third = Row(1, 4, prompt[8:], 8, Want.LAST)
    tokens = step(third, other, copies=copies).argmax(-1).tolist()
    for number in range(STEPS):
        rows = [
            Row(1, 4, [tokens[0]], 11 + number, Want.LAST),
            Row(2, 1, [tokens[1]], 3 + number, Want.LAST),
        ]
        tokens = step(*rows).argmax(-1).tolist()
    for engine in engines:
        engine.release([0, 1, 4])


@pytest.mark.parametrize("name", marked(CONFIGS))
def test_two_ranks(two: Ranks, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, CONFIGS[name])
    config = read_json(tmp_path / "config.json", "test")
    heads = next(
        config[key] for key in ("num_attention_heads", "n_head", "n_heads") if key in config
    )
    if heads % 2 or name == "falcon-11b":
        with pytest.raises(
            ModelError, match=r"must be divisible by `num_shards` .*: \d+ and .*: 2\)"
        ):
            split(tmp_path, two)
    else:
        agree(tmp_path, two)


@pytest.mark.parametrize("name", marked(EIGHT_HEADS))
def test_four_ranks(four: Ranks, tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, eight_heads(name))
    agree(tmp_path, four)


@pytest.mark.parametrize("name", marked(t5.CONFIGS))
@pytest.mark.parametrize("size", [2, 4])
def test_encoder_decoders(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, size: int
) -> None:
    ranks = request.getfixturevalue({2: "two", 4: "four"}[size])
    config = t5.CONFIGS[name]
    heads = 3 if name == "t5-odd" else 8
    t5.save(type(config)(**{**config.to_dict(), "num_heads": heads}), tmp_path)
    if heads % size:
        message = rf"`n_heads` must be divisible by `num_shards` .*: 3 and .*: {size}\)"
        with pytest.raises(ModelError, match=message):
            split(tmp_path, ranks)
    else:
        agree(tmp_path, ranks)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, eight_heads("llama"))
    return tmp_path


PLAN = StepPlan([Row(0, 0, [1, 2, 3], 0, Want.LAST), Row(1, 1, [4], 0, Want.LAST)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_types_are_near(two: Ranks, llama: Path, dtype: torch.dtype) -> None:
    logits = forward(split(llama, two, dtype), two, PLAN)
    expected = load(llama).forward(PLAN)
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_keys_and_values_are_divided(llama: Path, two: Ranks, four: Ranks) -> None:
    whole = load(llama).caps.kv_bytes_per_token
    assert [e.caps.kv_bytes_per_token for e in split(llama, two)] == [whole // 2] * 2
    assert [e.caps.kv_bytes_per_token for e in split(llama, four)] == [whole // 2] * 4  # 2 heads


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_rank_that_fails_in_a_step(
    two: Ranks, llama: Path, failing: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = split(llama, two)
    expected = forward(engines, two, PLAN)

    block = engines[failing]._decoder.blocks[1]  # type: ignore[attr-defined]
    compute = Block.mlp

    def mlp(self: Block, x: Tensor, *lora: Any) -> Tensor:
        if self is block:
            raise error("in the middle")
        return compute(self, x, *lora)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "mlp", mlp)
        wanted = error if failing == 0 or error is MemoryError else RankError
        with pytest.raises(wanted):
            forward(engines, two, PLAN)
    assert torch.equal(forward(engines, two, PLAN), expected)


def test_a_plan_that_fails_on_all_ranks(two: Ranks, llama: Path) -> None:
    engines = split(llama, two)
    expected = forward(engines, two, PLAN)
    for row in (Row(0, 0, [131], 0, Want.LAST), Row(0, 0, [1], SLOT_TOKENS, Want.LAST)):
        with pytest.raises(IndexError):
            forward(engines, two, StepPlan([row]))
    assert torch.equal(forward(engines, two, PLAN), expected)


def test_a_rank_that_is_lost_is_no_failed_step(llama: Path) -> None:
    with connected(2, timeout=0.3) as ranks:
        engines = split(llama, ranks)
        with pytest.raises(GroupError):
            engines[0].forward(PLAN)  # alone
