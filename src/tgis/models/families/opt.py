"""OPT: learned positions that begin at row 2 of their table."""

from tgis.models.families.base import Family, SeparateQkv, TensorNames
from tgis.models.families.common import ACTIVATIONS, heads, hidden_size, num_layers
from tgis.models.model_config import ModelConfig
from tgis.models.spec import DecoderSpec, Learned, Norm

NAMES = TensorNames(
    embedding="embed_tokens",
    positions="embed_positions",
    block="layers.{}",
    attention_norm="self_attn_layer_norm",
    qkv=SeparateQkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    mlp_in=("fc1",),
    mlp_out="fc2",
    final_norm="final_layer_norm",
    prefixes=("model.decoder.", "decoder."),
)


def read_opt(config: ModelConfig) -> DecoderSpec:
    """OPT, all but opt-350m, which norms after instead of before and projects its embeddings."""
    config.require("do_layer_norm_before", True)
    config.require("word_embed_proj_dim", hidden_size(config))
    config.require("_remove_final_layer_norm", False)
    config.require("layer_norm_elementwise_affine", True)
    bias = config.flag("enable_bias", default=True)
    num_heads, num_kv_heads, head_dim = heads(config)
    return DecoderSpec(
        family="opt",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size(config),
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("ffn_dim"),
        norm=Norm("layer", eps=1e-5, bias=True),
        positions=Learned(offset=2),
        max_positions=config.size("max_position_embeddings"),
        qkv_bias=bias,
        attention_out_bias=bias,
        activation=config.choice(ACTIVATIONS, "activation_function", default="relu"),
        gated_mlp=False,
        mlp_bias=bias,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )


FAMILIES = (Family(("opt",), lambda config: (read_opt(config), NAMES)),)
