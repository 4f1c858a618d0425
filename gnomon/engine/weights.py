"""A host's weights in the layout that the decode kernels read, without holding them twice.

k, v and q rows of a layer become one (2G + H)·d x D tensor and the columns of the out and down
projections rows of transposed ones. The host's own parameters turn into views of these, of the same
shape and the very same values, so that the host still runs (dense prefill) while both are in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from gnomon.accounting import Role
from gnomon.engine.expressible import decoder_of
from gnomon.host import HostSpec, LayerSpec, UnitKind, module
from gnomon.kernels.rowscaled_linear import quantize_rows


@dataclass(frozen=True)
class Matrix:
    """A weight as kernels read it: rows of units.

    With one scale per row where they are int8; int4 ones, two to a byte, have one per 32 weights.
    """

    weight: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of weight and scales."""
        tensors = (self.weight,) if self.scale is None else (self.weight, self.scale)
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def int4(self) -> bool:
        """Whether it is int4."""
        return self.scale is not None and self.scale.dim() == 2

    def rows(self, index: Tensor) -> Matrix:
        """A contiguous copy of chosen rows (n,) int64."""
        return Matrix(self.weight[index], None if self.scale is None else self.scale[index])

    def quantized(self) -> Matrix:
        """Row-scaled int8."""
        return self if self.scale is not None else Matrix(*quantize_rows(self.weight))


@dataclass(frozen=True)
class Rest:
    """Compressed neurons of a layer, int8 or int4: N of them, as rows of ``LayerWeights`` are."""

    up: Matrix
    up_bias: Tensor | None
    gate: Matrix | None
    gate_bias: Tensor | None
    down_t: Matrix


@dataclass(frozen=True)
class LayerWeights:
    """One layer.

    Attributes:
        kvq: ((2G + H)·d, D), the rows of k, v and q; ``kvq_bias`` or None. Its transpose where
            input channels of all three are skipped; k and v alone where only q's are.
        out_t: (H·d, D); ``out_bias`` (D,) or None.
        up, gate: (F, D), or (D, F) where input channels are skipped; gate None in a plain FFN;
            ``up_bias``, ``gate_bias`` (F,) or None.
        down_t: (F, D); ``down_bias`` (D,) or None.
        q_t: (D, H·d) where input channels of q alone are skipped; ``q_bias`` (H·d,) or None.
        rest: neurons beside those of ``up``, ``gate`` and ``down_t``, compressed; or None.
    """

    kvq: Matrix
    kvq_bias: Tensor | None
    out_t: Matrix
    out_bias: Tensor | None
    up: Matrix
    up_bias: Tensor | None
    gate: Matrix | None
    gate_bias: Tensor | None
    down_t: Matrix
    down_bias: Tensor | None
    q_t: Matrix | None = None
    q_bias: Tensor | None = None
    rest: Rest | None = None


@dataclass(frozen=True)
class StepWeights:
    """Every weight of a decode step.

    Attributes:
        embed: (V, D).
        head: (V, D), the same tensor where they are tied; ``head_bias`` (V,) or None.
        project_in, project_out: around the layers of a host whose embeddings are E wide, not D
            (OPT-350m): (D, E) and (E, D), and ``embed`` and ``head`` are (V, E); else None.
        turned: linears laid out by input channel (:mod:`gnomon.engine.turned`).
    """

    layers: tuple[LayerWeights, ...]
    embed: Tensor
    head: Matrix
    head_bias: Tensor | None
    project_in: Tensor | None = None
    project_out: Tensor | None = None
    turned: frozenset[Role] = frozenset()

    @property
    def int8(self) -> bool:
        """Whether the matrices are row-scaled int8."""
        return self.head.scale is not None

    def quantized(self) -> StepWeights:
        """Row-scaled int8 throughout but for the embedding and its projections.

        Rows are units here: the scale of an out or down projection belongs to its input channel,
        not to its output as in the ``dense_int8`` policy.
        """
        return replace(
            self,
            layers=tuple(_quantized(layer) for layer in self.layers),
            head=self.head.quantized(),
        )


@contextmanager
def laid_out(model: nn.Module, spec: HostSpec) -> Iterator[StepWeights]:
    """Lays a host's weights out for the kernels; puts its own layout back on exit.

    At any time the weights of one layer at most are held twice, on exit as long as nobody holds
    what was yielded.
    """
    try:
        yield lay_out(model, spec)
    finally:
        restore(model, spec)


@torch.no_grad()
def lay_out(
    model: nn.Module,
    spec: HostSpec,
    then: Callable[[LayerSpec, LayerWeights], LayerWeights] = lambda paths, layer: layer,
) -> StepWeights:
    """The layout itself, each layer followed by ``then``; :func:`restore` takes it back."""
    head, decoder = module(model, spec.head), decoder_of(model, spec)
    ends = (getattr(decoder, name, None) for name in ("project_in", "project_out"))
    project_in, project_out = (None if end is None else end.weight.data for end in ends)
    return StepWeights(
        layers=tuple(then(layer, _layer(model, layer)) for layer in spec.layers),
        embed=parameter_of(model, spec.embed).data,
        head=Matrix(parameter_of(model, spec.head).data),
        head_bias=_bias(head),
        project_in=project_in,
        project_out=project_out,
    )


