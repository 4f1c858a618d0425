"""Prompt statistics: what a policy sums up over the dense part of a prompt, layer by layer.

A decision for a whole sequence may look at positions 0 to P-2. Where it needs more of them than
the last, :class:`PromptStatistic` adds up what :meth:`Policy.observe` makes of each forward's dense
tokens, so that a prompt may come in chunks, and holds nothing that grows with its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gnomon.host import UnitKind

Observe = Callable[[UnitKind, int, Tensor, Tensor], Tensor]


class PromptStatistic:
    """Sums over the prompt of every sequence of a batch.

    Args:
        kinds: unit kinds that are observed.
        observe: (kind, layer, units, valid) -> (B, N), summed over the valid tokens of a forward.

    Attributes:
        tokens: (B,) prompt tokens summed so far.
    """

    def __init__(self, kinds: Sequence[UnitKind], observe: Observe) -> None:
        self.kinds, self._observe = tuple(kinds), observe
        self.tokens: Tensor | None = None
        self._sums: dict[tuple[UnitKind, int], Tensor] = {}
        self._valid: Tensor | None = None

    def begin(self, valid: Tensor) -> None:
        """A forward begins, of which these tokens (B, T) are prompt and dense."""
        some = bool(valid.any())  # a prompt's forward may wait for the device
        self._valid = valid if some else None
        if some:
            count = valid.sum(1)
            self.tokens = count if self.tokens is None else self._same(self.tokens, count)

    def rest(self) -> None:
        """A forward begins that holds no token of the prompt."""
        self._valid = None

    @torch.no_grad()
    def see(self, kind: UnitKind, layer: int, units: Tensor) -> None:
        """Takes the unit tensor (B, T, F) or (B, T, H, d) of one layer of this forward."""
        if self._valid is None:
            return
        part = self._observe(kind, layer, units.detach(), self._valid.to(units.device))
        key = (kind, layer)
        self._sums[key] = self._same(self._sums[key], part) if key in self._sums else part

    def of(self, kind: UnitKind, layer: int) -> Tensor:
        """The sums of one layer, (B, 1, N)."""
        return self._sums[kind, layer][:, None]

    def require(self, lengths: Tensor) -> None:
        """Checks that every row's tokens before position P-1 were seen, each once.

        Args:
            lengths: (B,) P-1.

        Raises:
            ValueError: a prompt of one token, or one that was not seen from its start.
        """
        if self.tokens is None or bool((lengths < 1).any()):
            raise ValueError(
                "refresh='prompt' decides from the prompt's tokens but its last: give every row a "
                "prompt of at least 2 tokens, and start the sequence inside sparsify"
            )
        if self.tokens.shape != lengths.shape or bool((self.tokens != lengths).any()):
            raise ValueError(
                f"the prompt has {lengths.tolist()} tokens before its last, and the policy has "
                f"seen {self.tokens.tolist()}: run it from its start inside sparsify, each token "
                "once, on a fresh cache"
            )

    @staticmethod
    def _same(total: Tensor, part: Tensor) -> Tensor:
        if total.shape != part.shape:
            raise ValueError(
                f"a prompt began with {total.shape[0]} sequences and goes on with "
                f"{part.shape[0]}: run all chunks of a batch together"
            )
        return total + part
