"""Prior: what the prompt's tokens say of a neuron, joined with a learned prior of the model's own.

The dense prompt computes GRIFFIN's flocking statistic s of every neuron anyway
(:mod:`gnomon.policies.griffin`), so that a decision from it costs a decoded token nothing:

    score[l, j] = a_l · log(√F · s[l, j] + ε) + b[l, j]        a_l = 1 to begin with

The prior b (L, F) and its counterweight a (L,) are trained end to end; where a is given
(``slope``), b alone. a = 0 would be a learned fixed choice (``static``), and is what a training of
both has ended in; a = 1, b = 0 ranks as GRIFFIN does. √F · s has a root mean square of 1
over the neurons of a layer, so that its log lies round 0: otherwise a gradient that asks for higher
scores altogether would lower a. Heads stay dense.

Held-out metrics of rows are those of b alone, since a row is one token and has no prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from gnomon.host import KINDS, HostSpec, UnitKind
from gnomon.predictors.static import FixedScores

EPSILON = 1e-3  # of an average neuron: what one scores that no token of the prompt used


class Prior(FixedScores):
    """Neurons' scores from the prompt's statistic; those of rows are its biases.

    Training starts from a product: the statistic times the fixed choice.

    Args:
        L, H, F: layers, heads and neurons of the host.
        width: W, width of the hidden state that is named as its tap and not used.
        slope: a of every layer, which then is not trained; None: begins at 1.

    Attributes:
        slope: (L,) a, fp32.
    """

    name = "prior"
    subject, reads = "every FFN neuron", "the units of the dense prompt"
    undecayed = ("bias", "slope")

    def __init__(self, L: int, H: int, F: int, width: int, slope: float | None = None) -> None:
        super().__init__(L, H, F, width)
        self._given = slope
        self.slope = nn.Parameter(torch.ones(L), slope is None)
        self.begin()
        self._hold_weights()

    @classmethod
    def for_host(cls, spec: HostSpec, slope: float | None = None) -> Self:
        """An untrained one, sized for a host."""
        made = super().for_host(spec)
        return cls(**made.params, slope=slope)

    def begin(self) -> None:
        """The slopes that were given, whatever a trained one had."""
        if self._given is not None:
            self.slope.data.fill_(self._given)

    def from_statistic(self, layer: int, statistic: Tensor) -> Tensor:
        """Scores of one layer's neurons; gradients reach a and b.

        Args:
            layer: l.
            statistic: (B, 1, F) s, the root mean square over a prompt's row-normalised units.

        Returns:
            (B, 1, F), fp32.
        """
        bias = self.outputs["neurons"].bias
        assert bias is not None
        evidence = (math.sqrt(self.F) * statistic + EPSILON).log()
        return self.slope[layer].to(evidence) * evidence + bias[layer].to(evidence)

    @property
    def nbytes(self) -> int:
        """Bytes of a and of the neurons' b."""
        return self.bytes_for(("neurons",))

    def bytes_for(self, kinds: Sequence[UnitKind]) -> int:
        """Bytes that a decision reads, once per prompt: b of these kinds, and a."""
        return 4 * self.L * sum(self.units(kind) for kind in kinds) + self.slope.nbytes

    @property
    def stored(self) -> str:
        """Nothing that is read is rounded."""
        return "fp32"

    def quantize(self) -> Self:
        """Ends training; a and b stay fp32."""
        self.slope.requires_grad_(False)
        return super().quantize()

    def dequantize(self) -> Self:
        """Training can go on."""
        super().dequantize()
        self.slope.requires_grad_(self._given is None)
        self._hold_weights()
        return self

    def _hold_weights(self) -> None:
        """The stacks' weights multiply zeros, and no gradient reaches them."""
        for kind in KINDS:
            weight = self.outputs[kind].weight
            if weight is not None:
                weight.requires_grad_(False)
