"""The native engine against the Transformers engine, family by family.

    python -m benchmarks.families [--families llama gpt_neox ...] [--dtype float32]

Each family gets a random checkpoint of 12 layers and hidden size 768, made with Transformers. The
core (scheduler, engine, sampler) serves it in this process with either engine, in turns, so that a
busy machine is so for both: 1 and 32 greedy streams of 32 prompt tokens and 32 new ones. Printed
are the best tokens/s of each and their ratio. The claim: at least 1.3.
"""

import argparse
import gc
import math
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tgis.config import Config
from tgis.control import Boot
from tgis.core.assembly import assemble
from tgis.hub.resolve import resolve
from tgis.types import NO_DETAILS, FinishReason, SamplingParams
from tgis.wire import Add, Failed, Gauges, Out

PROMPT_TOKENS = 32
NEW_TOKENS = 32
STREAMS = (1, 32)
ENGINES = ("tgis_native", "hf_transformers")
CLAIM = 1.3

VOCAB = 32_000
LAYERS, HIDDEN, HEADS, KV_HEADS = 12, 768, 12, 4
NO_END = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2048,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 2048,
    **NO_END,
}
PLAIN = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
GPT = {
    "vocab_size": VOCAB,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 2048,
    **NO_END,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 64,
    "num_heads": HEADS,
    "num_layers": LAYERS,
    "decoder_start_token_id": 0,
    **NO_END,
}
BLOOM = {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}
MPT = {"d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 2048}
OPT = {"ffn_dim": 3072, "word_embed_proj_dim": HIDDEN}
FALCON = {key: PLAIN[key] for key in PLAIN if key != "intermediate_size"}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 1024}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 64}),
    "granite": ("GraniteConfig", LLAMA),
    "gemma": ("GemmaConfig", {**LLAMA, "head_dim": 64}),
    "gpt_neox": ("GPTNeoXConfig", {**PLAIN, "intermediate_size": 3072}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, **BLOOM, **NO_END}),
    "falcon-7b": ("FalconConfig", FALCON),
    "falcon-40b": (
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    ),
    "falcon-rw": (
        "FalconConfig",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "gpt2": ("GPT2Config", GPT),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, **MPT, **NO_END}),
    "opt": ("OPTConfig", {**PLAIN, **OPT}),
    "t5": ("T5Config", {**T5, "d_ff": 3072}),
    "mt5": ("MT5Config", {**T5, "d_ff": 2048, "feed_forward_proj": "gated-gelu"}),
}
"""Family -> class of its configuration in Transformers, and a shape."""


class Link:
    """The front's part: hands requests to the core, and counts what comes back."""

    def __init__(self) -> None:
        self.requests: list[Add] = []
        self.num_open = 0
        self.num_tokens = 0

    def offer(self, count: int, rng: random.Random) -> None:
        """As many requests at once."""
        for number in range(count):
            prompt = [rng.randrange(10, VOCAB) for _ in range(PROMPT_TOKENS)]
            greedy = SamplingParams()
            add = Add(number, prompt, greedy, NO_DETAILS, NEW_TOKENS, math.inf, time.monotonic())
            self.requests.append(add)
        self.num_open += count

    def receive(self, _wait: float) -> Iterator[tuple[int, Add]]:
        while self.requests:
            yield 0, self.requests.pop()

    def send(self, _client: int, message: Out | Failed) -> None:
        if isinstance(message, Failed):
            raise RuntimeError(message.message)
        self.num_tokens += len(message.tokens)
        ended = [token for token in message.tokens if token.finish is not FinishReason.NOT_FINISHED]
        self.num_open -= len(ended)


class Pulse:
    """The heartbeat's part."""

    step_started = 0.0
    gauges = Gauges()


class Served(NamedTuple):
    """A model in an engine in a core."""

    core: Any
    link: Link


def make_model(family: str, path: Path) -> None:
    class_name, shape = CONFIGS[family]
    config = getattr(transformers, class_name)(**shape)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    torch.manual_seed(0)
    model = kinds[config.is_encoder_decoder].from_config(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)


def serve(path: Path, engine: str, dtype: str | None, threads: int | None) -> Served:
    config = Config(
        model_name=str(path),
        deployment_framework=engine,
        dtype=dtype,
        threads=threads,
        max_sequence_length=PROMPT_TOKENS + NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        max_batch_size=max(STREAMS),
        prefix_caching=False,
    )
    link: Any = Link()
    boot = Boot(config, resolve(config), "", "")
    core, _ = assemble(boot, link, Pulse(), lambda *_: None, [])
    return Served(core, link)


def tokens_per_second(served: Served, streams: int, rng: random.Random) -> float:
    served.link.num_tokens = 0
    start = time.perf_counter()
    served.link.offer(streams, rng)
    while served.link.num_open:
        served.core.turn(0.0)
    assert served.link.num_tokens == streams * NEW_TOKENS
    return served.link.num_tokens / (time.perf_counter() - start)


def measure(family: str, dtype: str | None, threads: int | None, rounds: int) -> list[list[float]]:
    """Best tokens/s by number of streams and engine."""
    with tempfile.TemporaryDirectory() as name:
        make_model(family, Path(name))
        both = [serve(Path(name), engine, dtype, threads) for engine in ENGINES]
    best = [[0.0] * len(both) for _ in STREAMS]
    rng = random.Random(0)
    for _ in range(rounds + 1):  # one to warm up
        for engine, served in enumerate(both):
            for row, streams in zip(best, STREAMS, strict=True):
                row[engine] = max(row[engine], tokens_per_second(served, streams, rng))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--families", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--dtype", help="default: as a server's")
    parser.add_argument("--threads", type=int, help="default: as a server's")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    print("| family | streams | native, tokens/s | Transformers, tokens/s | ratio |")
    print("|---|---|---|---|---|")
    for family in arguments.families:
        found = measure(family, arguments.dtype, arguments.threads, arguments.rounds)
        for streams, (ours, theirs) in zip(STREAMS, found, strict=True):
            ratio, short = ours / theirs, "" if ours >= CLAIM * theirs else " (short)"
            print(f"| {family} | {streams} | {ours:.1f} | {theirs:.1f} | {ratio:.2f}{short} |")
        gc.collect()


if __name__ == "__main__":
    main()
