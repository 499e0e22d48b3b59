"""Readings of `config.json` that several families share; they spell the sizes differently."""

from tgis.errors import ModelError
from tgis.models.model_config import ModelConfig
from tgis.models.spec import Activation, Norm

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

ATTENTION_BUFFERS = (r".*\.attn\.(bias|masked_bias)", r".*\.attention\.(bias|masked_bias)")
"""Causal masks that old checkpoints store beside the weights."""

ROTARY_BUFFERS = (r".*\.rotary_emb\.inv_freq",)


def hidden_size(config: ModelConfig) -> int:
    """Width of the residual stream."""
    return config.size("hidden_size", "n_embd", "n_embed", "d_model")


def num_layers(config: ModelConfig) -> int:
    """Number of blocks."""
    return config.size("num_hidden_layers", "n_layer", "n_layers", most=10_000)


def heads(config: ModelConfig, num_kv_heads: int | None = None) -> tuple[int, int, int]:
    """Query heads, key/value heads, values per head.

    Args:
        config: the model's configuration.
        num_kv_heads: where `num_key_value_heads` does not tell.

    Raises:
        ModelError: they do not divide as they must.
    """
    num_heads = config.size("num_attention_heads", "n_head", "n_heads")
    if num_kv_heads is None:
        num_kv_heads = config.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads = {num_heads} is not a multiple of"
            f" num_key_value_heads = {num_kv_heads}"
        )
    return num_heads, num_kv_heads, config.size("head_dim", default=_head_dim(config, num_heads))


def _head_dim(config: ModelConfig, num_heads: int) -> int:
    hidden = hidden_size(config)
    if hidden % num_heads and not config.has("head_dim"):
        raise ModelError(
            f"config.json: hidden_size = {hidden} is not a multiple of"
            f" num_attention_heads = {num_heads}"
        )
    return hidden // num_heads


def layer_norm(config: ModelConfig, bias: bool = True) -> Norm:
    """Layer norm with the configuration's epsilon."""
    eps = config.number("layer_norm_epsilon", "layer_norm_eps", default=1e-5, above=0)
    return Norm("layer", eps=eps, bias=bias)


def sliding_windows(config: ModelConfig, num_layers: int) -> tuple[int | None, ...]:
    """Per layer, the window of `sliding_window` where it is used."""
    if not config.flag("use_sliding_window", default=False) or not config.has("sliding_window"):
        return ()
    window = config.size("sliding_window")
    first = config.number("max_window_layers", default=num_layers)
    kinds = config.strings("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ModelError(f"config.json: layer_types = {kinds!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
