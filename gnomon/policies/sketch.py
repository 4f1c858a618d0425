"""Sketch: neurons chosen by few-bit copies of the projections that make them.

The predictor and its relatives are described in :mod:`gnomon.predictors.sketch`.
"""

from __future__ import annotations

from torch import Tensor, nn

from gnomon.host import UnitKind
from gnomon.policies.base import Seen
from gnomon.policies.dejavu import DejaVu
from gnomon.predictors.sketch import Sketch as SketchPredictor


class Sketch(DejaVu):
    """A sketch's units, layer by layer; neurons' scores are logs of magnitudes.

    Under ``choose=threshold`` the decode engine scores, decides and computes neurons in one launch.
    """

    name = "sketch"
    accepts = SketchPredictor

    def prepare(self, model: nn.Module) -> None:
        """Also refuses a sketch that was never filled."""
        super().prepare(model)
        assert isinstance(self.predictor, SketchPredictor)
        if not bool(self.predictor.neurons_bias.any()):
            raise ValueError(
                "policy=sketch: this sketch is empty: make one with python train.py "
                "predictor=sketch, or fill it with gnomon.sketching.sketch"
            )

    def combine(self, kind: UnitKind, scores: Tensor, seen: Seen) -> Tensor:
        """Of a shared set the magnitudes are summed, not their logs."""
        if kind == "neurons" and self.batch == "shared":
            scores = scores.exp()
        return super().combine(kind, scores, seen)
