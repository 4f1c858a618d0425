"""GRIFFIN: the FFN neurons on which the prompt's tokens flock together, fixed for the sequence.

https://arxiv.org/abs/2404.01365. With Z (tokens, F) the FFN units (the down-projection's input) of
the prompt, every row is divided by its norm and a neuron's statistic is the norm of its column:

    z̄[t] = Z[t] / ‖Z[t]‖₂        s_j = ‖z̄[:, j]‖₂        keep the top K of s in every layer

Deviations: Z is summed over positions 0 to P-2, because the last prompt token is already sparse
here; padding is excluded; a token whose units are all zero adds nothing (the released code divides
by zero); s is divided by √(P-1), which changes no ranking within a sequence and is the paper's
weight where a batch shares one set (``batch=shared``: the sum of s/√length over sequences). The
last step of a prompt and all that follow are sparse, in chunked prefill and later turns too; the
set is never chosen again within a sequence. Attention is untouched.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from gnomon.budget import Budget
from gnomon.host import HostSpec, UnitKind, weight
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies.base import Batch, Policy, Prefill, Refresh, Seen
from gnomon.policies.random import uniform

Variant = Literal["topk", "sampling", "half", "magnitude"]


class Griffin(Policy):
    """Keeps the neurons with the largest flocking statistic of the prompt.

    Args:
        budget: of neurons; heads stay dense.
        batch: ``per_sequence``, or ``shared``: one set for the batch.
        variant: ``topk``; ``sampling`` draws K neurons without replacement, with probability
            proportional to s; ``half`` keeps the top K/2 and draws the rest; ``magnitude`` needs no
            prompt (``refresh=static``): ‖w_gate‖·‖w_up‖, or ‖w_up‖ of a non-gated host.
        seed: of the draws; the same for every sequence.
        prefill: ``sparse`` for ``magnitude`` alone.

    Raises:
        ValueError: an unknown variant, or a budget of heads.
    """

    name = "griffin"
    kinds = ("neurons",)
    refreshes = ("prompt", "static")
    spreads = ("layer", "calibrated")

    def __init__(
        self,
        budget: Budget,
        batch: Batch = "per_sequence",
        variant: Variant = "topk",
        seed: int = 0,
        prefill: Prefill = "dense",
    ) -> None:
        if variant not in get_args(Variant):
            raise ValueError(
                f"policy.params.variant={variant!r}: use {', '.join(get_args(Variant))}"
            )
        refresh: Refresh = "static" if variant == "magnitude" else "prompt"
        super().__init__(budget, refresh, batch, prefill=prefill)
        self.variant, self.seed = variant, seed
        self.observes = ("neurons",) if refresh == "prompt" else ()

    def prepare(self, model: nn.Module) -> None:
        """Reads the norms of the weights, for ``magnitude`` alone."""
        if self.variant == "magnitude":
            self._norms = [_row_norms(model, self.spec, layer) for layer in range(self.spec.L)]

    def observe(self, kind: UnitKind, layer: int, units: Tensor, valid: Tensor) -> Tensor:
        """Squared, row-normalised units summed over tokens: (B, T', F), (B, T') -> (B, F)."""
        return flocking(units, valid)

    def scores(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        """s / √(P-1), (B, 1, F), or the norms of the weights, (F,)."""
        if self.variant == "magnitude":
            return self._norms[layer].to(seen.positions.device)
        return statistic(layer, seen)

    def select(self, kind: UnitKind, layer: int, scores: Tensor, seen: Seen) -> Tensor:
        """The top K, or a draw of K by the Gumbel-max trick on log s."""
        if self.variant not in ("sampling", "half"):
            return super().select(kind, layer, scores, seen)
        units = torch.arange(self.spec.F, device=scores.device)
        u = uniform(units, self.seed * 1_000_003 + layer).clamp_min(1e-300)
        drawn = scores.double().clamp_min(1e-300).log() - (-u.log()).log()
        if self.variant == "half":
            first = topk_mask(scores, max(1, self.counts[kind][layer] // 2))
            drawn = drawn.masked_fill(first, torch.inf)
        return super().select(kind, layer, drawn, seen)


def flocking(units: Tensor, valid: Tensor) -> Tensor:
    """Sum over tokens of (z/‖z‖)², zero for a row of zeros: (B, T', F), (B, T') -> (B, F)."""
    squared = units.float().square()
    whole = squared.sum(-1, keepdim=True)
    counted = valid[..., None] & (whole > 0)
    return torch.where(counted, squared / whole, 0).sum(1)


def statistic(layer: int, seen: Seen) -> Tensor:
    """Root mean square over the prompt of the row-normalised units, (B, 1, F)."""
    sums, tokens = seen.prompt.of("neurons", layer), seen.prompt.tokens
    assert tokens is not None
    return (sums / tokens[:, None, None].to(sums.device)).sqrt()


def _row_norms(model: nn.Module, spec: HostSpec, layer: int) -> Tensor:
    """Product of the norms of a neuron's up and gate rows, (F,)."""
    where = spec.layers[layer]
    norms = []
    for role, path in (("up", where.up), ("gate", where.gate)):
        if path is not None:
            rows = weight(model, path).detach()
            norms.append(rows[spec.blocks(role).to(rows.device)].float().norm(dim=1))
    return torch.stack(norms).prod(0)
