"""A norm on its own, with an optional residual: what is left where a norm cannot be fused.

    y[b] = residual[b] + n(x[b])

x, residual, y (B, W); n the identity, an RMS norm or a layer norm with weight and bias (W,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.gather_common import NORMS, check_choice, normalise
from gnomon.kernels.launch import pdl, power_of_two

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None


def norm_add_reference(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The specification, in fp32.

    Args:
        x: (B, W).
        weight, bias: (W,) of the norm.
        norm: ``none``, ``rms`` or ``layer``.
        eps: of the norm.
        residual: (B, W) or None.
        out_dtype: of y; None takes x's.

    Returns:
        (B, W).

    Raises:
        ValueError: unknown norm.
    """
    check_choice("norm", norm, NORMS)
    y = normalise(x, norm, weight, bias, eps)
    y = y if residual is None else residual.float() + y
    return y.to(out_dtype or x.dtype, copy=True)


if triton is not None:

    @triton.jit
    def _norm_add_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        bias_ptr,
        residual_ptr,
        y_ptr,
        W,
        eps,
        NORM: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK_W: tl.constexpr,
        PDL: tl.constexpr,
    ):
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        k = tl.arange(0, BLOCK_W)
        in_w = k < W
        place = tl.program_id(0).to(tl.int64) * W + k
        x = tl.load(x_ptr + place, mask=in_w, other=0.0).to(tl.float32)
        if NORM != "none":
            if NORM == "layer":
                x = tl.where(in_w, x - tl.sum(x, axis=0) / W, 0.0)
            x *= tl.rsqrt(tl.sum(x * x, axis=0) / W + eps)
            x *= tl.load(weight_ptr + k, mask=in_w, other=0.0).to(tl.float32)
            if HAS_BIAS:
                x += tl.load(bias_ptr + k, mask=in_w, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + place, mask=in_w, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, x.to(y_ptr.dtype.element_ty), mask=in_w)


def norm_add_triton(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Launches one program per row; same arguments, result and errors as the reference."""
    check_choice("norm", norm, NORMS)
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    if y.numel():
        _norm_add_kernel[(x.shape[0],)](
            x.contiguous(),
            weight,
            bias,
            None if residual is None else residual.contiguous(),
            y,
            x.shape[1],
            eps,
            NORM=norm,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_W=power_of_two(x.shape[1]),
            num_warps=8,
            **pdl(x.device),
        )
    return y


norm_add = torch.library.custom_op("gnomon::norm_add", norm_add_reference, mutates_args=())
norm_add.register_kernel("cuda", norm_add_triton)


@norm_add.register_fake
def _(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype or x.dtype)
