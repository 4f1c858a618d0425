"""Oracle: top-k by the true magnitude of every unit's contribution, at every token.

A strong reference, not a bound. It looks at the value it decides about, so it exists only under the
``mask`` backend and never has a speed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnomon.budget import Budget
from gnomon.data.criteria import LayerWeights, head_magnitude, layer_weights, neuron_magnitude
from gnomon.host import UnitKind
from gnomon.policies.base import Batch, Policy, Seen


class Oracle(Policy):
    """Keeps the largest |h|·‖w_down‖ (neurons) and out-projection contributions (heads)."""

    name = "oracle"
    spreads = ("layer", "calibrated")
    needs_units = True

    def __init__(self, budget: Budget, batch: Batch = "per_sequence") -> None:
        super().__init__(budget, "token", batch, "keep")

    def prepare(self, model: nn.Module) -> None:
        """Reads the weight norms that turn activations into contributions."""
        self._weights: list[LayerWeights] = [
            layer_weights(model, self.spec, layer) for layer in range(self.spec.L)
        ]

    @torch.no_grad()
    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """True contribution norms, (B, T', N)."""
        measure = head_magnitude if kind == "heads" else neuron_magnitude
        assert seen.units is not None
        return measure(seen.units.float(), self._weights[layer])
