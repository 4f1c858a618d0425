"""Measuring sensitivities: what each layer's output or the logits lose at a few densities.

Units are chosen by their true magnitude at every token, as the oracle does. ``cett`` is the
relative error of a sublayer's output, ‖W·(h − h_kept)‖ / ‖W·h‖ in the mean over tokens (the
cumulative error of tail truncation of https://arxiv.org/abs/2402.03804); one dense pass gives it at
all densities. ``loss`` is the KL divergence of the logits from the dense model's when one sublayer
alone is sparse: two passes per layer and density, but in one currency for heads and neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gnomon.data.criteria import LayerWeights, head_magnitude, layer_weights, neuron_magnitude
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, UnitKind, weight
from gnomon.kernels.topk_mask import ranked
from gnomon.predictors.calibration import Calibration

Advance = Callable[[int], object]


class TruncationError:
    """A pass over the text that measures ``cett``.

    Args:
        into: takes the errors.
        model: the host.
        spec: its description.
        rows: tokens of the text.
    """

    def __init__(self, into: Calibration, model: nn.Module, spec: HostSpec, rows: int) -> None:
        self.into, self.model, self.spec, self.rows = into, model, spec, rows
        self.weights = [layer_weights(model, spec, layer) for layer in range(spec.L)]
        shape = (spec.L, len(into.densities))
        self.sums = {kind: torch.zeros(shape, dtype=torch.float64) for kind in KINDS}

    def hook(self, hooks: HostHooks) -> None:
        """Reads the unit tensors."""
        for kind in KINDS:
            for layer in range(self.spec.L):
                hooks.on_units(kind, layer, partial(self._add, kind, layer))

    def store(self) -> None:
        """Writes the mean over tokens."""
        for kind in KINDS:
            self.into.errors[kind].copy_(self.sums[kind] / self.rows)

    def _add(self, kind: UnitKind, layer: int, units: Tensor) -> None:
        paths, units = self.spec.layers[layer], units.detach().float()
        turn = weight(self.model, paths.out if kind == "heads" else paths.down).detach().float().t()
        whole = (_flat(kind, units) @ turn).norm(dim=-1).clamp_min(1e-30)
        place_of = ranking(kind, units, self.weights[layer])  # one sort serves all densities
        for place, density in enumerate(self.into.densities):
            out = place_of >= round(density * self.spec.units(kind))
            lost = (_flat(kind, _masked(kind, units, out)) @ turn).norm(dim=-1)
            self.sums[kind][layer, place] += (lost / whole).double().sum().cpu()


class _OneSparse:
    """Masks the units of one layer at a time."""

    def __init__(self, model: nn.Module, spec: HostSpec, hooks: HostHooks) -> None:
        self.at: tuple[UnitKind, int, float] | None = None
        self.weights = [layer_weights(model, spec, layer) for layer in range(spec.L)]
        for kind in KINDS:
            for layer in range(spec.L):
                hooks.on_units(kind, layer, partial(self._mask, kind, layer))

    def _mask(self, kind: UnitKind, layer: int, units: Tensor) -> Tensor | None:
        if self.at is None or self.at[:2] != (kind, layer):
            return None
        place_of = ranking(kind, units, self.weights[layer])
        return _masked(kind, units, place_of < round(self.at[2] * place_of.shape[-1]))


@torch.no_grad()
def measure_loss(
    into: Calibration,
    model: nn.Module,
    spec: HostSpec,
    ids: Tensor,
    *,
    advance: Advance = lambda blocks: None,
) -> None:
    """Fills the errors of a calibration with ``loss`` over ids (n, block)."""
    device = next(model.parameters()).device
    sums = {k: torch.zeros(spec.L, len(into.densities), dtype=torch.float64) for k in KINDS}
    with HostHooks(model, spec) as hooks:
        sparse = _OneSparse(model, spec, hooks)
        for block in ids.to(device).split(1):
            sparse.at = None
            dense = _log_probabilities(model, block)
            for kind in KINDS:
                for layer in range(spec.L):
                    for place, density in enumerate(into.densities):
                        sparse.at = (kind, layer, density)
                        found = _log_probabilities(model, block)
                        kl = (dense.exp() * (dense - found)).sum()
                        sums[kind][layer, place] += kl.double().clamp_min(0).cpu()
            advance(1)
    for kind in KINDS:
        into.errors[kind].copy_(sums[kind] / ids.numel())


def ranking(kind: UnitKind, units: Tensor, weights: LayerWeights) -> Tensor:
    """Place of each unit in the oracle's order of its token, 0 for the largest: (B, T, N)."""
    measure = head_magnitude if kind == "heads" else neuron_magnitude
    order = ranked(measure(units, weights)).sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _masked(kind: UnitKind, units: Tensor, keep: Tensor) -> Tensor:
    return units * (keep[..., None] if kind == "heads" else keep)


def _flat(kind: UnitKind, units: Tensor) -> Tensor:
    return units.flatten(-2) if kind == "heads" else units


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T, V) in fp32."""
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
