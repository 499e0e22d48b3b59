"""What a rank loads, against what a single process loads; and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.twins import CONFIGS, load_engine, make_twin, random_ids, save_checkpoint
from torch import Tensor

from tgis.engines.plan import Row, StepPlan, Want
from tgis.errors import ModelError
from tgis.hub.safetensors import open_checkpoint
from tgis.models.families import read_spec
from tgis.models.model_config import ModelConfig
from tgis.models.parallel import Shard
from tgis.models.spec import DecoderSpec
from tgis.models.weights import Weights

pytestmark = pytest.mark.usefixtures("single_thread")

# name -> numbers of ranks that its heads allow
SPLITS = {
    "llama-mha": (2, 3),
    "llama": (2, 6),
    "llama-mqa": (2, 3),
    "llama-biases": (2,),
    "qwen3": (2,),
    "gpt_neox": (3,),
    "bloom": (4,),
    "falcon-7b": (2,),
    "falcon-40b": (2,),
    "falcon-rw": (2,),
    "gpt_bigcode": (3,),
    "gpt2": (2,),
    "opt": (2,),
    "mpt": (2,),
}


def rank_weights(path: Path, shard: Shard) -> tuple[DecoderSpec, Weights]:
    spec, names = read_spec(ModelConfig(json.loads((path / "config.json").read_text())))
    return spec, Weights(open_checkpoint(path), spec, names, shard, torch.float32)


@pytest.fixture(
    scope="module",
    params=[(name, ranks) for name, splits in SPLITS.items() for ranks in splits],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DecoderSpec, Weights, list[Weights]]:
    """The whole model's weights, and those of each rank."""
    name, world_size = request.param
    path = tmp_path_factory.mktemp(name)
    save_checkpoint(path, CONFIGS[name])
    spec, whole = rank_weights(path, Shard())
    return spec, whole, [rank_weights(path, Shard(r, world_size))[1] for r in range(world_size)]


def close(computed: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-4)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


Split = tuple[DecoderSpec, Weights, list[Weights]]


