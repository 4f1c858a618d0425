"""Byte budgets: the densities whose bytes come to ``budget.bytes``.

With ``spread=calibrated`` heads and neurons share the budget: units of both are kept in the order
of the error that they save per byte. Otherwise one common density is found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gnomon.accounting import Density, account, active_groups, expected_density
from gnomon.budget import Budget, choices, sensitivity_of
from gnomon.errors import Refused
from gnomon.host import KINDS, UnitKind

if TYPE_CHECKING:
    from gnomon.policies.base import Policy

_STEPS = 40


def solve_bytes(policy: Policy, budget: Budget) -> Budget:
    """The budget in densities.

    Args:
        policy: started on its host.
        budget: with ``bytes``; ``heads`` or ``neurons`` given beside it stay as given.

    Raises:
        ValueError: the parts that no density removes (output head, cache, predictor) exceed it.
    """
    split = budget.spread == "calibrated"
    return _split(policy, budget) if split else _common(policy, budget)


def _common(policy: Policy, budget: Budget) -> Budget:
    """One density for the kinds that are not given, by bisection."""

    def at(density: float) -> Budget:
        return replace(budget, bytes=None, density=density)

    low, high = _least(policy) + 1e-3, 1.0
    spread = "layer" if not budget.fixed_counts else budget.spread
    cost = _cost(policy, lambda density: replace(at(density), spread=spread))
    _require_reachable(policy, budget, cost(low))
    if cost(high) <= _target(budget):
        return at(1.0)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(middle) > _target(budget) else (middle, high)
    return at(low)


def _split(policy: Policy, budget: Budget) -> Budget:
    """Densities of heads and of neurons at which a byte saves as much error in either."""
    kinds = [k for k in KINDS if getattr(budget, k) is None and k in policy.kinds]
    pools = [_Pool(policy, budget, kind) for kind in kinds]
    worth = [pool.worth for pool in pools]
    owner = np.repeat(np.arange(len(pools)), [len(part) for part in worth])
    order = np.argsort(-np.concatenate([*worth, np.empty(0)]), kind="stable")
    taken = [np.concatenate([[0], np.cumsum(owner[order] == i)]) for i in range(len(pools))]

    def at(units: float) -> Budget:
        shares = {p.kind: p.share(int(t[int(units)])) for p, t in zip(pools, taken, strict=True)}
        return replace(budget, **({"bytes": None, "density": 1.0} | shares))  # type: ignore[arg-type]

    low, high = 0, len(order)
    cost = _cost(policy, at)
    _require_reachable(policy, budget, cost(0))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if cost(middle) > _target(budget) else (middle, high)
    return at(low)


class _Pool:
    """The units of one kind that may be left out, one of each layer being kept in any case.

    Attributes:
        worth: error that each saves per byte of byte density.
    """

    def __init__(self, policy: Policy, budget: Budget, kind: UnitKind) -> None:
        self.kind, self.L = kind, policy.spec.L
        self.n = choices(budget, policy.spec, kind)
        decided = [policy.decides(kind, layer) for layer in range(self.L)]
        self.free, self.worth = sum(decided), np.empty(0)
        if self.free:
            gains = sensitivity_of(budget, policy.spec).gains(kind, self.n, decided)
            self.worth = gains[:, 1:].ravel() / _unit_bytes(policy, budget, kind)

    def share(self, taken: int) -> float:
        """Density over all layers when so many of the pool are kept."""
        return (taken + self.free + (self.L - self.free) * self.n) / (self.L * self.n)


def _cost(policy: Policy, at: Callable[[float], Budget]) -> Callable[[float], float]:
    """Byte density that a policy is expected to have at a setting."""

    def cost(setting: float) -> float:
        aimed = expected_density(policy, at(setting))
        return account(policy, aimed, dtype=policy.bytes_dtype).byte_density

    return cost


def _unit_bytes(policy: Policy, budget: Budget, kind: UnitKind) -> float:
    """What one unit of a kind adds to the byte density, in the mean over the upper half of them."""
    spec = policy.spec
    whole = Density(1.0, 1.0, 1.0)
    half = replace(whole, neurons=0.5)
    if kind == "heads":
        half = replace(whole, heads=0.5, groups=active_groups(spec, budget, 0.5))
    bytes_ = [account(policy, at, dtype=policy.bytes_dtype).byte_density for at in (whole, half)]
    return (bytes_[0] - bytes_[1]) / (0.5 * choices(budget, spec, kind) * spec.L)


def _require_reachable(policy: Policy, budget: Budget, least: float) -> None:
    if least > _target(budget):
        raise Refused(
            f"budget.bytes={_target(budget):g} cannot be reached by policy={policy.name}: with no "
            f"units kept it still reads {least:.3f} of the dense bytes. Raise budget.bytes or use "
            "a smaller predictor"
        )


def _target(budget: Budget) -> float:
    return budget.bytes or 1.0


def _least(policy: Policy) -> float:
    """Density taken by the layers that the policy must keep dense."""
    spec = policy.spec
    forced = [sum(not policy.decides(kind, i) for i in range(spec.L)) for kind in KINDS]
    return max(n if n < spec.L else 0 for n in forced) / spec.L
