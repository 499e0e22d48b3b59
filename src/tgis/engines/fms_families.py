"""What the IBM FMS engine serves: found by comparing the library with Transformers."""

from typing import Any

# model_type -> the first of `architectures` in config.json. Of the library's others, some are no
# decoders, some keep more than keys and values, and some it cannot load with Transformers 5.
FAMILIES = {
    "gpt_bigcode": "GPTBigCodeForCausalLM",
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
# Families whose heads may be of another size than hidden_size / num_attention_heads.
FREE_HEADS = ("granite", "mistral")
# Settings that its networks take for granted, the default first.
VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"hidden_act": ("silu",)},
    "gpt_bigcode": {
        "activation_function": ("gelu_pytorch_tanh",),
        "scale_attn_weights": (True,),
        "multi_query": (True,),
    },
}
# (rope_type, model_type) of the scaled rotary positions that it computes as Transformers does.
SCALED_ROPE = ("llama3", "llama")
