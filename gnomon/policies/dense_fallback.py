"""DenseFallback: layers of which nearly everything would be kept stay dense.

A gathered linear reads rows by an index; past some density a dense one is faster, and keeps more.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gnomon.budget import Budget
from gnomon.host import UnitKind
from gnomon.policies.base import Policy
from gnomon.policies.wrap import Wrapper


class DenseFallback(Wrapper):
    """Keeps all units of a layer where the inner policy would keep more than a share of them.

    Args:
        inner: its budget fixes how many units each layer keeps; where the number varies by token
            (``spread=global``, thresholds) nothing falls back.
        above: density above which a layer stays dense.
        layers: that stay dense whatever is kept of them, after the budget has been spread: the
            others keep what they would have kept.

    Raises:
        ValueError: ``above`` outside (0, 1], or a layer that the host does not have.
    """

    name = "dense_fallback"

    def __init__(self, inner: Policy, above: float = 0.8, layers: Sequence[int] = ()) -> None:
        super().__init__(inner)
        if not 0 < above <= 1:
            raise ValueError(f"policy.params.above={above} is a density: use a value in (0, 1]")
        self.above, self.layers = above, tuple(layers)

    def prepare(self, model: nn.Module) -> None:
        """Checks the layers."""
        wrong = [i for i in self.layers if not 0 <= i < self.spec.L]
        if wrong:
            raise ValueError(
                f"policy.params.layers={list(self.layers)}: host {self.spec.name} has layers 0 to "
                f"{self.spec.L - 1}, not {wrong[0]}"
            )

    def keeps_all(self, kind: UnitKind, layer: int) -> bool:
        """Whether the layer is whole, or would be nearly."""
        if layer in self.layers or self.inner.keeps_all(kind, layer):
            return True
        kept = self.inner.kept(kind, layer)
        return kept is not None and kept > self.above * self.spec.units(kind)

    def kept(self, kind: UnitKind, layer: int) -> int | None:
        """All of a layer that falls back."""
        if self.keeps_all(kind, layer):
            return self.spec.units(kind)
        return self.inner.kept(kind, layer)

    def expected(self, kind: UnitKind, budget: Budget) -> list[float]:
        """The inner policy's, with layers that fall back whole."""
        rows = self.inner.expected(kind, budget)
        fixed = self.inner.ranks
        return [
            1.0 if i in self.layers or (fixed and row > self.above) else row
            for i, row in enumerate(rows)
        ]
