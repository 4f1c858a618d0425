"""Criteria that score a set of tokens together: activation patterns and gradient correlations.

All three compare how a unit answers different tokens, so that one token alone has no score. They
come from zero-cost architecture search, where they rank networks, and from ShadowLLM's code
(arXiv:2406.16635), which applies them to units.
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum

from gnomon.data.criterion import LayerWeights, SetCriterion
from gnomon.host import UnitKind


class Nwot(SetCriterion):
    """log det(I + K), K_ts the entries in which a unit's on/off patterns of tokens t and s agree.

    Neural Architecture Search without Training (arXiv:2006.04647). The pattern of a head is the
    signs of its d activations, that of a neuron the sign of its one: with n of its tokens on and m
    off, K has the eigenvalues n and m and the score is log(1 + n) + log(1 + m), highest for a
    neuron that divides the tokens into halves. A text's score is the mean over its blocks.

    Deviations. The paper has no I, but K of more than d + 1 tokens is singular. ShadowLLM's code
    keeps the entries that are both *off*, in effect the logarithm of how often the unit is off,
    which ranks dead neurons highest; K here has both halves, as in the paper. Patterns are those of
    the unit tensor; of a neuron without a gate they are the activation function's own.
    """

    name = "nwot"
    needs_gradient = False

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return (a > 0).float()

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return (h > 0).float()

    def pool(self, kind: UnitKind, values: Tensor, targets: Tensor) -> Tensor:
        """From patterns (n, L, H, d) or (n, L, F); heads by det(I_n + Y Y^T) = det(I + Y^T Y)."""
        if kind == "neurons":
            on = values.sum(0)
            return on.log1p() + (len(values) - on).log1p()
        both = torch.cat([values, 1 - values], -1).double()
        gram = einsum("nlhi,nlhj->lhij", both, both)
        return torch.logdet(gram + torch.eye(gram.shape[-1], device=gram.device).double()).float()


class Gradients(SetCriterion):
    """Base of the criteria that correlate a head's gradients of different tokens.

    A neuron's gradient is one number, which correlates with nothing; that of its weights, g_t x_t,
    correlates as x_t and x_s do, up to signs on which neither score depends: the same for every
    neuron. So these criteria are of heads alone, as in ShadowLLM's code.
    """

    granularities = ("static",)
    kinds = ("heads",)

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        assert g is not None
        return g.float()


class Jacov(Gradients):
    """How a head's gradients correlate over tokens: -sum(log(v + k) + 1 / (v + k)), k = 1e-5.

    v are the eigenvalues of the tokens' correlation matrix over d (arXiv:2006.04647, version 1);
    the mean over 10 draws of 200 tokens. Negative. A term is highest at v = 1, no correlation; but
    200 tokens have few dimensions to differ in and most v lie far above 1, so that among heads the
    formula prefers those whose gradients share a direction, which leaves the other v smaller.

    Deviation: a matrix of 200 tokens has rank d - 1 at most, and each zero eigenvalue adds the same
    number of about -1e5, plus rounding that drowns the rest. Here only the rank many are summed, in
    fp64 from the d x d matrix that shares them; among heads of one size this changes no order.
    """

    name = "jacov"
    draws, tokens, k = 10, 200, 1e-5

    def pool(self, kind: UnitKind, values: Tensor, targets: Tensor) -> Tensor:
        """From gradients (n, L, H, d)."""
        unit = directions(values)
        draw = torch.Generator().manual_seed(0)
        scores = torch.zeros(values.shape[1:3], dtype=torch.float64, device=values.device)
        for _ in range(self.draws):
            some = torch.randperm(len(values), generator=draw)[: self.tokens].to(values.device)
            gram = einsum("nlhi,nlhj->lhij", unit[some], unit[some])
            rank = min(len(some), values.shape[-1] - 1)
            v = torch.linalg.eigvalsh(gram)[..., -rank:].clamp_min(0) + self.k
            scores -= (v.log() + 1 / v).sum(-1)
        return (scores / self.draws).float()


class EpeNas(Gradients):
    """How differently a head's gradients correlate within the classes of tokens with one target.

    EPE-NAS (arXiv:2102.08099), as ShadowLLM codes it: of a class c of more than 4 tokens, with
    correlations r of their gradients over d, s_c = sum log(|r| + 1e-5); the score is the sum of
    |s_c - s_c'| over all pairs of classes. Larger classes have larger sums, for every head alike.
    """

    name = "epenas"
    least, k = 5, 1e-5

    def pool(self, kind: UnitKind, values: Tensor, targets: Tensor) -> Tensor:
        """From gradients (n, L, H, d).

        Raises:
            ValueError: fewer than two classes of enough tokens.
        """
        found, count = targets.unique(return_counts=True)
        classes = found[count >= self.least]
        if len(classes) < 2:
            raise ValueError(
                f"criterion=epenas compares targets that occur {self.least} times or more, and "
                f"{len(classes)} of {len(found)} do in {len(targets)} tokens: give more text "
                "(text.tokens)"
            )
        sums = torch.stack([self._sum(values[targets == c]) for c in classes])
        ordered = sums.sort(0).values  # sum over pairs |s - s'| = 2 sum_i (2 i - C + 1) s_(i)
        factor = 2.0 * torch.arange(len(sums), device=sums.device).double() - len(sums) + 1
        return (2 * einsum("c,clh->lh", factor, ordered)).float()

    def _sum(self, values: Tensor) -> Tensor:
        """s_c (L, H) of a class (m, L, H, d), layer by layer: its matrices are m x m."""
        unit = directions(values)
        layers = [einsum("nhd,mhd->hnm", x, x) for x in unit.unbind(1)]
        return torch.stack([(r.abs() + self.k).log().sum((1, 2)) for r in layers])


def directions(values: Tensor) -> Tensor:
    """Rows (..., d) less their mean, of norm 1, fp64: their products are Pearson correlations."""
    centred = values.double() - values.double().mean(-1, keepdim=True)
    return centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-300)
