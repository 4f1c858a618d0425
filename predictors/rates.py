"""A rate finder: tries rising learning rates on the first batches, and trains with one of them.

Lightning's range test (https://arxiv.org/abs/1506.01186): the rate rises from ``least`` to
``greatest`` over so many steps, the loss is smoothed, and the rate where it falls fastest is taken;
weights and optimiser are then as before. A schedule goes on from the rate found.
"""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateFinder

from gnomon.predictors.module import PredictorModule

log = logging.getLogger(__name__)


class RateFinder(LearningRateFinder):
    """Sets ``module.rate`` before the first step; a training that goes on keeps its own.

    Args:
        steps: rates tried, one on each batch; the first ten and the last are never chosen.
        least, greatest: first and last rate, tried in geometric steps.

    Raises:
        ValueError: too few steps, or rates that do not rise.
    """

    def __init__(self, steps: int = 50, least: float = 1e-6, greatest: float = 1e-1) -> None:
        if steps < 20:
            raise ValueError(
                f"find_rate={steps}: give 20 steps or more, of which the first ten do not count"
            )
        if not 0 < least < greatest:
            raise ValueError(f"least={least}, greatest={greatest}: rates rise from above 0")
        super().__init__(least, greatest, steps, early_stop_threshold=4.0, attr_name="rate")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Runs the test, and hands the rate to the schedule."""
        if trainer.ckpt_path is not None:
            return
        assert isinstance(pl_module, PredictorModule)
        pl_module.finding_rate = True
        try:
            super().on_fit_start(trainer, pl_module)
        finally:
            pl_module.finding_rate = False
        rate = pl_module.rate
        if rate is None:
            log.warning("find_rate: no rate lowered the loss; training keeps optimizer.lr")
            return
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.optimizers:
            shares: list[Any] = [1.0] * len(optimizer.param_groups)
            for schedule in schedules:
                rates = zip(schedule.get_last_lr(), schedule.base_lrs, strict=True)
                shares = [now / base for now, base in rates]
            bases = [_base(group, rate, pl_module) for group in optimizer.param_groups]
            for schedule in schedules:
                schedule.base_lrs = [*bases]
            for group, base, share in zip(optimizer.param_groups, bases, shares, strict=True):
                group["initial_lr"], group["lr"] = base, base * share
        log.warning("find_rate: training with optimizer.lr=%.2g", rate)


def _base(group: dict[str, Any], rate: float, module: PredictorModule) -> float:
    """The full rate of a group of parameters, where the optimiser's is ``rate``."""
    of_rate = group["of_rate"]
    return module.rates.spread if of_rate is None else rate * float(of_rate)
