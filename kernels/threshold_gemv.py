"""Threshold GEMV: a linear over the input channels whose magnitude passes a threshold.

    z[b] = bias + Σ_{k : |x[b, k]| > t[k]}  x[b, k] · scale[k] · weight_t[k]
    y[b] = residual[b] + given[b] · act(z[b])

x (B, W); weight_t (W, N), row k being what input channel k adds (the transpose of a linear's
weight), fp32, fp16, bf16, or int8 with scale (W,); t (W,) fp32 (CHESS) or (1,) (TEAL); y (B, N).
Every sequence has its own channels; those that do not pass are not read. Bytes of weights read:
passing channels times N times the size of an element, for each sequence.

A program owns a part of the channels and a tile of outputs. It first compacts its part into a list
of its own (no scan over the grid, no second launch), then walks the list with the next rows under
way while it sums the present ones, so bytes in flight do not fall with the density. The last part
to finish adds up the parts in their order, so that the result is the same every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice
from gnomon.kernels.launch import TICKETS, pdl, power_of_two, processors, tickets

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None


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


if triton is not None:

    @triton.jit
    def _load_channels(  # type: ignore[no-untyped-def]
        list_ptr, x_ptr, scale_ptr, weight_ptr, r, total, n, N, HAS_SCALE: tl.constexpr
    ):
        """x (ROWS,) and weights (ROWS, BLOCK_N) of the channels at places r of the list."""
        live = r < total
        k = tl.load(list_ptr + r, mask=live, other=0)
        x = tl.load(x_ptr + k, mask=live, other=0.0).to(tl.float32)
        if HAS_SCALE:
            x *= tl.load(scale_ptr + k, mask=live, other=0.0)
        place = k.to(tl.int64)[:, None] * N + n[None, :]
        mask = live[:, None] & (n < N)[None, :]
        return x, tl.load(weight_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")

    @triton.jit
    def _threshold_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        threshold_ptr,
        bias_ptr,
        scale_ptr,
        given_ptr,
        residual_ptr,
        y_ptr,
        list_ptr,
        partial_ptr,
        ticket_ptr,
        W,
        N: tl.constexpr,
        PER_CHANNEL: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_GIVEN: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        ACTIVATION: tl.constexpr,
        SPLITS: tl.constexpr,
        PART: tl.constexpr,
        BLOCK: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_N: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """BLOCK_N outputs of one sequence over PART channels."""
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        tile, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        x_ptr += b * W
        list_ptr += ((b * SPLITS + split) * tl.num_programs(0) + tile) * PART
        k = split * PART + tl.arange(0, BLOCK)
        end = tl.minimum(split * PART + PART, W)
        x = tl.load(x_ptr + k, mask=k < end, other=0.0).to(tl.float32)
        if PER_CHANNEL:
            cut = tl.load(threshold_ptr + k, mask=k < end, other=0.0)
        else:
            cut = tl.load(threshold_ptr)
        keep = ((k < end) & (tl.abs(x) > cut)).to(tl.int32)
        total = tl.sum(keep, axis=0)
        tl.store(list_ptr + tl.cumsum(keep, axis=0) - keep, k, mask=keep > 0)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, ROWS)
        xs, w = _load_channels(list_ptr, x_ptr, scale_ptr, weight_ptr, r, total, n, N, HAS_SCALE)
        acc = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
        for start in range(0, total, ROWS):
            xs_now, w_now = xs, w
            r = start + ROWS + tl.arange(0, ROWS)
            xs, w = _load_channels(
                list_ptr, x_ptr, scale_ptr, weight_ptr, r, total, n, N, HAS_SCALE
            )
            acc += w_now.to(tl.float32) * xs_now[:, None]
        y = tl.sum(acc, axis=0)
        last = True
        if SPLITS > 1:
            tl.store(partial_ptr + (b * SPLITS + split) * N + n, y, mask=n < N)
            tl.debug_barrier()
            ticket = ticket_ptr + b * tl.num_programs(0) + tile
            last = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if last:
            if SPLITS > 1:
                tl.store(ticket, 0)
                y = tl.zeros((BLOCK_N,), dtype=tl.float32)
                for s in range(SPLITS):
                    place = (b * SPLITS + s) * N + n
                    y += tl.load(partial_ptr + place, mask=n < N, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            y = _activate(y, ACTIVATION)
            if HAS_GIVEN:
                y *= tl.load(given_ptr + b * N + n, mask=n < N, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                y += tl.load(residual_ptr + b * N + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(y_ptr + b * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


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
    (batch, width), n = x.shape, weight_t.shape[1]
    y = torch.empty((batch, n), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    block_n, part = _tiles(width, n, batch, x.device)
    tiles, splits = -(-n // block_n), max(1, -(-width // part))
    if batch * tiles > TICKETS:
        raise ValueError(f"a batch of {batch} with N={n} is more than one launch serves: split x")
    lists = torch.empty(batch * splits * tiles * part, dtype=torch.int32, device=x.device)
    partial = torch.empty((batch, splits, n), dtype=torch.float32, device=x.device)
    _threshold_kernel[(tiles, splits, batch)](
        x.contiguous(),
        weight_t.contiguous(),
        threshold.float().contiguous(),
        bias,
        scale,
        None if given is None else given.contiguous(),
        None if residual is None else residual.contiguous(),
        y,
        lists,
        partial,
        tickets(x.device),
        width,
        N=n,
        PER_CHANNEL=threshold.shape[0] > 1 or width == 1,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        HAS_GIVEN=given is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        SPLITS=splits,
        PART=part,
        BLOCK=power_of_two(part),
        ROWS=16,
        BLOCK_N=block_n,
        num_warps=8 if block_n == 256 else 4,
        **pdl(x.device),
    )
    return y


def _tiles(width: int, n: int, batch: int, device: torch.device) -> tuple[int, int]:
    """Outputs of a tile and channels of a part: three programs per processor, parts of 16-1024."""
    block_n = min(256, max(16, power_of_two(n)))
    splits = max(1, 3 * processors(device) // (-(-n // block_n) * batch))
    part = -(-width // (16 * splits)) * 16
    return block_n, min(1024, max(16, part))


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
