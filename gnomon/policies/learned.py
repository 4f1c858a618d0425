"""Learned: what every policy that asks a predictor has in common."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gnomon.budget import Budget, choices
from gnomon.host import KINDS, Tap, UnitKind
from gnomon.policies.base import KV, Batch, Policy, Refresh, Seen
from gnomon.predictors.base import Predictor

log = logging.getLogger(__name__)

Choose = Literal["topk", "threshold"]


class Learned(Policy):
    """Scores units with a predictor, from hidden states that the sparse model has just computed.

    ``refresh=token`` decides at every token from that token's own state; ``prompt`` decides once
    per sequence from the last prompt token but one.

    Args:
        predictor: trained for the host it will be bound to.
        budget: what may be kept.
        choose: ``topk`` keeps as many at every decision; ``threshold`` all whose score reaches the
            layer's threshold, placed on held-out text so that the mean over tokens meets the
            budget (as TEAL and CATS place theirs). A unit is then decided by itself.

    Raises:
        ValueError: thresholds for a shared set or for groups, or beside a global ranking, which
            has one of its own; a predictor without quantiles to place them on.
    """

    name = "learned"
    spreads: ClassVar[tuple[str, ...]] = ("layer", "learned")
    refreshes: ClassVar[tuple[Refresh, ...]] = ("token", "prompt")
    chooses: ClassVar[tuple[Choose, ...]] = ("topk",)
    accepts: type[Predictor] = Predictor

    def __init__(
        self,
        predictor: Predictor,
        budget: Budget,
        refresh: Refresh | None = None,
        batch: Batch = "per_sequence",
        kv: KV = "keep",
        choose: Choose = "topk",
    ) -> None:
        if not isinstance(predictor, self.accepts):
            raise ValueError(
                f"policy={self.name} needs a {self.accepts.__name__} predictor, got "
                f"{type(predictor).__name__}: use policy={type(predictor).__name__.lower()}"
            )
        if budget.spread == "learned":
            budget = replace(budget, tilt=predictor.tilt())
        elif budget.spread == "layer" and predictor.has_tilt:
            log.warning(
                "this %s predictor was trained with student.spread=learned, and "
                "budget.spread=layer keeps as many units in every layer: budget.spread=learned is "
                "what it was trained for",
                predictor.name,
            )
        super().__init__(budget, refresh, batch, kv)
        self._offer("params.choose", choose, self.chooses)
        self.choose = choose
        self._cuts: dict[UnitKind, Tensor] = {}
        if choose == "threshold":
            self._require_single_units()
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

    def settle(self, budget: Budget) -> None:
        """Also places the thresholds."""
        super().settle(budget)
        sparse = [k for k in KINDS if self.choose == "threshold" and budget.target(k) < 1]
        self._cuts = {kind: self._placed(kind) for kind in sparse}

    @property
    def ranks(self) -> bool:
        """Not where thresholds decide."""
        return self.choose == "topk" and super().ranks

    def unit_cut(self, kind: UnitKind, layer: int) -> Tensor | None:
        """What a score must reach, (1,) fp32; None where the best units are kept."""
        cuts = self._cuts.get(kind)
        return None if cuts is None else cuts[layer : layer + 1]

    def kept(self, kind: UnitKind, layer: int) -> int | None:
        """Varies by token under a threshold."""
        varies = kind in self._cuts and not self.keeps_all(kind, layer)
        return None if varies else super().kept(kind, layer)

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """The best units, or all that reach the layer's threshold."""
        cut = self.unit_cut(kind, layer)
        return super().select(kind, layer, scores, seen) if cut is None else scores >= cut

    def least(self, kind: UnitKind) -> int:
        """Units that every decided layer keeps under ``spread=global`` and ``hybrid``."""
        floor = self.resolved.floor if self.resolved.spread == "hybrid" else 0.0
        return max(1, round(floor * choices(self.resolved, self.spec, kind)))

    def kept_globally(self, kind: UnitKind) -> int:
        """Units that the decided layers share when they are ranked together."""
        n, layers = choices(self.resolved, self.spec, kind), len(self._decided(kind))
        dense = (self.spec.L - layers) * n
        return max(layers, round(self.resolved.target(kind) * n * self.spec.L) - dense)

    def _placed(self, kind: UnitKind) -> Tensor:
        """Thresholds (L,) above which a layer's share of held-out scores lies, interpolated."""
        table = self.predictor.quantiles[kind].double()  # (L, Q) ascending
        if bool(table[self._decided(kind)].isnan().any()):
            raise ValueError(
                f"policy.params.choose='threshold': this {self.predictor.name} predictor has no "
                "quantiles of scores to place thresholds on: make one with python train.py "
                f"predictor={self.predictor.name}, or use policy.params.choose=topk"
            )
        share = torch.tensor(self.counts[kind], device=table.device) / self.spec.units(kind)
        place = (1 - share.double()) * (table.shape[1] - 1)
        low = place.floor().long().clamp(0, table.shape[1] - 2)[:, None]
        below, above = table.gather(1, low), table.gather(1, low + 1)
        cut = (below + (place[:, None] - low) * (above - below))[:, 0]
        return torch.where(
            share < 1, cut, -torch.inf
        ).float()  # scores below all held-out ones pass

    def _require_single_units(self) -> None:
        for field, value, offered in (
            ("policy.batch", self.batch, ("per_sequence",)),
            ("budget.head_unit", self.budget.head_unit, ("head",)),
            ("budget.spread", self.budget.spread, ("layer", "calibrated", "learned")),
        ):
            if value not in offered:
                raise ValueError(
                    f"policy.params.choose='threshold' places a threshold in every layer for "
                    f"single units and sequences, and {field}={value!r}: use "
                    + " or ".join(offered)
                )

    def _decided(self, kind: UnitKind) -> list[int]:
        return [i for i in range(self.spec.L) if self.decides(kind, i)]
