"""Budgets: how much of the host a policy may keep, and how many units that is in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from gnomon.allocation import Sensitivity, Tilt
from gnomon.errors import Refused
from gnomon.host import HostSpec, UnitKind

Spread = Literal["layer", "global", "hybrid", "calibrated", "learned"]
HeadUnit = Literal["head", "group"]


@dataclass(frozen=True)
class Budget:
    """What may be kept. Densities are kept fractions in (0, 1]; heads and neurons never compete.

    Attributes:
        density: sets both kinds.
        heads: density of query heads; overrides ``density``. A kind that nothing sets stays dense.
        neurons: density of FFN neurons; overrides ``density``.
        spread: ``layer`` keeps K = max(1, round(density·N)) in every layer; ``global`` ranks the
            units of all layers together; ``hybrid`` is global with a floor in every layer;
            ``calibrated`` gives every layer a K of its own, by measured sensitivity, ``learned``
            one that the predictor was trained with.
        bytes: byte density to reach, found by byte accounting, with one common unit density, or
            under ``calibrated`` with those of heads and neurons that lose the least together;
            ``heads`` or ``neurons`` given beside it stay as given.
        max_ppl_increase: perplexity increase to allow on validation text, e.g. 0.03 for a ratio of
            1.03; :func:`gnomon.find_budget` finds the least budget that stays within it. ``heads``
            or ``neurons`` given beside it stay as given.
        head_unit: decide single query heads, or whole key/value groups.
        floor: least density of a layer under ``hybrid``.
        sensitivity: what ``calibrated`` goes by: ``gnomon.load_predictor(<calibration>)
            .sensitivity``. In configs ``auto``, a folder or a hub id.
        tilt: what ``learned`` goes by; a policy takes its predictor's.

    Raises:
        ValueError: a density outside (0, 1], conflicting or missing fields.
    """

    density: float | None = None
    heads: float | None = None
    neurons: float | None = None
    spread: Spread = "layer"
    bytes: float | None = None
    max_ppl_increase: float | None = None
    head_unit: HeadUnit = "head"
    floor: float = 0.1
    sensitivity: Sensitivity | str | None = None
    tilt: Tilt | None = None

    def __post_init__(self) -> None:
        for field in ("density", "heads", "neurons", "bytes", "floor"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 1:
                raise ValueError(
                    f"budget.{field}={value} is outside (0, 1]: it is a kept fraction "
                    "(1 keeps everything)"
                )
        if self.spread not in get_args(Spread):
            raise ValueError(f"budget.spread={self.spread!r}: use {', '.join(get_args(Spread))}")
        if self.head_unit not in get_args(HeadUnit):
            raise ValueError(
                f"budget.head_unit={self.head_unit!r}: use {', '.join(get_args(HeadUnit))}"
            )
        self._require_one_target()
        targets = ("density", "heads", "neurons", "bytes", "max_ppl_increase")
        if all(getattr(self, field) is None for field in targets):
            raise ValueError(f"budget is empty: set one of budget.{', '.join(targets)}")

    @property
    def fixed_counts(self) -> bool:
        """Whether every decision of a layer keeps the same number of units."""
        return self.spread in ("layer", "calibrated", "learned")

    def target(self, kind: UnitKind) -> float:
        """Density of one kind, in the mean over all layers; 1 for an unsolved ``bytes`` one.

        Raises:
            ValueError: ``max_ppl_increase`` has not been turned into a density.
        """
        own = self.heads if kind == "heads" else self.neurons
        if own is not None:
            return own
        self.require_found()
        return 1.0 if self.density is None else self.density

    def require_found(self) -> None:
        """Raises ValueError while ``max_ppl_increase`` has not been turned into a density."""
        if self.max_ppl_increase is not None:
            raise ValueError(
                f"budget.max_ppl_increase={self.max_ppl_increase:g} is found on validation text, "
                "which a budget alone does not have: call gnomon.find_budget(model, tokenizer, "
                "make_policy, text, budget) and build the policy with the .budget that it returns"
            )

    def _require_one_target(self) -> None:
        """At most one of ``density``, ``bytes`` and ``max_ppl_increase`` sets the open kinds."""
        rivals = ("density", "bytes", "max_ppl_increase")
        given = [field for field in rivals if getattr(self, field) is not None]
        if len(given) > 1:
            first, second = given[-1], given[0]
            raise ValueError(
                f"budget.{first}={getattr(self, first)} and budget.{second}="
                f"{getattr(self, second)} exclude each other: {first} picks the density (set "
                f"budget.{second}=null)"
            )
        if self.max_ppl_increase is None:
            return
        if not 0 < self.max_ppl_increase < math.inf:
            raise ValueError(
                f"budget.max_ppl_increase={self.max_ppl_increase} is a relative increase above 0: "
                "0.03 allows a perplexity ratio of 1.03"
            )
        if self.heads is not None and self.neurons is not None:
            raise ValueError(
                f"budget.max_ppl_increase={self.max_ppl_increase:g} finds the density of heads and "
                f"neurons, and budget.heads={self.heads:g} and budget.neurons={self.neurons:g} "
                "leave none to find: leave one of them out"
            )


def layer_counts(
    budget: Budget, spec: HostSpec, kind: UnitKind, decided: Sequence[bool]
) -> list[int]:
    """Units kept in each layer where ``budget.fixed_counts``.

    Layers that the policy cannot decide stay dense and count: the others go lower, so that the mean
    over all layers meets the target. With ``head_unit=group`` counts are in key/value groups.

    Args:
        decided: per layer, whether the policy decides it.

    Returns:
        L counts.

    Raises:
        ValueError: the dense layers alone exceed the budget, or ``calibrated`` has no sensitivity
            of this host.
    """
    n, target = choices(budget, spec, kind), budget.target(kind)
    free = sum(decided)
    if free == 0:
        return [n] * spec.L
    rest = (target * spec.L - (spec.L - free)) / free
    if rest <= 0:
        dense = [i for i, d in enumerate(decided) if not d]
        raise Refused(
            f"budget.{kind}={target:g} keeps no unit: this policy must keep layers {dense} of "
            f"{spec.L} dense, which alone is {(spec.L - free) / spec.L:.3f}. Raise the density or "
            "use a predictor that reads an earlier layer"
        )
    if budget.spread in ("calibrated", "learned"):
        total = round(target * n * spec.L) - (spec.L - free) * n
        by = tilt_of(budget) if budget.spread == "learned" else sensitivity_of(budget, spec)
        return by.counts(kind, n, total, decided)
    k = max(1, round(rest * n))
    return [k if d else n for d in decided]


def global_counts(
    budget: Budget, spec: HostSpec, kind: UnitKind, ranking: Sequence[Sequence[float]]
) -> list[int]:
    """Units kept in each layer when fixed scores (L, N) of all layers are ranked together.

    ``hybrid`` raises every layer to its floor and takes the excess from the others' lowest ranks.
    """
    n = choices(budget, spec, kind)
    total = max(spec.L, round(budget.target(kind) * n * spec.L))
    least = max(1, round(budget.floor * n)) if budget.spread == "hybrid" else 1
    rows = [sorted(row, reverse=True) for row in ranking]
    counts = [min(n, least)] * spec.L
    rest = sorted(
        ((score, layer) for layer, row in enumerate(rows) for score in row[least:]), reverse=True
    )
    for _, layer in rest[: max(0, total - sum(counts))]:
        counts[layer] += 1
    return counts


def choices(budget: Budget, spec: HostSpec, kind: UnitKind) -> int:
    """How many things are chosen from in one layer: heads or groups, or neurons."""
    if kind == "heads" and budget.head_unit == "group":
        return spec.G
    return spec.units(kind)


def tilt_of(budget: Budget) -> Tilt:
    """What ``spread=learned`` goes by.

    Raises:
        ValueError: there is none.
    """
    if budget.tilt is None:
        raise ValueError(
            "budget.spread='learned' goes by what a predictor learned with student.spread=learned, "
            "and budget.tilt is None: use a policy that has a predictor (shadow, dejavu, sketch, "
            "prior), or budget.spread=layer"
        )
    return budget.tilt


def sensitivity_of(budget: Budget, spec: HostSpec) -> Sensitivity:
    """The sensitivities that ``spread=calibrated`` goes by.

    Raises:
        ValueError: none are given, or they are another host's.
    """
    if not isinstance(budget.sensitivity, Sensitivity):
        raise ValueError(
            f"budget.spread='calibrated' goes by measured sensitivities, and budget.sensitivity="
            f"{budget.sensitivity!r}: give gnomon.load_predictor(<folder>).sensitivity of a "
            "calibration (python train.py predictor=calibration predictor.sensitivity=loss)"
        )
    budget.sensitivity.check_host(spec)
    return budget.sensitivity
