"""Allocation: how many units each layer keeps, by what leaving them out was measured to cost.

A :class:`Sensitivity` holds an error of every layer at a few densities. Its lower convex hull is a
price list: what one more unit of that layer saves, falling with every unit. Under convex costs the
greedy choice is optimal, so the units of all layers are taken in the order of what they save until
the budget is full; heads and neurons together, where they share one, by what they save per byte.

A :class:`Tilt` was learned with a predictor instead, by the gradient of its own loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnomon.host import HostSpec, UnitKind

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """Measured error of every layer at a few densities; at density 1 it is 0.

    Attributes:
        measure: ``cett`` (relative error of the sublayer's output) or ``loss`` (KL of the logits
            from the dense model's, in nats per token, with that layer alone sparse).
        densities: P densities, ascending from 0 and below 1.
        heads, neurons: L rows of P errors.
        spec_hash: of the host; empty for any host of L layers.
        source: where it was measured: text, tokens, folder.
    """

    measure: str
    densities: tuple[float, ...]
    heads: tuple[tuple[float, ...], ...]
    neurons: tuple[tuple[float, ...], ...]
    spec_hash: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        grid = self.densities
        if list(grid) != sorted({*grid}) or grid[:1] != (0.0,) or grid[-1] >= 1:
            raise ValueError(f"densities={grid}: use ascending values from 0 to below 1")
        for kind in ("heads", "neurons"):
            rows = np.array(getattr(self, kind), dtype=float)
            if rows.ndim != 2 or rows.shape[1] != len(grid) or not np.isfinite(rows).all():
                raise ValueError(
                    f"sensitivity of {kind} has shape {rows.shape}, or holds NaN: use a finite "
                    f"error of every layer at each of {len(grid)} densities"
                )

    def check_host(self, spec: HostSpec) -> None:
        """Raises ValueError where it was measured on another host."""
        if self.spec_hash not in ("", spec.hash) or len(self.heads) != spec.L:
            raise ValueError(
                f"budget.sensitivity was measured on a host of {len(self.heads)} layers (spec "
                f"{self.spec_hash or 'unknown'}), and this host is {spec.name!r} with {spec.L} "
                f"(spec {spec.hash}): make one of its own "
                "(python train.py predictor=calibration predictor.sensitivity=loss)"
            )

    def gains(self, kind: UnitKind, n: int, decided: Sequence[bool]) -> Floats:
        """Error that each further unit saves, falling along every row.

        Args:
            kind: of the units.
            n: choices per layer.
            decided: per layer, whether it is sparse.

        Returns:
            (decided layers, n): column k is the gain of keeping k + 1 units instead of k.
        """
        rows = [row for row, free in zip(getattr(self, kind), decided, strict=True) if free]
        x = np.array([*self.densities, 1.0])
        hulls = [convex_hull(x, np.array([*row, 0.0])) for row in rows]
        at = np.arange(n + 1) / n
        return np.array([-np.diff(np.interp(at, x, hull)) for hull in hulls])

    def counts(self, kind: UnitKind, n: int, total: int, decided: Sequence[bool]) -> list[int]:
        """Units of each layer that lose the least together, at least one in each.

        Args:
            kind: of the units.
            n: choices per layer.
            total: kept in all decided layers together.
            decided: per layer; the others keep all n.

        Returns:
            L counts; those of decided layers sum to ``total``.
        """
        found = iter(allocate(self.gains(kind, n, decided), total))
        return [next(found) if free else n for free in decided]

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies it in a result."""
        about = asdict(self)
        return {key: about[key] for key in ("measure", "densities", "source")}


@dataclass(frozen=True)
class Tilt:
    """How a training spread a budget over the layers: layer l keeps sigmoid(τ + tilt_l) of its N.

    τ is the number at which the mean over layers meets the budget, so that one tilt serves every
    density.

    Attributes:
        heads, neurons: L logits.
    """

    heads: tuple[float, ...]
    neurons: tuple[float, ...]

    def counts(self, kind: UnitKind, n: int, total: int, decided: Sequence[bool]) -> list[int]:
        """Units of each layer, as :meth:`Sensitivity.counts` takes and gives them."""
        own = np.array([t for t, free in zip(getattr(self, kind), decided, strict=True) if free])
        total = min(max(total, len(own)), len(own) * n)
        wanted = n * sigmoid(own + level(own, total / (n * len(own))))
        kept = np.clip(np.floor(wanted), 1, n)
        while (missing := round(total - kept.sum())) != 0:  # rounded to where it is missed most
            step = 1 if missing > 0 else -1
            free = kept < n if step > 0 else kept > 1
            order = np.argsort(np.where(free, -step * (wanted - kept), np.inf), kind="stable")
            kept[order[: min(abs(missing), int(free.sum()))]] += step
        found = iter(kept.astype(int).tolist())
        return [next(found) if free else n for free in decided]


def level(tilt: Floats, share: float) -> float:
    """τ at which the mean of sigmoid(τ + tilt) is a share in [0, 1]."""
    low, high = -40.0 - tilt.max(), 40.0 - tilt.min()
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if sigmoid(tilt + middle).mean() > share else (middle, high)
    return float(low + high) / 2


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x))."""
    found: Floats = 0.5 * (1 + np.tanh(x / 2))
    return found


def convex_hull(x: Floats, y: Floats) -> Floats:
    """The lower convex hull of points (x ascending), read at each x: (P,), (P,) -> (P,)."""
    kept = [0]
    for i in range(1, len(x)):
        while len(kept) > 1 and _above(x, y, kept[-2], kept[-1], i):
            kept.pop()
        kept.append(i)
    return np.interp(x, x[kept], y[kept])


def allocate(gains: Floats, total: int) -> list[int]:
    """Takes ``total`` units in the order of their gain, at least one in each row.

    Args:
        gains: (layers, n), each row falling.
        total: clamped to layers..layers·n.

    Returns:
        Units taken of each row; among equal gains the earlier layer comes first.
    """
    layers, n = gains.shape
    rest = min(max(total, layers), layers * n) - layers
    order = np.argsort(-gains[:, 1:].ravel(), kind="stable")[:rest]
    return (1 + np.bincount(order // max(1, n - 1), minlength=layers)).tolist()


def _above(x: Floats, y: Floats, a: int, b: int, c: int) -> bool:
    """Whether point b does not lie below the line from a to c."""
    return bool((y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a]))
