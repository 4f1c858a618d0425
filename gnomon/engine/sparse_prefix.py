"""Sparse prefill: the host's own forward over the prompt, on the decode step's compacted weights.

Only what attention reshapes keeps its width: q rows of skipped heads, and under ``kv=drop`` k and v
rows of idle groups, are zero without being computed. Between gate, up and down all is elementwise,
so that the FFN is as narrow as its kept neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnomon.engine.active import Active
from gnomon.engine.weights import LayerWeights, StepWeights
from gnomon.host import HostSpec, LayerSpec, UnitKind, module

Forward = Callable[[Tensor], Tensor]


@contextmanager
def compacted_linears(
    model: nn.Module,
    spec: HostSpec,
    weights: StepWeights,
    sets: Mapping[tuple[UnitKind, int], Active],
) -> Iterator[None]:
    """Inside, the host computes kept units alone; its linears' forwards are put back on exit.

    Args:
        model: the host.
        spec: its description.
        weights: compacted by ``sets``.
        sets: (kind, layer) -> the set of the whole batch; a layer that is missing is dense.
    """
    held: list[tuple[nn.Module, Any]] = []
    try:
        for i, layer in enumerate(spec.layers):
            small, forwards = weights.layers[i], dict[str, Forward]()
            heads, neurons = sets.get(("heads", i)), sets.get(("neurons", i))
            if heads is not None:
                forwards |= _attention(spec, layer, small, heads)
            if neurons is not None:
                forwards |= _ffn(layer, small)
            for path, forward in forwards.items():
                linear = module(model, path)
                held.append((linear, linear.__dict__.get("forward")))
                linear.forward = torch.compiler.disable(forward)  # type: ignore[method-assign]
        yield
    finally:
        for linear, own in reversed(held):
            del linear.forward
            if own is not None:
                linear.forward = own  # type: ignore[method-assign]


def _attention(
    spec: HostSpec, layer: LayerSpec, small: LayerWeights, active: Active
) -> dict[str, Forward]:
    """Forwards of the projections of kept heads."""
    assert active.compacted and active.kvq is not None and small.kvq.scale is None
    groups = spec.G if active.groups is None else active.groups
    heads = _rows(active.index[0], spec.d)
    parts = {layer.q: (slice(2 * groups * spec.d, None), heads, spec.H * spec.d)}
    if active.groups is not None:
        used, wide = _rows(active.kvq[0, :groups], spec.d), groups * spec.d
        parts[layer.k] = (slice(0, wide), used, spec.G * spec.d)
        parts[layer.v] = (slice(wide, 2 * wide), used, spec.G * spec.d)
    forwards: dict[str, Forward] = {
        path: partial(_spread, small.kvq.weight[own], _part(small.kvq_bias, own), places, width)
        for path, (own, places, width) in parts.items()
    }
    out = partial(_linear, small.out_t.weight.t(), small.out_bias)
    forwards[layer.out] = lambda x: out(x[..., heads])
    return forwards


def _ffn(layer: LayerSpec, small: LayerWeights) -> dict[str, Forward]:
    """Forwards of the projections of kept neurons."""
    assert small.up.scale is None
    forwards: dict[str, Forward] = {
        layer.up: partial(_linear, small.up.weight, small.up_bias),
        layer.down: partial(_linear, small.down_t.weight.t(), small.down_bias),
    }
    if layer.gate is not None:
        assert small.gate is not None
        forwards[layer.gate] = partial(_linear, small.gate.weight, small.gate_bias)
    return forwards


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _spread(weight: Tensor, bias: Tensor | None, places: Tensor, width: int, x: Tensor) -> Tensor:
    """Few outputs, each at its own place among ``width``; zero elsewhere."""
    y = _linear(weight, bias, x)
    return y.new_zeros(*y.shape[:-1], width).index_copy_(-1, places, y)


def _rows(units: Tensor, block: int) -> Tensor:
    within = torch.arange(block, device=units.device)
    return (units.long()[:, None] * block + within).flatten()


def _part(bias: Tensor | None, own: slice) -> Tensor | None:
    return None if bias is None else bias[own]
