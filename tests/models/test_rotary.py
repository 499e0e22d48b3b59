"""Scaling kinds against the tables of `transformers`; old and new spellings; what is refused."""

import json
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tgis.errors import ModelError
from tgis.models.model_config import ModelConfig
from tgis.models.rotary import max_positions, read_rotary, rotary_table

HEAD_DIM = 32
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = [1.0 + n / 4 for n in range(16)]
SHORT = [1.0 + n / 9 for n in range(16)]
KINDS: dict[str, dict[str, Any]] = {
    "none": {},
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "llama3-more-frequent": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 30.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-exact": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.8},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 64,
    },
    "longrope-factor": {
        "rope_type": "longrope",
        "factor": 3.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": 64,
    },
}


def values(**extra: Any) -> dict[str, Any]:
    return {"model_type": "llama", "max_position_embeddings": 256, **extra}


def expected_table(rope: dict[str, Any], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = transformers.LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10_000.0, **rope},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.ones(1), torch.arange(count)[None])
    return cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]


@pytest.mark.parametrize("count", [40, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_table_as_transformers(kind: str, count: int) -> None:
    rope = KINDS[kind]
    rotary = read_rotary(ModelConfig(values(rope_parameters=rope)), HEAD_DIM)
    computed = rotary_table(rotary, count)
    torch.testing.assert_close(computed, expected_table(rope, count), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_old_spellings_mean_the_same(kind: str) -> None:
    new = {"rope_theta": 777.0, **KINDS[kind]}
    old = json.loads(json.dumps(KINDS[kind]))
    if "rope_type" in old:
        old["type"] = old.pop("rope_type")
    outside = {"rope_theta": 777.0, "rope_scaling": old or None}
    if kind == "longrope":
        key = "original_max_position_embeddings"
        outside[key] = old.pop(key)
    read = [
        read_rotary(ModelConfig(values(**extra)), HEAD_DIM)
        for extra in ({"rope_parameters": new}, outside)
    ]
    assert read[0] == read[1]
    assert read[0].theta == 777.0


@pytest.mark.parametrize(
    ("extra", "dim"),
    [
        ({}, 32),
        ({"partial_rotary_factor": 0.25}, 8),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0}, 16),
        ({"partial_rotary_factor": 0.29}, 10),
    ],
)
def test_a_part_of_each_head_rotates(extra: dict[str, Any], dim: int) -> None:
    rotary = read_rotary(ModelConfig(values(**extra)), HEAD_DIM)
    assert rotary.dim == dim
    assert rotary_table(rotary, 3)[0].shape == (3, dim // 2)


def test_only_dynamic_scaling_ends_hard() -> None:
    ends = {
        kind: max_positions(read_rotary(ModelConfig(values(rope_parameters=rope)), HEAD_DIM))
        for kind, rope in KINDS.items()
    }
    assert {kind for kind, end in ends.items() if end is not None} == {"dynamic"}
    assert ends["dynamic"] == 256


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "ntk"}, "rope_scaling type 'ntk' is not supported (only default, linear,"),
        ({"rope_type": 3}, "rope_parameters: rope_type = 3 is not a string"),
        ({"rope_type": "linear"}, "rope_parameters: factor is missing"),
        ({"rope_type": "linear", "factor": "2"}, "rope_parameters: factor = '2' is not a number"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is missing"),
        ({**KINDS["longrope"], "long_factor": [1.0]}, "long_factor must list 16 numbers"),
        ({"partial_rotary_factor": 0.0}, "rotary positions on 0 of 32 values of a head"),
        ([], "rope_parameters = [] is not an object"),
    ],
)
def test_what_is_refused(rope: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_rotary(ModelConfig(values(rope_parameters=rope)), HEAD_DIM)
    assert message in str(caught.value)
