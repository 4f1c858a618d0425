"""CATS: neurons whose gate is small are skipped.

https://arxiv.org/abs/2404.08763. With g = act(x W_gate) of a gated FFN, the threshold t of a layer
is the p-quantile of |g| over the tokens and channels of calibration text:

    keep neuron j of a token where |g_j| > t

The gate is computed in full; up rows and down columns of the neurons that are kept are read.
Deviations: one pooled quantile of all calibration tokens; decode alone is sparse, as everywhere
here; no fine-tuning after it.
"""

from __future__ import annotations

from torch import Tensor

from gnomon.host import UnitKind
from gnomon.policies.base import Seen
from gnomon.policies.threshold import Threshold, activated


class Cats(Threshold):
    """Keeps the neurons whose |act(gate)| exceeds the layer's threshold; heads stay dense."""

    name = "cats"
    kinds = ("neurons",)
    reads_gate = True
    table = "gate"

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """|act(gate)|, (B, T', F)."""
        return activated(layer, seen)

    def gate_cut(self, layer: int) -> Tensor | None:
        """The layer's threshold."""
        return self.unit_cut(layer)
