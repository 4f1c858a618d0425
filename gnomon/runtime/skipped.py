"""Attention sublayers that are never run at sparse positions: no projections, no cache.

Where a policy skips a layer's attention for good, its module is left out of every forward that has
no dense token, and what the prompt wrote into the layer's cache is given back after it. What comes
out is what no active head gives: the out-projection's bias.

Three kinds of layers keep running their zeroed attention: those from which the host counts the
tokens in its cache (the first of each attention type), those where the policy reads a hidden state,
and those whose attention module adds the residual itself (BLOOM).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from gnomon.host import module

if TYPE_CHECKING:
    from gnomon.runtime.session import Session


class SkippedAttention:
    """Leaves attention modules out for one session.

    Args:
        session: says which forward is running.
        model: the host.
    """

    def __init__(self, session: Session, model: nn.Module) -> None:
        self.session, self.model, self.spec = session, model, session.spec
        read = {t.layer for t in session.policy.taps() if t.site in ("attn_input", "attn_context")}
        counted = _counted(model, self.spec.L)
        self.layers = [
            i
            for i in range(self.spec.L)
            if session.policy.skips("heads", i)
            and i not in read | counted
            and "residual" not in signature(self._attention(i).forward).parameters
        ]

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """The modules are left out inside; their forwards are put back on exit."""
        held: list[tuple[nn.Module, Any]] = []
        try:
            for i in self.layers:
                attention = self._attention(i)
                held.append((attention, attention.__dict__.get("forward")))
                forward = partial(self._run, i, attention.forward)
                attention.forward = torch.compiler.disable(forward)  # type: ignore[method-assign]
            yield
        finally:
            for attention, own in held:
                del attention.forward
                if own is not None:
                    attention.forward = own  # type: ignore[method-assign]

    def forget(self, cache: Any) -> None:
        """Gives back what a prompt has written into the caches of skipped layers."""
        if self.session.start is None:
            return
        for i in self.layers:
            held = getattr(cache, "layers", ())
            layer: Any = held[i] if i < len(held) else None
            if type(layer) is DynamicLayer and layer.keys is not None and layer.keys.numel():
                layer.keys = layer.keys[..., :0, :].clone()
                layer.values = layer.values[..., :0, :].clone()

    def _attention(self, layer: int) -> nn.Module:
        """The module that owns a layer's out-projection."""
        return module(self.model, self.spec.layers[layer].out.rpartition(".")[0])

    def _run(
        self, layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        session = self.session
        if not session.all_sparse:
            return original(*args, **kwargs)
        session.note_skipped("heads", layer)
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        out = hidden.new_zeros(*hidden.shape[:-1], self.spec.D)
        bias = getattr(module(self.model, self.spec.layers[layer].out), "bias", None)
        return (out if bias is None else out + bias), None


def _counted(model: Any, depth: int) -> set[int]:
    """The first layer of each attention type: the host reads lengths of its cache there."""
    types = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if not types:
        return {0}
    return {0, *(types.index(kind) for kind in set(types[:depth]))}
