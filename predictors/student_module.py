"""The LightningModule of what trains on the sparse host itself: ``kl``, and ``on_policy=true``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gnomon.data.criteria import Criterion
from gnomon.host import UnitKind
from gnomon.predictors.divergence import Divergence, mean_kl, relative_error
from gnomon.predictors.imitation import Imitation
from gnomon.predictors.module import Batch, PredictorModule, Rates
from gnomon.predictors.objectives import Kl, Objective
from gnomon.runtime.positions import Step
from gnomon.runtime.softness import Softness
from gnomon.runtime.student import Student

log = logging.getLogger(__name__)

KEYS = ("kl", "ppl_dense", "ppl_sparse", "ppl_ratio")


class StudentModule(PredictorModule):
    """Fits a predictor on blocks of token ids; logs ``val/kl`` and ``val/ppl_ratio`` too.

    Training batches hold ``ids`` (B, T), and ``prompt`` (B,) under the protocol ``decode``.
    Held-out batches are of both kinds: such blocks, and the rows of :class:`PredictorModule`.

    Args:
        student: runs the host; it is no submodule, so that no checkpoint holds the host.
        objective: ``Kl``, or another one with ``on_policy``.
        criterion: what makes a target of a unit that the sparse host has computed (not for ``Kl``).
        optimizer, scheduler, density, warm, rates: as in :class:`PredictorModule`.

    Raises:
        ValueError: a criterion that needs gradients, which a sparse forward alone has not.
    """

    def __init__(
        self,
        student: Student,
        objective: Objective,
        criterion: Criterion,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None,
        density: Mapping[UnitKind, float],
        warm: bool = False,
        rates: Rates | None = None,
    ) -> None:
        how = (optimizer, scheduler, density, warm, rates)
        super().__init__(student.predictor, objective, *how)
        self._student, self._divergence = [student], Divergence(student.device)
        self._at_start: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._imitate: Imitation | None = None
        if not isinstance(objective, Kl):
            self._imitate = Imitation(student, objective, criterion, density)

    @property
    def student(self) -> Student:
        """The sparse host."""
        return self._student[0]

    def on_fit_start(self) -> None:
        """Refuses a trainer on another device than the host's.

        Raises:
            ValueError: names both.
        """
        if self.device.type != self.student.device.type:
            raise ValueError(
                f"trainer.accelerator trains on {self.device.type}, but the host is on "
                f"{self.student.device.type}, and objective={self.objective.name} runs it: set "
                "trainer.accelerator and host.device alike"
            )

    def on_train_start(self) -> None:
        """Measures the divergence that training starts from."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None or self.global_step > 0:
            return
        self._divergence = Divergence(self.student.device)
        for batch in data.val_dataloader():
            if "ids" in batch:
                self._diverge({key: value.to(self.device) for key, value in batch.items()})
        self._at_start = _rounded(self._reduced())

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """One step of the objective on the sparse host.

        Raises:
            ValueError: the loss is not finite.
        """
        step = self.student.step(batch["ids"], batch.get("prompt"))
        if self._imitate is None:
            loss = self._distil(batch["ids"], step)
        else:
            loss = self._imitate(batch["ids"], step)
        self._require_finite(loss)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["ids"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Starts counting anew."""
        super().on_validation_epoch_start()
        self._divergence = Divergence(self.student.device)

    def validation_step(self, batch: Batch, index: int) -> None:
        """Divergence on blocks; recall and mass on rows."""
        if "ids" in batch:
            self._diverge(batch)
        else:
            self._measure(batch, correlate=False)

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out metrics of rows and blocks."""
        super().on_validation_epoch_end()
        found = self._reduced()
        for key in ("kl", "ppl_ratio"):
            self.log(f"val/{key}", found[key], prog_bar=key == "kl", sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Starts counting anew."""
        super().on_test_epoch_start()
        self._divergence = Divergence(self.student.device)

    def test_step(self, batch: Batch, index: int) -> None:
        """All metrics of blocks or rows."""
        if "ids" in batch:
            self._diverge(batch)
        else:
            super().test_step(batch, index)

    def on_test_epoch_end(self) -> None:
        """Adds the divergence, as quantised and before, to the results."""
        super().on_test_epoch_end()
        found, policy = self._reduced(), self.student.policy
        self.results["student"] = {
            "refresh": policy.refresh,
            "protocol": self.student.protocol,
            "choose": self.student.choose,
            "spread": policy.resolved.spread,
            **_rounded(found),
            "positions": int(found["positions"]),
            "float": self._before,
            "start": self._at_start,
        }
        for key in ("kl", "ppl_ratio"):
            self.log(f"test/{key}", found[key], sync_dist=True)

    def before_quantized(self, rows: Iterable[Batch]) -> None:
        """Measures the weights as trained, for ``results["student"]["float"]``."""
        self.trainer.test(self, dataloaders=rows, verbose=False)
        self._before = _rounded(self.results["student"])
        start = self._at_start.get("kl")
        if start is not None and self._before["kl"] > start:
            log.warning(
                "the divergence was %.4f at the start and is %.4f after training: lower "
                "optimizer.lr or train for longer",
                *(start, self._before["kl"]),
            )

    def _distil(self, ids: Tensor, step: Step) -> Tensor:
        """KL to the dense host at the sparse positions, and the weighted error of its layers."""
        assert isinstance(self.objective, Kl)
        states, errors = {}, []
        at, watched = step.sparse, self.objective.layers_weight > 0

        def keep(layer: int, hidden: Tensor) -> None:
            states[layer] = hidden[at]

        def compare(layer: int, hidden: Tensor) -> None:
            errors.append(relative_error(hidden[at], states.pop(layer)))

        teacher = _scored(self.student.dense(ids, keep if watched else None), step, self.student)
        softness = Softness(*self.objective.softness(self._progress()), self.objective.balanced)
        logits = self.student.sparse(ids, step, softness, compare if watched else None)
        loss = mean_kl(_scored(logits, step, self.student), teacher, self.objective.temperature)
        self.log("train/kl", loss, batch_size=len(ids))
        if watched:
            error = torch.stack(errors).mean()
            self.log("train/layers", error, batch_size=len(ids))
            loss = loss + self.objective.layers_weight * error
        return loss

    @torch.no_grad()
    def _diverge(self, batch: Batch) -> None:
        ids, student = batch["ids"], self.student
        step = student.step(ids, batch.get("prompt"))
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:]
        dense, sparse = student.dense(ids), student.sparse(ids, step)
        scored = (_scored(x, step, student) for x in (sparse, dense, targets))
        self._divergence.update(*scored)

    def _reduced(self) -> dict[str, float]:
        """Over all processes."""
        total = Divergence(self.student.device)
        total.sums = self.trainer.strategy.reduce(self._divergence.sums, reduce_op="sum")
        return total.compute()

    def _progress(self) -> float:
        """Share of the steps done, 0 where their number is unknown."""
        steps = self.trainer.estimated_stepping_batches
        return 0.0 if steps == float("inf") else min(1.0, self.global_step / max(1, steps))

    def _require_finite(self, loss: Tensor) -> None:
        if not self.finding_rate and not bool(loss.isfinite()):
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise ValueError(
                f"the loss is {float(loss.detach())} at step {self.global_step} with a rate of "
                f"{rate:.2g}: training has diverged; lower optimizer.lr (begin with 3e-4 for "
                "dejavu, 5e-5 for shadow), or start from a trained predictor (init=<folder>)"
            )


def _scored(values: Tensor, step: Step, student: Student) -> Tensor:
    """Values (B, T, …) at the sparse positions, (M, …)."""
    return values.flatten(0, 1) if student.protocol == "all" else values[step.sparse]


def _rounded(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: round(found[key], 5) for key in KEYS}
