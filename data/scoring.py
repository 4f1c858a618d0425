"""The hooks that score units while a host runs forward and backward once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from gnomon.data.backward import hessian_gradient, unscaled
from gnomon.data.criterion import Criterion, LayerWeights, layer_weights
from gnomon.hooks import HostHooks
from gnomon.host import HostSpec, UnitKind, weight

Write = Callable[[Tensor], None]


class Scorer:
    """Makes a criterion's scores inside the gradient hooks of a host, batch after batch.

    Args:
        model: the host.
        spec: its description.
        criterion: what makes a score.

    Raises:
        ValueError: a criterion of gate and up rows on a host that keeps them in no known order.
    """

    def __init__(self, model: nn.Module, spec: HostSpec, criterion: Criterion) -> None:
        self.model, self.spec, self.criterion = model, spec, criterion
        self._weights: list[LayerWeights | None] = [None] * spec.L
        if criterion.needs_weights:
            self._weights = [layer_weights(model, spec, layer) for layer in range(spec.L)]
        self._rows = row_blocks(spec) if criterion.reads_rows else []
        self._scale = 1.0
        self._moved: list[tuple[Tensor, Write]] = []

    def hook(self, hooks: HostHooks, out: Mapping[UnitKind, Tensor], scale: float) -> None:
        """Hooks every unit tensor of the criterion's kinds.

        Args:
            hooks: of the forward to come.
            out: kind -> (B, T, L, *shape), filled by the backward (or the forward, of a criterion
                without gradient).
            scale: of the loss that will be differentiated.
        """
        self._scale = scale**2 if self.criterion.needs_curvature else scale
        self._moved.clear()
        for kind in self.criterion.kinds:
            for layer in range(self.spec.L):
                into = out[kind][:, :, layer]
                if kind == "neurons" and self._rows:
                    self._hook_rows(hooks, layer, into)
                else:
                    hooks.on_units(kind, layer, self._on_units(kind, layer, into))

    def backward(self, loss: Tensor) -> None:
        """Differentiates the scaled loss, once or twice, which fires the hooks."""
        if not self.criterion.needs_curvature:
            loss.backward()
            return
        curvatures = hessian_gradient(loss, [addition for addition, _ in self._moved])
        for (_, write), curvature in zip(self._moved, curvatures, strict=True):
            write(curvature)
        self._moved.clear()

    def _on_units(
        self, kind: UnitKind, layer: int, out: Tensor
    ) -> Callable[[Tensor], Tensor | None]:
        """The hook of one unit tensor, which writes its scores to ``out`` (B, T, *shape).

        Where curvature is needed it adds zeros, in which the loss is differentiated.
        """
        score = self.criterion.heads if kind == "heads" else self.criterion.neurons
        weights = self._weights[layer]

        def on_units(units: Tensor) -> Tensor | None:
            if not self.criterion.needs_gradient:
                out.copy_(score(units, None, weights))
                return None
            units = _in_graph(units)
            held = [units.detach()]  # shares storage, not the graph: no reference cycle

            def on_gradient(gradient: Tensor) -> None:
                with torch.no_grad():
                    out.copy_(score(held.pop(), unscaled(gradient, self._scale), weights))

            if self.criterion.needs_curvature:
                addition = torch.zeros_like(units, requires_grad=True)
                self._moved.append((addition, on_gradient))
                return units + addition
            units.register_hook(on_gradient)
            return units

        return on_units

    def _hook_rows(self, hooks: HostHooks, layer: int, out: Tensor) -> None:
        """Adds up, for each neuron, the scores of its gate and up rows in ``out`` (B, T, F)."""
        out.zero_()
        for path, blocks in self._rows[layer].items():
            hooks.on_linear(path, self._on_rows(hooks, path, blocks, out))

    def _on_rows(
        self, hooks: HostHooks, path: str, blocks: Sequence[Tensor], out: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        w = weight(self.model, path)

        def on_linear(x: Tensor, y: Tensor) -> Tensor:
            y = _in_graph(y)
            held = [x.detach()]

            def on_gradient(gradient: Tensor) -> None:
                with torch.no_grad():
                    g = unscaled(hooks.rows(gradient), self._scale)
                    rows = self.criterion.rows(held.pop(), g, w)
                    for block in blocks:
                        out.add_(rows[..., block.to(rows.device)])

            y.register_hook(on_gradient)
            return y

        return on_linear


def row_blocks(spec: HostSpec) -> list[dict[str, list[Tensor]]]:
    """Layer by layer, the linears of gate and up, each with the rows (F,) of every neuron in it.

    Raises:
        ValueError: a fused linear whose rows are in no known order.
    """
    roles = ("gate", "up") if spec.gated else ("up",)
    layers: list[dict[str, list[Tensor]]] = []
    for where in spec.layers:
        paths: dict[str, list[Tensor]] = {}
        for role in roles:
            paths.setdefault(getattr(where, role), []).append(spec.blocks(role))
        layers.append(paths)
    return layers


def _in_graph(x: Tensor) -> Tensor:
    """The tensor, or a leaf where the graph begins: the first units of a host."""
    return x if x.requires_grad else x.detach().requires_grad_()
