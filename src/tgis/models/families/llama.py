"""LLaMA and those built like it: Mistral, Qwen2, Qwen3, Granite, Gemma."""

from dataclasses import replace

from tgis.models.families.base import Family, SeparateQkv, TensorNames
from tgis.models.families.common import (
    ACTIVATIONS,
    ROTARY_BUFFERS,
    heads,
    hidden_size,
    num_layers,
    sliding_windows,
)
from tgis.models.model_config import ModelConfig
from tgis.models.rotary import max_positions, read_rotary
from tgis.models.spec import Activation, DecoderSpec, Norm

NAMES = TensorNames(
    embedding="model.embed_tokens",
    block="model.layers.{}",
    attention_norm="input_layernorm",
    qkv=SeparateQkv("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_out="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp_in=("mlp.gate_proj", "mlp.up_proj"),
    mlp_out="mlp.down_proj",
    final_norm="model.norm",
    ignored=ROTARY_BUFFERS,
)

NAMES_WITH_QK_NORM = replace(NAMES, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")


def read_llama(config: ModelConfig) -> DecoderSpec:
    """What all of them share, and LLaMA itself."""
    num_heads, num_kv_heads, head_dim = heads(config)
    rotary = read_rotary(config, head_dim)
    attention_bias = config.flag("attention_bias", default=False)
    return DecoderSpec(
        family="llama",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size(config),
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.size("intermediate_size"),
        norm=Norm("rms", eps=config.number("rms_norm_eps", default=1e-6, above=0)),
        positions=rotary,
        max_positions=max_positions(rotary),
        qkv_bias=attention_bias,
        attention_out_bias=attention_bias,
        activation=config.choice(ACTIVATIONS, "hidden_act", default="silu"),
        mlp_bias=config.flag("mlp_bias", default=False),
        tied_head=config.flag("tie_word_embeddings", default=False),
    )


def read_mistral(config: ModelConfig) -> DecoderSpec:
    """Mistral: a sliding window in every layer, no biases."""
    spec = replace(read_llama(config), family="mistral")
    if not config.has("sliding_window"):
        return spec
    return replace(spec, windows=(config.size("sliding_window"),) * spec.num_layers)


def read_qwen2(config: ModelConfig) -> DecoderSpec:
    """Qwen2: biases on queries, keys and values only; a window in the later layers if asked for."""
    spec = replace(read_llama(config), family="qwen2", attention_out_bias=False, qkv_bias=True)
    return replace(spec, windows=sliding_windows(config, spec.num_layers))


def read_qwen3(config: ModelConfig) -> DecoderSpec:
    """Qwen3: RMS norms of query and key heads."""
    spec = replace(read_llama(config), family="qwen3", qk_norm=True)
    return replace(spec, windows=sliding_windows(config, spec.num_layers))


def read_granite(config: ModelConfig) -> DecoderSpec:
    """Granite: multipliers on embeddings, scores, residual additions and logits."""
    return replace(
        read_llama(config),
        family="granite",
        attention_scale=config.number("attention_multiplier", default=1.0),
        embedding_multiplier=config.number("embedding_multiplier", default=1.0),
        residual_multiplier=config.number("residual_multiplier", default=1.0),
        logits_multiplier=1.0 / config.number("logits_scaling", default=1.0, above=0),
    )


# Gemma's first configurations say "gelu" and mean the approximation by tanh.
GEMMA_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def read_gemma(config: ModelConfig) -> DecoderSpec:
    """Gemma: norms store their weight minus 1, embeddings are multiplied by sqrt(hidden_size)."""
    config.require("use_bidirectional_attention", None)
    spec = read_llama(config)
    return replace(
        spec,
        family="gemma",
        norm=replace(spec.norm, weight_offset=1.0),
        activation=config.choice(
            GEMMA_ACTIVATIONS, "hidden_activation", "hidden_act", default="gelu"
        ),
        embedding_multiplier=spec.hidden_size**0.5,
        multiplies_prompts=False,
        tied_head=config.flag("tie_word_embeddings", default=True),
    )


FAMILIES = (
    Family(("llama",), lambda config: (read_llama(config), NAMES)),
    Family(("mistral",), lambda config: (read_mistral(config), NAMES)),
    Family(("qwen2",), lambda config: (read_qwen2(config), NAMES)),
    Family(("qwen3",), lambda config: (read_qwen3(config), NAMES_WITH_QK_NORM)),
    Family(("granite",), lambda config: (read_granite(config), NAMES)),
    Family(("gemma",), lambda config: (read_gemma(config), NAMES)),
)
