"""Softness: what gradient the hard mask of a training forward has (:mod:`gnomon.runtime.student`).

The hardness w is 1 by default: the forward is that of inference, the gradient that of the sigmoid
(straight-through). Below 1 the forward is a mixture that training anneals (relaxed top-k). Where it
is balanced, the gradient of c is that of the threshold that keeps Σ soft as it is, so that scores
compete for the budget instead of rising together: the units of a position, or of all positions
where one threshold serves them all.

Under ``spread=learned`` a layer keeps the share p = sigmoid(τ + tilt), whose mean over layers is
the budget's; one more unit costs the threshold 1 / (mean of soft'), so that the gradient of c is
also that of -(p - detach(p)) / mean(soft'): tilts rise where the next unit is worth most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.allocation import level


@dataclass(frozen=True)
class Softness:
    """How soft the mask is: temperature of its sigmoid, hardness of its forward, and balance."""

    temperature: float = 1.0
    hardness: float = 1.0
    balanced: bool = False

    def of(
        self,
        scores: Tensor,
        cut: Tensor,
        share: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """The sigmoid of scores round a threshold, in (0, 1).

        Args:
            scores: (…, N).
            cut: (…, 1) of every row, or (1,) of all of them.
            share: that the threshold lets pass, a scalar that gradients may reach.
            counted: rows (…) that a threshold of all of them was placed on; None: all.
        """
        over = (-1,) if cut.dim() == scores.dim() else tuple(range(scores.dim()))
        with torch.no_grad():
            soft = ((scores - cut) / self.temperature).sigmoid()
            weights, n = soft * (1 - soft), scores.shape[-1]
            if len(over) > 1:
                n = scores.numel() if counted is None else n * int(counted.sum())
                weights = weights if counted is None else weights * counted[..., None]
            total = weights.sum(over, keepdim=True).clamp_min(1e-12)
            slope, weights = total / (n * self.temperature), weights / total
        if self.balanced:
            mean = (weights * scores).sum(over, keepdim=True)
            cut = cut + (mean - mean.detach())
        if share is not None:
            cut = cut - (share - share.detach()) / slope
        return ((scores - cut) / self.temperature).sigmoid()


HARD = Softness()


def shares_of(tilt: Tensor, share: float) -> Tensor:
    """sigmoid(τ + tilt) of the decided layers, with the gradient of a mean that stays as it is."""
    with torch.no_grad():
        tau = level(tilt.double().cpu().numpy(), share)
        found = (tilt + tau).sigmoid()
        weights = found * (1 - found) / (found * (1 - found)).sum().clamp_min(1e-12)
    mean = (weights * tilt).sum()
    shares: Tensor = (tilt + tau - (mean - mean.detach())).sigmoid()
    return shares
