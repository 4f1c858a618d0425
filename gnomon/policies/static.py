"""Static: the same units for every token and text, by their mean scores on calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from gnomon.budget import Budget, global_counts
from gnomon.host import KINDS, HostSpec, UnitKind
from gnomon.policies.base import KV, Batch, Policy, Prefill, Seen
from gnomon.predictors.base import Predictor


class HasMeans(Protocol):
    """Anything that stores per-unit means: a predictor or a trace store."""

    @property
    def means(self) -> Mapping[str, Tensor]:
        """``heads`` (L, H) and ``neurons`` (L, F)."""


Source = HasMeans | Mapping[str, Tensor]


def means_of(source: Source) -> dict[UnitKind, Tensor]:
    """Per-unit means in fp32, kind -> (L, N)."""
    means = source if isinstance(source, Mapping) else source.means
    return {kind: torch.as_tensor(means[kind]).float() for kind in KINDS}


def check_means(source: Source, means: Mapping[UnitKind, Tensor], spec: HostSpec) -> None:
    """Raises ValueError where means belong to another host."""
    if hasattr(source, "check_host"):
        source.check_host(spec)
    for kind in KINDS:
        found, wanted = tuple(means[kind].shape), (spec.L, spec.units(kind))
        if found != wanted:
            raise ValueError(
                f"means of {kind} have shape {found}; host {spec.name} needs {wanted}: use a "
                "predictor or traces of this host"
            )


class Static(Policy):
    """Keeps the units with the largest mean score.

    Args:
        source: a predictor, a trace store, or ``{"heads": (L, H), "neurons": (L, F)}``.
        budget: every spread is offered; ``global`` ranks the means of all layers together.

    Raises:
        ValueError: a ranking over all layers of learned scores, which compare within a layer.
    """

    name = "static"
    refreshes = ("static",)
    spreads = ("layer", "global", "hybrid", "calibrated", "learned")

    def __init__(
        self,
        source: Source,
        budget: Budget,
        batch: Batch = "per_sequence",
        kv: KV = "keep",
        prefill: Prefill = "dense",
    ) -> None:
        if budget.spread == "learned" and isinstance(source, Predictor):
            budget = replace(budget, tilt=source.tilt())
        super().__init__(budget, "static", batch, kv, prefill)
        if getattr(source, "learned_means", False) and budget.spread in ("global", "hybrid"):
            raise ValueError(
                f"budget.spread={budget.spread!r} ranks the scores of all layers together, and "
                "those of a trained static predictor compare within a layer only: use "
                "budget.spread=layer, or a policy.predictor whose means were harvested"
            )
        self._source, self._means = source, means_of(source)

    def prepare(self, model: nn.Module) -> None:
        """Checks that the means belong to this host."""
        check_means(self._source, self._means, self.spec)

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Mean scores, (N,)."""
        return self._means[kind][layer].to(seen.positions.device)

    def count_layers(self, kind: UnitKind) -> list[int]:
        """Counts per layer; a global ranking of fixed scores is a fixed count per layer."""
        if self.resolved.fixed_counts or self.resolved.target(kind) == 1:
            return super().count_layers(kind)
        means = self._means[kind]
        if kind == "heads" and self.resolved.head_unit == "group":
            means = means.unflatten(-1, (self.spec.G, self.spec.group_size)).mean(-1)
        return global_counts(self.resolved, self.spec, kind, means.tolist())
