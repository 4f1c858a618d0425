"""Measuring a :class:`Calibration`: a few dense passes over calibration text.

The first pass collects all but one table and the sensitivities (:mod:`gnomon.sensitivity`); CHESS
ranks a gate's channels by |act(gate)| times the mean |up| of the channel, which is known after it,
so that gated hosts are run twice. Quantiles are those of all values of a layer together: they are
read off a histogram over the float's own bits (128 bins an octave), so memory does not grow with
the text.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from gnomon.activation import activation
from gnomon.data.criteria import head_magnitude, layer_weights, neuron_magnitude
from gnomon.data.text import Text
from gnomon.hooks import HostHooks
from gnomon.host import HostSpec, Tap
from gnomon.predictors.base import PredictorInfo
from gnomon.predictors.calibration import POINTS, Calibration
from gnomon.sensitivity import TruncationError, measure_loss
from gnomon.stream import watch_stream
from gnomon.training import versions

_BITS = 16  # of the mantissa that a bin ignores
_BINS = 1 << (31 - _BITS)


class Histogram:
    """Counts of magnitudes, one row per layer."""

    def __init__(self, layers: int) -> None:
        self.counts = torch.zeros(layers, _BINS, dtype=torch.int64)

    def add(self, layer: int, x: Tensor) -> None:
        """Counts |x|, whatever its shape; NaN and infinity are refused by :meth:`quantiles`."""
        bins = x.detach().float().abs().flatten().view(torch.int32) >> _BITS
        self.counts = self.counts.to(x.device)  # not a copy of 32768 counts for each layer and site
        self.counts[layer] += torch.bincount(bins, minlength=_BINS)

    def quantiles(self, layer: int) -> Tensor:
        """The values at POINTS equal steps from the least to the largest, linear within a bin."""
        counts = self.counts[layer].double().cpu()
        ends = counts.cumsum(0)
        rank = torch.linspace(0, 1, POINTS, dtype=torch.float64) * ends[-1]
        place = torch.searchsorted(ends, rank.clamp_min(0.5)).clamp_max(_BINS - 1)
        edges = (torch.arange(_BINS + 1, dtype=torch.int32) << _BITS).view(torch.float32).double()
        inside = (rank - (ends[place] - counts[place])) / counts[place]
        found = edges[place] + inside.clamp(0, 1) * (edges[place + 1] - edges[place])
        if not bool(found.isfinite().all()):
            raise ValueError(
                f"layer {layer} gave NaN or infinite activations: load the host in float32 or "
                "bfloat16 (host.dtype)"
            )
        return found.float()


def calibrate(
    into: Calibration,
    model: nn.Module,
    tokenizer: Any,
    spec: HostSpec,
    text: Text,
    *,
    batch: int = 2,
    seed: int = 0,
    advance: Callable[[int], object] = lambda blocks: None,
) -> PredictorInfo:
    """Fills a calibration from ``text.tokens`` training tokens.

    Args:
        into: an empty calibration of this host.
        model: the host.
        tokenizer: its tokenizer.
        spec: its description.
        text: where documents come from.
        batch: blocks in one forward.
        seed: recorded alone: nothing is drawn.
        advance: called with the blocks done after each forward.

    Returns:
        The record that goes into the folder.

    Raises:
        ValueError: the text is shorter than a block, or activations are not finite.
    """
    blocks = text.blocks(tokenizer, "train")
    info = PredictorInfo(
        host=spec.name,
        revision=spec.revision,
        spec_hash=spec.hash,
        criterion="magnitude",
        granularity="token",
        text=text.name,
        text_digest=blocks.digest,
        text_split=text.facts("train", "validation"),
        tokens=blocks.ids.numel(),
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        versions=versions(),
    )
    measure(into, model, spec, blocks.ids, batch=batch, advance=advance)
    return info


@torch.no_grad()
def measure(
    into: Calibration,
    model: nn.Module,
    spec: HostSpec,
    ids: Tensor,
    *,
    batch: int = 2,
    advance: Callable[[int], object] = lambda blocks: None,
) -> None:
    """Fills a calibration from token ids (n, block); see :func:`calibrate`."""
    few = ids[: max(1, into.sensitivity_tokens // ids.shape[1])]
    passes: list[tuple[_Pass | TruncationError, Tensor]] = [
        (_First(into, model, spec, ids.numel()), ids)
    ]
    passes += [(_GateUp(into, spec), ids)] if spec.gated else []
    if into.measure == "cett":
        passes.append((TruncationError(into, model, spec, few.numel()), few))
    device = next(model.parameters()).device
    for one, blocks in passes:
        with HostHooks(model, spec) as hooks:
            one.hook(hooks)
            for part in blocks.split(batch):
                model(input_ids=part.to(device), use_cache=False)
                advance(len(part))
        one.store()
    if into.measure == "loss":
        measure_loss(into, model, spec, few)


class _Pass:
    """One run over the text: hooks, and what is stored after it."""

    def hook(self, hooks: HostHooks) -> None:
        raise NotImplementedError

    def store(self) -> None:
        raise NotImplementedError


class _First(_Pass):
    """Everything but ``gate_up``."""

    def __init__(self, into: Calibration, model: nn.Module, spec: HostSpec, rows: int) -> None:
        self.into, self.spec, self.rows = into, spec, rows
        self.histograms = {t: Histogram(spec.L) for t in into.tables if t != "gate_up"}
        self.weights = [layer_weights(model, spec, layer) for layer in range(spec.L)]
        self.sums = {"heads": torch.zeros(spec.L, spec.H), "neurons": torch.zeros(spec.L, spec.F)}
        self.up = torch.zeros_like(into.up_mean)
        self.cosines = torch.zeros(spec.L, 3, dtype=torch.float64)
        self.stream: dict[str, Tensor] = {}

    def hook(self, hooks: HostHooks) -> None:
        act = activation(self.spec)
        for layer, paths in enumerate(self.spec.layers):
            for site in ("attn_input", "attn_context", "ffn_input"):
                add = partial(self.histograms[site].add, layer)
                hooks.on_tap(Tap(layer, site), add)  # type: ignore[arg-type]
            hooks.on_units("heads", layer, partial(self._heads, layer))
            hooks.on_units("neurons", layer, partial(self._neurons, layer))
            if paths.gate is not None:
                hooks.on_branch(layer, "gate", partial(self._gate, layer, act))
                hooks.on_branch(layer, "up", partial(self._up, layer))
            watch_stream(hooks, layer, partial(self._stream, layer))

    def store(self) -> None:
        for table, histogram in self.histograms.items():
            _store(self.into, table, histogram)
        self.into.set_means({"heads": self.sums["heads"] / self.rows, "neurons": self._neuron_mean})
        self.into.up_mean.copy_(self.up / self.rows)
        self.into.similarity.copy_(self.cosines / self.rows)

    @property
    def _neuron_mean(self) -> Tensor:
        return self.sums["neurons"] / self.rows

    def _heads(self, layer: int, units: Tensor) -> None:
        found = head_magnitude(units, self.weights[layer])
        self.sums["heads"][layer] += found.flatten(0, 1).sum(0).cpu()

    def _neurons(self, layer: int, units: Tensor) -> None:
        self.histograms["neurons"].add(layer, units)
        found = neuron_magnitude(units, self.weights[layer])
        self.sums["neurons"][layer] += found.flatten(0, 1).sum(0).cpu()

    def _gate(self, layer: int, act: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.histograms["gate"].add(layer, act(x))

    def _up(self, layer: int, x: Tensor) -> None:
        self.up[layer] += x.float().abs().flatten(0, 1).sum(0).cpu()

    def _stream(self, layer: int, before: Tensor, middle: Tensor | None, after: Tensor) -> None:
        pairs = ((before, middle), (middle, after), (before, after))
        for place, (a, b) in enumerate(pairs):
            if a is None or b is None:
                self.cosines[layer, place] = torch.nan
            else:
                close = cosine_similarity(a.float(), b.float(), dim=-1)
                self.cosines[layer, place] += close.double().sum().cpu()


class _GateUp(_Pass):
    """|act(gate)| times the mean |up| of its neuron."""

    def __init__(self, into: Calibration, spec: HostSpec) -> None:
        self.into, self.spec, self.histogram = into, spec, Histogram(spec.L)

    def hook(self, hooks: HostHooks) -> None:
        act = activation(self.spec)
        for layer in range(self.spec.L):
            hooks.on_branch(layer, "gate", partial(self._add, layer, act))

    def store(self) -> None:
        _store(self.into, "gate_up", self.histogram)

    def _add(self, layer: int, act: Callable[[Tensor], Tensor], x: Tensor) -> None:
        mean = self.into.up_mean[layer].to(x.device)
        self.histogram.add(layer, act(x).float() * mean)


def _store(into: Calibration, table: str, histogram: Histogram) -> None:
    rows = [histogram.quantiles(layer) for layer in range(into.L)]
    getattr(into, f"table_{table}").copy_(torch.stack(rows))
    into.values[into.tables.index(table)] = float(histogram.counts[0].sum())
