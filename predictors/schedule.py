"""Learning-rate schedules, configured with everything but the optimiser and the number of steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_warmup(
    optimizer: Optimizer, total_steps: int, warmup: float = 0.05, floor: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then a half cosine from the full rate to ``floor`` times it.

    Args:
        total_steps: optimiser steps of the whole run.
        warmup: share of the steps to warm up in.
        floor: final rate as a share of the full one.
    """
    if not 0 <= warmup < 1 or not 0 <= floor <= 1:
        raise ValueError(
            f"scheduler.warmup={warmup}, scheduler.floor={floor}: use shares in [0, 1)"
        )
    rise = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = min(1.0, (step - rise) / max(1, total_steps - rise))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
