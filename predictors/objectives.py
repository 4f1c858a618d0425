"""Objectives: what a predictor's scores are fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gnomon.host import KINDS, UnitKind

Needs = Literal["labels", "scores"]


class Objective:
    """A loss between predicted scores and harvested rows, and the output bias it starts from.

    Attributes:
        on_policy: trained on the states of the sparse host, not on harvested rows.
    """

    name: ClassVar[str]
    needs: ClassVar[Needs]
    on_policy: bool = False

    @property
    def label(self) -> str:
        """Name for the record."""
        return f"{self.name}, on policy" if self.on_policy else self.name

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Held-out metric that picks the checkpoint, and which of its values is better."""
        return ("val/kl", "min") if self.on_policy else ("val/recall", "max")

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean loss: predicted (R, L, N), target (R, L, N) labels (bool) or scores -> scalar."""
        raise NotImplementedError

    def bias(self, means: Tensor, density: float) -> Tensor:
        """Output bias (L, N) whose ranking is that of the per-unit means (L, N)."""
        raise NotImplementedError


class Mse(Objective):
    """ShadowLLM: squared error to scores that are min-max scaled within each row and layer.

    Args:
        on_policy: rows are states of the sparse host (``predictors/student_module.py``).
    """

    name = "mse"
    needs = "scores"

    def __init__(self, on_policy: bool = False) -> None:
        self.on_policy = on_policy

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """mean((predicted − minmax(target))²)."""
        return nn.functional.mse_loss(predicted, minmax(target))

    def bias(self, means: Tensor, density: float) -> Tensor:
        """The per-layer min-max of the means."""
        return minmax(means)


class Bce(Objective):
    """DejaVu: cross-entropy to top-k labels; positives weigh 1, negatives ``negative_weight``.

    Args:
        negative_weight: None takes the positive rate, as DejaVu does.
        on_policy: rows are states of the sparse host (``predictors/student_module.py``).
    """

    name = "bce"
    needs = "labels"

    def __init__(self, negative_weight: float | None = None, on_policy: bool = False) -> None:
        if negative_weight is not None and negative_weight <= 0:
            raise ValueError(
                f"objective.negative_weight={negative_weight}: use more than 0, or null"
            )
        self.negative_weight, self.on_policy = negative_weight, on_policy

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """mean(y·softplus(−z) + w·(1 − y)·softplus(z)), z the predicted log-odds."""
        rate = target.sum() / target.numel()
        weight = rate if self.negative_weight is None else self.negative_weight
        soft = nn.functional.softplus(predicted)
        return torch.where(target, soft - predicted, weight * soft).mean()

    def bias(self, means: Tensor, density: float) -> Tensor:
        """log mean, shifted so that log-odds are positive inside the fixed choice.

        Beyond ±4 a hundredth of the distance counts, so that no two units tie for being far away.
        """
        logs = means.clamp_min(1e-30).log()
        k = max(1, round(density * means.shape[-1]))
        edge = logs.topk(k, -1).values[..., -1:]
        odds = logs - edge
        near = odds.clamp(-4, 4)
        return near + 0.01 * (odds - near)


class Ranking(Objective):
    """Pairwise logistic loss across the edge of the top k: a smooth bound on what recall misses.

    The kept units of a row and layer, lowest score first, are paired with the dropped units,
    highest first. As many kept units lie outside the predicted top k as dropped ones inside it,
    say m, and exactly the first m pairs are in the wrong order. With softplus(x) >= log 2 for
    x >= 0, the sum over pairs / (k log 2) is at least m / k = 1 - recall. A pair far on the right
    side adds next to nothing, so that capacity goes where sets change; ``bce`` asks of every unit
    which side of one threshold it is on, whatever the others score.

    Args:
        on_policy: rows are states of the sparse host (``predictors/student_module.py``).
    """

    name = "ranking"
    needs = "labels"

    def __init__(self, on_policy: bool = False) -> None:
        self.on_policy = on_policy

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """mean over rows, layers and pairs of softplus(z_dropped − z_kept), times pairs / k.

        Raises:
            ValueError: rows or layers that keep different numbers of units.
        """
        n = predicted.shape[-1]
        k, most = (int(x) for x in target.sum(-1).aminmax())
        if k != most or k < 1:
            raise ValueError(
                f"objective=ranking needs labels that keep as many units in every row and layer, "
                f"at least one; these keep {k} to {most}: make them from scores (harvest.format)"
            )
        pairs = min(k, n - k)
        if pairs == 0:
            return predicted.sum() * 0
        low = predicted.masked_fill(~target, torch.inf).topk(pairs, largest=False).values
        high = predicted.masked_fill(target, -torch.inf).topk(pairs).values
        return nn.functional.softplus(high - low).mean() * (pairs / k)

    def bias(self, means: Tensor, density: float) -> Tensor:
        """That of ``bce``: any ranking of the means would do, and this one has unit-sized gaps."""
        return Bce().bias(means, density)


class Kl(Objective):
    """End to end: KL divergence of the sparse host's predictions from the dense host's.

    Its own scores are what the masks of the forward are made of (:mod:`gnomon.runtime.student`).

    Args:
        temperature: divides both logits; the loss is multiplied by its square.
        layers_weight: of the mean squared error of every layer's input, over the dense one's
            variance, added to the divergence.
        mask_temperature: of the sigmoid whose gradient the mask has.
        final_mask_temperature: reached geometrically at the last step; None: constant.
        relaxed: share of the steps over which the forward's mask goes from the sigmoid to the hard
            set; 0: hard from the first step.
        balanced: scores compete for the budget in the gradient.

    Raises:
        ValueError: a field out of its range.
    """

    name = "kl"
    needs = "labels"
    on_policy = True

    def __init__(
        self,
        temperature: float = 1.0,
        layers_weight: float = 0.0,
        mask_temperature: float = 1.0,
        final_mask_temperature: float | None = None,
        relaxed: float = 0.0,
        balanced: bool = False,
    ) -> None:
        last = mask_temperature if final_mask_temperature is None else final_mask_temperature
        for key, value in (
            ("temperature", temperature),
            ("mask_temperature", mask_temperature),
            ("final_mask_temperature", last),
        ):
            if value <= 0:
                raise ValueError(f"objective.{key}={value}: use more than 0")
        if layers_weight < 0 or not 0 <= relaxed <= 1:
            raise ValueError(
                f"objective.layers_weight={layers_weight}, objective.relaxed={relaxed}: use a "
                "weight of 0 or more, and a share in [0, 1]"
            )
        self.temperature, self.layers_weight = temperature, layers_weight
        self.mask_temperature, self.last_mask_temperature = mask_temperature, last
        self.relaxed, self.balanced = relaxed, balanced

    @property
    def label(self) -> str:
        """Name for the record."""
        return self.name

    def softness(self, progress: float) -> tuple[float, float]:
        """Temperature and hardness of the mask at a share of the steps in [0, 1]."""
        start, end = self.mask_temperature, self.last_mask_temperature
        hardness = 1.0 if progress >= self.relaxed else progress / self.relaxed
        return start * (end / start) ** progress, hardness

    def bias(self, means: Tensor, density: float) -> Tensor:
        """As :class:`Bce`: its log-odds suit the sigmoid of the mask."""
        return Bce().bias(means, density)


OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Mse, Bce, Ranking, Kl)}


def objective(name: str) -> Objective:
    """The objective of a name, with its defaults.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r} is unknown; known are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]()


