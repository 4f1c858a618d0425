"""Threshold GEMV: a linear over the input channels whose magnitude passes a threshold.

    z[b] = bias + Σ_{k : |x[b, k]| > t[k]}  x[b, k] · scale[k] · weight_t[k]
    y[b] = residual[b] + given[b] · act(z[b])

x (B, W); weight_t (W, N), row k being what input channel k adds (the transpose of a linear's
weight), fp32, fp16, bf16, or int8 with scale (W,); t (W,) fp32 (CHESS) or (1,) (TEAL); y (B, N).
Every sequence has its own channels; those that pass for none are not read. Bytes of weights read:
of up to four sequences together, the channels that pass for any of them, times N elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice
from gnomon.kernels.threshold_launch import launch_walk
from gnomon.kernels.threshold_walk import triton


def threshold_gemv_reference(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
    given: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The specification, accumulated in fp32; on CPU only the passing channels are read.

    Args:
        x: (B, W).
        weight_t: (W, N).
        threshold: (W,) or (1,) fp32; a channel passes where |x| > threshold (NaN never does).
        bias: (N,) or None.
        scale: (W,) fp32 of int8 weights.
        out_dtype: of y; None takes x's.
        activation: ``none``, ``relu``, ``silu``, ``gelu_tanh`` or ``gelu``.
        given: (B, N) factors, an FFN's act(gate) for one, or None.
        residual: (B, N) or None.

    Returns:
        (B, N).

    Raises:
        ValueError: an unknown activation, or a tensor that does not fit the weights.
    """
    check_tensors(x, weight_t, threshold, bias, scale, activation, given, residual)
    y = channels(x, weight_t, threshold, bias, scale)
    return epilogue(y, activation, given, residual).to(out_dtype or x.dtype)


def channels(
    x: Tensor, weight_t: Tensor, threshold: Tensor, bias: Tensor | None, scale: Tensor | None
) -> Tensor:
    """The sum over the channels that pass, with its bias, (B, N) fp32."""
    x32 = x.float()
    keep = x32.abs() > threshold
    x32 = x32 if scale is None else x32 * scale
    y = x32.new_empty((x.shape[0], weight_t.shape[1]))
    for b in range(x.shape[0]):
        y[b] = _channels(x32[b], weight_t, keep[b])
    return y if bias is None else y + bias.float()


def epilogue(y: Tensor, activation: str, given: Tensor | None, residual: Tensor | None) -> Tensor:
    """What becomes of the sum with its bias, (B, N) fp32."""
    y = y if activation == "none" else activate(y, activation)
    y = y if given is None else y * given.float()
    return y if residual is None else y + residual.float()


def _channels(x: Tensor, weight_t: Tensor, keep: Tensor) -> Tensor:
    if x.device.type == "cpu":
        kept = keep.nonzero().flatten()
        return x[kept] @ weight_t[kept].float()
    held = torch.where(keep[:, None], weight_t, 0)  # a gather would wait for its length
    return torch.where(keep, x, 0) @ held.float()


def check_tensors(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    activation: str,
    given: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raises ValueError for an unknown activation, or a tensor that does not fit the weights."""
    check_choice("activation", activation, ("none", *ACTIVATIONS))
    width, n = weight_t.shape
    for field, tensor, allowed in (
        ("x", x, ((x.shape[0], width),)),
        ("threshold", threshold, ((width,), (1,))),
        ("bias", bias, ((n,),)),
        ("scale", scale, ((width,),)),
        ("given", given, ((x.shape[0], n),)),
        ("residual", residual, ((x.shape[0], n),)),
    ):
        if tensor is not None and tuple(tensor.shape) not in allowed:
            raise ValueError(
                f"{field} has shape {tuple(tensor.shape)} for weight_t {(width, n)}; use "
                + " or ".join(map(str, allowed))
            )


def threshold_gemv_triton(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
    given: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    check_tensors(x, weight_t, threshold, bias, scale, activation, given, residual)
    own = (weight_t, None, threshold, bias, None, scale)
    return launch_walk(x, *own, out_dtype, activation, given, residual)


threshold_gemv = torch.library.custom_op(
    "gnomon::threshold_gemv", threshold_gemv_reference, mutates_args=()
)
if triton is not None:
    threshold_gemv.register_kernel("cuda", threshold_gemv_triton)


@threshold_gemv.register_fake
def _(
    x: Tensor,
    weight_t: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
    given: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], weight_t.shape[1]), dtype=out_dtype or x.dtype)
