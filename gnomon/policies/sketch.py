"""Sketch: neurons chosen by few-bit copies of the projections that make them.

The predictor and its relatives are described in :mod:`gnomon.predictors.sketch`.
"""

from __future__ import annotations

from torch import Tensor

from gnomon.host import UnitKind
from gnomon.policies.base import Seen
from gnomon.policies.dejavu import DejaVu
from gnomon.predictors.sketch import Sketch as SketchPredictor


class Sketch(DejaVu):
    """A sketch's top units, layer by layer; neurons' scores are logs of magnitudes."""

    name = "sketch"
    accepts = SketchPredictor

    def combine(self, kind: UnitKind, scores: Tensor, seen: Seen) -> Tensor:
        """Of a shared set the magnitudes are summed, not their logs."""
        if kind == "neurons" and self.batch == "shared":
            scores = scores.exp()
        return super().combine(kind, scores, seen)
