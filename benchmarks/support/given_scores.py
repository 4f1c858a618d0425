"""A policy whose scores are handed in, batch by batch: what a criterion says, used as a decision.

Most criteria are made with the gradient of the text that is decided about, which no decision at
inference has. A row measured with them is a reference, as the oracle's is, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from gnomon import Budget
from gnomon.host import UnitKind
from gnomon.policies import Policy, Seen


class Given(Policy):
    """Keeps the top units by :attr:`given`, of the batch that runs next.

    Attributes:
        given: kind -> (B, T, L, N) a score for every position, or (B, 1, L, N) for all of them.
    """

    name = "given"

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self.given: Mapping[UnitKind, Tensor] = {}

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Scores of the sparse columns, which are the last, (B, T', N) or (B, 1, N)."""
        scores = self.given[kind][:, :, layer]
        return scores if scores.shape[1] == 1 else scores[:, -seen.positions.shape[1] :]
