"""Judging an exported model: the loss on texts it has not seen, and what it writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from .corpus import Critic, Split, curate
from .packing import encode_documents
from .tokenizer import EOS_ID, PAD_ID

MAX_NEW_TOKENS = 400
IGNORED = -100
ROWS = 16
PROMPTS = (
    "Once upon a time",
    "Once upon a time, there was a little girl named Sophie.",
    "Once upon a time, there was a little boy named Oscar. He had a red ball.",
    "One day, a small bird",
    "One day, Tim and his mom went to the park.",
    "There was a big dog",
    "The cat and the dog",
    "A boy named Will found a shiny box",
    "Lily wanted to",
    "Mia was sad because",
    "In the forest, there was a little rabbit",
    "The sun was bright and",
    '"Can I have a cookie?" asked Tom.',
    "Mommy said,",
    "It was raining",
    "Max the dog liked to dig",
    "Far away, a king",
    "The little fish swam",
    "Anna and Ben were best friends.",
    "Hello",
)
SAMPLED_PROMPTS = PROMPTS[:3]
TEMPERATURE = 0.8
TOP_P = 0.95


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean cross entropy per token, in nats, EOS included."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The loss as an equivalent number of equally likely tokens."""
        return math.exp(self.nats)


class Judge:
    """An exported model with its tokenizer, computing in float32 on the stored weights."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def loss(self, documents: Sequence[str]) -> Loss:
        """The loss over whole documents, each on its own."""
        encoded = sorted(encode_documents(self._tokenizer, documents), key=len)
        total, count = 0.0, 0
        for start in range(0, len(encoded), ROWS):
            ids, targets = _padded(encoded[start : start + ROWS])
            logits = self._model(input_ids=ids).logits
            total += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            count += int((targets != IGNORED).sum())
        return Loss(total / count, count)

    def write(self, prompt: str, **sampling: Any) -> tuple[str, bool]:
        """The prompt with its continuation, and whether that ended by itself."""
        ids = torch.tensor([self._tokenizer.encode(prompt).ids])
        sampling = {"do_sample": False, **sampling}
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, **sampling
        )[0].tolist()
        return self._tokenizer.decode(output), output[-1] == EOS_ID


def _padded(encoded: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, encoded)) - 1
    ids = torch.full((len(encoded), width), PAD_ID)
    targets = torch.full((len(encoded), width), IGNORED)
    for row, document in enumerate(encoded):
        ids[row, : len(document) - 1] = torch.tensor(document[:-1])
        targets[row, : len(document) - 1] = torch.tensor(document[1:])
    return ids, targets


def report(folder: Path, split: Split, seed: int) -> str:
    """Losses and sample texts as Markdown."""
    judge = Judge(folder)
    sound = curate(split.held_out, Critic(split.train))
    lines = [
        _loss_line(f"all {len(split.held_out)} held-out stories", judge.loss(split.held_out)),
        _loss_line(f"the {len(sound)} of them that pass curation", judge.loss(sound)),
        "",
        *_greedy_samples(judge),
        *_random_samples(judge, seed),
    ]
    return "\n".join(lines)


def _loss_line(name: str, loss: Loss) -> str:
    return f"- {name}: {loss.nats:.4f} nats/token, perplexity {loss.perplexity:.3f} ({loss.tokens})"


def _greedy_samples(judge: Judge) -> Iterable[str]:
    for prompt in PROMPTS:
        text, ended = judge.write(prompt)
        yield f"### Greedy: {prompt}\n\n{_quoted(text, ended)}\n"


def _random_samples(judge: Judge, seed: int) -> Iterable[str]:
    for prompt in SAMPLED_PROMPTS:
        torch.manual_seed(seed)
        text, ended = judge.write(prompt, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P)
        yield f"### Sampled: {prompt}\n\n{_quoted(text, ended)}\n"


def _quoted(text: str, ended: bool) -> str:
    ending = "" if ended else f"\n[cut after {MAX_NEW_TOKENS} tokens]"
    return "\n".join(f"> {line}" for line in (text + ending).splitlines())
