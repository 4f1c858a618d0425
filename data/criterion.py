"""What a criterion is: the base classes, and the weights that a formula may need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, einsum, nn

from gnomon.host import KINDS, HostSpec, UnitKind, weight

GRANULARITIES = ("token", "prompt", "static")


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
    granularities: ClassVar[tuple[str, ...]] = GRANULARITIES  # what it has scores of
    kinds: ClassVar[tuple[UnitKind, ...]] = KINDS  # unit kinds that it has scores of
    needs_gradient: ClassVar[bool] = True
    needs_curvature: ClassVar[bool] = False  # ``g`` is then the Hessian times the gradient
    needs_weights: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = False  # neurons are scored by :meth:`rows`, not :meth:`neurons`

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

    def rows(self, x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        """Scores (..., R), fp32, of the rows of a gate or up projection; added up by neuron.

        Args:
            x: (..., D) what the linear reads.
            g: (..., R) gradient of what it gives.
            w: (R, D) its weight.
        """
        raise NotImplementedError(f"{type(self).__name__}.rows")

    def shape(self, kind: UnitKind, spec: HostSpec) -> tuple[int, ...]:
        """Shape of what is kept of one token and layer: its scores (N,)."""
        return (spec.units(kind),)

    def pool(self, kind: UnitKind, values: Tensor, targets: Tensor) -> Tensor:
        """Score (L, N) of a set of tokens: here the sum of token scores.

        Args:
            kind: of the units.
            values: (n, L, N), or (n, L, *shape).
            targets: (n,) the token that each position predicts.
        """
        return values.sum(0)

    def require(self, granularity: str) -> None:
        """Raises ValueError where the criterion has no scores of that granularity."""
        if granularity in self.granularities:
            return
        static = "gnomon.data.static.static_scores with policy Static"
        prompt = "harvest.granularity=prompt, "
        raise ValueError(
            f"criterion={self.name} has no {granularity} scores, it is defined for "
            f"{' and '.join(self.granularities)} alone: use "
            f"{prompt if 'prompt' in self.granularities else ''}{static}, or a criterion that has "
            "them, such as criterion=plainact"
        )


class SetCriterion(Criterion):
    """A criterion of a set of tokens together: a single token has no score.

    :meth:`heads` and :meth:`neurons` give what is kept of every token, :meth:`pool` the score.
    """

    granularities: ClassVar[tuple[str, ...]] = ("prompt", "static")

    def shape(self, kind: UnitKind, spec: HostSpec) -> tuple[int, ...]:
        """(H, d) of a head, (F,) of neurons."""
        return (spec.H, spec.d) if kind == "heads" else (spec.F,)

    def pool(self, kind: UnitKind, values: Tensor, targets: Tensor) -> Tensor:
        """Score (L, N) of a set of tokens; see :meth:`Criterion.pool`."""
        raise NotImplementedError(f"{type(self).__name__}.pool")
