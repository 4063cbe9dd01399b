"""Learning rate and EMA decay as pure functions of the step; nothing to save or restore."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["constant", "cosine"]


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int, shape: Shape) -> float:
    """Return the learning rate of the optimiser step ``step`` (0 … ``steps`` − 1).

    Linear warm-up that reaches ``peak`` at step ``warmup_steps``, then constant or half a cosine
    down to 0 at ``steps``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if shape == "constant":
        return peak
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def ema_decay(step: int, limit: float) -> float:
    """Return the EMA decay of a step: ``limit``, less at the start so that the average forgets
    the random initial weights (at step 1,000 it remembers about 110 steps).
    """
    return min(limit, (1 + step) / (10 + step))
