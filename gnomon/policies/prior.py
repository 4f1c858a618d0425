"""Prior: GRIFFIN's statistic of the prompt, joined with a learned prior of the model's own.

    score_j = a · log(√F · s_j + ε) + b_j        keep the top K in every layer

with s of :mod:`gnomon.policies.griffin`, and a and b of :mod:`gnomon.predictors.prior`, trained end
to end. No paper: GLASS (https://arxiv.org/abs/2508.14302) adds up ranks of the prompt's statistic
and of one that was measured on other text; here the second one is learned.
"""

from __future__ import annotations

from torch import Tensor

from gnomon.budget import Budget
from gnomon.host import Tap, UnitKind
from gnomon.policies.base import Batch, Refresh, Seen
from gnomon.policies.griffin import flocking, statistic
from gnomon.policies.learned import Learned
from gnomon.predictors.prior import Prior as PriorPredictor


class Prior(Learned):
    """Keeps the neurons that the prompt and the learned prior together score highest.

    Args:
        predictor: a prior, trained for the host it will be bound to.
        budget: of neurons; heads stay dense.
        refresh: ``prompt``.
        batch: ``per_sequence``, or ``shared``: one set for the batch.
    """

    name = "prior"
    kinds = ("neurons",)
    refreshes = ("prompt",)
    spreads = ("layer", "calibrated", "learned")
    observes = ("neurons",)
    accepts = PriorPredictor
    predictor: PriorPredictor

    def __init__(
        self,
        predictor: PriorPredictor,
        budget: Budget,
        refresh: Refresh | None = None,
        batch: Batch = "per_sequence",
    ) -> None:
        super().__init__(predictor, budget, refresh, batch)

    def taps(self) -> tuple[Tap, ...]:
        """None: the prompt's units are all that it looks at."""
        return ()

    def observe(self, kind: UnitKind, layer: int, units: Tensor, valid: Tensor) -> Tensor:
        """GRIFFIN's statistic: (B, T', F), (B, T') -> (B, F)."""
        return flocking(units, valid)

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Scores (B, 1, F); gradients reach the predictor while it trains."""
        return self.predictor.from_statistic(layer, statistic(layer, seen))

    def combine(self, kind: UnitKind, scores: Tensor, seen: Seen) -> Tensor:
        """Of a shared set what the logs stand for is summed, as GRIFFIN does."""
        if self.batch == "shared":
            scores = scores.exp()
        return super().combine(kind, scores, seen)
