"""CHESS: a threshold for every channel of the gate, and sparse inputs of q and out projections.

https://arxiv.org/abs/2409.01366. With g = act(x W_gate), u = x W_up and m_j = E|u_j| over
calibration text, a neuron matters by |g_j|·m_j. With T the p-quantile of |g_j|·m_j over the tokens
and channels of a layer, every channel has a threshold of its own:

    t_j = T / m_j        keep neuron j of a token where |g_j| > t_j

*Selective sparsification of attention* (``attention=True``): entries of the inputs of the q and out
projections are zeroed where |x| does not exceed the p-quantile of that tensor in that layer; k and
v read their whole input.

Deviations: quantiles pool all calibration tokens (the release averages those of documents); a
threshold of zero never keeps an exact zero; decode alone is sparse; the density of the attention's
channels may differ from that of neurons (``budget.heads``).
"""

from __future__ import annotations

from torch import Tensor

from gnomon.budget import Budget
from gnomon.host import KINDS, UnitKind
from gnomon.policies.base import Seen
from gnomon.policies.threshold import Threshold, activated
from gnomon.predictors.calibration import Calibration


class Chess(Threshold):
    """Keeps the neurons whose |act(gate)| exceeds their own threshold.

    Args:
        predictor: a calibration of the host.
        budget: ``neurons``; with ``attention`` also ``heads``, the density of the channels that the
            q and out projections read.
        attention: sparsify those inputs ("CHESS w/"); without it heads stay dense ("CHESS w/o").
    """

    name = "chess"
    reads_gate = True
    table = "gate_up"

    def __init__(self, predictor: Calibration, budget: Budget, attention: bool = True) -> None:
        self.kinds = KINDS if attention else ("neurons",)
        self.channels = ("q", "out") if attention else ()
        super().__init__(predictor, budget)

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """|act(gate)|·E|up|, (B, T', F): over T exactly where |act(gate)| is over t_j."""
        found = activated(layer, seen)
        return found * self.predictor.up_mean[layer].to(found.device)

    def gate_cut(self, layer: int) -> Tensor | None:
        """t_j of every neuron."""
        cut = self.unit_cut(layer)
        return None if cut is None else cut / self.predictor.up_mean[layer].to(cut.device)

    @property
    def predictor_bytes(self) -> float:
        """Thresholds of all channels of the gate, read at every token."""
        own = 0.0 if self.resolved.target("neurons") == 1 else 4.0 * self.spec.L * self.spec.F
        return super().predictor_bytes + own
