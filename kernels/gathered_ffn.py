"""Gathered feed-forward network: chosen neurons of a gated or plain FFN, granularity one neuron.

    h[b, s] = act(n(x)[b] · gate[j] + gate_bias[j]) · (n(x)[b] · up[j] + up_bias[j])     (gated)
    h[b, s] = given[b, j] · (n(x)[b] · up[j] + up_bias[j])                               (given)
    h[b, s] = act(n(x)[b] · up[j] + up_bias[j])                                          (plain)
    y[b]    = residual[b] + bias + Σ_s h[b, s] · down_t[j],                   j = index[s]

x (B, W); up, gate (F, W) and down_t (F, D), fp32, fp16, bf16, or int8 with one fp32 scale per row;
given (B, F) is act(gate), where a choice of neurons was made from it; h (B, S) fp32, compact in the
order of the list; y (B, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gnomon.kernels.column_gather import column_gather
from gnomon.kernels.gather_common import (
    ACTIVATIONS,
    NORMS,
    activate,
    check_choice,
    check_list,
    of_units,
)
from gnomon.kernels.row_gather import row_gather_reference
from gnomon.kernels.row_gemv import launch_rows


def ffn_up_reference(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    early: bool = False,
    wanted: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """The specification of the first half, accumulated in fp32.

    Args:
        x: (B, W).
        up, gate: (F, W); gate None for a plain FFN.
        index: (S,) or (B, S) int32 neurons; None for all.
        count: (1,) or (B,) entries that hold.
        activation: ``relu``, ``silu``, ``gelu_tanh`` or ``gelu``.
        up_bias, gate_bias: (F,) or None.
        up_scale, gate_scale: (F,) fp32 of int8 weights.
        norm_weight, norm_bias, norm, eps: the norm before the FFN, fused.
        early, wanted: as in :func:`gnomon.kernels.row_gather.row_gather_reference`.
        given: (B, F) factor of every neuron, instead of a gate and an activation.

    Returns:
        h (B, S) fp32; past the count it is undefined.

    Raises:
        ValueError: unknown activation or norm, a list that does not fit the batch, or both a gate
            and what is given for it.
    """
    check_given(x, up, gate, activation, given)

    def rows(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        fused: dict[str, Any] = {"norm_weight": norm_weight, "norm_bias": norm_bias}
        return row_gather_reference(
            x,
            weight,
            index,
            1,
            count,
            scale,
            bias,
            **fused,
            norm=norm,
            eps=eps,
            out_dtype=torch.float32,
            wanted=wanted,
        )

    h = rows(up, up_scale, up_bias)
    if given is not None:
        return h * of_units(given, index, count)
    if gate is None:
        return activate(h, activation)
    return activate(rows(gate, gate_scale, gate_bias), activation) * h


def check_given(
    x: Tensor, up: Tensor, gate: Tensor | None, activation: str, given: Tensor | None
) -> None:
    """Raises ValueError for an unknown activation, or factors that do not fit the FFN."""
    check_choice("activation", activation, ACTIVATIONS)
    if given is not None and gate is not None:
        raise ValueError("gate and given are both set: given is act(gate), computed before")
    if given is not None and given.shape != (x.shape[0], up.shape[0]):
        raise ValueError(
            f"given has shape {tuple(given.shape)}; use {(x.shape[0], up.shape[0])}, a factor for "
            "every neuron of every sequence"
        )


def ffn_up_triton(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    early: bool = False,
    wanted: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    check_given(x, up, gate, activation, given)
    check_choice("norm", norm, NORMS)
    check_list(index, count, x.shape[0], up.shape[0], wanted)
    return launch_rows(
        x,
        up,
        gate,
        index,
        1,
        count,
        (up_scale, gate_scale),
        (up_bias, gate_bias),
        norm_weight,
        norm_bias,
        norm,
        eps,
        activation if given is None else "none",
        torch.float32,
        early,
        wanted,
        given,
    )


ffn_up = torch.library.custom_op("gnomon::ffn_up", ffn_up_reference, mutates_args=())
ffn_up.register_kernel("cuda", ffn_up_triton)


@ffn_up.register_fake
def _(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    early: bool = False,
    wanted: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    slots = up.shape[0] if index is None else index.shape[-1]
    return x.new_empty((x.shape[0], slots), dtype=torch.float32)


def gathered_ffn(
    x: Tensor,
    up: Tensor,
    down_t: Tensor,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    early: bool = False,
) -> Tensor:
    """The whole FFN: two registered operators, (B, W) -> (B, D) in x's dtype.

    Arguments as in :func:`ffn_up_reference`, and of the down projection ``down_t`` (F, D),
    ``down_bias`` (D,), ``down_scale`` (F,). ``early`` is a promise about the first half alone: by
    the second the list is always complete, since the launch before it is the first half.
    """
    h = ffn_up(
        x, up, gate, index, count, activation, up_bias, gate_bias, up_scale, gate_scale, early=early
    )
    return column_gather(
        h, down_t, index, 1, count, down_scale, down_bias, None, x.dtype, early=True
    )
