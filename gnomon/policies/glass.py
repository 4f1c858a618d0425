"""GLASS: the prompt's own ranking of neurons, aggregated with one that belongs to the model.

https://arxiv.org/abs/2508.14302. In every layer the neurons are ranked twice: by the prompt's
statistic (r_local) and by a statistic of the model over other text (r_global), 0 for the least:

    score_j = (1 − λ) · r_local(j) + λ · r_global(j)        keep the top K

which is the consensus of the two rankings under a permutation model. The two published variants
differ in the global statistic: activation (A-GLASS) or impact, activation times gradient (I-GLASS).

Written from the abstracts and public summaries; the paper's tables were not at hand. Deviations:
the local statistic is GRIFFIN's flocking statistic in both variants (an impact of the prompt would
take a backward pass at inference); the global one is what a predictor or calibration folder holds,
means over calibration text, not over text that the model wrote itself; one λ for all layers.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from gnomon.budget import Budget
from gnomon.host import UnitKind
from gnomon.policies.base import Batch, Policy, Seen
from gnomon.policies.griffin import flocking, statistic
from gnomon.policies.static import Source, check_means, means_of

Variant = Literal["activation", "impact"]
CRITERIA: dict[Variant, tuple[str, ...]] = {
    "activation": ("magnitude", "l2norm"),
    "impact": ("plainact", "fisher", "grad_norm"),
}


class Glass(Policy):
    """Keeps the neurons that stand high in the prompt's and the model's ranking together.

    Args:
        source: holds per-unit means: a predictor, a trace store, or ``{"heads": (L, H),
            "neurons": (L, F)}``.
        budget: of neurons; heads stay dense.
        batch: ``per_sequence``, or ``shared``: one set for the batch, from the sum of the scores.
        variant: refuses a source whose means are of another kind; None takes what is given.
        weight: λ, the global ranking's share in [0, 1]; 0 is GRIFFIN, 1 is ``static``.

    Raises:
        ValueError: a weight outside [0, 1], an unknown variant, or means of another kind.
    """

    name = "glass"
    kinds = ("neurons",)
    refreshes = ("prompt",)
    spreads = ("layer", "calibrated")
    observes = ("neurons",)

    def __init__(
        self,
        source: Source,
        budget: Budget,
        batch: Batch = "per_sequence",
        variant: Variant | None = None,
        weight: float = 0.5,
    ) -> None:
        super().__init__(budget, "prompt", batch)
        if not 0 <= weight <= 1:
            raise ValueError(f"policy.params.weight={weight} is a share: use 0 to 1")
        if variant is not None:
            _require(variant, source)
        self.weight = weight
        self._source, self._means = source, means_of(source)

    def prepare(self, model: nn.Module) -> None:
        """Checks that the means belong to this host, and ranks them."""
        check_means(self._source, self._means, self.spec)
        self._global = ranks(self._means["neurons"])

    @property
    def predictor_bytes(self) -> float:
        """The model's ranking, which a decision reads."""
        return float(self._means["neurons"].nbytes)

    def observe(self, kind: UnitKind, layer: int, units: Tensor, valid: Tensor) -> Tensor:
        """GRIFFIN's statistic: (B, T', F), (B, T') -> (B, F)."""
        return flocking(units, valid)

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """Weighted sum of the two rankings, (B, 1, F)."""
        local = ranks(statistic(layer, seen))
        return (1 - self.weight) * local + self.weight * self._global[layer].to(local.device)


def ranks(scores: Tensor) -> Tensor:
    """Rank of each score among its row, 0 for the least: (..., N) -> (..., N), fp32."""
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1).float()


def _require(variant: str, source: Source) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"policy.params.variant={variant!r}: use {', '.join(get_args(Variant))}")
    found = getattr(getattr(source, "info", None), "criterion", "")
    wanted = CRITERIA[variant]  # type: ignore[index]
    if found and found not in wanted:
        raise ValueError(
            f"policy.params.variant={variant!r} ranks by means of {' or '.join(wanted)}, and "
            f"policy.predictor holds means of {found}: give one trained with criterion={wanted[0]}"
        )
