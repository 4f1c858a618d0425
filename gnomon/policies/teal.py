"""TEAL: small entries of every linear's input are skipped.

https://arxiv.org/abs/2408.14690. For every linear of a decoder layer, with t the p-quantile of |x|
over the tokens and channels of its input on calibration text:

    y = W · (x · 1[|x| > t])

so that the columns of W which would read a zero need not be read. q, k and v share an input, as do
gate and up.

Deviations: one density for the attention's linears (``budget.heads``) and one for the FFN's
(``budget.neurons``), where the paper also searches for a density per tensor, block by block; decode
alone is sparse.
"""

from __future__ import annotations

from torch import Tensor

from gnomon.accounting import LINEARS
from gnomon.host import UnitKind
from gnomon.policies.base import Seen
from gnomon.policies.threshold import Threshold


class Teal(Threshold):
    """Keeps the input channels whose magnitude exceeds the threshold of their tensor and layer.

    An entry of the down-projection's input is a neuron: its density is that of neurons too.
    """

    name = "teal"
    channels = LINEARS

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """No unit is decided as such."""
        raise NotImplementedError("policy=teal thresholds channels")
