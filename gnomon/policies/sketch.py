"""Sketch: neurons chosen by few-bit copies of the projections that make them.

The predictor and its relatives are described in :mod:`gnomon.predictors.sketch`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gnomon.budget import Budget
from gnomon.host import KINDS, UnitKind
from gnomon.policies.base import KV, Batch, Refresh, Seen
from gnomon.policies.dejavu import DejaVu
from gnomon.predictors.sketch import Sketch as SketchPredictor

Choose = Literal["topk", "threshold"]


class Sketch(DejaVu):
    """A sketch's units, layer by layer; neurons' scores are logs of magnitudes.

    Args:
        choose: ``topk`` keeps as many at every token; ``threshold`` all whose score reaches the
            layer's threshold, placed on held-out text so that the mean over tokens meets the
            budget (as TEAL and CATS place theirs). A neuron is then decided by itself, and the
            decode engine scores and computes it in one launch.

    Raises:
        ValueError: thresholds for a shared set or for groups, or beside a global ranking, which
            has a threshold of its own; a sketch without quantiles to place them on.
    """

    name = "sketch"
    accepts = SketchPredictor

    def __init__(
        self,
        predictor: SketchPredictor,
        budget: Budget,
        refresh: Refresh | None = None,
        batch: Batch = "per_sequence",
        kv: KV = "keep",
        choose: Choose = "topk",
    ) -> None:
        super().__init__(predictor, budget, refresh, batch, kv)
        self._offer("params.choose", choose, get_args(Choose))
        self.choose = choose
        self._cuts: dict[UnitKind, Tensor] = {}
        if choose == "threshold":
            for field, value, offered in (
                ("policy.batch", batch, ("per_sequence",)),
                ("budget.head_unit", budget.head_unit, ("head",)),
                ("budget.spread", budget.spread, ("layer", "calibrated")),
            ):
                if value not in offered:
                    raise ValueError(
                        f"policy.params.choose='threshold' places a threshold in every layer for "
                        f"single units and sequences, and {field}={value!r}: use "
                        + " or ".join(offered)
                    )

    def prepare(self, model: nn.Module) -> None:
        """Also refuses a sketch that was never filled."""
        super().prepare(model)
        assert isinstance(self.predictor, SketchPredictor)
        if not bool(self.predictor.neurons_bias.any()):
            raise ValueError(
                "policy=sketch: this sketch is empty: make one with python train.py "
                "predictor=sketch, or fill it with gnomon.sketching.sketch"
            )

    def settle(self, budget: Budget) -> None:
        """Also places the thresholds."""
        super().settle(budget)
        sparse = [k for k in KINDS if self.choose == "threshold" and budget.target(k) < 1]
        self._cuts = {kind: self._placed(kind) for kind in sparse}

    @property
    def ranks(self) -> bool:
        """Not where thresholds decide."""
        return self.choose == "topk" and super().ranks

    def unit_cut(self, kind: UnitKind, layer: int) -> Tensor | None:
        """What a score must reach, (1,) fp32; None where the best units are kept."""
        cuts = self._cuts.get(kind)
        return None if cuts is None else cuts[layer : layer + 1]

    def kept(self, kind: UnitKind, layer: int) -> int | None:
        """Varies by token under a threshold."""
        varies = kind in self._cuts and not self.keeps_all(kind, layer)
        return None if varies else super().kept(kind, layer)

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """The best units, or all that reach the layer's threshold."""
        cut = self.unit_cut(kind, layer)
        return super().select(kind, layer, scores, seen) if cut is None else scores >= cut

    def combine(self, kind: UnitKind, scores: Tensor, seen: Seen) -> Tensor:
        """Of a shared set the magnitudes are summed, not their logs."""
        if kind == "neurons" and self.batch == "shared":
            scores = scores.exp()
        return super().combine(kind, scores, seen)

    def _placed(self, kind: UnitKind) -> Tensor:
        """Thresholds (L,) above which a layer's share of held-out scores lies, interpolated."""
        table = self.predictor.quantiles[kind].double()  # (L, Q) ascending
        if bool(table.isnan().any()):
            raise ValueError(
                "policy.params.choose='threshold': this sketch has no quantiles of scores to place "
                "thresholds on; make one with python train.py predictor=sketch, or use choose=topk"
            )
        share = torch.tensor(self.counts[kind], device=table.device) / self.spec.units(kind)
        place = (1 - share.double()) * (table.shape[1] - 1)
        low = place.floor().long().clamp(0, table.shape[1] - 2)[:, None]
        below, above = table.gather(1, low), table.gather(1, low + 1)
        cut = (below + (place[:, None] - low) * (above - below))[:, 0]
        return torch.where(
            share < 1, cut, -torch.inf
        ).float()  # scores below all held-out ones pass
