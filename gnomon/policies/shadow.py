"""Shadow: one network at an early layer scores every head and neuron of every layer.

ShadowLLM, https://arxiv.org/abs/2406.16635. Deviations: decisions are causal (the published code
decides from the last token of the whole text and masks every position with it); the layers before
the source stay dense and count against the budget; neurons are really skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.host import UnitKind
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies.base import Seen
from gnomon.policies.learned import Learned
from gnomon.predictors.shadow import Shadow as ShadowPredictor


class Shadow(Learned):
    """A shadow predictor's top units.

    All scores of a token are known at the source layer, so ``spread=global`` and ``hybrid`` rank
    the units of all layers for every token.
    """

    name = "shadow"
    spreads = ("layer", "global", "hybrid", "calibrated", "learned")
    chooses = ("topk", "threshold")
    accepts = ShadowPredictor

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """Of every layer alone, or all units above the token's own threshold over all layers."""
        if self.resolved.fixed_counts:
            return super().select(kind, layer, scores, seen)
        cut = seen.once(("cut", kind), lambda: self._threshold(kind, seen))
        return (scores >= cut) | topk_mask(scores, self.least(kind))

    def _threshold(self, kind: UnitKind, seen: Seen) -> Tensor:
        """Score of the last unit kept when all decided layers are ranked together, (B, T', 1).

        The units that a layer keeps in any case are ranked first; the rest gives way to them.
        """
        layers = self._decided(kind)
        rows = [self.combine(kind, self.scores(kind, layer, seen), seen) for layer in layers]
        first = [r.masked_fill(topk_mask(r, self.least(kind)), torch.inf) for r in rows]
        kept = max(self.kept_globally(kind), len(layers) * self.least(kind))
        return torch.cat(first, dim=-1).topk(kept, dim=-1).values[..., -1:]
