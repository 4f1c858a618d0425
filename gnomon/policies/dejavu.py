"""DejaVu: one low-rank predictor per layer, deciding a configurable number of layers ahead.

https://arxiv.org/abs/2310.17157. Deviations: any host, gated or not; decisions for heads never skip
the key and value projections (``kv=keep``); labels are the top units by any criterion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.host import UnitKind
from gnomon.policies.base import Seen
from gnomon.policies.learned import Learned
from gnomon.predictors.dejavu import DejaVu as DejaVuPredictor


class DejaVu(Learned):
    """Per-layer predictors' top units.

    Layers are scored in order, so ``spread=global`` uses one threshold on the predicted scores,
    calibrated on held-out text so that the mean density over layers meets the budget.
    """

    name = "dejavu"
    spreads = ("layer", "global", "hybrid")
    accepts = DejaVuPredictor

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """Per-layer top-k, or all units above the calibrated threshold (at least one)."""
        if self.resolved.spread == "layer":
            return super().select(kind, layer, scores, seen)
        cut = seen.once(("cut", kind), lambda: self._threshold(kind))
        floor = self.resolved.floor if self.resolved.spread == "hybrid" else 0.0
        least = max(1, round(floor * scores.shape[-1]))
        lowest = scores.topk(least, dim=-1).values[..., -1:]
        return scores >= lowest.clamp(max=cut)

    def _threshold(self, kind: UnitKind) -> float:
        """Threshold at which the decided layers keep, in the mean, what the budget leaves them."""
        layers = self._decided(kind)
        table = self.predictor.quantiles[kind][layers].float().cpu()  # (layers, Q) ascending
        kept = sum(self.counts[kind][layer] for layer in layers)
        wanted = kept / (len(layers) * self.spec.units(kind))
        return float(torch.quantile(table.flatten(), 1 - wanted))
