"""What to train on when. Everything follows the clock, so a busy machine still ends in time."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP_MINUTES = 1.0
FINAL_LR_SHARE = 0.02
ECHO_WEIGHT = 10.0


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of the training time with its own window length, batch and choice of text."""

    ends_at: float
    context: int
    tokens_per_step: int
    best_share: float
    echo_weight: float

    @property
    def rows(self) -> int:
        """Windows in one batch."""
        return max(1, self.tokens_per_step // self.context)


def phases(context: int, tokens_per_step: int) -> tuple[Phase, ...]:
    """Short windows first (cheap attention), full ones and the most coherent texts last."""
    return (
        Phase(0.55, context // 4, tokens_per_step, best_share=1.0, echo_weight=0.0),
        Phase(0.8, context // 2, tokens_per_step, best_share=0.6, echo_weight=ECHO_WEIGHT),
        Phase(1.0, context, tokens_per_step, best_share=0.6, echo_weight=ECHO_WEIGHT),
    )


def phase_at(plan: tuple[Phase, ...], progress: float) -> Phase:
    """The phase for a share of the training time."""
    return next((phase for phase in plan if progress < phase.ends_at), plan[-1])


def learning_rate(peak: float, elapsed_minutes: float, total_minutes: float) -> float:
    """Linear warm-up, then a cosine that reaches its floor exactly at the end."""
    if elapsed_minutes < WARM_UP_MINUTES:
        return peak * max(0.02, elapsed_minutes / WARM_UP_MINUTES)
    progress = (elapsed_minutes - WARM_UP_MINUTES) / max(1e-9, total_minutes - WARM_UP_MINUTES)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (FINAL_LR_SHARE + (1.0 - FINAL_LR_SHARE) * cosine)
