"""Gate and up over the input channels whose magnitude passes a threshold, in one launch.

    h[b, j] = act(gate_bias[j] + Σ_k x[b, k] · gate_t[k, j])
            · (up_bias[j] + Σ_k x[b, k] · up_t[k, j])

over the channels k with |x[b, k]| > t[k]. x (B, D); up_t and gate_t (D, F), row k being what input
channel k adds, fp32, fp16 or bf16; t (D,) or (1,) fp32; h (B, F).

Both projections read the same input (TEAL, https://arxiv.org/abs/2408.14690), so a channel is
compared once, and their product is made where both sums are. Bytes of weights read: passing
channels times 2 F elements; up to four sequences share what passes for more than one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice
from gnomon.kernels.threshold_gemv import channels, check_tensors
from gnomon.kernels.threshold_launch import launch_walk
from gnomon.kernels.threshold_walk import triton


def threshold_ffn_reference(
    x: Tensor,
    up_t: Tensor,
    gate_t: Tensor,
    threshold: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification, accumulated in fp32; on CPU only the passing channels are read.

    Args:
        x: (B, D), the input of the FFN, normed.
        up_t, gate_t: (D, F).
        threshold: (D,) or (1,) fp32; a channel passes where |x| > threshold (NaN never does).
        activation: ``relu``, ``silu``, ``gelu_tanh`` or ``gelu``.
        up_bias, gate_bias: (F,) or None.
        out_dtype: of h; None takes x's.

    Returns:
        (B, F).

    Raises:
        ValueError: an unknown activation, or a tensor that does not fit ``up_t``.
    """
    check_pair(x, up_t, gate_t, threshold, activation, up_bias, gate_bias)
    up, gate = (
        channels(x, weight_t, threshold, bias, None)
        for weight_t, bias in ((up_t, up_bias), (gate_t, gate_bias))
    )
    return (activate(gate, activation) * up).to(out_dtype or x.dtype)


def check_pair(
    x: Tensor,
    up_t: Tensor,
    gate_t: Tensor,
    threshold: Tensor,
    activation: str,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
) -> None:
    """Raises ValueError for an unknown activation, or a tensor that does not fit ``up_t``."""
    check_choice("activation", activation, ACTIVATIONS)
    check_tensors(x, up_t, threshold, None, None, activation, None, None)
    for field, bias in (("up_bias", up_bias), ("gate_bias", gate_bias)):
        if bias is not None and tuple(bias.shape) != up_t.shape[1:]:
            raise ValueError(f"{field} has shape {tuple(bias.shape)}; use {tuple(up_t.shape[1:])}")
    if gate_t.shape != up_t.shape or gate_t.dtype != up_t.dtype:
        raise ValueError(
            f"gate_t is {gate_t.dtype} of shape {tuple(gate_t.shape)}; use up_t's {up_t.dtype} and "
            f"{tuple(up_t.shape)}"
        )
    if not up_t.dtype.is_floating_point:
        raise ValueError(f"up_t is {up_t.dtype}; use fp32, fp16 or bf16")


def threshold_ffn_triton(
    x: Tensor,
    up_t: Tensor,
    gate_t: Tensor,
    threshold: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    check_pair(x, up_t, gate_t, threshold, activation, up_bias, gate_bias)
    own = (up_t, gate_t, threshold, up_bias, gate_bias, None)
    return launch_walk(x, *own, out_dtype, activation)


threshold_ffn = torch.library.custom_op(
    "gnomon::threshold_ffn", threshold_ffn_reference, mutates_args=()
)
if triton is not None:
    threshold_ffn.register_kernel("cuda", threshold_ffn_triton)


@threshold_ffn.register_fake
def _(
    x: Tensor,
    up_t: Tensor,
    gate_t: Tensor,
    threshold: Tensor,
    activation: str,
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], up_t.shape[1]), dtype=out_dtype or x.dtype)
