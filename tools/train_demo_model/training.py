"""The training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from .network import Network, Shape, rotary_tables
from .objective import Objective
from .packing import Batch, Rewrite, WindowStream
from .schedule import Phase, learning_rate, phase_at, phases

log = logging.getLogger(__name__)

WEIGHT_DECAY = 0.1
GRADIENT_LIMIT = 1.0
STEPS_PER_REPORT = 50
MINUTES_PER_CHECKPOINT = 2.0


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """How long, how fast, from which seed, and where checkpoints go."""

    minutes: float
    tokens_per_step: int
    learning_rate: float
    seed: int
    checkpoint: Path
    compile: bool


class Trainer:
    """Owns the network, the optimiser and the clock of one training run."""

    def __init__(
        self,
        shape: Shape,
        tokenizer: Tokenizer,
        documents: Sequence[str],
        rewrite: Rewrite,
        options: TrainingOptions,
    ) -> None:
        torch.manual_seed(options.seed)
        self._options = options
        self._network = Network(shape)
        objective = Objective(self._network)
        self._losses_of = torch.compile(objective, dynamic=False) if options.compile else objective
        self._optimiser = _optimiser(self._network, options.learning_rate)
        self._plan = phases(shape.context, options.tokens_per_step)
        self._source = (tokenizer, list(documents), rewrite)
        self._elapsed_minutes = 0.0
        self._steps = 0
        self._tokens = 0

    def resume(self, checkpoint: Path) -> None:
        """Go on where a checkpoint stopped; its minutes count as spent."""
        state = torch.load(checkpoint, weights_only=True)
        self._network.load_state_dict(state["network"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._elapsed_minutes = state["elapsed_minutes"]
        self._steps, self._tokens = state["steps"], state["tokens"]

    def run(self) -> Network:
        """Train until the minutes are spent; the last checkpoint holds the result."""
        started = time.monotonic() - 60.0 * self._elapsed_minutes
        saved_at = self._elapsed_minutes
        phase: Phase | None = None
        while (progress := self._elapsed_minutes / self._options.minutes) < 1.0:
            if phase is not (now := phase_at(self._plan, progress)):
                phase, stream = now, self._stream(now)
                tables = rotary_tables(self._network.shape, phase.context, torch.bfloat16)
                log.info("phase: %s", phase)
            batch = stream.batch(phase.rows, phase.context)
            losses = self._step(batch, tables, phase.echo_weight)
            self._elapsed_minutes = (time.monotonic() - started) / 60.0
            if self._steps % STEPS_PER_REPORT == 0:
                self._report(*losses.tolist())
            if self._elapsed_minutes - saved_at >= MINUTES_PER_CHECKPOINT:
                saved_at = self._elapsed_minutes
                self._save()
        self._save()
        return self._network

    def _step(self, batch: Batch, tables: tuple[Tensor, Tensor], echo_weight: float) -> Tensor:
        rate = learning_rate(
            self._options.learning_rate, self._elapsed_minutes, self._options.minutes
        )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            surprise, echo = self._losses_of(batch.ids, batch.targets, batch.echoes, *tables)
        (surprise + echo_weight * echo).backward()
        nn.utils.clip_grad_norm_(self._network.parameters(), GRADIENT_LIMIT)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._steps += 1
        self._tokens += batch.ids.numel()
        return torch.stack((surprise, echo)).detach()

    def _stream(self, phase: Phase) -> WindowStream:
        tokenizer, documents, rewrite = self._source
        best = documents[: max(1, round(phase.best_share * len(documents)))]
        return WindowStream(tokenizer, best, rewrite, self._options.seed + self._steps)

    def _report(self, surprise: float, echo: float) -> None:
        log.info(
            "step %d  tokens %.2fM  minutes %.1f  lr %.2e  loss %.4f  echo %.4f",
            self._steps,
            self._tokens / 1e6,
            self._elapsed_minutes,
            self._optimiser.param_groups[0]["lr"],
            surprise,
            echo,
        )

    def _save(self) -> None:
        path = self._options.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        state: dict[str, Any] = {
            "shape": asdict(self._network.shape),
            "network": self._network.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "elapsed_minutes": self._elapsed_minutes,
            "steps": self._steps,
            "tokens": self._tokens,
        }
        torch.save(state, partial)
        # A reader (an early export, say) must never see half a checkpoint.
        partial.replace(path)


def _optimiser(network: Network, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in network.parameters() if p.dim() >= 2]
    gains = [p for p in network.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)
