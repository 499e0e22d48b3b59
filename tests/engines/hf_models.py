"""Tiny random models made with Transformers, loaded into the Transformers engine."""

import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tgis.config import Config
from tgis.engines import hf as engine_module
from tgis.engines.padded import PaddedEngine
from tgis.engines.plan import Row, StepPlan, Want
from tgis.hub.resolve import resolve

VOCAB, START = 131, 2

NO_SPECIAL = {"eos_token_id": None, "bos_token_id": None}
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 60,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    **NO_SPECIAL,
}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": 128,
    **NO_SPECIAL,
}
BLOOM = {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 3, "n_head": 8, "eos_token_id": None}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    **NO_SPECIAL,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {
    **SMALL,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "sliding_window": 6,
    "layer_types": MIXED,
}
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 60,
    "decoder_ffn_dim": 60,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "decoder_start_token_id": START,
    "bos_token_id": 0,
    "eos_token_id": None,
    "forced_eos_token_id": None,
}

CONFIGS: dict[str, Any] = {
    "gpt2": hf.GPT2Config(**GPT),
    "gpt_neox": hf.GPTNeoXConfig(**SMALL),
    "gpt_neo": hf.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=5,
        max_position_embeddings=128,
        **NO_SPECIAL,
    ),
    "opt": hf.OPTConfig(**SMALL | {"pad_token_id": 1}, ffn_dim=60, word_embed_proj_dim=48),
    "bloom": hf.BloomConfig(**BLOOM),
    "falcon": hf.FalconConfig(**FALCON),
    "falcon-alibi": hf.FalconConfig(**FALCON, alibi=True),
    "mpt": hf.MptConfig(vocab_size=VOCAB, d_model=48, n_layers=3, n_heads=8, max_seq_len=128),
    "gptj": hf.GPTJConfig(**GPT, rotary_dim=4),
    "codegen": hf.CodeGenConfig(**GPT | {"n_head": 4}, rotary_dim=4),
    "phi": hf.PhiConfig(**SMALL),
    "gemma2": hf.Gemma2Config(**GEMMA),
    "gemma3": hf.Gemma3TextConfig(**GEMMA),
    "mistral": hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5),
    "mamba": hf.MambaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=4,
        pad_token_id=0,
        **NO_SPECIAL,
    ),
    "qwen3_next": hf.Qwen3NextConfig(
        **SMALL,
        head_dim=16,
        num_key_value_heads=2,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "rwkv": hf.RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        context_length=128,
        **NO_SPECIAL,
    ),
    "t5": hf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=START,
        pad_token_id=0,
        eos_token_id=None,
    ),
    "bart": hf.BartConfig(**SEQ2SEQ),
    "mbart": hf.MBartConfig(**SEQ2SEQ),
    "m2m_100": hf.M2M100Config(**SEQ2SEQ),
    "marian": hf.MarianConfig(**SEQ2SEQ),
    "pegasus": hf.PegasusConfig(**SEQ2SEQ),
}


def save_model(path: Path, config: Any) -> Any:
    """Save a random model, its weights large enough for greedy choices to be clear; returns it."""
    torch.manual_seed(7)
    auto = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return auto.from_pretrained(path).eval()  # tables that are computed are not saved


def load_engine(path: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """The engine over a saved model."""
    config = Config(model_name=str(path), **settings)
    return engine_module.load(config, resolve(config), dtype)


@cache
def random_ids(seed: int, count: int) -> tuple[int, ...]:
    """Tokens that are neither padding nor the decoder's first."""
    rng = random.Random(seed)
    return tuple(rng.randrange(3, VOCAB) for _ in range(count))


class Sequences:
    """Greedy sequences on an engine; each is known by its slot."""

    def __init__(self, engine: PaddedEngine[Any], is_seq2seq: bool) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, list[Tensor]] = {}
        self._is_seq2seq = is_seq2seq
        self._inputs: dict[int, list[int]] = {}
        self._computed: dict[int, int] = {}

    def add(self, slot: int, ids: Sequence[int]) -> None:
        """A new sequence; it is computed from the next step of it on."""
        self.tokens[slot] = [START] if self._is_seq2seq else list(ids)
        self._inputs[slot] = list(ids)
        self._computed[slot] = 0
        self.logits[slot] = []

    def row(self, slot: int) -> Row:
        """What the next step has to compute of a sequence."""
        start, tokens = self._computed[slot], self.tokens[slot]
        encoder_ids = self._inputs[slot] if self._is_seq2seq and start == 0 else None
        return Row(slot, slot, tokens[start:], start, Want.LAST, encoder_ids=encoder_ids)

    def step(self, slots: Iterable[int]) -> None:
        """One token for each of these."""
        rows = [self.row(slot) for slot in slots]
        logits = self.engine.forward(StepPlan(rows))
        for row, scores in zip(rows, logits, strict=True):
            self._computed[row.slot] += len(row.token_ids)
            self.tokens[row.slot].append(int(scores.argmax()))
            self.logits[row.slot].append(scores)

    def preempt(self, slot: int) -> None:
        """Take its memory; it is computed anew in the next step of it."""
        self.engine.release([slot])
        self._computed[slot] = 0

    def remove(self, slot: int) -> None:
        """It has ended."""
        self.engine.release([slot])
        del self.tokens[slot], self._computed[slot]


def generate(model: Any, ids: Sequence[int], count: int) -> tuple[list[int], Tensor]:
    """What Transformers generates greedily: the tokens, and the logits [count, vocabulary]."""
    found = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences[0][-count:].tolist(), torch.cat(found.logits)
