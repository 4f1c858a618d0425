"""Thresholds in a decode step: neurons by their gate, and input channels inside the products.

The comparison is |x| > t of the policy's own thresholds, made where x is: a list of neurons in one
launch behind the gate's, and of input channels in the very launch that reads their weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.accounting import Role
from gnomon.engine.active import Active, Channels, LayerSketch, StepDecider
from gnomon.engine.lists import Lists
from gnomon.host import HostSpec, Tap, UnitKind
from gnomon.policies.base import Policy
from gnomon.policies.teal_attention import TealAttention
from gnomon.policies.threshold import Threshold

TOGETHER: tuple[frozenset[Role], ...] = (frozenset({"q", "k", "v"}), frozenset({"gate", "up"}))


def thresholds_of(policy: Policy) -> Threshold | None:
    """The thresholds that a policy compares input channels with; None where it has none."""
    if type(policy) is TealAttention:
        return policy.thresholds
    return policy if isinstance(policy, Threshold) else None


class InputChannels(StepDecider):
    """Input channels that exceed a threshold; which units run, another decider says.

    Args:
        policy: bound; its thresholds.
        spec: the host's.
        units: decides about units; None keeps them all.
    """

    def __init__(self, policy: Threshold, spec: HostSpec, units: StepDecider | None = None) -> None:
        super().__init__()
        self.channels = policy.thresholded
        self.cuts: dict[tuple[Role, int], Tensor] = {
            (role, i): policy.channel_cut(role, i) for role in self.channels for i in range(spec.L)
        }
        self._units = units or StepDecider()
        self.taps, self.sets = self._units.taps, self._units.sets

    def begin(self, position: Tensor, live: Tensor) -> None:
        """Forgets the step before."""
        self._units.begin(position, live)
        self.inputs.clear()

    def see(self, tap: Tap, hidden: Tensor) -> None:
        """Passes it on."""
        self._units.see(tap, hidden)

    def reads_gate(self, layer: int) -> bool:
        """Whether units are decided from it."""
        return self._units.reads_gate(layer)

    def see_gate(self, layer: int, gate: Tensor) -> None:
        """Passes it on."""
        self._units.see_gate(layer, gate)

    def sketch(self, layer: int) -> LayerSketch | None:
        """The other decider's."""
        return self._units.sketch(layer)

    def took(self, layer: int, index: Tensor) -> None:
        """Passes it on."""
        self._units.took(layer, index)

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """The other decider's."""
        return self._units.active(kind, layer)

    def cut(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """The policy's; x stays at hand for whoever asks afterwards what was read."""
        cut = self.cuts[role, layer]
        self.inputs[role, layer] = Channels(x, cut)
        return cut


class Passing(InputChannels):
    """A policy that keeps what exceeds a threshold, and nothing else.

    Args:
        policy: bound; see :meth:`fits`.
        spec: the host's.
        lists: builds active sets.
    """

    def __init__(self, policy: Threshold, spec: HostSpec, lists: Lists) -> None:
        super().__init__(policy, spec)
        self._lists = lists
        found = {i: policy.gate_cut(i) for i in range(spec.L)}
        self.gate_cuts = {i: cut for i, cut in found.items() if cut is not None}

    @staticmethod
    def fits(policy: Policy) -> bool:
        """Whether thresholds are all that a bound policy decides by."""
        if not isinstance(policy, Threshold):
            return False
        cls = type(policy)
        own = (cls.decide, cls.select, cls.keep_channels)
        if own != (Policy.decide, Threshold.select, Threshold.keep_channels):
            return False
        decided = [i for i in range(policy.spec.L) if not policy.keeps_all("neurons", i)]
        if any(policy.gate_cut(i) is None for i in decided):
            return False
        if decided and _definer(cls, "scores") is not _definer(cls, "gate_cut"):
            return False  # its scores are no longer those that the cut was made for
        return all(_shared(policy, roles) for roles in TOGETHER if roles <= policy.thresholded)

    def begin(self, position: Tensor, live: Tensor) -> None:
        """Forgets the step before."""
        self.sets.clear()
        self.inputs.clear()

    def reads_gate(self, layer: int) -> bool:
        """Whether neurons of this layer are compared."""
        return layer in self.gate_cuts

    def see_gate(self, layer: int, gate: Tensor) -> None:
        """Lists the neurons whose gate exceeds its threshold."""
        cut = self.gate_cuts[layer]
        self.sets["neurons", layer] = self._lists.of_passing("neurons", gate, cut)

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """Decided when the gate was seen."""
        return self.sets.get((kind, layer))


def _definer(cls: type, name: str) -> type:
    """The class that defines what ``cls`` has under a name."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _shared(policy: Threshold, roles: frozenset[Role]) -> bool:
    """Whether linears that one launch reads have one threshold; waits for the device."""
    layers = range(policy.spec.L)
    first, *others = ([policy.channel_cut(r, i) for i in layers] for r in roles)
    return all(torch.equal(a, b) for cuts in others for a, b in zip(first, cuts, strict=True))
