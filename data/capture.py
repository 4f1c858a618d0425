"""One forward and one backward of the host: predictor inputs, and the scores of every unit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gnomon.data.backward import loss_scales, summed_loss
from gnomon.data.criterion import Criterion
from gnomon.data.scoring import Scorer
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind, weight


@dataclass(frozen=True, eq=False)
class Capture:
    """What one batch gave, on the host's device.

    Attributes:
        inputs: (B, T, n_taps, W) hidden states at the taps, in the host's dtype.
        heads: (B, T, L, H) token scores, fp32; higher = keep. Of a criterion of sets of tokens,
            what it keeps of each, (B, T, L, *shape).
        neurons: (B, T, L, F) token scores, fp32; zero for a criterion of heads alone.
        valid: (B, T) positions that predict a target: unpadded, with an unpadded successor.
            Scores at padding are zero; a row's last token has no gradient.
        ids: (B, T) the tokens.
        criterion: what made the scores.
    """

    inputs: Tensor
    heads: Tensor
    neurons: Tensor
    valid: Tensor
    ids: Tensor
    criterion: Criterion

    def values(self, kind: UnitKind) -> Tensor:
        """What the criterion made of every token, (B, T, L, *shape)."""
        return self.heads if kind == "heads" else self.neurons

    def scores(self, kind: UnitKind) -> Tensor:
        """Token scores (B, T, L, N) of a kind.

        Raises:
            ValueError: the criterion has none.
        """
        self.criterion.require("token")
        return self.values(kind)

    def pooled(self, kind: UnitKind, first: int = 0) -> Tensor:
        """Scores (B, L, N) of each row's positions from ``first`` on together, its last aside."""
        values = self.values(kind)[:, first:-1]
        if "token" in self.criterion.granularities:
            return values.sum(1)
        pairs = zip(values, self.ids[:, first + 1 :], strict=True)
        return torch.stack([self.criterion.pool(kind, row, targets) for row, targets in pairs])

    def total(self, kind: UnitKind) -> Tensor:
        """Sums (L, N) fp64 over the batch, of which the mean over predicting positions is made.

        A score of a whole row counts once for each of its positions.
        """
        rows = self.pooled(kind).double()
        alone = "token" in self.criterion.granularities
        return rows.sum(0) * (1 if alone else self.ids.shape[1] - 1)


class Probe:
    """Captures batch after batch of one host; keeps what does not change between batches.

    The loss is the sum of cross-entropy over unpadded targets, times a power of two on float16
    hosts (:mod:`gnomon.data.backward`). Scores are computed inside the gradient hook of each unit
    tensor, so that neither gradients nor activations outlive it (those of a criterion that needs
    curvature live until its second backward); no gradient of a host's parameter is computed.

    Args:
        model: the host, in eval mode.
        spec: its description.
        taps: which hidden states a predictor reads; all of one width.
        criterion: what makes a score.

    Raises:
        ValueError: a tap outside the host, or taps of different widths; a criterion of gate and up
            rows on a host that keeps them in no known order.
    """

    def __init__(
        self, model: nn.Module, spec: HostSpec, taps: Sequence[Tap], criterion: Criterion
    ) -> None:
        self.model, self.spec, self.taps, self.criterion = model, spec, tuple(taps), criterion
        self.width = tap_width(spec, self.taps)
        self.device: torch.device = weight(model, spec.layers[0].out).device
        self._scorer = Scorer(model, spec, criterion)
        self._scales = loss_scales(_dtype(model, spec), criterion.needs_gradient)
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Capture:
        """Captures one batch.

        Args:
            ids: (B, T) token ids, on any device.
            mask: (B, T) 1 for tokens, 0 for padding; ``None``: no padding.

        Raises:
            ValueError: NaN or inf in a score, with its layer and unit kind.
        """
        gradient = self.criterion.needs_gradient
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradient))
            stack.enter_context(frozen(self.model))
            if self.criterion.needs_curvature:  # fused attention has no second derivative
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            ids = ids.to(self.device, copy=ids.is_inference())
            real = (
                torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) > 0
            )
            for scale in self._scales:
                found = self._run(ids, real, mask is not None, scale)
                bad = _not_finite(found)
                if not bad:
                    return found
        raise ValueError(_overflow(bad))

    def _run(self, ids: Tensor, real: Tensor, padded: bool, scale: float) -> Capture:
        """One forward, and one backward of the loss times ``scale``."""
        found = self._new(ids, real)
        with HostHooks(self.model, self.spec) as hooks:
            for index, tap in enumerate(self.taps):
                hooks.on_tap(tap, _store(found.inputs[:, :, index]))
            self._scorer.hook(hooks, {kind: found.values(kind) for kind in KINDS}, scale)
            logits = self._forward(ids, real if padded else None)
            if self.criterion.needs_gradient:
                self._scorer.backward(summed_loss(logits, ids, found.valid) * scale)
        if padded:
            for kind in self.criterion.kinds:
                values = found.values(kind)
                values.masked_fill_(~real.view(*real.shape, *[1] * (values.dim() - 2)), 0.0)
        return found

    def _new(self, ids: Tensor, real: Tensor) -> Capture:
        """A capture to be filled; kinds without scores take no memory."""
        spec = self.spec
        nothing = torch.zeros((), device=self.device)
        values = {
            kind: self._empty(ids, spec.L, *self.criterion.shape(kind, spec))
            if kind in self.criterion.kinds
            else nothing.expand(*ids.shape, spec.L, spec.units(kind))
            for kind in KINDS
        }
        return Capture(
            inputs=self._empty(ids, len(self.taps), self.width, dtype=_dtype(self.model, spec)),
            heads=values["heads"],
            neurons=values["neurons"],
            valid=_predicting(real),
            ids=ids,
            criterion=self.criterion,
        )

    def _forward(self, ids: Tensor, real: Tensor | None) -> Tensor:
        if real is None:
            return self.model(input_ids=ids, use_cache=False).logits
        extra = {}
        if self._positions:
            extra["position_ids"] = (real.long().cumsum(-1) - 1).clamp_min(0)
        return self.model(
            input_ids=ids, attention_mask=real.long(), use_cache=False, **extra
        ).logits

    def _empty(self, ids: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*ids.shape, *shape, dtype=dtype, device=self.device)


