"""The residual stream of a decoder layer, before, between and after its two sublayers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.hooks import HostHooks
from gnomon.host import module

See = Callable[[Tensor, Tensor | None, Tensor], object]


def watch_stream(hooks: HostHooks, layer: int, see: See) -> None:
    """Calls ``see`` with the stream (B, T, D) before, between and after a layer's sublayers.

    Between them it is what the norm before the FFN reads: that norm is the module without children
    whose output the up projection reads. None where there is no such module, or where it reads what
    enters the layer (parallel sublayers).
    """
    where = hooks.spec.layers[layer]
    block = module(hooks.model, where.path)
    watch = _Watch(hooks, see)
    hooks.add(block.register_forward_pre_hook(watch.enter, with_kwargs=True))
    for child in block.modules():
        if not isinstance(child, nn.Linear) and not list(child.children()):
            hooks.add(child.register_forward_hook(watch.made))
    hooks.add(module(hooks.model, where.up).register_forward_pre_hook(watch.up))
    hooks.add(block.register_forward_hook(watch.leave))


class _Watch:
    """The hooks of one layer, in the order in which they run."""

    def __init__(self, hooks: HostHooks, see: See) -> None:
        self._hooks, self._see = hooks, see
        self._before: Tensor | None = None
        self._middle: Tensor | None = None
        self._sources: dict[int, tuple[Tensor, Tensor]] = {}  # address of an output -> it, input

    @torch.compiler.disable
    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._sources.clear()
        self._middle = None
        self._before = args[0] if args else kwargs["hidden_states"]

    @torch.compiler.disable
    def made(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            self._sources[output.data_ptr()] = output, args[0]

    @torch.compiler.disable
    def up(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        source = self._sources.get(args[0].data_ptr())
        self._middle = None if source is None else source[1]

    @torch.compiler.disable
    def leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        before, middle, rows = self._before, self._middle, self._hooks.rows
        assert before is not None
        if middle is not None and middle.data_ptr() == before.data_ptr():
            middle = None
        self._see(rows(before), None if middle is None else rows(middle), rows(after))
        self._sources.clear()
