"""MPT: ALiBi, no biases anywhere."""

from tgis.models.families.base import Family, FusedQkv, TensorNames
from tgis.models.families.common import heads, hidden_size, layer_norm, num_layers
from tgis.models.model_config import ModelConfig
from tgis.models.spec import Alibi, DecoderSpec

NAMES = TensorNames(
    embedding="wte",
    block="blocks.{}",
    attention_norm="norm_1",
    qkv=FusedQkv("attn.Wqkv", "stacked"),
    attention_out="attn.out_proj",
    mlp_norm="norm_2",
    mlp_in=("ffn.up_proj",),
    mlp_out="ffn.down_proj",
    final_norm="norm_f",
    prefixes=("transformer.", ""),
)


def read_mpt(config: ModelConfig) -> DecoderSpec:
    """MPT."""
    config.require("no_bias", True)
    config.require("logit_scale", None)
    attention = config.section("attn_config")
    for key, value in {
        "alibi": True,
        "attn_type": "multihead_attention",
        "prefix_lm": False,
        "qk_ln": False,
        "attn_uses_sequence_id": False,
    }.items():
        attention.require(key, value)
    num_heads, num_kv_heads, head_dim = heads(config)
    return DecoderSpec(
        family="mpt",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size(config),
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("expansion_ratio", default=4) * hidden_size(config),
        norm=layer_norm(config, bias=False),
        positions=Alibi(max_bias=attention.number("alibi_bias_max", default=8, above=0)),
        max_positions=None,
        attention_scale=(
            attention.number("softmax_scale") if attention.has("softmax_scale") else None
        ),
        qkv_clip=attention.number("clip_qkv", above=0) if attention.has("clip_qkv") else None,
        activation="gelu",
        gated_mlp=False,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )


FAMILIES = (Family(("mpt",), lambda config: (read_mpt(config), NAMES)),)
