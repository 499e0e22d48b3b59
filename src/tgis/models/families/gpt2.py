"""GPT-2, and GPT-BigCode (SantaCoder, StarCoder): learned positions."""

from dataclasses import replace

from tgis.models.families.base import Family, FusedQkv, TensorNames
from tgis.models.families.common import (
    ACTIVATIONS,
    ATTENTION_BUFFERS,
    heads,
    hidden_size,
    layer_norm,
    num_layers,
)
from tgis.models.model_config import ModelConfig
from tgis.models.spec import DecoderSpec, Learned

GPT2_NAMES = TensorNames(
    embedding="wte",
    positions="wpe",
    block="h.{}",
    attention_norm="ln_1",
    qkv=FusedQkv("attn.c_attn", "stacked"),
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    mlp_in=("mlp.c_fc",),
    mlp_out="mlp.c_proj",
    final_norm="ln_f",
    prefixes=("transformer.", ""),
    transposed=True,
    ignored=ATTENTION_BUFFERS,
)

BIGCODE_NAMES = replace(GPT2_NAMES, qkv=FusedQkv("attn.c_attn", "grouped"), transposed=False)


def _read(config: ModelConfig, family: str, num_kv_heads: int | None = None) -> DecoderSpec:
    config.require("add_cross_attention", False)
    num_heads, num_kv_heads, head_dim = heads(config, num_kv_heads)
    return DecoderSpec(
        family=family,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size(config),
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("n_inner", default=4 * hidden_size(config)),
        norm=layer_norm(config),
        positions=Learned(),
        max_positions=config.size("max_position_embeddings", "n_positions"),
        qkv_bias=True,
        attention_out_bias=True,
        attention_scale=None if config.flag("scale_attn_weights", default=True) else 1.0,
        activation=config.choice(ACTIVATIONS, "activation_function", default="gelu_new"),
        gated_mlp=False,
        mlp_bias=True,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )


def read_gpt2(config: ModelConfig) -> DecoderSpec:
    """GPT-2: matrices are stored as [in, out]."""
    config.require("scale_attn_by_inverse_layer_idx", False)
    config.require("attention_head_type", "multihead")  # SantaCoder's first form
    return _read(config, "gpt2")


def read_gpt_bigcode(config: ModelConfig) -> DecoderSpec:
    """GPT-BigCode: usually one key/value head."""
    return _read(config, "gpt_bigcode", 1 if config.flag("multi_query", default=True) else None)


FAMILIES = (
    Family(("gpt2",), lambda config: (read_gpt2(config), GPT2_NAMES)),
    Family(
        ("gpt_bigcode",),
        lambda config: (read_gpt_bigcode(config), BIGCODE_NAMES),
    ),
)