def minmax(scores: Tensor) -> Tensor:
    """Scales scores (..., N) to [0, 1] along the last axis; constant rows become zero."""
    low, high = scores.aminmax(dim=-1, keepdim=True)
    return (scores - low) / (high - low).clamp_min(torch.finfo(scores.dtype).tiny)


def total_loss(
    chosen: Objective,
    predicted: Mapping[UnitKind, Tensor],
    batch: Mapping[str, Tensor],
    first: Mapping[UnitKind, int],
) -> dict[UnitKind, Tensor]:
    """Loss of each kind over the decided layers.

    Args:
        predicted: kind -> (R, decided layers, N).
        batch: rows as the data modules give them.
        first: kind -> first decided layer.

    Raises:
        ValueError: the rows do not hold what the objective needs.
    """
    suffix = "_labels" if chosen.needs == "labels" else ""
    losses: dict[UnitKind, Tensor] = {}
    for kind in KINDS:
        if f"{kind}{suffix}" not in batch:
            raise ValueError(
                f"objective={chosen.name} needs {chosen.needs} of {kind}, but the rows hold "
                f"{', '.join(sorted(batch))}; harvest them (harvest.format=auto fits the objective)"
            )
        losses[kind] = chosen.loss(predicted[kind], batch[f"{kind}{suffix}"][:, first[kind] :])
    return losses
