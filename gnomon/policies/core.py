"""Core: a fixed set of neurons is always kept, a contextual policy fills the rest of the budget.

The core holds the neurons of every layer with the largest mean score on calibration text. They are
given the highest score there is, so that an inner policy which keeps a number of its best units
still keeps exactly what its budget says. Thresholds on a gate (``cats``, ``chess``) let the core
pass *beside* what exceeds them, and keep more.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnomon.budget import Budget
from gnomon.errors import Refused
from gnomon.host import UnitKind
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies.base import Policy, Seen
from gnomon.policies.learned import Learned
from gnomon.policies.static import Source, check_means, means_of
from gnomon.policies.wrap import Wrapper


class Core(Wrapper):
    """Always keeps the core; the inner policy chooses the other neurons.

    Args:
        source: holds per-unit means: a calibration, a predictor, a trace store, or ``{"heads":
            (L, H), "neurons": (L, F)}``.
        inner: decides neurons by scores; not itself a wrapper.
        share: of a layer's neurons that are core, in [0, 1].

    Raises:
        ValueError: a share outside [0, 1], a wrapper or thresholds inside, or a budget
            smaller than the core.
    """

    name = "core"

    def __init__(self, source: Source, inner: Policy, share: float = 0.1) -> None:
        super().__init__(inner)
        if not 0 <= share <= 1:
            raise ValueError(f"policy.params.share={share} is a share of neurons: use 0 to 1")
        if isinstance(inner, Wrapper):
            raise ValueError(
                f"policy={self.name} ranks its neurons before all that the inner policy scores, "
                f"and {inner.name} is a wrapper: put {inner.name} round {self.name}"
            )
        if isinstance(inner, Learned) and inner.choose == "threshold":
            raise ValueError(
                f"policy={self.name} would be kept beside all that reaches its thresholds, "
                "and exceed the budget: use policy.params.inner.params.choose=topk"
            )
        self.share = share
        self._source, self._means = source, means_of(source)

    def prepare(self, model: nn.Module) -> None:
        """Checks that the means belong to this host, and marks the core."""
        check_means(self._source, self._means, self.spec)
        self._mark()

    def settle(self, budget: Budget) -> None:
        """Also checks that the budget holds the core."""
        super().settle(budget)
        core = round(self.share * self.spec.F)
        for layer, kept in enumerate(self.counts["neurons"]):
            if not self.keeps_all("neurons", layer) and budget.fixed_counts and kept < core:
                raise Refused(
                    f"budget.neurons={budget.target('neurons'):g} keeps {kept} of {self.spec.F} "
                    f"neurons in layer {layer}, fewer than the {core} of the core: raise it, or "
                    "make the core smaller"
                )

    def decide(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """The inner policy's selection from scores in which the core comes first."""
        if kind != "neurons":
            return self.inner.decide(kind, layer, seen)
        scores = self.inner.combine(kind, self.inner.scores(kind, layer, seen), seen)
        core = self.core[layer].to(scores.device)
        return self.inner.select(kind, layer, scores.masked_fill(core, torch.inf), seen)

    def _mark(self) -> None:
        self.core = topk_mask(self._means["neurons"], round(self.share * self.spec.F))  # (L, F)
