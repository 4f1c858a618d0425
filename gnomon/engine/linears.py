"""The linears of a decode step: by rows, by lists of units, or by the input channels that pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gnomon.accounting import Role
from gnomon.engine.active import Active, Decider, LayerSketch
from gnomon.engine.arithmetic import Norm
from gnomon.engine.ops import Ops
from gnomon.engine.weights import LayerWeights, Matrix, Rest
from gnomon.host import HostSpec

Followed = tuple[Tensor | None, Tensor | None, Tensor | None]
QKV: tuple[Role, ...] = ("k", "v", "q")
GATE_UP: tuple[Role, ...] = ("gate", "up")


class Linears:
    """The projections of one step.

    Args:
        spec: the host's.
        decider: what is active, and the thresholds of input channels.
        ops: the operators.
        activation: of the FFN, as the kernels name it.
    """

    def __init__(self, spec: HostSpec, decider: Decider, ops: Ops, activation: str) -> None:
        self.spec, self.decider, self.ops, self.activation = spec, decider, ops, activation

    def rows(
        self,
        x: Tensor,
        matrix: Matrix,
        norm: Norm,
        bias: Tensor | None,
        active: Active | None = None,
    ) -> Tensor:
        """Normed x times the rows of a matrix: all, or the kept heads' with all k and v rows."""
        norms = (norm.weight, norm.bias, norm.kind, norm.eps, torch.float32)
        lists = (None, None) if active is None else (active.kvq, active.kvq_count)
        index, count, wanted = followed(active, *lists)
        if active is None or (index is None and wanted is None):
            return self.ops.row_gather(x, matrix.weight, None, 1, None, matrix.scale, bias, *norms)
        how = (index, self.spec.d, count, matrix.scale, bias, *norms, active.early, wanted)
        return self.ops.row_gather(x, matrix.weight, *how)

    def passing(
        self,
        roles: Sequence[Role],
        layer: int,
        x: Tensor,
        matrix: Matrix,
        bias: Tensor | None,
        **fused: Any,
    ) -> Tensor:
        """x (B, W) times a matrix by input channel, of which those that pass are read.

        Args:
            roles: linears that the matrix holds; they share a threshold.
            layer: theirs.
            x: their input.
            matrix: (W, N).
            bias: (N,) or None.
            fused: what follows the sum, as in ``threshold_gemv_reference``.
        """
        cuts = [self.decider.cut(role, layer, x) for role in roles]
        how = (bias, matrix.scale, torch.float32)
        return self.ops.threshold_gemv(x, matrix.weight, cuts[0], *how, **fused)

    def normed(self, x: Tensor, norm: Norm) -> Tensor:
        """The norm alone: it is otherwise part of the projection behind it."""
        if norm.kind == "none":
            return x
        return self.ops.norm_add(x, norm.weight, norm.bias, norm.kind, norm.eps)

    def qkv(
        self, layer: int, x: Tensor, w: LayerWeights, norm: Norm, active: Active | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """K and v (B, groups·d), q (B, heads·d) of the residual stream x (B, D)."""
        groups = self.spec.G if active is None or active.groups is None else active.groups
        wide = groups * self.spec.d
        if "q" not in self.decider.channels:
            kvq = self.rows(x, w.kvq, norm, w.kvq_bias, active)
        elif w.q_t is None:
            kvq = self.passing(QKV, layer, self.normed(x, norm), w.kvq, w.kvq_bias)
        else:
            kv = self.rows(x, w.kvq, norm, w.kvq_bias)
            q = self.passing(("q",), layer, self.normed(x, norm), w.q_t, w.q_bias)
            return kv[:, :wide], kv[:, wide:], q
        return kvq[:, :wide], kvq[:, wide : 2 * wide], kvq[:, 2 * wide :]

    def units(self, layer: int, x: Tensor, w: LayerWeights, norm: Norm) -> Tensor:
        """The input of the down projection, (B, F), from the input channels that pass."""
        x = self.normed(x, norm)
        if w.gate is None:
            return self.passing(("up",), layer, x, w.up, w.up_bias, activation=self.activation)
        _, cut = (self.decider.cut(role, layer, x) for role in GATE_UP)  # one, see Passing.fits
        own = (self.activation, w.up_bias, w.gate_bias, torch.float32)
        return self.ops.threshold_ffn(x, w.up.weight, w.gate.weight, cut, *own)

    def kept_units(
        self, layer: int, x: Tensor, w: LayerWeights, norm: Norm
    ) -> tuple[Tensor, Active | None]:
        """The same for the neurons that are kept, (B, S) or (B, F), and which they are."""
        norms = (norm.weight, norm.bias, norm.kind, norm.eps)
        gate, given = w.gate, None
        if gate is not None and self.decider.reads_gate(layer):
            how = (self.activation, w.gate_bias, None, gate.scale, None)
            given = self.ops.ffn_up(x, gate.weight, None, None, None, *how, *norms)
            self.decider.see_gate(layer, given)
            gate = None
        active = self.decider.active("neurons", layer)
        index, count, wanted = followed(active, *_list(active))
        h = self.ops.ffn_up(
            x,
            w.up.weight,
            None if gate is None else gate.weight,
            index,
            count,
            self.activation,
            w.up_bias,
            None if gate is None else w.gate_bias,
            w.up.scale,
            None if gate is None else gate.scale,
            *norms,
            active is not None and active.early,
            wanted,
            given,
        )
        if active is not None and wanted is not None:
            h = torch.where(active.slot >= 0, h, 0)
        return h, active

    def sketched_units(
        self, layer: int, x: Tensor, w: LayerWeights, norm: Norm, sketch: LayerSketch
    ) -> Tensor:
        """The same, (B, F), where a sketch decides them as they are computed; 0 where skipped."""
        h, index = self.ops.sketched_ffn(
            self.normed(x, norm),
            sketch.cut,
            w.up.weight,
            None if w.gate is None else w.gate.weight,
            **sketch.copies,
            up_bias=w.up_bias,
            gate_bias=w.gate_bias,
            up_scale=w.up.scale,
            gate_scale=None if w.gate is None else w.gate.scale,
        )
        self.decider.took(layer, index)
        return h

    def two_parts(
        self,
        layer: int,
        x: Tensor,
        w: LayerWeights,
        rest: Rest,
        norm: Norm,
        residual: Tensor | None,
    ) -> Tensor:
        """The FFN of the residual stream x (B, D): plain neurons, and compressed ones; (B, D)."""
        bias = w.down_bias
        if w.up.weight.shape[0]:
            h, _ = self.kept_units(layer, x, w, norm)
            residual, bias = self.columns(h, w.down_t, None, 1, bias, residual), None
        up, gate, down = rest.up, rest.gate, rest.down_t
        gates = (None, None) if gate is None else (gate.weight, gate.scale)
        biases = (rest.up_bias, rest.gate_bias)
        if up.int4:
            own = (up.weight, up.scale, *gates, self.activation, *biases)
            h = self.ops.int4_ffn_up(self.normed(x, norm), *own)
            how = (self.spec.D, bias, residual)
            return self.ops.int4_ffn_down(h, down.weight, down.scale, *how)
        norms = (norm.weight, norm.bias, norm.kind, norm.eps)
        own = (self.activation, *biases, up.scale, gates[1])
        h = self.ops.ffn_up(x, up.weight, gates[0], None, None, *own, *norms)
        return self.columns(h, down, None, 1, bias, residual)

    def columns(
        self,
        x: Tensor,
        matrix: Matrix,
        active: Active | None,
        block: int,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:
        """The sum over kept units of an out or down projection, ``block`` columns each: (B, D).

        The list is older than the launch before this one.
        """
        index, count, wanted = followed(active, *_list(active))
        whole = index is None and wanted is None
        how = (count, matrix.scale, bias, residual, torch.float32, not whole, wanted)
        return self.ops.column_gather(x, matrix.weight, index, 1 if whole else block, *how)


def _list(active: Active | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if active is None else (active.index, active.count)


def followed(active: Active | None, index: Tensor | None, count: Tensor | None) -> Followed:
    """A list and its count, or the units that any sequence wants; nothing where all is read."""
    if active is None or active.compacted:
        return None, None, None
    if active.wanted is not None:
        return None, None, active.wanted
    return _shared(index), count, None


def _shared(index: Tensor | None) -> Tensor | None:
    """A list for the whole batch as (S,), lists of single sequences as they are."""
    return index[0] if index is not None and index.shape[0] == 1 else index
