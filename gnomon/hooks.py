"""Hooks on a live host: read hidden states, read or replace unit tensors, leave no trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnomon.host import HostSpec, LayerSpec, Tap, UnitKind, module


class HostHooks:
    """Registers hooks against a :class:`HostSpec` and removes all of them on exit.

    Unit tensors are handed over as (B, T, H, d) for heads and (B, T, F) for neurons, hidden states
    as (B, T, W), whatever shape the architecture uses inside (OPT flattens its FFN to rows).
    """

    def __init__(self, model: nn.Module, spec: HostSpec) -> None:
        self.model, self.spec = model, spec
        self._handles: list[Any] = []
        self._shape: tuple[int, int] = (0, 0)
        self._signature = inspect.signature(model.forward)
        first = module(model, spec.layers[0].path)
        self.add(first.register_forward_pre_hook(self._see_shape, with_kwargs=True))

    def on_forward(self, fn: Callable[[dict[str, Any]], None]) -> None:
        """Calls ``fn`` with the bound arguments of every forward of the host, before it runs."""

        @torch.compiler.disable
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = self._signature.bind_partial(*args, **kwargs).arguments
            extra = bound.pop("kwargs", {})
            fn({**bound, **extra})

        self.add(self.model.register_forward_pre_hook(hook, with_kwargs=True))

    def on_cache(self, fn: Callable[[Any], None]) -> None:
        """Calls ``fn`` with the key/value cache (or None) that a forward of the host returns."""

        @torch.compiler.disable
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            fn(getattr(output, "past_key_values", None))

        self.add(self.model.register_forward_hook(hook))

    def on_tap(self, tap: Tap, fn: Callable[[Tensor], None]) -> None:
        """Calls ``fn`` with the hidden state (B, T, W) at a tap, before the module there runs."""

        @torch.compiler.disable
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            fn(self.rows(_hidden(args, kwargs)))

        target = module(self.model, _tap_path(self.spec.layers[tap.layer], tap))
        self.add(target.register_forward_pre_hook(hook, with_kwargs=True))

    def on_units(self, kind: UnitKind, layer: int, fn: Callable[[Tensor], Tensor | None]) -> None:
        """Calls ``fn`` with the unit tensor of a layer; a tensor returned replaces it."""
        spec = self.spec
        path = spec.layers[layer].out if kind == "heads" else spec.layers[layer].down

        @torch.compiler.disable
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x = args[0]
            units = self.rows(x)
            if kind == "heads":
                units = units.unflatten(-1, (spec.H, spec.d))
            out = fn(units)
            return None if out is None else (out.reshape(x.shape), *args[1:])

        self.add(module(self.model, path).register_forward_pre_hook(hook))

    def on_input(self, path: str, fn: Callable[[Tensor], Tensor | None]) -> None:
        """Calls ``fn`` with the input (B, T, W) of a linear; a tensor returned replaces it."""

        @torch.compiler.disable
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            out = fn(self.rows(args[0]))
            return None if out is None else (out.reshape(args[0].shape), *args[1:])

        self.add(module(self.model, path).register_forward_pre_hook(hook))

    def on_output(self, path: str, fn: Callable[[Tensor], object]) -> None:
        """Calls ``fn`` with the output (B, T, N) of a linear."""

        @torch.compiler.disable
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            fn(self.rows(output))

        self.add(module(self.model, path).register_forward_hook(hook))

    def on_linear(self, path: str, fn: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Calls ``fn`` with what a linear reads, (B, T, W), and gives, as it is in the graph; a
        tensor returned replaces the latter."""

        @torch.compiler.disable
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return fn(self.rows(args[0]), output)

        self.add(module(self.model, path).register_forward_hook(hook))

    def on_branch(
        self, layer: int, role: Literal["gate", "up"], fn: Callable[[Tensor], object]
    ) -> None:
        """Calls ``fn`` with what gate or up gives, (B, T, F) in the order of the neurons.

        Raises:
            ValueError: they are one linear whose rows are in no known order.
        """
        path, rows = getattr(self.spec.layers[layer], role), self.spec.blocks(role)
        fused = self.spec.gate_up != "separate"
        self.on_output(path, lambda y: fn(y[..., rows.to(y.device)] if fused else y))

    def remove(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> HostHooks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def add(self, handle: Any) -> None:
        """Keeps the handle of a hook, to be removed with the others."""
        self._handles.append(handle)

    @torch.compiler.disable
    def _see_shape(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _hidden(args, kwargs)
        self._shape = (hidden.shape[0], hidden.shape[1])

    def rows(self, x: Tensor) -> Tensor:
        """Hidden states of the running forward as (B, T, W), also where a host flattens them."""
        return x if x.dim() == 3 else x.reshape(*self._shape, x.shape[-1])


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _tap_path(layer: LayerSpec, tap: Tap) -> str:
    return {
        "layer_input": layer.path,
        "attn_input": layer.q,
        "attn_context": layer.out,
        "ffn_input": layer.up,
    }[tap.site]
