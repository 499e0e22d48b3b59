"""GPT-NeoX, Pythia, Dolly: partial rotary positions, attention and MLP side by side."""

from tgis.models.families.base import Family, FusedQkv, TensorNames
from tgis.models.families.common import (
    ACTIVATIONS,
    ATTENTION_BUFFERS,
    ROTARY_BUFFERS,
    heads,
    hidden_size,
    layer_norm,
    num_layers,
)
from tgis.models.model_config import ModelConfig
from tgis.models.rotary import max_positions, read_rotary
from tgis.models.spec import DecoderSpec

NAMES = TensorNames(
    embedding="embed_in",
    block="layers.{}",
    attention_norm="input_layernorm",
    qkv=FusedQkv("attention.query_key_value", "grouped"),
    attention_out="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    final_norm="final_layer_norm",
    heads=("embed_out", "lm_head"),
    prefixes=("gpt_neox.", ""),
    ignored=(*ATTENTION_BUFFERS, *ROTARY_BUFFERS),
)


def read_gpt_neox(config: ModelConfig) -> DecoderSpec:
    """GPT-NeoX."""
    num_heads, num_kv_heads, head_dim = heads(config)
    rotary = read_rotary(config, head_dim, fraction=0.25)
    attention_bias = config.flag("attention_bias", default=True)
    return DecoderSpec(
        family="gpt_neox",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size(config),
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("intermediate_size"),
        norm=layer_norm(config),
        positions=rotary,
        max_positions=max_positions(rotary),
        topology=(
            "parallel" if config.flag("use_parallel_residual", default=True) else "sequential"
        ),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        activation=config.choice(ACTIVATIONS, "hidden_act", default="gelu"),
        gated_mlp=False,
        mlp_bias=True,
        tied_head=config.flag("tie_word_embeddings", default=False),
    )


FAMILIES = (Family(("gpt_neox",), lambda config: (read_gpt_neox(config), NAMES)),)
