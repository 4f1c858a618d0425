"""Objectives: what a predictor's scores are fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gnomon.host import KINDS, UnitKind

Needs = Literal["labels", "scores"]


class Objective:
    """A loss between predicted scores and harvested rows, and the output bias it starts from."""

    name: ClassVar[str]
    needs: ClassVar[Needs]

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Mean loss: predicted (R, L, N), target (R, L, N) labels (bool) or scores -> scalar."""
        raise NotImplementedError

    def bias(self, means: Tensor, density: float) -> Tensor:
        """Output bias (L, N) whose ranking is that of the per-unit means (L, N)."""
        raise NotImplementedError


class Mse(Objective):
    """ShadowLLM: squared error to scores that are min-max scaled within each row and layer."""

    name = "mse"
    needs = "scores"

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
    """

    name = "bce"
    needs = "labels"

    def __init__(self, negative_weight: float | None = None) -> None:
        if negative_weight is not None and negative_weight <= 0:
            raise ValueError(
                f"objective.negative_weight={negative_weight}: use more than 0, or null"
            )
        self.negative_weight = negative_weight

    def loss(self, predicted: Tensor, target: Tensor) -> Tensor:
        """mean(y·softplus(−z) + w·(1 − y)·softplus(z)), z the predicted log-odds."""
        rate = target.sum() / target.numel()
        weight = rate if self.negative_weight is None else self.negative_weight
        soft = nn.functional.softplus(predicted)
        return torch.where(target, soft - predicted, weight * soft).mean()

    def bias(self, means: Tensor, density: float) -> Tensor:
        """log mean, shifted so that log-odds are positive inside the fixed choice."""
        logs = means.clamp_min(means.amax(-1, keepdim=True) * 1e-6).clamp_min(1e-30).log()
        k = max(1, round(density * means.shape[-1]))
        edge = logs.topk(k, -1).values[..., -1:]
        return (logs - edge).clamp(-4, 4)


class Ranking(Objective):
    """Pairwise logistic loss across the edge of the top k: a smooth bound on what recall misses.

    The kept units of a row and layer, lowest score first, are paired with the dropped units,
    highest first. As many kept units lie outside the predicted top k as dropped ones inside it,
    say m, and exactly the first m pairs are in the wrong order. With softplus(x) >= log 2 for
    x >= 0, the sum over pairs / (k log 2) is at least m / k = 1 - recall. A pair far on the right
    side adds next to nothing, so that capacity goes where sets change; ``bce`` asks of every unit
    which side of one threshold it is on, whatever the others score.
    """

    name = "ranking"
    needs = "labels"

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


OBJECTIVES: dict[str, type[Objective]] = {cls.name: cls for cls in (Mse, Bce, Ranking)}


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
