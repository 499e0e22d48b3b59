"""What `config.json` may say, what its absences mean, and what is refused by name."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.twins import CONFIGS

from tgis.errors import ModelError
from tgis.models.families import FAMILIES, read_spec
from tgis.models.model_config import ModelConfig
from tgis.models.rotary import rotary_table
from tgis.models.spec import Alibi, DecoderSpec, Rotary

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


def read(**changes: Any) -> DecoderSpec:
    return read_spec(ModelConfig({**LLAMA, **changes}))[0]


def test_an_old_llama_config_means_what_it_meant() -> None:
    spec = read()
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (4, 4, 16)
    assert spec.norm.eps == 1e-6
    assert spec.scale == 0.25
    assert not any((spec.tied_head, spec.qkv_bias, spec.attention_out_bias, spec.mlp_bias))
    assert spec.max_positions is None
    assert [spec.window(layer) for layer in range(4)] == [None] * 4


def test_null_is_as_good_as_absent() -> None:
    assert read(head_dim=None, num_key_value_heads=None, rope_scaling=None) == read()


def test_windows() -> None:
    mistral = read(model_type="mistral", sliding_window=5)
    assert [mistral.window(layer) for layer in range(4)] == [5] * 4
    assert read(model_type="mistral").windows == ()
    qwen = {"model_type": "qwen2", "sliding_window": 6, "max_window_layers": 3}
    assert read(**qwen).windows == ()
    assert read(**qwen, use_sliding_window=True).windows == (None, None, None, 6)
    kinds = ["sliding_attention", "full_attention"] * 2
    spec = read(**qwen, use_sliding_window=True, layer_types=kinds)
    assert spec.windows == (6, None, 6, None)


REFINED_WEB = {
    "model_type": "RefinedWeb",
    "vocab_size": 100,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_head_kv": 4,
    "layer_norm_epsilon": 1e-6,
}


def test_falcon_by_its_older_names() -> None:
    spec, names = read_spec(ModelConfig(REFINED_WEB))
    assert (spec.topology, spec.num_heads, spec.num_kv_heads) == ("parallel", 8, 4)
    assert names.mlp_norm == "ln_mlp"
    assert spec.norm.eps == 1e-6
    old = {**REFINED_WEB, "model_type": "RefinedWebModel", "multi_query": True}
    spec, names = read_spec(ModelConfig(old))
    assert (spec.topology, spec.num_heads, spec.num_kv_heads) == ("shared", 8, 1)
    assert names.mlp_norm is None
    spec, names = read_spec(ModelConfig({**old, "alibi": True, "parallel_attn": False}))
    assert spec.topology == "sequential"
    assert spec.positions == Alibi(scaled=True)


def test_gpt_neox_by_its_older_keys() -> None:
    spec = read(model_type="gpt_neox", rotary_pct=0.5, rotary_emb_base=500, hidden_act="gelu")
    assert isinstance(spec.positions, Rotary)
    assert (spec.positions.dim, spec.positions.theta) == (8, 500.0)


def test_gemma_means_the_approximation_by_tanh() -> None:
    assert read(model_type="gemma", hidden_act="gelu").activation == "gelu_tanh"


def test_gelu_is_exact_elsewhere() -> None:
    assert read(hidden_act="gelu").activation == "gelu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not known to the native engine (only "),
        ({"model_type": None}, "config.json: model_type is missing"),
        ({"hidden_size": None}, "config.json: hidden_size / n_embd / n_embed / d_model is missing"),
        ({"hidden_size": 0}, "config.json: hidden_size = 0 is not a positive integer"),
        ({"vocab_size": "100"}, "config.json: vocab_size = '100' is not a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True is not a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small' is not a number"),
        ({"attention_bias": 1}, "attention_bias = 1 is not true or false"),
        ({"hidden_act": "mish"}, "hidden_act = 'mish' is not supported (only "),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads = 4 is not a multiple of num_key_value_heads = 3",
        ),
        ({"num_attention_heads": 5}, "hidden_size = 64 is not a multiple of num_attention_heads"),
        (
            {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm = True is not supported (only False)",
        ),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True is not supported (only False)",
        ),
        ({"model_type": "gpt2"}, "max_position_embeddings / n_positions is missing"),
        (
            {"model_type": "mpt", "attn_config": {"alibi": False}},
            "config.json: attn_config: alibi = False is not supported (only True)",
        ),
        (
            {"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"},
            "logit_scale = 'inv_sqrt_d_model' is not supported (only None)",
        ),
        (
            {"model_type": "opt", "do_layer_norm_before": False},
            "do_layer_norm_before = False is not supported (only True)",
        ),
        (
            {"model_type": "opt", "word_embed_proj_dim": 32},
            "word_embed_proj_dim = 32 is not supported (only 64)",
        ),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act = 'silu' is not supported"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4,
             "layer_types": ["full_attention"] * 3 + ["chunked_attention"]},
            "layer_types = ['full_attention', 'full_attention', 'full_attention',"
            " 'chunked_attention'] is not supported",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(**changes)
    assert message in str(caught.value)


def test_every_type_belongs_to_one_family() -> None:
    for model_type, family in FAMILIES.items():
        assert model_type in family.model_types


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def spoiled_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A good configuration of some family with one value, perhaps an inner one, replaced."""
    config = copy.deepcopy(draw(st.sampled_from(GOOD)))
    place = config
    key = draw(st.sampled_from(sorted(place)))
    if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
        place = place[key]
        key = draw(st.sampled_from(sorted(place)))
    place[key] = draw(json_values | st.sampled_from([0, -1, 1, 0.0, 10**400, -0.5, 1e-300]))
    return config


GOOD = [json.loads(config.to_json_string()) for config in CONFIGS.values()]


@settings(max_examples=400, deadline=None)
@given(config=spoiled_configs())
def test_any_value_is_read_or_refused(config: dict[str, Any]) -> None:
    try:
        spec, _ = read_spec(ModelConfig(config))
    except ModelError as error:
        assert "config.json" in str(error) or "model_type" in str(error)  # noqa: PT017
        return
    if isinstance(spec.positions, Rotary) and spec.positions.dim < 1000:
        rotary_table(spec.positions, 5)
