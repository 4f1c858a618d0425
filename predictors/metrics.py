"""Held-out metrics: how well scores find the units that the criterion found, beside ``static``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gnomon.host import KINDS, UnitKind

NAMES = ("recall", "mass", "spearman")
CHOICES = ("predictor", "static", "oracle")


class UnitMetrics:
    """Sums over held-out rows of one unit kind; one value per layer, three choices side by side.

    ``recall``: share of the true top-k that the choice's top-k holds. ``mass``: share of a layer's
    true score that it captures. ``spearman``: rank correlation of scores with true scores over the
    units of a layer, ties averaged. ``oracle`` is the true top-k itself: the most that mass can be.
    """

    def __init__(self, means: Tensor, density: float) -> None:
        """Takes the per-unit means (L, N) of the ``static`` choice and the kept fraction."""
        layers, n = means.shape
        self.k = max(1, round(density * n))
        self.static_top = means.topk(self.k, -1).indices
        self.static_ranks = ranks(means)
        self.sums = torch.zeros(len(CHOICES), len(NAMES), layers, dtype=torch.float64)
        self.sums = self.sums.to(means.device)
        self.rows = 0

    @torch.no_grad()
    def update(self, predicted: Tensor, truth: Tensor, *, correlate: bool = True) -> None:
        """Adds rows: predicted and true scores (R, L, N); ``correlate=False`` skips Spearman."""
        count = truth.shape[0]
        top = truth.topk(self.k, -1)
        labels = torch.zeros_like(truth, dtype=torch.bool).scatter_(-1, top.indices, True)
        total = truth.sum(-1)
        picks = (
            predicted.topk(self.k, -1, sorted=False).indices,
            self.static_top.expand(count, -1, -1),
            top.indices,
        )
        for choice, picked in enumerate(picks):
            captured = truth.gather(-1, picked).sum(-1)
            self.sums[choice, 0] += labels.gather(-1, picked).double().mean(-1).sum(0)
            self.sums[choice, 1] += torch.where(total > 0, captured / total, 1.0).double().sum(0)
        if correlate:
            true_ranks = ranks(truth)
            for choice, other in enumerate((ranks(predicted), self.static_ranks, true_ranks)):
                self.sums[choice, 2] += _correlation(other, true_ranks).double().sum(0)
        self.rows += count

    def reduce(self, add: Callable[[Tensor], Tensor]) -> None:
        """Adds up over processes with ``add``."""
        rows = add(torch.tensor(float(self.rows), device=self.sums.device))
        self.sums, self.rows = add(self.sums), int(rows.item())

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """choice -> metric -> (L,) float64 on the CPU."""
        values = (self.sums / max(1, self.rows)).cpu()
        return {c: {m: values[i, j] for j, m in enumerate(NAMES)} for i, c in enumerate(CHOICES)}


def summary(
    results: Mapping[UnitKind, dict[str, dict[str, Tensor]]],
    density: Mapping[UnitKind, float],
    decided: Mapping[UnitKind, Tensor],
    rows: int,
) -> dict[str, Any]:
    """Everything as plain numbers, for config.json: overall and per layer, dense layers left out.

    Args:
        results: kind -> :meth:`UnitMetrics.compute`.
        density: kind -> kept fraction within a layer.
        decided: kind -> (L,) bool.
        rows: held-out rows.
    """
    out: dict[str, Any] = {"density": dict(density), "rows": rows}
    for kind in KINDS:
        mask = decided[kind].cpu()
        mean = {
            c: {m: _round(v[mask].mean().item()) for m, v in by.items()}
            for c, by in results[kind].items()
        }
        out[kind] = {
            **mean["predictor"],
            "static": mean["static"],
            "oracle": {"mass": mean["oracle"]["mass"]},
            "layers": {c: _layers(results[kind][c], mask) for c in ("predictor", "static")},
        }
    for m in NAMES:
        out[m] = _round(sum(out[kind][m] for kind in KINDS) / len(KINDS))
    return out


def ranks(x: Tensor) -> Tensor:
    """Ranks (0 = lowest) of x (..., N) along the last axis, fp32; ties share their mean rank."""
    values, order = x.sort(-1)
    n = x.shape[-1]
    at = torch.arange(n, device=x.device, dtype=torch.float32).expand(x.shape)
    new = torch.ones_like(x, dtype=torch.bool)
    new[..., 1:] = values[..., 1:] != values[..., :-1]
    start = torch.where(new, at, 0.0).cummax(-1).values
    last = torch.ones_like(new)
    last[..., :-1] = new[..., 1:]
    end = torch.where(last, at, float(n)).flip(-1).cummin(-1).values.flip(-1)
    return torch.empty_like(at, memory_format=torch.contiguous_format).scatter_(
        -1, order, (start + end) / 2
    )


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation along the last axis; 0 where one side is constant."""
    a = a - a.mean(-1, keepdim=True)
    b = b - b.mean(-1, keepdim=True)
    norm = a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt()
    return torch.where(norm > 0, (a * b).sum(-1) / norm.clamp_min(1e-12), 0.0)


def _layers(values: dict[str, Tensor], mask: Tensor) -> dict[str, list[float | None]]:
    return {
        m: [_round(x) if keep else None for x, keep in zip(v.tolist(), mask.tolist(), strict=True)]
        for m, v in values.items()
    }


def _round(x: float) -> float:
    return round(x, 4)