def capture(
    model: nn.Module,
    spec: HostSpec,
    taps: Sequence[Tap],
    criterion: Criterion,
    ids: Tensor,
    mask: Tensor | None = None,
) -> Capture:
    """One batch through a fresh :class:`Probe`, which see; ids and mask are (B, T)."""
    return Probe(model, spec, taps, criterion)(ids, mask)


def tap_width(spec: HostSpec, taps: Sequence[Tap]) -> int:
    """The common width W of the taps.

    Raises:
        ValueError: no tap, a layer that the host does not have, or different widths.
    """
    if not taps:
        raise ValueError("taps is empty: a predictor reads at least one hidden state")
    outside = [t for t in taps if not 0 <= t.layer < spec.L]
    if outside:
        raise ValueError(f"taps {outside} are outside the {spec.L} layers of {spec.name}")
    widths = {t.site: spec.width(t.site) for t in taps}
    if len(set(widths.values())) > 1:
        raise ValueError(f"taps have different widths {widths}: use sites of one width")
    return next(iter(widths.values()))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for any parameter inside; flags as they were afterwards."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def _store(out: Tensor) -> Callable[[Tensor], None]:
    def on_tap(hidden: Tensor) -> None:
        with torch.no_grad():
            out.copy_(hidden)

    return on_tap


def _dtype(model: nn.Module, spec: HostSpec) -> torch.dtype:
    dtype = weight(model, spec.layers[0].out).dtype
    return dtype if dtype.is_floating_point else torch.float32


def _predicting(real: Tensor) -> Tensor:
    valid = torch.zeros_like(real)
    valid[:, :-1] = real[:, :-1] & real[:, 1:]
    return valid


def _not_finite(found: Capture) -> list[tuple[UnitKind, int]]:
    """Kinds and layers whose scores hold NaN or inf; one device sync for the whole batch."""
    kinds = found.criterion.kinds
    sums = torch.stack([found.values(kind).flatten(3).sum(dim=(0, 1, 3)) for kind in kinds])
    return [(kinds[k], layer) for k, layer in (~sums.isfinite()).nonzero().tolist()]


def _overflow(bad: Sequence[tuple[UnitKind, int]]) -> str:
    kind, layer = bad[0]
    more = f" and {len(bad) - 1} more (layer, kind) pairs" if len(bad) > 1 else ""
    return (
        f"NaN or inf in the scores of {kind} in layer {layer}{more}: the host overflows on "
        "this text; load it in bfloat16 or float32 (host.dtype=float32)"
    )
