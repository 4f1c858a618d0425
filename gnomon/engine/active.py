"""Active sets as the decode step takes them, and who gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gnomon.accounting import Role
from gnomon.host import Tap, UnitKind


@dataclass(frozen=True)
class Active:
    """An active set of one layer: R = 1 list for the batch, or one for each of its B sequences.

    Attributes:
        index: (R, S) int32 kept units; entries past the count may be anything. Where S = N and
            nothing is counted, N itself may stand in the place of a unit that is skipped.
        count: (R,) int32 entries that hold; None for all S.
        slot: (R, N) int32 place of every unit in the list, -1 where it is skipped; of neurons
            it is read only where R > 1.
        kvq: heads only: (R, 2·groups + S) int32 blocks of d rows of the fused k, v and q weights:
            k and v groups, then the kept heads. ``kvq_count`` as ``count``.
        groups: heads only: k groups that are computed; None for all G.
        kv_slot: heads only: (R, G) int32 place of a group among these, -1 where it is skipped;
            None for all.
        early: the list was complete before the launch that precedes its first use.
        compacted: the weights in use hold the kept rows alone, in the list's order.
        wanted: (N,) bool units that any sequence keeps: one pass over the whole weights reads
            these, where R lists together would read more, and of heads wherever R > 1. None where
            lists are followed.
    """

    index: Tensor
    count: Tensor | None
    slot: Tensor
    kvq: Tensor | None = None
    kvq_count: Tensor | None = None
    groups: int | None = None
    kv_slot: Tensor | None = None
    early: bool = False
    compacted: bool = False
    wanted: Tensor | None = None


@dataclass(frozen=True)
class Channels:
    """Input channels that a linear reads: those whose magnitude exceeds a threshold.

    Attributes:
        x: (B, W) the linear's input, of the step that ran last.
        cut: (1,) fp32.
    """

    x: Tensor
    cut: Tensor

    @property
    def keep(self) -> Tensor:
        """(B, W) bool."""
        return self.x.float().abs() > self.cut


@dataclass(frozen=True)
class LayerSketch:
    """What decides the neurons of one layer inside the launch that computes them.

    Attributes:
        copies: arguments of ``sketch_scores`` but x: few-bit copies of the layer's projections.
        cut: (1,) fp32 that a score must reach.
        nothing: (1,) zero, which what the down projection reads must exceed.
    """

    copies: dict[str, Any]
    cut: Tensor
    nothing: Tensor


class Decider(Protocol):
    """What a decode step asks: which hidden states are wanted, and which units are active.

    Attributes:
        taps: hidden states to hand over.
        channels: linears whose input channels are skipped, in every layer.
    """

    taps: Sequence[Tap]
    channels: frozenset[Role]

    def see(self, tap: Tap, hidden: Tensor) -> None:
        """Takes the hidden state (B, W) of this step at one of ``taps``."""

    def reads_gate(self, layer: int) -> bool:
        """Whether the neurons of a layer are decided from its gate."""

    def see_gate(self, layer: int, gate: Tensor) -> None:
        """Takes act(gate) (B, F) of a layer that is decided from it."""

    def sketch(self, layer: int) -> LayerSketch | None:
        """What decides the neurons of a layer as they are computed; None: :meth:`active` does."""

    def took(self, layer: int, index: Tensor) -> None:
        """Takes what such a layer kept: (B, F) int32, the neuron, or F where it was skipped."""

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """The active set, asked just before its first use; None keeps every unit."""

    def cut(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """The threshold (1,) of a linear in ``channels`` on its input x (B, W)."""


class KeepAll:
    """The dense model, and what a decider does where it says nothing else."""

    taps: Sequence[Tap] = ()
    channels: frozenset[Role] = frozenset()

    def see(self, tap: Tap, hidden: Tensor) -> None:
        """Never called."""

    def reads_gate(self, layer: int) -> bool:
        """No gate is asked for."""
        return False

    def see_gate(self, layer: int, gate: Tensor) -> None:
        """Never called."""

    def sketch(self, layer: int) -> LayerSketch | None:
        """No layer has one."""
        return None

    def took(self, layer: int, index: Tensor) -> None:
        """Never called."""

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """Every unit."""
        return None

    def cut(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """Never called."""
        raise NotImplementedError


Key = tuple[UnitKind, int]


class StepDecider(KeepAll):
    """A decider with the engine's view of it.

    Attributes:
        sets: active sets of the step that ran last; a layer that is missing keeps everything.
        inputs: what linears in ``channels`` read in that step.
    """

    def __init__(self) -> None:
        self.sets: dict[Key, Active] = {}
        self.inputs: dict[tuple[Role, int], Channels] = {}

    def begin(self, position: Tensor, live: Tensor) -> None:
        """A step starts: (B,) positions of its tokens, and which rows have not ended."""
