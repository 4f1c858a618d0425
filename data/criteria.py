"""Criteria: what a unit's activation and gradient say about its importance, token by token.

With activation ``a`` and gradient ``g`` of the unit tensor at one token, of the *sum* of
cross-entropy over unpadded targets:

=============  ==========================  ================  ===================================
name           head                        neuron            from
=============  ==========================  ================  ===================================
``magnitude``  norm of W_h a               abs(h) norm(w)    contribution to the residual stream
``l2norm``     norm(a)                     abs(h)            activation alone
``plainact``   abs(sum_d a g)              abs(h g)          ShadowLLM, arXiv:2406.16635
``fisher``     (sum_d a g)^2               (h g)^2           arXiv:2406.16635, its squared form
``grad_norm``  norm(g)                     abs(g)            gradient alone
=============  ==========================  ================  ===================================

Every score is fp32, non-negative, and higher means keep. A prompt's score is the sum over its
continuation, a static score the sum over all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor, einsum, nn

from gnomon.host import HostSpec, weight

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """What of a layer's weights a criterion needs, in fp32.

    Attributes:
        down_norm: (F,) norm of each column of the down projection.
        out_gram: (H, d, d) W_h^T W_h of each head's slice of the out projection.
    """

    down_norm: Tensor
    out_gram: Tensor


def layer_weights(model: nn.Module, spec: HostSpec, layer: int) -> LayerWeights:
    """Reads the weights of one layer; costs one pass over them."""
    down = weight(model, spec.layers[layer].down).detach().float()
    out = weight(model, spec.layers[layer].out).detach().float().unflatten(1, (spec.H, spec.d))
    return LayerWeights(down.norm(dim=0), einsum("ohd,ohe->hde", out, out))


def neuron_magnitude(h: Tensor, weights: LayerWeights) -> Tensor:
    """Norm of each neuron's contribution: h (..., F) -> (..., F)."""
    return h.float().abs() * weights.down_norm


def head_magnitude(a: Tensor, weights: LayerWeights) -> Tensor:
    """Norm of each head's contribution: a (..., H, d) -> (..., H), as sqrt(a^T W^T W a)."""
    a = a.float()
    squared = (einsum("...hd,hde->...he", a, weights.out_gram) * a).sum(-1)
    return squared.clamp_min(0).sqrt()


class Criterion:
    """One definition of importance: override :meth:`heads` and :meth:`neurons`.

    ``g`` is None where ``needs_gradient`` is false, ``weights`` None where ``needs_weights`` is.
    """

    name: ClassVar[str]
    version: ClassVar[str] = ""  # change it with the formula, so that old traces are not used again
    needs_gradient: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False

    @property
    def identity(self) -> str:
        """What tells criteria of one name apart in the hash of a trace folder."""
        cls = type(self)
        return f"{cls.__module__}.{cls.__qualname__}" + (f"@{cls.version}" if cls.version else "")

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        """Scores (..., H), fp32, from activation and gradient (..., H, d)."""
        raise NotImplementedError(f"{type(self).__name__}.heads")

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        """Scores (..., F), fp32, from activation and gradient (..., F)."""
        raise NotImplementedError(f"{type(self).__name__}.neurons")


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


CRITERIA: dict[str, type[Criterion]] = {
    c.name: c for c in (PlainAct, Fisher, L2Norm, Magnitude, GradNorm)
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
