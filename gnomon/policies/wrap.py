"""Wrapper: a policy around another one, which decides whatever the wrapper does not.

Combinations are made by wrapping: ``SkipSublayers(budget, FFSplit(..., inner=Shadow(...)))``. A
wrapper takes the inner policy's budget, refresh and batch for its own, so that byte budgets are
solved for the whole and then handed down.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from gnomon.accounting import Density, HostBytes, Role
from gnomon.budget import Budget
from gnomon.host import HostSpec, Tap, UnitKind
from gnomon.policies.base import Policy, Seen


class Wrapper(Policy):
    """Asks the inner policy for everything; a subclass overrides what it decides itself.

    Args:
        inner: the policy inside; it must not be bound elsewhere at the same time.
    """

    def __init__(self, inner: Policy) -> None:
        self.inner = inner
        self.budget, self.refresh, self.batch = inner.budget, inner.refresh, inner.batch
        self.kv, self.kinds, self.observes = inner.kv, inner.kinds, inner.observes
        self.prefill = inner.prefill
        self.channels, self.reads_gate = inner.channels, inner.reads_gate
        self.needs_units, self.weight_dtype = inner.needs_units, inner.weight_dtype
        self.predictor = inner.predictor

    def start(self, model: nn.Module, spec: HostSpec) -> None:
        """The inner policy first: what it is bound to, the wrapper is."""
        self.inner.start(model, spec)
        self.spec, self.bytes = spec, HostBytes.of(model, spec)
        self.resolved = self.inner.resolved
        self.prepare(model)

    def settle(self, budget: Budget) -> None:
        """Hands the budget down."""
        self.resolved = budget
        self.inner.settle(budget)
        self.counts = self.inner.counts

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """The inner policy's."""
        return self.inner.scores(kind, layer, seen)

    def decide(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """The inner policy's active set."""
        return self.inner.decide(kind, layer, seen)

    def decides(self, kind: UnitKind, layer: int) -> bool:
        """Whether the inner policy does."""
        return self.inner.decides(kind, layer)

    def keeps_all(self, kind: UnitKind, layer: int) -> bool:
        """Whether the inner policy skips nothing."""
        return self.inner.keeps_all(kind, layer)

    def kept(self, kind: UnitKind, layer: int) -> int | None:
        """The inner policy's."""
        return self.inner.kept(kind, layer)

    @property
    def ranks(self) -> bool:
        """Whether the inner policy does."""
        return self.inner.ranks

    def skips(self, kind: UnitKind, layer: int) -> bool:
        """Whether the inner policy never keeps a unit."""
        return self.inner.skips(kind, layer)

    def expected(self, kind: UnitKind, budget: Budget) -> list[float]:
        """The inner policy's."""
        return self.inner.expected(kind, budget)

    def fractions(self, density: Density) -> dict[Role, float]:
        """The inner policy's."""
        return self.inner.fractions(density)

    def saved_bytes(self, density: Density, size: int) -> float:
        """The inner policy's."""
        return self.inner.saved_bytes(density, size)

    def taps(self) -> tuple[Tap, ...]:
        """The inner policy's."""
        return self.inner.taps()

    def observe(self, kind: UnitKind, layer: int, units: Tensor, valid: Tensor) -> Tensor:
        """The inner policy's."""
        return self.inner.observe(kind, layer, units, valid)

    def keep_channels(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """The inner policy's."""
        return self.inner.keep_channels(role, layer, x)

    def channel_density(self, role: Role, budget: Budget) -> float:
        """The inner policy's."""
        return self.inner.channel_density(role, budget)

    def transform(self, model: nn.Module) -> AbstractContextManager[None]:
        """The inner policy's change of weights."""
        return self.inner.transform(model)

    @property
    def transforms(self) -> bool:
        """Whether this or the inner policy changes weights."""
        return type(self).transform is not Wrapper.transform or self.inner.transforms

    @property
    def facts(self) -> dict[str, Any]:
        """The inner policy's."""
        return self.inner.facts

    @property
    def predictor_bytes(self) -> float:
        """The inner policy's."""
        return self.inner.predictor_bytes
