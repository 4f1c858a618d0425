"""Learned: what every policy that asks a predictor has in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gnomon.budget import Budget, choices
from gnomon.host import KINDS, Tap, UnitKind
from gnomon.policies.base import KV, Batch, Policy, Refresh, Seen
from gnomon.predictors.base import Predictor


class Learned(Policy):
    """Scores units with a predictor, from hidden states that the sparse model has just computed.

    ``refresh=token`` decides at every token from that token's own state; ``prompt`` decides once
    per sequence from the last prompt token but one.

    Args:
        predictor: trained for the host it will be bound to.
        budget: what may be kept.
    """

    name = "learned"
    refreshes: ClassVar[tuple[Refresh, ...]] = ("token", "prompt")
    accepts: type[Predictor] = Predictor

    def __init__(
        self,
        predictor: Predictor,
        budget: Budget,
        refresh: Refresh | None = None,
        batch: Batch = "per_sequence",
        kv: KV = "keep",
    ) -> None:
        super().__init__(budget, refresh, batch, kv)
        if not isinstance(predictor, self.accepts):
            raise ValueError(
                f"policy={self.name} needs a {self.accepts.__name__} predictor, got "
                f"{type(predictor).__name__}: use policy={type(predictor).__name__.lower()}"
            )
        self.predictor: Predictor = predictor

    def prepare(self, model: nn.Module) -> None:
        """Checks the host and moves the predictor to the host's first device."""
        self.predictor.check_host(self.spec)
        self.predictor.eval().to(next(model.parameters()).device)

    def taps(self) -> tuple[Tap, ...]:
        """The predictor's taps."""
        return self.predictor.taps

    @property
    def predictor_bytes(self) -> float:
        """Bytes of the predictor that a decision reads: nothing that scores a kind kept dense."""
        sparse = [kind for kind in KINDS if self.resolved.target(kind) < 1]
        return float(self.predictor.bytes_for(sparse))

    def decides(self, kind: UnitKind, layer: int) -> bool:
        """Layers before the predictor's source stay dense."""
        return self.predictor.decided_from(kind, layer) is not None

    @torch.no_grad()
    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Predicted scores, (B, T', N)."""
        tap = self.predictor.decided_from(kind, layer)
        assert tap is not None
        return self.predictor.score(kind, layer, self._code(tap, seen))

    def _code(self, tap: Tap, seen: Seen) -> Tensor:
        device = next(self.predictor.buffers()).device
        return seen.once(
            ("code", tap), lambda: self.predictor.encode(tap, seen.hidden(tap).to(device).float())
        )

    def least(self, kind: UnitKind) -> int:
        """Units that every decided layer keeps under ``spread=global`` and ``hybrid``."""
        floor = self.resolved.floor if self.resolved.spread == "hybrid" else 0.0
        return max(1, round(floor * choices(self.resolved, self.spec, kind)))

    def kept_globally(self, kind: UnitKind) -> int:
        """Units that the decided layers share when they are ranked together."""
        n, layers = choices(self.resolved, self.spec, kind), len(self._decided(kind))
        dense = (self.spec.L - layers) * n
        return max(layers, round(self.resolved.target(kind) * n * self.spec.L) - dense)

    def _decided(self, kind: UnitKind) -> list[int]:
        return [i for i in range(self.spec.L) if self.decides(kind, i)]