def test_query_heads_are_divided_and_their_kv_heads_come_along(split: Split) -> None:
    spec, whole, ranks = split
    x = random(3, spec.hidden_size)
    sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    q, k, v = whole.qkv(1)(x).view(3, -1, spec.head_dim).split(sizes, 1)
    group = spec.num_heads // spec.num_kv_heads
    for rank, weights in enumerate(ranks):
        heads = [*range(spec.num_heads)][rank * spec.num_heads // len(ranks) :]
        heads = heads[: spec.num_heads // len(ranks)]
        kv_heads = sorted({head // group for head in heads})
        expected = torch.cat((q[:, heads], k[:, kv_heads], v[:, kv_heads]), 1)
        close(weights.qkv(1)(x), expected.flatten(1))


def test_the_inner_values_are_divided(split: Split) -> None:
    """Each rank's gates, then the values that they gate."""
    spec, whole, ranks = split
    x = random(3, spec.hidden_size)
    num_parts = 2 if spec.gated_mlp else 1
    parts = [weights.mlp_in(0)(x).chunk(num_parts, -1) for weights in ranks]
    expected = [part[n] for n in range(num_parts) for part in parts]
    close(torch.cat(expected, -1), whole.mlp_in(0)(x))


@pytest.mark.parametrize("name", ["attention_out", "mlp_out"])
def test_outputs_are_sums_over_the_ranks(split: Split, name: str) -> None:
    spec, whole, ranks = split
    width = spec.intermediate_size if name == "mlp_out" else spec.num_heads * spec.head_dim
    x = random(3, width)
    chunks = x.chunk(len(ranks), -1)
    parts = [getattr(w, name)(2)(part) for w, part in zip(ranks, chunks, strict=True)]
    close(sum(parts[1:], parts[0]), getattr(whole, name)(2)(x))


def test_the_vocabulary_is_divided(split: Split) -> None:
    spec, whole, ranks = split
    embedding = whole.embedding()
    parts = [weights.embedding() for weights in ranks]
    assert torch.equal(torch.cat(parts), embedding)
    x = random(3, spec.hidden_size)
    heads = [weights.head()(x) for weights in ranks]
    close(torch.cat(heads, -1), whole.head()(x))


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("llama", 4, "`num_heads` must be divisible by `num_shards` (got `num_heads`: 6 and"),
        ("llama", 3, "`num_key_value_heads` must be divisible by `num_shards`"),
    ],
)
def test_heads_that_do_not_divide(tmp_path: Path, name: str, ranks: int, message: str) -> None:
    save_checkpoint(tmp_path, CONFIGS[name])
    _, weights = rank_weights(tmp_path, Shard(0, ranks))
    with pytest.raises(ModelError) as caught:
        weights.qkv(0)
    assert message in str(caught.value)


def test_blocks_of_a_vocabulary() -> None:
    assert [Shard(rank, 4).blocks(7) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    with pytest.raises(ModelError, match="`vocab_size`: 5 and `num_shards`: 4"):
        Shard(0, 4).blocks(5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path, CONFIGS["llama-tied"])
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")


def test_a_sharded_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    twin = make_twin(checkpoint)
    shards = tmp_path_factory.mktemp("shards")
    twin.oracle.save_pretrained(shards, max_shard_size="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 3
    ids = random_ids(1, 20)
    logits = make_twin(shards).all_logits(ids)
    assert torch.equal(logits, twin.all_logits(ids))


def test_a_tied_head_that_is_stored_too(checkpoint: Path) -> None:
    expected = make_twin(checkpoint).all_logits([1, 2, 3])
    name = "model.embed_tokens.weight"
    edit(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    assert torch.equal(make_twin(checkpoint).all_logits([1, 2, 3]), expected)


def test_embeddings_that_are_stored_as_the_head(checkpoint: Path) -> None:
    expected = make_twin(checkpoint).all_logits([1, 2, 3])
    name = "model.embed_tokens.weight"
    edit(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(name)}))
    assert torch.equal(make_twin(checkpoint).all_logits([1, 2, 3]), expected)


# family -> (what its tensors are called, what old checkpoints call them)
OLD_NAMES = {
    "bloom": (r"transformer\.", ""),
    "falcon-7b": (r"transformer\.", ""),
    "gpt2": (r"transformer\.", ""),
    "gpt_neox": (r"(lm_head|embed_out)", "embed_out"),
    "gpt_neox-tied": (r"(lm_head|embed_out)", "lm_head"),
    "mpt": (r"transformer\.", ""),
    "opt": (r"model\.decoder\.", "decoder."),
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_of_old_checkpoints(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, CONFIGS[name.removesuffix("-tied")])
    expected = load_engine(tmp_path)
    ids = StepPlan([Row(0, 0, random_ids(1, 9), 0, Want.ALL)])

    def rename(tensors: dict[str, Tensor]) -> None:
        for old in list(tensors):
            tensors[re.sub("^" + OLD_NAMES[name][0], OLD_NAMES[name][1], old)] = tensors.pop(old)

    edit(tmp_path, rename)
    assert torch.equal(load_engine(tmp_path).forward(ids), expected.forward(ids))


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt_bigcode", "transformer.h.0.attn.bias"),
    ],
)
def test_tensors_that_are_no_parameters(tmp_path: Path, name: str, buffer: str) -> None:
    save_checkpoint(tmp_path, CONFIGS[name])
    edit(tmp_path, lambda tensors: tensors.update({buffer: torch.ones(4)}))
    load_engine(tmp_path)


NORM = "model.layers.1.input_layernorm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"weight {NORM} does not exist"),
        (lambda t: t.pop(GATE), f"weight {GATE} does not exist"),
        (
            lambda t: t.update({GATE: torch.zeros(60, 47)}),
            f"weight {GATE} has shape [60, 47] in model.safetensors, but config.json asks for",
        ),
        (
            lambda t: t.update({f"extra.{n}": torch.zeros(1) for n in range(7)}),
            "7 tensors of the checkpoint have no place in a llama network of this config.json:"
            " extra.0, extra.1, extra.2, extra.3, extra.4, ...",
        ),
        (
            lambda t: t.update({GATE.replace("weight", "bias"): torch.zeros(60)}),
            "1 tensors of the checkpoint have no place",
        ),
    ],
    ids=["norm", "linear", "shape", "extra", "bias"],
)
def test_tensors_that_do_not_match(
    checkpoint: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit(checkpoint, change)
    with pytest.raises(ModelError) as caught:
        load_engine(checkpoint)
    assert message in str(caught.value)


def test_every_shared_model_continues_as_transformers_does(
    shared_dir: Path, tmp_path: Path
) -> None:
    for name in ("stories260K", "stories260K-eos", "babyllama105"):
        copy = shutil.copytree(shared_dir / "models" / name, tmp_path / name)
        twin = make_twin(copy)
        ids = [1, *random_ids(2, 5)]
        logits = twin.all_logits(ids)[-1]
        for _ in range(64):
            ids.append(int(logits.argmax()))
            logits = twin.all_logits(ids[-1:], start=len(ids) - 1)[-1]
        assert ids[6:] == twin.expected(ids)[5:-1].argmax(-1).tolist()
