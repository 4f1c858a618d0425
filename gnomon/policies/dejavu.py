"""DejaVu: one low-rank predictor per layer, deciding a configurable number of layers ahead.

https://arxiv.org/abs/2310.17157. Deviations: any host, gated or not; key and value projections
are skipped only under ``kv=drop``; labels are the top units by any criterion.
"""

from __future__ import annotations

from torch import Tensor

from gnomon.budget import Budget
from gnomon.host import KINDS, UnitKind
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies.base import KV, Batch, Refresh, Seen
from gnomon.policies.learned import Choose, Learned
from gnomon.predictors.base import Predictor
from gnomon.predictors.dejavu import DejaVu as DejaVuPredictor


class DejaVu(Learned):
    """Per-layer predictors' top units.

    Layers are scored in order, so ``spread=global`` uses one threshold on the predicted scores,
    calibrated on held-out text so that the mean density over layers meets the budget.
    """

    name = "dejavu"
    spreads = ("layer", "global", "hybrid", "calibrated", "learned")
    chooses = ("topk", "threshold")
    accepts: type[Predictor] = DejaVuPredictor

    def __init__(
        self,
        predictor: Predictor,
        budget: Budget,
        refresh: Refresh | None = None,
        batch: Batch = "per_sequence",
        kv: KV = "keep",
        choose: Choose = "topk",
    ) -> None:
        super().__init__(predictor, budget, refresh, batch, kv, choose)
        if not budget.fixed_counts and (batch == "shared" or budget.head_unit == "group"):
            raise ValueError(
                f"policy={self.name} calibrates budget.spread={budget.spread!r} on the scores of "
                "single units and sequences: use policy.batch=per_sequence and "
                "budget.head_unit=head, or budget.spread=layer"
            )

    def settle(self, budget: Budget) -> None:
        """Also calibrates the thresholds: they wait for the device, which no decode step may."""
        super().settle(budget)
        sparse = [k for k in KINDS if self.resolved.target(k) < 1]
        calibrated = [] if self.resolved.fixed_counts else sparse
        self._cut = {kind: self._threshold(kind) for kind in calibrated}

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """Of a layer alone, or all above the calibrated threshold and the layer's floor."""
        if self.resolved.fixed_counts:
            return super().select(kind, layer, scores, seen)
        return (scores >= self._cut[kind]) | topk_mask(scores, self.least(kind))

    def _threshold(self, kind: UnitKind) -> float:
        """Threshold at which the decided layers keep, in the mean, what the budget leaves them."""
        layers, n = self._decided(kind), self.spec.units(kind)
        table = self.predictor.quantiles[kind][layers].double().cpu()  # (layers, Q) ascending
        wanted, floor = self.kept_globally(kind) / (len(layers) * n), self.least(kind) / n
        low, high = float(table.min()), float(table.max())
        for _ in range(50):
            cut = (low + high) / 2
            kept = (table >= cut).double().mean(-1).clamp_min(floor).mean()
            low, high = (cut, high) if kept > wanted else (low, cut)
        return high
