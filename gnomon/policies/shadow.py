"""Shadow: one network at an early layer scores every head and neuron of every layer.

ShadowLLM, https://arxiv.org/abs/2406.16635. Deviations: decisions are causal (the published code
decides from the last token of the whole text and masks every position with it); the layers before
the source stay dense and count against the budget; neurons are really skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.host import UnitKind
from gnomon.policies.base import Seen
from gnomon.policies.learned import Learned
from gnomon.predictors.shadow import Shadow as ShadowPredictor


class Shadow(Learned):
    """A shadow predictor's top units.

    All scores of a token are known at the source layer, so ``spread=global`` and ``hybrid`` rank
    the units of all layers for every token.
    """

    name = "shadow"
    spreads = ("layer", "global", "hybrid")
    accepts = ShadowPredictor

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """Per-layer top-k, or all units above the token's own threshold over all layers."""
        if self.resolved.spread == "layer":
            return super().select(kind, layer, scores, seen)
        cut = seen.once(("cut", kind), lambda: self._threshold(kind, seen))
        floor = self.resolved.floor if self.resolved.spread == "hybrid" else 0.0
        least = max(1, round(floor * scores.shape[-1]))
        lowest = scores.topk(least, dim=-1).values[..., -1:]
        return scores >= cut.minimum(lowest)

    def _threshold(self, kind: UnitKind, seen: Seen) -> Tensor:
        """Score of the last unit kept when all decided layers are ranked together, (B, T', 1)."""
        layers = self._decided(kind)
        rows = []
        for layer in layers:
            row = self.scores(kind, layer, seen)
            if kind == "neurons" and self.batch == "shared":
                row = (row * seen.live[..., None]).sum(0, keepdim=True)
            if kind == "heads" and self.resolved.head_unit == "group":
                row = row.unflatten(-1, (self.spec.G, self.spec.group_size)).mean(-1)
            rows.append(row)
        ranked = torch.cat(rows, dim=-1)
        kept = sum(self.counts[kind][layer] for layer in layers)
        return ranked.topk(kept, dim=-1).values[..., -1:]
