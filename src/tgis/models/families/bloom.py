"""BLOOM and BLOOMZ: ALiBi, a norm of the embeddings."""

from tgis.models.families.base import Family, FusedQkv, TensorNames
from tgis.models.families.common import heads, hidden_size, layer_norm, num_layers
from tgis.models.model_config import ModelConfig
from tgis.models.spec import Alibi, DecoderSpec

NAMES = TensorNames(
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    block="h.{}",
    attention_norm="input_layernorm",
    qkv=FusedQkv("self_attention.query_key_value", "grouped"),
    attention_out="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.dense_h_to_4h",),
    mlp_out="mlp.dense_4h_to_h",
    final_norm="ln_f",
    prefixes=("transformer.", ""),
)


def read_bloom(config: ModelConfig) -> DecoderSpec:
    """BLOOM."""
    config.require("apply_residual_connection_post_layernorm", False)
    num_heads, num_kv_heads, head_dim = heads(config)
    return DecoderSpec(
        family="bloom",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size(config),
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=4 * hidden_size(config),
        norm=layer_norm(config),
        positions=Alibi(),
        max_positions=None,
        qkv_bias=True,
        attention_out_bias=True,
        activation="gelu_tanh",
        gated_mlp=False,
        mlp_bias=True,
        embedding_norm=True,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )


FAMILIES = (Family(("bloom",), lambda config: (read_bloom(config), NAMES)),)
