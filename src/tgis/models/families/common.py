"""Readings of `config.json` that several families share."""

from tgis.errors import ModelError
from tgis.models.model_config import ModelConfig
from tgis.models.spec import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def heads(config: ModelConfig) -> tuple[int, int, int]:
    """Query heads, key/value heads, values per head.

    Raises:
        ModelError: they do not divide as they must.
    """
    num_heads = config.size("num_attention_heads")
    num_kv_heads = config.size("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"config.json: num_attention_heads = {num_heads} is not a multiple of"
            f" num_key_value_heads = {num_kv_heads}"
        )
    head_dim = config.size("head_dim", default=config.size("hidden_size") // num_heads)
    return num_heads, num_kv_heads, head_dim


def sliding_windows(config: ModelConfig, num_layers: int) -> tuple[int | None, ...]:
    """Per layer, the window of `sliding_window` where it is used."""
    if not config.flag("use_sliding_window", default=False) or not config.has("sliding_window"):
        return ()
    window = config.size("sliding_window")
    first = config.get("max_window_layers", default=num_layers)
    kinds = config.get("layer_types", default=None) or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]
    if len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ModelError(f"config.json: layer_types = {kinds!r} is not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
