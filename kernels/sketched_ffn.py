"""Sketched FFN: neurons that a few-bit copy scores above a threshold, scored and computed at once.

    score[b, j] as in ``sketch_scores.py``        kept[b, j] = score[b, j] >= cut
    h[b, j] = act(x[b] · gate[j] + gate_bias[j]) · (x[b] · up[j] + up_bias[j])   if kept, else 0

x (B, D); up and gate (F, D), fp32, fp16, bf16, or int8 with one fp32 scale per row; without a gate
h is act(x · up + up_bias). h (B, F) fp32, and index (B, F) int32, j where a neuron is kept and F
where it is not. Every sequence has its own neurons. Bytes read: the copies, and 2 · D elements
(D without a gate) of every kept neuron.

A neuron is decided by itself, so nothing waits for the others: what would otherwise be scores, a
selection over the whole row and a gathered product, three launches that wait for one another, is
the one of ``sketched_gemv.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gnomon.kernels import cpu_gather, cpu_sketch
from gnomon.kernels.fewbit import Copy
from gnomon.kernels.gather_common import activate
from gnomon.kernels.sketch_scores import (
    TINY,
    check_copies,
    scores_reference,
    second_copy,
)
from gnomon.kernels.sketched_gemv import Rows, launch_sketched, triton

Found = tuple[Tensor, Tensor]
Copies = tuple[Copy, Copy | None]
Run = Callable[[Tensor, Tensor, str, Tensor, Copies, Rows, Rows | None], Found]


def _operator(run: Run) -> Callable[..., Found]:
    """An implementation under the operator's signature, which is checked and grouped for it."""

    def ffn(
        x: Tensor,
        cut: Tensor,
        up: Tensor,
        gate: Tensor | None,
        inner: Tensor,
        inner_scale: Tensor,
        inner_bits: int,
        activation: str,
        offset: Tensor,
        linear: Tensor | None = None,
        linear_scale: Tensor | None = None,
        linear_bits: int = 0,
        inner_bias: Tensor | None = None,
        linear_bias: Tensor | None = None,
        inner_floor: Tensor | None = None,
        linear_floor: Tensor | None = None,
        up_bias: Tensor | None = None,
        gate_bias: Tensor | None = None,
        up_scale: Tensor | None = None,
        gate_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The input of the down projection, and which neurons it holds.

        Args:
            x: (B, D), the input of the FFN, normed.
            cut: (1,) fp32, what a score must reach.
            up, gate: (F, D); gate None for a plain FFN.
            inner, …, linear_floor: as in ``sketch_scores``; a gated FFN has ``linear``.
            up_bias, gate_bias: (F,) or None.
            up_scale, gate_scale: (F,) fp32 of int8 weights.

        Returns:
            h (B, F) fp32 and index (B, F) int32.

        Raises:
            ValueError: a threshold or weights that do not fit, or what ``sketch_scores`` refuses.
        """
        first = Copy(inner, inner_scale, inner_bits, inner_bias, inner_floor)
        second = second_copy(linear, linear_scale, linear_bits, linear_bias, linear_floor)
        check_copies(x, activation, offset, first, second)
        _check(x, cut, up, gate, offset, second)
        gates = None if gate is None else Rows(gate, gate_scale, gate_bias)
        ups = Rows(up, up_scale, up_bias)
        return run(x, cut, activation, offset, (first, second), ups, gates)

    return ffn


def _reference(
    x: Tensor,
    cut: Tensor,
    activation: str,
    offset: Tensor,
    copies: Copies,
    up: Rows,
    gate: Rows | None,
) -> Found:
    keep = scores_reference(x, activation, offset, *copies) >= cut
    h = _product(x, up)
    h = activate(h, activation) if gate is None else activate(_product(x, gate), activation) * h
    return torch.where(keep, h, 0), _index(keep)


def _gather(
    x: Tensor,
    cut: Tensor,
    activation: str,
    offset: Tensor,
    copies: Copies,
    up: Rows,
    gate: Rows | None,
) -> Found:
    """On a CPU rows of what passes, in C; elsewhere the reference: a list waits for its length."""
    lib = cpu_gather.serving(x, up.weight, None if gate is None else gate.weight)
    mixed = gate is not None and gate.weight.dtype != up.weight.dtype
    if lib is None or mixed:
        return _reference(x, cut, activation, offset, copies, up, gate)
    return cpu_sketch.sketched(lib, x, cut, activation, offset, copies, up, gate, TINY)


def _triton(
    x: Tensor,
    cut: Tensor,
    activation: str,
    offset: Tensor,
    copies: Copies,
    up: Rows,
    gate: Rows | None,
) -> Found:
    return launch_sketched(x, cut, activation, offset, copies, up, gate, TINY)


def _product(x: Tensor, rows: Rows) -> Tensor:
    y = x.float() @ rows.weight.float().T
    y = y if rows.scale is None else y * rows.scale
    return y if rows.bias is None else y + rows.bias.float()


def _index(keep: Tensor) -> Tensor:
    n = keep.shape[1]
    return torch.where(keep, torch.arange(n, device=keep.device), n).int()


def _check(
    x: Tensor, cut: Tensor, up: Tensor, gate: Tensor | None, offset: Tensor, linear: Copy | None
) -> None:
    wanted = (offset.shape[0], x.shape[-1])
    for field, tensor in (("up", up), ("gate", gate)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise ValueError(f"{field} has shape {tuple(tensor.shape)}; use (F, D) = {wanted}")
    if tuple(cut.shape) != (1,):
        raise ValueError(f"cut has shape {tuple(cut.shape)}; use (1,), one threshold of a layer")
    if (gate is None) != (linear is None):
        raise ValueError(
            "gate and linear belong together: the copy of a gated FFN has both projections"
        )


sketched_ffn_reference = _operator(_reference)  # the specification, accumulated in fp32
sketched_ffn_gather = _operator(_gather)
sketched_ffn_triton = _operator(_triton)  # the launch
sketched_ffn = torch.library.custom_op(
    "gnomon::sketched_ffn", sketched_ffn_reference, mutates_args=()
)
sketched_ffn.register_kernel("cpu", sketched_ffn_gather)
if triton is not None:
    sketched_ffn.register_kernel("cuda", sketched_ffn_triton)


@sketched_ffn.register_fake
def _(x: Tensor, cut: Tensor, up: Tensor, *rest: object, **named: object) -> Found:
    h = x.new_empty((x.shape[0], up.shape[0]), dtype=torch.float32)
    return h, torch.empty_like(h, dtype=torch.int32)