@torch.no_grad()
def restore(model: nn.Module, spec: HostSpec) -> None:
    """Gives every linear a contiguous tensor of its own again."""
    for layer in spec.layers:
        for path in layer.linears:
            parameter = parameter_of(model, path)
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def compacted(
    weights: StepWeights,
    spec: HostSpec,
    kept: Mapping[tuple[UnitKind, int], Tensor],
    into: StepWeights | None = None,
) -> StepWeights:
    """Contiguous copies of the kept rows, for decisions that hold for a sequence.

    Args:
        weights: of the whole host.
        spec: its description.
        kept: (kind, layer) -> (n,) int64 neurons, or blocks of d rows of the fused k, v, q weights
            for heads; layers that are not named keep the whole host's tensors.
        into: an earlier result for as many rows, whose buffers are filled again: a captured
            graph reads them where they are.
    """
    layers = []
    for i, layer in enumerate(weights.layers):
        found = _compacted_heads(layer, spec, kept.get(("heads", i)))
        found = _compacted_neurons(found, kept.get(("neurons", i)))
        if into is not None:
            found = _refill(into.layers[i], found)
        layers.append(found)
    return replace(weights, layers=tuple(layers))


def _compacted_heads(layer: LayerWeights, spec: HostSpec, kept: Tensor | None) -> LayerWeights:
    if kept is None:
        return layer
    within = torch.arange(spec.d, device=kept.device)
    rows = (kept[:, None] * spec.d + within).flatten()
    heads = kept[kept >= 2 * spec.G] - 2 * spec.G
    return replace(
        layer,
        kvq=layer.kvq.rows(rows),
        kvq_bias=None if layer.kvq_bias is None else layer.kvq_bias[rows],
        out_t=layer.out_t.rows((heads[:, None] * spec.d + within).flatten()),
    )


def _compacted_neurons(layer: LayerWeights, kept: Tensor | None) -> LayerWeights:
    if kept is None:
        return layer
    return replace(
        layer,
        up=layer.up.rows(kept),
        up_bias=None if layer.up_bias is None else layer.up_bias[kept],
        gate=None if layer.gate is None else layer.gate.rows(kept),
        gate_bias=None if layer.gate_bias is None else layer.gate_bias[kept],
        down_t=layer.down_t.rows(kept),
    )


def _refill(target: LayerWeights, source: LayerWeights) -> LayerWeights:
    """Copies new rows into the buffers of old ones."""
    for field in fields(LayerWeights):
        if field.name == "rest":  # of policies that decide nothing
            continue
        old, new = getattr(target, field.name), getattr(source, field.name)
        for name in ("weight", "scale") if isinstance(old, Matrix) else ("",):
            a, b = (getattr(old, name), getattr(new, name)) if name else (old, new)
            if a is not None and a.data_ptr() != b.data_ptr():
                a.copy_(b)
    return target


def _layer(model: nn.Module, layer: LayerSpec) -> LayerWeights:
    kvq = _fused(model, (layer.k, layer.v, layer.q))
    biases = [_bias(module(model, path)) for path in (layer.k, layer.v, layer.q)]
    return LayerWeights(
        kvq=Matrix(kvq),
        kvq_bias=_fused_bias(model, layer, biases),
        out_t=Matrix(_transposed(model, layer.out)),
        out_bias=_bias(module(model, layer.out)),
        up=_plain(model, layer.up),
        up_bias=_bias(module(model, layer.up)),
        gate=None if layer.gate is None else _plain(model, layer.gate),
        gate_bias=None if layer.gate is None else _bias(module(model, layer.gate)),
        down_t=Matrix(_transposed(model, layer.down)),
        down_bias=_bias(module(model, layer.down)),
    )


def _fused(model: nn.Module, paths: tuple[str, ...]) -> Tensor:
    """Rows of several linears in one tensor, of which they become views."""
    parameters = [parameter_of(model, path) for path in paths]
    fused = torch.cat([p.data for p in parameters])
    start = 0
    for parameter in parameters:
        end = start + parameter.shape[0]
        parameter.data = fused[start:end]
        start = end
    return fused


def _fused_bias(model: nn.Module, layer: LayerSpec, biases: list[Tensor | None]) -> Tensor | None:
    if all(bias is None for bias in biases):
        return None
    rows = [parameter_of(model, path).shape[0] for path in (layer.k, layer.v, layer.q)]
    like = next(bias for bias in biases if bias is not None)
    return torch.cat(
        [like.new_zeros(n) if b is None else b for b, n in zip(biases, rows, strict=True)]
    )


def _transposed(model: nn.Module, path: str) -> Tensor:
    """(in, out) contiguous; the linear's weight becomes its transposed view."""
    parameter = parameter_of(model, path)
    turned = parameter.data.t().contiguous()
    parameter.data = turned.t()
    return turned


def _plain(model: nn.Module, path: str) -> Matrix:
    parameter = parameter_of(model, path)
    parameter.data = parameter.data.contiguous()
    return Matrix(parameter.data)


def parameter_of(model: nn.Module, path: str) -> nn.Parameter:
    """The weight of a linear."""
    weight = module(model, path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.data.float()


def _quantized(layer: LayerWeights) -> LayerWeights:
    return _each(layer, Matrix.quantized)


def _each(layer: LayerWeights, fn: Callable[[Matrix], Matrix]) -> LayerWeights:
    return replace(
        layer,
        kvq=fn(layer.kvq),
        out_t=fn(layer.out_t),
        up=fn(layer.up),
        gate=None if layer.gate is None else fn(layer.gate),
        down_t=fn(layer.down_t),
    )
