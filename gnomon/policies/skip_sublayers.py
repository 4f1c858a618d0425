"""SkipSublayers: whole attention sublayers, FFN sublayers or layers are left out.

https://arxiv.org/abs/2404.05741 (Tyukin) and its follow-up https://arxiv.org/abs/2407.15516: in the
last x % of the layers the residual branch of attention, of the FFN, or of both is skipped, without
training. Here that is all heads, or all neurons, of a layer; biases of its last linear stay, and a
skipped attention sublayer keeps no key/value cache.

``choose=similarity`` takes the sublayers which change the residual stream least: with x before and
y after a sublayer, those with the largest mean cosine of x and y over calibration text.

Deviations: the prompt but its last token is dense (the papers skip everywhere; prefill=sparse and
protocol=all do); a budget says how many sublayers are kept, K = round(density·L).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from gnomon.accounting import Density, Role
from gnomon.budget import Budget
from gnomon.host import KINDS, UnitKind
from gnomon.policies.base import Policy, Prefill, Seen
from gnomon.policies.dense import Dense
from gnomon.policies.wrap import Wrapper
from gnomon.predictors.calibration import SUBLAYERS, Calibration

What = Literal["attention", "ffn", "layer"]
Choose = Literal["last", "similarity"]
SKIPPED: dict[str, tuple[UnitKind, ...]] = {
    "attention": ("heads",),
    "ffn": ("neurons",),
    "layer": KINDS,
}


class SkipSublayers(Wrapper):
    """Skips sublayers; the inner policy decides in the others.

    Args:
        budget: kept share of the sublayers: ``heads`` of attention, ``neurons`` of the FFN,
            ``density`` of either. None where ``layers`` says which are skipped.
        inner: decides the units of the sublayers that stay, by its own budget; None keeps them.
        predictor: a calibration, for ``choose=similarity``.
        what: ``attention``, ``ffn``, or ``layer`` (both of the same layers).
        layers: the layers to skip in, whatever the budget says.
        choose: ``last``, or ``similarity``.
        keep_last: layers at the end that are never skipped by ``choose=last``.
        prefill: ``sparse``: in the prompt too; None takes the inner policy's.

    Raises:
        ValueError: an unknown choice, a layer that the host does not have, no calibration.
    """

    name = "skip_sublayers"
    accepts = Calibration  # what policy.predictor=auto looks for
    refreshes = ("static",)

    def __init__(
        self,
        budget: Budget | None = None,
        inner: Policy | None = None,
        predictor: Calibration | None = None,
        what: What = "attention",
        layers: Sequence[int] | None = None,
        choose: Choose = "last",
        keep_last: int = 0,
        prefill: Prefill | None = None,
    ) -> None:
        for field, value, allowed in (("what", what, What), ("choose", choose, Choose)):
            if value not in get_args(allowed):
                raise ValueError(
                    f"policy.params.{field}={value!r}: use {', '.join(get_args(allowed))}"
                )
        if budget is None and layers is None:
            raise ValueError("skip_sublayers needs a budget, or policy.params.layers")
        if choose == "similarity" and layers is None and not isinstance(predictor, Calibration):
            raise ValueError(
                "policy.params.choose='similarity' needs a calibration: python train.py "
                "predictor=calibration, then policy.predictor=auto; or use choose=last"
            )
        super().__init__(Dense() if inner is None else inner)
        self.what, self.choose, self.keep_last = what, choose, keep_last
        self.layers = None if layers is None else tuple(sorted(set(layers)))
        self.calibration = predictor
        self._alone = inner is None
        if self._alone:
            self.kinds, self.kv, self.refresh = SKIPPED[what], "drop", "static"
            self.budget = Budget(density=1.0) if budget is None else self._own(budget)
        if prefill is not None:
            self.set_prefill(prefill)
        self.sublayers = None if budget is None else budget
        self._require_one_density(budget)

    def prepare(self, model: nn.Module) -> None:
        """Checks the layers, and chooses them where that does not wait for a byte budget."""
        if self.calibration is not None:
            self.calibration.check_host(self.spec)
        wrong = [i for i in self.layers or () if not 0 <= i < self.spec.L]
        if wrong:
            raise ValueError(
                f"policy.params.layers={list(self.layers or ())}: host {self.spec.name} has layers "
                f"0 to {self.spec.L - 1}, not {wrong[0]}"
            )
        if self._alone and self.layers is not None:
            kept = 1 - len(self.layers) / self.spec.L
            heads, neurons = (kept if kind in SKIPPED[self.what] else 1.0 for kind in KINDS)
            # a density of 0 cannot be said and stands for one of next to nothing
            self.budget = Budget(heads=max(heads, 1e-9), neurons=max(neurons, 1e-9))
            self.resolved = self.budget
        self._skipped = self._choose(self.sublayers or Budget(density=1.0))

    def settle(self, budget: Budget) -> None:
        """The budget is the sublayers', or else the inner policy's."""
        if self._alone:
            self._skipped = self._choose(budget)
            super().settle(Budget(density=1.0))
            self.resolved = budget
        else:
            super().settle(budget)

    def decide(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Nothing of a skipped sublayer, (1, 1, N); else the inner policy's active set."""
        if not self.skips(kind, layer):
            return self.inner.decide(kind, layer, seen)
        device = seen.positions.device
        return torch.zeros(1, 1, self.spec.units(kind), dtype=torch.bool, device=device)

    def skips(self, kind: UnitKind, layer: int) -> bool:
        """Whether the sublayer is skipped here or by the inner policy."""
        own = kind in SKIPPED[self.what] and layer in self._skipped
        return own or self.inner.skips(kind, layer)

    def keeps_all(self, kind: UnitKind, layer: int) -> bool:
        """Whether the sublayer stays whole."""
        return not self.skips(kind, layer) and self.inner.keeps_all(kind, layer)

    def kept(self, kind: UnitKind, layer: int) -> int | None:
        """0 in a skipped sublayer."""
        return 0 if self.skips(kind, layer) else self.inner.kept(kind, layer)

    def expected(self, kind: UnitKind, budget: Budget) -> list[float]:
        """The inner policy's kept fractions, 0 in skipped sublayers."""
        skipped: Sequence[int] = (
            self._choose(budget, strict=False) if self._alone else self._skipped
        )
        rows = self.inner.expected(kind, Budget(density=1.0) if self._alone else budget)
        own = skipped if kind in SKIPPED[self.what] else ()
        return [0.0 if i in own else row for i, row in enumerate(rows)]

    def fractions(self, density: Density) -> dict[Role, float]:
        """The inner policy's over the sublayers that stay, times their share of all."""
        heads, neurons = (self._share(kind, density) for kind in KINDS)
        read = self.inner.fractions(self._inside(density))
        return {
            role: part * (neurons if role in ("gate", "up", "down") else heads)
            for role, part in read.items()
        }

    def saved_bytes(self, density: Density, size: int) -> float:
        """The inner policy's, in the FFNs that stay."""
        saved = self.inner.saved_bytes(self._inside(density), size)
        return saved * self._share("neurons", density)

    @property
    def facts(self) -> dict[str, Any]:
        """The layers that are skipped in, by what is skipped."""
        own = {f"skipped {self.what}": list(self._skipped)}
        return self.inner.facts | own

    def _inside(self, density: Density) -> Density:
        """Densities over the sublayers that stay."""
        heads, neurons = (self._share(kind, density) for kind in KINDS)
        return replace(
            density,
            heads=_over(density.heads, heads),
            neurons=_over(density.neurons, neurons),
            groups=_over(density.groups, heads),
        )

    def _share(self, kind: UnitKind, density: Density) -> float:
        """Share of the sublayers of a kind that stay."""
        if kind not in SKIPPED[self.what]:
            return 1.0
        if self._alone:  # each is whole or gone, also while a byte budget is being solved
            return density.heads if kind == "heads" else density.neurons
        return 1 - len(self._skipped) / self.spec.L

    def _choose(self, budget: Budget, strict: bool = True) -> tuple[int, ...]:
        if self.layers is not None:
            return self.layers
        L = self.spec.L
        count = L - round(budget.target(SKIPPED[self.what][0]) * L)
        if count == 0:
            return ()
        if self.choose == "last":
            if strict and count > L - self.keep_last:
                raise ValueError(
                    f"budget keeps {L - count} of {L} sublayers, and policy.params.keep_last="
                    f"{self.keep_last} leaves {L - self.keep_last} to skip: lower keep_last or "
                    "raise the density"
                )
            return tuple(range(max(0, L - self.keep_last - count), L - self.keep_last))
        assert self.calibration is not None
        close = self.calibration.similarity[:, SUBLAYERS.index(self.what)]
        if not bool(close.isfinite().all()):
            raise ValueError(
                f"policy.params.choose='similarity': the calibration does not tell how similar the "
                f"residual stream is round the {self.what} sublayers of {self.spec.name}: use "
                "what=layer, choose=last, or layers"
            )
        return tuple(sorted(close.argsort(descending=True, stable=True)[:count].tolist()))

    def _require_one_density(self, budget: Budget | None) -> None:
        if budget is None or self.what != "layer" or self.layers is not None:
            return
        if budget.target("heads") != budget.target("neurons"):
            raise ValueError(
                f"budget.heads={budget.target('heads'):g} and budget.neurons="
                f"{budget.target('neurons'):g}: what=layer skips both in the same layers; set "
                "budget.density alone, or wrap one skip_sublayers round another"
            )


def _over(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
