"""Falcon in its three shapes, and under its older name RefinedWeb.

7B    one key/value head, attention and MLP side by side after one norm
40B   groups of heads, attention and MLP side by side after a norm each (11B: after one)
RW    one after the other, with ALiBi
"""

from dataclasses import replace

from tgis.models.families.base import Family, FusedQkv, TensorNames
from tgis.models.families.common import (
    ACTIVATIONS,
    ROTARY_BUFFERS,
    heads,
    hidden_size,
    layer_norm,
    num_layers,
)
from tgis.models.model_config import ModelConfig
from tgis.models.rotary import max_positions, read_rotary
from tgis.models.spec import Alibi, DecoderSpec, Rotary, Topology

SHARED = TensorNames(
    embedding="word_embeddings",
    block="h.{}",
    attention_norm="input_layernorm",
    qkv=FusedQkv("self_attention.query_key_value", "grouped"),
    attention_out="self_attention.dense",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    final_norm="ln_f",
    prefixes=("transformer.", ""),
    ignored=ROTARY_BUFFERS,
)

NAMES: dict[Topology, TensorNames] = {
    "shared": SHARED,
    "parallel": replace(SHARED, attention_norm="ln_attn", mlp_norm="ln_mlp"),
    "sequential": replace(SHARED, mlp_norm="post_attention_layernorm"),
}


def _is_grouped(config: ModelConfig) -> bool:
    """Whether this is the 40B shape; RefinedWeb is its older name."""
    return config.flag("new_decoder_architecture", default=config.model_type == "RefinedWeb")


def _topology(config: ModelConfig) -> Topology:
    if _is_grouped(config):
        norms = config.size("num_ln_in_parallel_attn", default=2)
        return "parallel" if norms == 2 else "shared"
    return "shared" if config.flag("parallel_attn", default=True) else "sequential"


def _kv_heads(config: ModelConfig) -> int:
    num_heads = config.size("num_attention_heads", "n_head")
    if _is_grouped(config):
        return config.size("num_kv_heads", "n_head_kv", default=num_heads)
    return 1 if config.flag("multi_query", default=True) else num_heads


def read_falcon(config: ModelConfig) -> tuple[DecoderSpec, TensorNames]:
    """Falcon."""
    num_heads, num_kv_heads, head_dim = heads(config, _kv_heads(config))
    positions: Rotary | Alibi
    if config.flag("alibi", default=False):
        positions, end = Alibi(scaled=True), None
    else:
        positions = read_rotary(config, head_dim)
        end = max_positions(positions)
    bias = config.flag("bias", default=False)
    topology = _topology(config)
    spec = DecoderSpec(
        family="falcon",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size(config),
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("ffn_hidden_size", default=4 * hidden_size(config)),
        norm=layer_norm(config),
        positions=positions,
        max_positions=end,
        topology=topology,
        qkv_bias=bias,
        attention_out_bias=bias,
        activation=config.choice(ACTIVATIONS, "activation", default="gelu"),
        gated_mlp=False,
        mlp_bias=bias,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )
    return spec, NAMES[topology]


FAMILIES = (Family(("falcon", "RefinedWeb", "RefinedWebModel"), read_falcon),)
