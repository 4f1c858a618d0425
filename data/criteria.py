"""Criteria: what a unit's activation and gradient say about its importance.

With activation ``a`` and gradient ``g`` of the unit tensor at one token, of the *sum* of
cross-entropy over unpadded targets, and Hessian ``H`` of that sum in all unit tensors together:

===================  ==========================  ===================  ===========================
name                 head                        neuron               what it is
===================  ==========================  ===================  ===========================
``magnitude``        norm of W_h a               abs(h) norm(w_down)  contribution to the stream
``l2norm``           norm(a)                     abs(h)               activation alone
``plainact``         abs(sum_d a g)              abs(h g)             loss without the unit
``plainact_weight``  as ``plainact``             sum_j abs(W G)       its weight form
``fisher``           (sum_d a g)^2               (h g)^2              ``plainact`` squared
``grad_norm``        norm(g)                     abs(g)               gradient alone
``snip``             sum_d abs(g)                abs(g)               the same in the 1-norm
``grasp``            abs(sum_d a (H g))          abs(h (H g))         gradient without the unit
``nwot``             log det of activation patterns, both kinds       of a set of tokens
``jacov, epenas``    correlation of gradients    none                 of a whole text
===================  ==========================  ===================  ===========================

They are those of ShadowLLM, arXiv:2406.16635; the last three are in :mod:`gnomon.data.sets`. Every
token score is fp32, non-negative, and higher means keep. A prompt's score is the sum over its
continuation, a static score the sum over all tokens. ``Criterion.granularities`` says what a
criterion has scores of.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from gnomon.data.criterion import (
    Criterion,
    LayerWeights,
    SetCriterion,
    head_magnitude,
    layer_weights,
    neuron_magnitude,
)
from gnomon.data.sets import EpeNas, Jacov, Nwot

__all__ = ["SetCriterion", "layer_weights"]  # found here with the others

T = TypeVar("T")


class Magnitude(Criterion):
    """Norm of the unit's contribution to the residual stream; the oracle's criterion."""

    name = "magnitude"
    needs_gradient = False
    needs_weights = True

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return head_magnitude(a, _given(weights))

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return neuron_magnitude(h, _given(weights))


class L2Norm(Criterion):
    """Norm of the activation."""

    name = "l2norm"
    needs_gradient = False

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return a.float().norm(dim=-1)

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return h.float().abs()


class PlainAct(Criterion):
    """First-order change of the loss when the unit is removed."""

    name = "plainact"

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return (a.float() * _given(g).float()).sum(-1).abs_()

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return (h.float() * _given(g).float()).abs_()


class PlainActWeight(PlainAct):
    """``plainact`` of a neuron's weights: sum_j |W[n, j] G[n, j]|, G the gradient of the weights.

    At one token G is the outer product g_n x_j of the gradient at the neuron's pre-activation and
    what the linear reads, so that the score is |g_n| (|W| |x|)_n, exactly, without any G. A gated
    neuron has two rows: gate and up are added, |g_gate| (|W_gate| |x|) + |g_up| (|W_up| |x|).
    Heads are those of ``plainact``, as in ShadowLLM's code.

    Deviation: of a prompt or text, ShadowLLM takes |W G| of the G that is *summed* over its tokens,
    in which tokens cancel; here, as for every criterion, token scores are summed. By the triangle
    inequality that is never less, and it is equal for a single token.
    """

    name = "plainact_weight"
    reads_rows = True

    def rows(self, x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        return g.float().abs() * (x.float().abs() @ w.float().abs().T)


class Fisher(Criterion):
    """Square of ``plainact``, token by token: the empirical Fisher information of its mask."""

    name = "fisher"

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return (a.float() * _given(g).float()).sum(-1).square_()

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return (h.float() * _given(g).float()).square_()


class GradNorm(Criterion):
    """Norm of the gradient."""

    name = "grad_norm"

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return _given(g).float().norm(dim=-1)

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return _given(g).float().abs()


class Snip(Criterion):
    """Sum of the absolute gradient over a head's dimensions.

    Deviation: this is what ShadowLLM's code computes under the name, but per head; the code takes
    the gradient *behind* the out projection, where no head has a slice of its own. The connection
    sensitivity of SNIP itself (arXiv:1810.02340), the gradient of a unit's 0/1 mask, is
    ``plainact``. A neuron has one dimension, so that its score is ``grad_norm``'s.
    """

    name = "snip"

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return _given(g).float().abs().sum(-1)

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        return _given(g).float().abs()


class Grasp(PlainAct):
    """|theta H g| of GraSP (arXiv:2002.07376), theta the unit's activation: ``plainact`` with H g.

    H g is the gradient of ||g||^2 / 2, where g and H are the derivatives of the loss in additions
    to all unit tensors of the host together, at every token: two backward passes through the frozen
    host, no approximation. To first order the score is how much removing the unit changes
    ||g||^2 / 2.

    Deviation: GraSP's -theta H g is signed, and it prunes where it is highest, so that the gradient
    of a network still to be trained stays large. A host is never trained: what changes its gradient
    in either direction matters, so the absolute value is taken, and higher means keep.
    """

    name = "grasp"
    needs_curvature = True


CRITERIA: dict[str, type[Criterion]] = {
    c.name: c
    for c in (
        *(PlainAct, PlainActWeight, Fisher, L2Norm, Magnitude, GradNorm, Snip, Grasp),
        *(Nwot, Jacov, EpeNas),
    )
}


def criterion(name: str) -> Criterion:
    """The criterion of a name.

    Raises:
        ValueError: unknown name.
    """
    if name not in CRITERIA:
        raise ValueError(f"criterion={name!r} is unknown; use one of {', '.join(sorted(CRITERIA))}")
    return CRITERIA[name]()


def _given(value: T | None) -> T:
    assert value is not None, "the capture hands over what the criterion says it needs"
    return value
