"""TealAttention: TEAL's thresholds in the attention projections, round a policy for the neurons.

The inputs of q, k, v and of the out projection are thresholded as in TEAL
(:mod:`gnomon.policies.teal`, https://arxiv.org/abs/2408.14690); which neurons run is the inner
policy's decision. ``budget.heads`` is the density of those input channels, ``budget.neurons`` that
of the inner policy's neurons; every head runs.

Why: whole heads are dear to skip (docs/systems.md), small entries of what the projections read are
not, and a policy that knows which neurons will matter loses less on an FFN than thresholds do.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from gnomon.accounting import Density, Role
from gnomon.budget import Budget
from gnomon.host import KINDS, HostSpec, UnitKind
from gnomon.policies.base import Policy
from gnomon.policies.skip_sublayers import SkipSublayers
from gnomon.policies.teal import Teal
from gnomon.policies.wrap import Wrapper
from gnomon.predictors.calibration import Calibration

ATTENTION: tuple[Role, ...] = ("q", "k", "v", "out")


class TealAttention(Wrapper):
    """Keeps the attention's input channels that exceed their threshold, and the inner's neurons.

    Args:
        predictor: a calibration of the host.
        inner: decides at every token. Of its budget ``heads`` is that of input channels here, and
            ``neurons`` its own.

    Raises:
        ValueError: an inner policy that decides once per sequence, has no budget for heads, or
            skips input channels itself; a budget whose density differs between layers, or for
            groups of heads.
    """

    name = "teal_attention"
    accepts = Calibration

    def __init__(self, predictor: Calibration, inner: Policy) -> None:
        wrong = _unfit(inner)
        if wrong:
            raise ValueError(
                f"policy={self.name} goes round a policy that chooses heads and neurons at every "
                f"token, and policy={inner.name} {wrong}: use sketch, shadow, dejavu, oracle or "
                "random inside"
            )
        for field, value, offered in (
            ("spread", inner.budget.spread, "layer"),
            ("head_unit", inner.budget.head_unit, "head"),
        ):
            if value != offered:
                raise ValueError(
                    f"policy={self.name} does not offer budget.{field}={value!r}: use {offered}"
                )
        super().__init__(inner)
        self.channels = ATTENTION
        self.thresholds = Teal(predictor, inner.budget)

    def start(self, model: nn.Module, spec: HostSpec) -> None:
        """The thresholds too."""
        self.thresholds.start(model, spec)
        super().start(model, spec)

    def settle(self, budget: Budget) -> None:
        """Places the thresholds; the inner policy keeps every head."""
        self.thresholds.settle(replace(budget, neurons=1.0))
        super().settle(_inside(budget))
        self.resolved = budget

    def expected(self, kind: UnitKind, budget: Budget) -> list[float]:
        """The inner policy's neurons, and every head."""
        return self.inner.expected(kind, _inside(budget))

    def keep_channels(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """Input channels that exceed the layer's threshold: x (B, T', W) -> bool (B, T', W)."""
        return self.thresholds.keep_channels(role, layer, x)

    def channel_density(self, role: Role, budget: Budget) -> float:
        """``budget.heads`` of what the attention's linears read."""
        return budget.target("heads") if role in self.channels else 1.0

    def fractions(self, density: Density) -> dict[Role, float]:
        """The inner policy's units, times the channels that are read."""
        read = self.inner.fractions(replace(density, channels={}))
        return {role: share * density.channels.get(role, 1.0) for role, share in read.items()}

    @property
    def predictor_bytes(self) -> float:
        """The inner policy's, and a threshold for each layer and linear."""
        return self.inner.predictor_bytes + 4.0 * self.spec.L * len(self.channels)


def _unfit(inner: Policy) -> str:
    """Why a policy cannot be inside; empty where it can."""
    if inner.channels:
        return "skips input channels itself"
    part = inner
    while isinstance(part, Wrapper):
        if isinstance(part, SkipSublayers):
            return "skips sublayers (put skip_sublayers round teal_attention)"
        part = part.inner
    if inner.refresh != "token":
        return f"decides with refresh={inner.refresh}"
    return "" if inner.kinds == KINDS else f"decides {', '.join(inner.kinds)} alone"


def _inside(budget: Budget) -> Budget:
    return replace(budget, heads=1.0)
