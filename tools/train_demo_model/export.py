"""Writing a checkpoint as a model folder that any LLaMA implementation can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .network import NORM_EPS, ROPE_THETA, Block, Network, Shape
from .tokenizer import BOS_ID, BOS_TOKEN, EOS_ID, EOS_TOKEN, PAD_ID, PAD_TOKEN


def load_network(checkpoint: Path) -> Network:
    """The network of a checkpoint, in float32."""
    state = torch.load(checkpoint, weights_only=True)
    network = Network(Shape(**state["shape"]))
    network.load_state_dict(state["network"])
    return network


def export_model(checkpoint: Path, tokenizer: Path, output: Path) -> None:
    """Write weights, configuration and tokenizer files to a folder; other files there stay."""
    network = load_network(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    weights = save(llama_weights(network), metadata={"format": "pt"})
    (output / "model.safetensors").write_bytes(weights)
    shutil.copyfile(tokenizer, output / "tokenizer.json")
    _write_json(output / "config.json", _model_config(network.shape))
    _write_json(output / "generation_config.json", _special_ids())
    _write_json(output / "tokenizer_config.json", _tokenizer_config(network.shape))
    _write_json(output / "special_tokens_map.json", _special_tokens())


def llama_weights(network: Network) -> dict[str, Tensor]:
    """The parameters under LLaMA's names, in bfloat16; the output layer is the embedding's."""
    weights = {
        "model.embed_tokens.weight": network.embedding.weight,
        "model.norm.weight": network.final_norm,
    }
    for index, block in enumerate(network.blocks):
        assert isinstance(block, Block)
        query, key, value = torch.split(block.qkv.weight, list(network.shape.projections))
        gate, up = block.gate_up.weight.chunk(2)
        parts = {
            "input_layernorm": block.attention_norm,
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": value,
            "self_attn.o_proj": block.attention_out.weight,
            "post_attention_layernorm": block.mlp_norm,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": block.down.weight,
        }
        weights |= {f"model.layers.{index}.{name}.weight": part for name, part in parts.items()}
    return {n: w.detach().to(torch.bfloat16).contiguous() for n, w in weights.items()}


def _model_config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_THETA,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        **_special_ids(),
    }


def _special_ids() -> dict[str, Any]:
    return {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}


def _special_tokens() -> dict[str, Any]:
    return {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}


def _tokenizer_config(shape: Shape) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.context,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        **_special_tokens(),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
