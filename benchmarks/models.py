"""Checkpoints with random weights in LLaMA shapes, for measuring.

python -m benchmarks.models M /tmp/model-m
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "M": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "L": {
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
VOCAB = 32_000
MAX_POSITIONS = 2048
# No generated token ends a sequence: the id is beyond the vocabulary of the tokenizer's text.
EOS = VOCAB - 1


def shape_config(name: str) -> dict[str, object]:
    """`config.json` of a shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITIONS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "torch_dtype": "bfloat16",
        **SHAPES[name],
    }


def random_tensors(config: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Weights by checkpoint name, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = head_dim * config["num_key_value_heads"]

    def weight(rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return values.to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": weight(VOCAB, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": weight(VOCAB, hidden),
    }
    # The last id is never the best: generation runs to its limit.
    tensors["lm_head.weight"][EOS] = 0
    projections = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in projections.items():
            tensors[f"{prefix}{name}.weight"] = weight(rows, columns)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def make_model(name: str, directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint with the demo model's tokenizer, unless it is there already."""
    from tgis.demo import model_dir

    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = shape_config(name)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(model_dir() / file, directory / file)
    tensors = random_tensors({k: v for k, v in config.items() if isinstance(v, int)}, seed)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    print(make_model(arguments.shape, arguments.directory))


if __name__ == "__main__":
    main()
