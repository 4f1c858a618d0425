"""Static: one learned score per unit, whatever the input; the ablation of a context.

Trained like any predictor (``predictor=static objective=kl``: a fixed mask learned end to end), and
evaluated by ``policy=static policy.predictor=<folder>``: when it is quantised its scores, as
exponentials, take the place of the harvested means, which is what that policy ranks by. A kind that
was kept whole in training keeps its harvested means. Only an explicit folder gives such means:
``policy.predictor=auto`` of ``static``, ``core`` and ``glass``, and the bracket, pass them over.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.predictors.base import Predictor
from gnomon.predictors.linear import LinearStack, StackByKind

_TAP = Tap(0, "layer_input")


class FixedScores(Predictor):
    """Scores of layer l = b_l for every row; not a predictor of its own.

    Args:
        L, H, F: layers, heads and neurons of the host.
        width: W, width of the hidden state that is named as its tap and not used.
    """

    def __init__(self, L: int, H: int, F: int, width: int) -> None:
        super().__init__(L, H, F, width, (_TAP,))
        self.outputs = StackByKind(
            {kind: LinearStack(L, self.units(kind), 1, gain=0.0) for kind in KINDS}
        )

    @classmethod
    def for_host(cls, spec: HostSpec) -> Self:
        """An untrained predictor sized for a host."""
        return cls(spec.L, spec.H, spec.F, spec.width(_TAP.site))

    @property
    def params(self) -> dict[str, Any]:
        """Constructor arguments, JSON-able."""
        return {"L": self.L, "H": self.H, "F": self.F, "width": self.width}

    def decided_from(self, kind: UnitKind, layer: int) -> Tap | None:
        """Every layer is decided before anything has run."""
        return _TAP

    def encode(self, tap: Tap, hidden: Tensor) -> Tensor:
        """Zeros (..., 1), so that the scores are the biases."""
        return hidden.new_zeros(*hidden.shape[:-1], 1, dtype=torch.float32)

    def score(self, kind: UnitKind, layer: int, code: Tensor) -> Tensor:
        """Scores of one layer: code (..., 1) -> (..., N)."""
        return self.outputs[kind].one(self._require_decided(kind, layer), code)

    def decided_scores(self, inputs: Tensor) -> dict[UnitKind, Tensor]:
        """inputs (R, 1, W) -> kind -> (R, L, N), the same in every row."""
        code = self.encode(_TAP, inputs[:, 0])
        return {kind: self.outputs[kind].shared(code) for kind in KINDS}


class Static(FixedScores):
    """Scores that take the place of means."""

    name = "static"
    learned_means = True

    def quantize(self) -> Self:
        """Ends training: means become the learned scores, exponentials in the same order.

        A stack without gradients was not trained, and leaves the means of its kind as they are.
        """
        if not self.quantized:
            biases = {kind: self.outputs[kind].bias for kind in KINDS}
            trained = {k: b for k, b in biases.items() if b is not None and b.requires_grad}
            self.set_means(self.means | {k: b.detach().exp() for k, b in trained.items()})
        return super().quantize()
