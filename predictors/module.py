"""The LightningModule: fits any predictor with any objective, measures it on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gnomon.host import KINDS, UnitKind
from gnomon.predictors.base import QUANTILES, Predictor
from gnomon.predictors.metrics import NAMES, UnitMetrics, summary
from gnomon.predictors.objectives import Objective, total_loss


@dataclass(frozen=True)
class Rates:
    """Learning rates other than ``optimizer.lr``.

    Attributes:
        biases: that of the biases, the fixed choice among them, as a multiple of it.
        spread: that of the tilts of ``spread=learned``, in logits a step.

    Raises:
        ValueError: a rate of 0 or less.
    """

    biases: float = 1.0
    spread: float = 1e-2

    def __post_init__(self) -> None:
        for field, value, by in (
            ("bias_rate", self.biases, "a positive multiple of optimizer.lr, 1 for the same"),
            ("student.spread_rate", self.spread, "a positive rate, e.g. 1e-2"),
        ):
            if not 0 < value < float("inf"):
                raise ValueError(f"{field}={value}: use {by}")


CALIBRATION_ROWS = 8192  # held-out rows whose predicted scores make the quantiles
SPARED = 32  # of a row's units every so many, others in the next row, where there are many

Batch = dict[str, Tensor]


class PredictorModule(pl.LightningModule):
    """Fits a predictor; logs ``train/loss``, and ``val/recall`` and its kin beside the loss.

    Args:
        predictor: trained in place.
        objective: ``Mse``, ``Bce`` or ``Ranking``.
        optimizer: takes parameter groups; biases come in a group without weight decay.
        scheduler: takes the optimiser and ``total_steps``; None keeps the rate constant.
        density: kind -> kept fraction within a layer at which recall and mass are measured.
        warm: the predictor is trained already, and starts as it is.
        rates: of what does not train at the optimiser's own.
    """

    def __init__(
        self,
        predictor: Predictor,
        objective: Objective,
        optimizer: Callable[[Iterable[dict[str, Any]]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None,
        density: Mapping[UnitKind, float],
        warm: bool = False,
        rates: Rates | None = None,
    ) -> None:
        super().__init__()
        self.rates = rates or Rates()
        self.predictor, self.objective = predictor, objective
        self._optimizer, self._scheduler = optimizer, scheduler
        self.density, self.warm = dict(density), warm
        self.first: dict[UnitKind, int] = {kind: predictor.first(kind) for kind in KINDS}
        self.results: dict[str, Any] = {}
        self.rate: float | None = None  # that a rate finder found
        self.finding_rate = False  # while one tries rates that are too high
        self._units: dict[UnitKind, UnitMetrics] = {}
        self._samples: dict[UnitKind, list[Tensor]] = {}

    def setup(self, stage: str) -> None:
        """Starts a cold fit from the fixed choice; a checkpoint, restored later, replaces it."""
        data = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or data is None:
            return
        self.take_means(data)
        if not self.warm:
            means = self.predictor.means
            self.predictor.set_output_bias(
                {kind: self.objective.bias(means[kind], self.density[kind]) for kind in KINDS}
            )

    def take_means(self, data: Any) -> None:
        """Per-unit means of a data module, unless a warm start brought those of the same text.

        A warm start keeps its means where criterion, granularity and text digest are the same: the
        folder that training ends in names one text for both.
        """
        info, keys = self.predictor.info, ("criterion", "granularity", "text_digest")
        same = all(getattr(info, key) == data.info[key] for key in keys)
        if not (self.warm and same):
            self.predictor.set_means({kind: data.means[kind].float().cpu() for kind in KINDS})

    def before_quantized(self, rows: Iterable[Batch]) -> None:
        """Called by ``fit`` once the best weights are back, before they are quantised."""

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Sum of the losses of both kinds."""
        losses = total_loss(
            self.objective, self.predictor.decided_scores(batch["inputs"]), batch, self.first
        )
        loss = torch.stack([losses[kind] for kind in KINDS]).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["inputs"]))
        for kind in KINDS:
            self.log(f"train/loss_{kind}", losses[kind], batch_size=len(batch["inputs"]))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Starts counting anew."""
        self._start()

    def validation_step(self, batch: Batch, index: int) -> None:
        """Recall, mass and loss; Spearman waits for the test, where its sorting is paid once."""
        predicted = self._measure(batch, correlate=False)
        decided = {kind: predicted[kind][:, self.first[kind] :] for kind in KINDS}
        losses = total_loss(self.objective, decided, batch, self.first)
        loss = torch.stack([losses[kind] for kind in KINDS]).sum()
        self.log("val/loss", loss, batch_size=len(batch["inputs"]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Logs the held-out metrics."""
        results = self._finish()
        for name in NAMES[:2]:
            self.log(f"val/{name}", results[name], prog_bar=name == "recall", sync_dist=True)
            for kind in KINDS:
                self.log(f"val/{name}_{kind}", results[kind][name], sync_dist=True)

    def on_test_epoch_start(self) -> None:
        """Starts counting anew."""
        self._start()

    def test_step(self, batch: Batch, index: int) -> None:
        """All metrics, and a sample of predicted scores for the quantiles."""
        predicted = self._measure(batch, correlate=True)
        for kind in KINDS:
            held = sum(len(s) for s in self._samples[kind])
            rows = predicted[kind][: CALIBRATION_ROWS - held]
            self._samples[kind].append(_sampled(rows, held))

    def on_test_epoch_end(self) -> None:
        """Keeps the results, logs them, and stores the quantiles in the predictor."""
        self.results = self._finish() | self._origin()
        self.predictor.calibrate({kind: self._quantiles(kind) for kind in KINDS})
        for kind in KINDS:
            for name in NAMES:
                own, static = self.results[kind][name], self.results[kind]["static"][name]
                self.log(f"test/{name}_{kind}", own, sync_dist=True)
                self.log(f"test/static_{name}_{kind}", static, sync_dist=True)

    def configure_optimizers(self) -> Any:
        """The configured optimiser; weight decay spares the biases, which hold the fixed choice."""
        tilts, spared = list(self.predictor.tilts.values()), self.predictor.undecayed
        tilted = {id(tilt) for tilt in tilts}
        named = [(n, p) for n, p in self.predictor.named_parameters() if id(p) not in tilted]
        biases = [p for n, p in named if n.endswith("bias")]
        others = [p for n, p in named if n.endswith(spared) and not n.endswith("bias")]
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in named if not n.endswith(spared)], "of_rate": 1.0},
            {"params": biases, "weight_decay": 0.0, "of_rate": self.rates.biases},
            {"params": others, "weight_decay": 0.0, "of_rate": 1.0},
            {"params": tilts, "weight_decay": 0.0, "lr": self.rates.spread, "of_rate": None},
        ]
        optimizer = self._optimizer([group for group in groups if _any_trained(group["params"])])
        for group in optimizer.param_groups:
            group["lr"] *= 1.0 if group["of_rate"] is None else group["of_rate"]
        if self._scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                "the length of this training is unknown, so the learning rate has no schedule: set "
                "trainer.max_steps, or scheduler=null for a constant rate"
            )
        schedule = self._scheduler(optimizer, total_steps=int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checkpoints from before ``spread=learned`` have no tilts."""
        for kind, tilt in self.predictor.tilts.items():
            checkpoint["state_dict"].setdefault(f"predictor.tilt_{kind}", torch.zeros_like(tilt))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by norm ourselves: Lightning refuses a fused optimiser under bf16-mixed.

        Only the loss scaling of 16-mixed makes the two conflict, and that stays with Lightning.
        """
        norm = gradient_clip_algorithm in (None, "norm")
        if not gradient_clip_val or not norm or self.trainer.precision == "16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def _origin(self) -> dict[str, Any]:
        """What a warm start was trained on, for the record."""
        keys = ("objective", "criterion", "text", "tokens", "created")
        return {"init": {k: getattr(self.predictor.info, k) for k in keys}} if self.warm else {}

    def _start(self) -> None:
        means = self.predictor.means
        self._units = {kind: UnitMetrics(means[kind], self.density[kind]) for kind in KINDS}
        self._samples = {kind: [] for kind in KINDS}

    def _measure(self, batch: Batch, *, correlate: bool) -> dict[UnitKind, Tensor]:
        predicted = {k: v.float() for k, v in self.predictor(batch["inputs"]).items()}
        for kind in KINDS:
            self._units[kind].update(predicted[kind], batch[kind], correlate=correlate)
        return predicted

    def _finish(self) -> dict[str, Any]:
        for units in self._units.values():
            units.reduce(lambda t: self.trainer.strategy.reduce(t, reduce_op="sum"))
        return summary(
            {kind: units.compute() for kind, units in self._units.items()},
            self.density,
            {kind: self.predictor.decided(kind) for kind in KINDS},
            self._units["heads"].rows,
        )

    def _quantiles(self, kind: UnitKind) -> Tensor:
        """(L, QUANTILES) of this process's sample, averaged over processes; NaN in dense layers."""
        scores = torch.cat(self._samples[kind]).transpose(0, 1).flatten(1).sort(-1).values
        at = torch.linspace(0, scores.shape[1] - 1, QUANTILES, device=scores.device).round().long()
        found = self.trainer.strategy.reduce(scores[:, at], reduce_op="mean")
        found[: self.first[kind]] = torch.nan
        return found


def _sampled(scores: Tensor, first: int) -> Tensor:
    """Of scores (R, L, N) every 32nd unit, another one in every row; all where N is small."""
    rows, layers, n = scores.shape
    if n < 4 * SPARED:
        return scores
    row = torch.arange(rows, device=scores.device)[:, None] + first
    units = (row + SPARED * torch.arange(n // SPARED, device=scores.device)) % n
    return scores.gather(-1, units[:, None].expand(rows, layers, -1))


def _any_trained(parameters: list[torch.nn.Parameter]) -> bool:
    return any(p.requires_grad for p in parameters)
