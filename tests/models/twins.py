"""Tiny random checkpoints of every family, and `transformers` as the oracle of their logits."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tgis.engines import native
from tgis.engines.base import CacheShape
from tgis.engines.plan import KvCopy, Row, StepPlan, Want

NUM_SLOTS = 6
SLOT_TOKENS = 96

SMALL = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "eos_token_id": None,
}


def llama(**changes: Any) -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**{**SMALL, **changes})


def rope(**parameters: Any) -> transformers.PretrainedConfig:
    return llama(rope_parameters={"rope_theta": 500.0, **parameters})


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.9], "long_factor": [1.0, 2.0, 4.0, 8.0]}
ORIGINAL = {"original_max_position_embeddings": 32}

CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": llama(),
    "llama-mha": llama(num_key_value_heads=6),
    "llama-mqa": llama(num_key_value_heads=1),
    "llama-odd-heads": llama(num_attention_heads=5, num_key_value_heads=5, hidden_size=40),
    "llama-head-dim": llama(head_dim=20, vocab_size=77),
    "llama-aligned": llama(  # sizes for which there are layers of our own
        hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=160
    ),
    "llama-tied": llama(tie_word_embeddings=True),
    "llama-biases": llama(attention_bias=True, mlp_bias=True),
    "llama-gelu": llama(hidden_act="gelu_new", rms_norm_eps=1e-3),
    "llama-linear": rope(rope_type="linear", factor=4.0),
    "llama-dynamic": rope(rope_type="dynamic", factor=2.0),
    "llama-llama3": rope(rope_type="llama3", **LLAMA3, **ORIGINAL),
    "llama-yarn": rope(rope_type="yarn", factor=4.0, **ORIGINAL),
    "llama-yarn-mscale": rope(
        rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.4, truncate=False, **ORIGINAL
    ),
    "llama-longrope": rope(
        rope_type="longrope", factor=2.0, original_max_position_embeddings=100, **LONGROPE
    ),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=7),
    "mistral-no-window": transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=16),
    "qwen2": transformers.Qwen2Config(**SMALL),
    "qwen2-window": transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "granite": transformers.GraniteConfig(
        **SMALL,
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.5,
    ),
}

GPT = {
    "vocab_size": 131,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 100,
    "eos_token_id": None,
    "bos_token_id": None,
}
NEOX = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
BLOOM = {"vocab_size": 131, "hidden_size": 48, "n_layer": 3, "n_head": 8, "eos_token_id": None}
MPT = {"vocab_size": 131, "d_model": 48, "n_layers": 3, "n_heads": 8, "max_seq_len": 96}
OPT = {**NEOX, "ffn_dim": 60, "max_position_embeddings": 96, "word_embed_proj_dim": 48}
FALCON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "eos_token_id": None,
    "bos_token_id": None,
}


def falcon(**changes: Any) -> transformers.PretrainedConfig:
    return transformers.FalconConfig(**{**FALCON, **changes})


CONFIGS |= {
    "gemma": transformers.GemmaConfig(**SMALL, head_dim=20),
    "gpt_neox": transformers.GPTNeoXConfig(**NEOX),
    "gpt_neox-sequential": transformers.GPTNeoXConfig(
        **{**NEOX, "num_attention_heads": 3, "vocab_size": 77},
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        rope_parameters={"rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
    "bloom": transformers.BloomConfig(**BLOOM),
    "bloom-odd-heads": transformers.BloomConfig(
        **{**BLOOM, "n_head": 6, "vocab_size": 77}, tie_word_embeddings=False
    ),
    "falcon-7b": falcon(),
    "falcon-7b-odd-heads": falcon(num_attention_heads=3, bias=True, tie_word_embeddings=False),
    "falcon-mha": falcon(multi_query=False, ffn_hidden_size=60),
    "falcon-40b": falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-11b": falcon(
        new_decoder_architecture=True, num_kv_heads=3, num_ln_in_parallel_attn=1, bias=True
    ),
    "falcon-rw": falcon(
        alibi=True, multi_query=False, parallel_attn=False, bias=True, num_attention_heads=8
    ),
    "gpt_bigcode": transformers.GPTBigCodeConfig(**GPT),
    "gpt_bigcode-mha": transformers.GPTBigCodeConfig(
        **{**GPT, "n_head": 3, "vocab_size": 77}, multi_query=False, scale_attn_weights=False
    ),
    "gpt2": transformers.GPT2Config(**GPT),
    "gpt2-odd-heads": transformers.GPT2Config(
        **{**GPT, "n_head": 3}, n_inner=60, tie_word_embeddings=False, activation_function="relu"
    ),
    "mpt": transformers.MptConfig(**MPT),
    "mpt-odd-heads": transformers.MptConfig(
        **{**MPT, "n_heads": 6, "vocab_size": 77},
        attn_config={"clip_qkv": 0.5, "softmax_scale": 0.2},
    ),
    "opt": transformers.OPTConfig(**OPT),
    "opt-odd-heads": transformers.OPTConfig(
        **{**OPT, "num_attention_heads": 3, "vocab_size": 77},
        enable_bias=False,
        tie_word_embeddings=False,
        activation_function="gelu",
    ),
}


@dataclass
class Twin:
    """A checkpoint, the oracle, and the engine under test."""

    path: Path
    oracle: transformers.PreTrainedModel
    engine: native.NativeEngine

    @torch.no_grad()
    def expected(self, ids: Sequence[int]) -> Tensor:
        """The oracle's logits after every token, float32 [len(ids), vocab]."""
        return self.oracle(torch.tensor([ids])).logits[0].float()

    def step(self, *rows: Row, copies: Iterable[KvCopy] = ()) -> Tensor:
        """One step of the engine."""
        return self.engine.forward(StepPlan(list(rows), list(copies)))

    def all_logits(self, ids: Sequence[int], slot: int = 0, start: int = 0) -> Tensor:
        """The engine's logits after every token of a sequence of its own."""
        return self.step(Row(0, slot, list(ids), start, Want.ALL))


def save_checkpoint(path: Path, config: transformers.PretrainedConfig) -> None:
    """Save a model in which every parameter is random, norms and biases too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            spread = 0.2 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            parameter.normal_(center, spread)
    model.save_pretrained(path)


def make_twin(path: Path, dtype: torch.dtype = torch.float32) -> Twin:
    """Load a saved checkpoint both ways."""
    oracle = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return Twin(path, oracle.eval(), load_engine(path, dtype))


def load_engine(path: Path, dtype: torch.dtype = torch.float32) -> native.NativeEngine:
    """The engine alone, its cache allocated."""
    engine = native.load(path, json.loads((path / "config.json").read_text()), dtype)
    engine.allocate(CacheShape(NUM_SLOTS, SLOT_TOKENS))
    return engine


def random_ids(seed: int, length: int, vocab_size: int = 77) -> list[int]:
    """Token ids that every checkpoint here knows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()
