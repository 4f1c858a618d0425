"""Random: a fresh draw for every token from a fixed seed. The lower bracket of every table."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.budget import Budget
from gnomon.host import KINDS, UnitKind
from gnomon.policies.base import KV, Batch, Policy, Prefill, Refresh, Seen


class Random(Policy):
    """Keeps random units.

    The draw is a hash of (seed, layer, kind, position, unit), so that it does not depend on how a
    text is batched or whether it is run at once or token by token.
    """

    name = "random"
    refreshes = ("token", "prompt", "static")
    spreads = ("layer", "global", "calibrated")

    def __init__(
        self,
        budget: Budget,
        refresh: Refresh | None = None,
        batch: Batch = "per_sequence",
        kv: KV = "keep",
        seed: int = 0,
        prefill: Prefill = "dense",
    ) -> None:
        super().__init__(budget, refresh, batch, kv, prefill)
        self.seed = seed

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Uniform in [0, 1), (B, T', N)."""
        when = seen.positions if self.refresh == "token" else torch.zeros_like(seen.positions)
        units = torch.arange(self.spec.units(kind), device=when.device)
        stream = (self.seed * 1_000_003 + layer) * 2 + KINDS.index(kind)
        return uniform(when[..., None] * 65_537 * 1_031 + units, stream)

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """Under ``global`` every unit of every layer is kept with the same probability."""
        if self.resolved.fixed_counts:
            return super().select(kind, layer, scores, seen)
        keep = scores >= 1 - self.resolved.target(kind)
        return keep | (scores == scores.amax(-1, keepdim=True))


def uniform(x: Tensor, stream: int) -> Tensor:
    """Counter-based hash (the splitmix64 finaliser) of int64 counters to floats in [0, 1)."""
    x = x + stream * 2_654_435_769
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 11 & (1 << 53) - 1).double() / (1 << 53)
