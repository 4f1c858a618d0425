"""Threshold: what policies that skip by the size of an activation have in common.

A threshold is placed once, on calibration text, so that the mean density over its tokens meets the
budget; at inference a token keeps what exceeds it, so the number kept varies by token. No score is
predicted: what is compared with the threshold has been computed already, and its bytes count.

Beyond units, a policy may skip *input channels* of linears: entries of a linear's input that are
zeroed, so that the columns which read them need not be. ``budget.heads`` is then the density of the
attention projections' channels and ``budget.neurons`` that of the FFN's; no head is skipped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnomon.accounting import LINEARS, Density, Role
from gnomon.budget import Budget
from gnomon.errors import Refused
from gnomon.host import UnitKind
from gnomon.policies.base import Policy, Seen
from gnomon.predictors.calibration import Calibration

SITE: dict[Role, str] = {
    "q": "attn_input",
    "k": "attn_input",
    "v": "attn_input",
    "out": "attn_context",
    "gate": "ffn_input",
    "up": "ffn_input",
    "down": "neurons",
}
"""The calibrated table that holds a linear's input."""


class Threshold(Policy):
    """Keeps what exceeds a calibrated threshold.

    Args:
        predictor: a calibration of the host (``python train.py predictor=calibration``).
        budget: kept in the mean over calibration tokens, in every layer.

    Raises:
        ValueError: no calibration, or a budget that the policy cannot meet.
    """

    refreshes = ("token",)
    accepts = Calibration
    predictor: Calibration
    table: str | None = None  # that neurons are compared in; None: no neuron is skipped

    def __init__(self, predictor: Calibration, budget: Budget) -> None:
        super().__init__(budget, "token")
        if not isinstance(predictor, Calibration):
            raise ValueError(
                f"policy={self.name} needs a calibration, got {type(predictor).__name__}: make one "
                "with python train.py predictor=calibration"
            )
        if budget.head_unit == "group":
            raise ValueError(
                f"budget.head_unit='group': policy={self.name} skips no heads; use head_unit=head"
            )
        self.predictor = predictor

    def settle(self, budget: Budget) -> None:
        """Also places the thresholds."""
        super().settle(budget)
        self._cuts: dict[str, Tensor] = {}
        if self.table is not None and budget.target("neurons") < 1:
            cut = self.predictor.cut(self.table, budget.target("neurons"))
            self._cuts["units"] = cut.to(self._device)
        for role in self.channels:
            density = self.channel_density(role, budget)
            if density < 1:
                self._cuts[role] = self.predictor.cut(SITE[role], density).to(self._device)

    def prepare(self, model: nn.Module) -> None:
        """Checks the host."""
        self.predictor.check_host(self.spec)
        self._device = next(model.parameters()).device
        if self.reads_gate and not self.spec.gated:
            raise Refused(
                f"policy={self.name} compares the gate of a gated FFN with its threshold, and host "
                f"{self.spec.name} ({self.spec.family}) has no gate: use policy=teal or griffin, "
                "or a trained predictor (policy=shadow or dejavu)"
            )

        own = {"q", "k", "v"} & set(self.channels)
        if self.spec.qkv != "separate" and 0 < len(own) < 3:
            raise Refused(
                f"policy={self.name} skips input channels of {', '.join(sorted(own))} alone, and "
                f"in host {self.spec.name} ({self.spec.family}) one linear makes q, k and v: use "
                "policy.params.attention=false, or policy=teal, which treats them alike"
            )

    def decides(self, kind: UnitKind, layer: int) -> bool:
        """Neurons alone, and those only where a table says so."""
        return kind == "neurons" and self.table is not None

    def unit_cut(self, layer: int) -> Tensor | None:
        """The threshold of a layer's scores, (1, 1); None where no neuron is skipped."""
        cuts = self._cuts.get("units")
        return None if cuts is None else cuts[layer : layer + 1, None]

    def kept(self, kind: UnitKind, layer: int) -> int | None:
        """The number varies by token."""
        return self.spec.units(kind) if self.keeps_all(kind, layer) else None

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """All that exceed the layer's threshold."""
        return scores > self._cuts["units"][layer]

    def keep_channels(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """Input channels that exceed the layer's threshold: x (B, T', W) -> bool (B, T', W)."""
        return x.float().abs() > self.channel_cut(role, layer)

    @property
    def thresholded(self) -> frozenset[Role]:
        """Linears of a layer whose input channels are skipped under the budget."""
        skipped = (r for r in self.channels if self.channel_density(r, self.resolved) < 1)
        return frozenset(r for r in skipped if r != "gate" or self.spec.gated)

    def channel_cut(self, role: Role, layer: int) -> Tensor:
        """What the magnitude of an input channel must exceed: (1,) fp32."""
        return self._cuts[role][layer : layer + 1]

    def gate_cut(self, layer: int) -> Tensor | None:
        """What |act(gate)| of a neuron must exceed: (1, 1), or (1, F) with one for every neuron.

        It says of the gate what :meth:`scores` and :meth:`select` say together. None where no
        neuron is skipped, or where scores are another function of the gate.
        """
        return None

    def channel_density(self, role: Role, budget: Budget) -> float:
        """Kept fraction of a linear's input channels under a budget."""
        if role not in self.channels:
            return 1.0
        return budget.target("neurons" if role in ("gate", "up", "down") else "heads")

    def fractions(self, density: Density) -> dict[Role, float]:
        """Of each linear: the units that are computed, times the channels that are read."""
        read = super().fractions(density)
        if self.reads_gate:
            read["gate"] = 1.0  # the decision is made from it
            if self.spec.gate_up != "separate":
                read["up"] = 1.0  # one linear gives both at once
        if self.table is None:  # channels alone
            read = dict.fromkeys(LINEARS, 1.0)
        return {role: read[role] * density.channels.get(role, 1.0) for role in LINEARS}

    @property
    def predictor_bytes(self) -> float:
        """Thresholds, one per layer and tensor, read at every token."""
        return 4.0 * self.spec.L * (len(self.channels) + (self.table is not None))


def activated(layer: int, seen: Seen) -> Tensor:
    """|act(gate)| in fp32, (B, T', F)."""
    return torch.abs(seen.gate(layer).float())
