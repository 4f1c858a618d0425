"""One forward and one backward of the host: predictor inputs, and the scores of every unit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from gnomon.data.criteria import Criterion, LayerWeights, layer_weights
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind, weight


@dataclass(frozen=True, eq=False)
class Capture:
    """What one batch gave, on the host's device.

    Attributes:
        inputs: (B, T, n_taps, W) hidden states at the taps, in the host's dtype.
        heads: (B, T, L, H) token scores, fp32; higher = keep.
        neurons: (B, T, L, F) token scores, fp32.
        valid: (B, T) positions that predict a target: unpadded, with an unpadded successor.
            Scores at padding are zero; a row's last token has no gradient.
    """

    inputs: Tensor
    heads: Tensor
    neurons: Tensor
    valid: Tensor

    def scores(self, kind: UnitKind) -> Tensor:
        """Token scores (B, T, L, N) of a kind."""
        return self.heads if kind == "heads" else self.neurons


class Probe:
    """Captures batch after batch of one host; keeps what does not change between batches.

    The loss is the sum of cross-entropy over unpadded targets. Scores are computed inside the
    gradient hook of each unit tensor, so that neither gradients nor activations outlive it; no
    gradient of a host's parameter is computed.

    Args:
        model: the host, in eval mode.
        spec: its description.
        taps: which hidden states a predictor reads; all of one width.
        criterion: what makes a score.

    Raises:
        ValueError: a tap outside the host, or taps of different widths.
    """

    def __init__(
        self, model: nn.Module, spec: HostSpec, taps: Sequence[Tap], criterion: Criterion
    ) -> None:
        self.model, self.spec, self.taps, self.criterion = model, spec, tuple(taps), criterion
        self.width = tap_width(spec, self.taps)
        self.device: torch.device = weight(model, spec.layers[0].out).device
        self._weights: list[LayerWeights | None] = [None] * spec.L
        if criterion.needs_weights:
            self._weights = [layer_weights(model, spec, layer) for layer in range(spec.L)]
        self._positions = "position_ids" in inspect.signature(model.forward).parameters

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Capture:
        """Captures one batch.

        Args:
            ids: (B, T) token ids, on any device.
            mask: (B, T) 1 for tokens, 0 for padding; ``None``: no padding.

        Raises:
            ValueError: NaN or inf in a score, with its layer and unit kind.
        """
        spec, gradient = self.spec, self.criterion.needs_gradient
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradient))
            stack.enter_context(frozen(self.model))
            ids = ids.to(self.device, copy=ids.is_inference())
            real = (
                torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device) > 0
            )
            found = Capture(
                inputs=self._empty(ids, len(self.taps), self.width, dtype=_dtype(self.model, spec)),
                heads=self._empty(ids, spec.L, spec.H),
                neurons=self._empty(ids, spec.L, spec.F),
                valid=_predicting(real),
            )
            hooks = stack.enter_context(HostHooks(self.model, spec))
            self._hook(hooks, found)
            logits = self._forward(ids, None if mask is None else real)
            if gradient:
                _summed_loss(logits, ids, found.valid).backward()
        if mask is not None:
            for kind in KINDS:
                found.scores(kind).masked_fill_(~real[:, :, None, None], 0.0)
        _require_finite(found)
        return found

    def _hook(self, hooks: HostHooks, found: Capture) -> None:
        for index, tap in enumerate(self.taps):
            hooks.on_tap(tap, _store(found.inputs[:, :, index]))
        for kind in KINDS:
            score = self.criterion.heads if kind == "heads" else self.criterion.neurons
            for layer in range(self.spec.L):
                out = found.scores(kind)[:, :, layer]
                on_units = self._scorer(score, self._weights[layer], out)
                hooks.on_units(kind, layer, on_units)

    def _scorer(
        self, score: Callable[..., Tensor], weights: LayerWeights | None, out: Tensor
    ) -> Callable[[Tensor], Tensor | None]:
        """The hook of one unit tensor, which writes its scores to ``out`` (B, T, N)."""

        def on_units(units: Tensor) -> Tensor | None:
            if not self.criterion.needs_gradient:
                out.copy_(score(units, None, weights))
                return None
            if not units.requires_grad:  # the first units of the host: the graph begins here
                units = units.detach().requires_grad_()
            held = [units.detach()]  # shares storage, not the graph: no reference cycle

            def on_gradient(gradient: Tensor) -> None:
                with torch.no_grad():
                    out.copy_(score(held.pop(), gradient, weights))

            units.register_hook(on_gradient)
            return units

        return on_units

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


def _summed_loss(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    targets = ids[:, 1:].masked_fill(~valid[:, :-1], -100).to(logits.device)
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return nnf.cross_entropy(
        exact[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def _require_finite(found: Capture) -> None:
    """One device sync for the whole batch."""
    sums = torch.stack([found.scores(kind).sum(dim=(0, 1, 3)) for kind in KINDS])
    bad = (~sums.isfinite()).nonzero().tolist()
    if bad:
        kind, layer = KINDS[bad[0][0]], bad[0][1]
        more = f" and {len(bad) - 1} more (layer, kind) pairs" if len(bad) > 1 else ""
        raise ValueError(
            f"NaN or inf in the scores of {kind} in layer {layer}{more}: the host overflows on "
            "this text; load it in bfloat16 or float32 (host.dtype=float32)"
        )
