"""Sketched FFN: neurons that a few-bit copy scores above a threshold, scored and computed at once.

    score[b, j] as in ``sketch_scores.py``        kept[b, j] = score[b, j] >= cut
    h[b, j] = act(x[b] · gate[j] + gate_bias[j]) · (x[b] · up[j] + up_bias[j])   if kept, else 0

x (B, D); up and gate (F, D), fp32, fp16, bf16, or int8 with one fp32 scale per row; without a gate
h is act(x · up + up_bias). h (B, F) fp32, and index (B, F) int32, j where a neuron is kept and F
where it is not. Every sequence has its own neurons. Bytes read: the copies, and 2 · D elements
(D without a gate) of every kept neuron.

A neuron is decided by itself, so nothing waits for the others: a program scores a block of neurons,
lists those that pass, and walks the list with the next rows under way while it sums the present
ones. What would otherwise be scores, a selection over the whole row and a gathered product, three
launches that wait for one another, is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels import fewbit, sketch_gemv
from gnomon.kernels.cpu_gather import ffn_up
from gnomon.kernels.gather_common import activate
from gnomon.kernels.launch import pdl, power_of_two, processors
from gnomon.kernels.sketch_gemv import planes
from gnomon.kernels.sketch_scores import TINY, sketch_scores, sketch_scores_reference

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
    from gnomon.kernels.sketch_gemv import (
        _half_log,
        _load,
        _plane_sums,
        _product,
        _row_sum,
        _zeros,
    )
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None

Found = tuple[Tensor, Tensor]


def sketched_ffn_reference(
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
) -> Found:
    """The specification, accumulated in fp32.

    Args:
        x: (B, D), the input of the FFN, normed.
        cut: (1,) fp32, what a score must reach.
        up, gate: (F, D); gate None for a plain FFN.
        inner, …, linear_floor: as in ``sketch_scores_reference``; a gated FFN has ``linear``.
        up_bias, gate_bias: (F,) or None.
        up_scale, gate_scale: (F,) fp32 of int8 weights.

    Returns:
        h (B, F) fp32 and index (B, F) int32.

    Raises:
        ValueError: a threshold or weights that do not fit, or what ``sketch_scores`` refuses.
    """
    _check(x, cut, up, gate, offset, linear)
    biases = inner_bias, linear_bias, inner_floor, linear_floor
    first = inner, inner_scale, inner_bits, activation, offset
    score = sketch_scores_reference(x, *first, linear, linear_scale, linear_bits, *biases)

    def product(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.float() @ weight.float().T
        y = y if scale is None else y * scale
        return y if bias is None else y + bias.float()

    h = product(up, up_scale, up_bias)
    if gate is None:
        h = activate(h, activation)
    else:
        h = activate(product(gate, gate_scale, gate_bias), activation) * h
    keep = score >= cut
    return torch.where(keep, h, 0), _index(keep)


def sketched_ffn_gather(
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
) -> Found:
    """The same on a CPU: one operator scores, another computes the rows of those that pass.

    Elsewhere the reference, as a list would wait for its length.
    """
    _check(x, cut, up, gate, offset, linear)
    biases = inner_bias, linear_bias, inner_floor, linear_floor
    first = inner, inner_scale, inner_bits, activation, offset
    own = up_bias, gate_bias, up_scale, gate_scale
    if x.device.type != "cpu":
        copies = (*first, linear, linear_scale, linear_bits)
        return sketched_ffn_reference(x, cut, up, gate, *copies, *biases, *own)
    score = sketch_scores(x, *first, linear, linear_scale, linear_bits, *biases)
    keep = score >= cut
    h = score.new_zeros(score.shape)
    for b in range(x.shape[0]):
        rows = keep[b].nonzero().flatten()
        h[b, rows] = ffn_up(x[b : b + 1], up, gate, rows.int(), None, activation, *own)[0]
    return h, _index(keep)


def _index(keep: Tensor) -> Tensor:
    n = keep.shape[1]
    return torch.where(keep, torch.arange(n, device=keep.device), n).int()


def _check(
    x: Tensor, cut: Tensor, up: Tensor, gate: Tensor | None, offset: Tensor, linear: Tensor | None
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


if triton is not None:

    @triton.jit
    def _load_rows(  # type: ignore[no-untyped-def]
        list_ptr, up_ptr, gate_ptr, r, total, k, D: tl.constexpr, GATED: tl.constexpr
    ):
        """The neurons at places r of the list, and their rows (ROWS, BLOCK_D) of up and gate."""
        live = r < total
        j = tl.load(list_ptr + r, mask=live, other=0)
        place = j.to(tl.int64)[:, None] * D + k[None, :]
        mask = live[:, None] & (k < D)[None, :]
        up = tl.load(up_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
        gate = up
        if GATED:
            gate = tl.load(gate_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
        return j, up, gate

    @triton.jit
    def _dot(  # type: ignore[no-untyped-def]
        rows,
        x,
        j,
        live,
        scale_ptr,
        bias_ptr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
    ):
        y = tl.sum(rows.to(tl.float32) * x[None, :], axis=1)
        if HAS_SCALE:
            y *= tl.load(scale_ptr + j, mask=live, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + j, mask=live, other=0.0).to(tl.float32)
        return y

    @triton.jit
    def _sketched_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        inner_ptr,
        linear_ptr,
        inner_scale_ptr,
        linear_scale_ptr,
        inner_bias_ptr,
        linear_bias_ptr,
        inner_floor_ptr,
        linear_floor_ptr,
        offset_ptr,
        cut_ptr,
        up_ptr,
        gate_ptr,
        up_bias_ptr,
        gate_bias_ptr,
        up_scale_ptr,
        gate_scale_ptr,
        h_ptr,
        index_ptr,
        list_ptr,
        N,
        tiny,
        D: tl.constexpr,
        INNER: tl.constexpr,
        LINEAR: tl.constexpr,
        INNER_BITS: tl.constexpr,
        LINEAR_BITS: tl.constexpr,
        INNER_BYTES: tl.constexpr,
        LINEAR_BYTES: tl.constexpr,
        ACTIVATION: tl.constexpr,
        HAS_INNER_BIAS: tl.constexpr,
        HAS_LINEAR_BIAS: tl.constexpr,
        HAS_INNER_FLOOR: tl.constexpr,
        HAS_LINEAR_FLOOR: tl.constexpr,
        HAS_UP_BIAS: tl.constexpr,
        HAS_GATE_BIAS: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_D: tl.constexpr,
        ROWS: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """BLOCK_N neurons of one sequence."""
        GATED: tl.constexpr = LINEAR_BITS > 0
        SHARED: tl.constexpr = LINEAR_BITS == INNER_BITS  # one walk over x serves both copies
        b, B = tl.program_id(1), tl.num_programs(1)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_n = n < N
        tiles = _load(inner_ptr, n, N, INNER_BYTES, INNER)
        EACH: tl.constexpr = len(tiles)
        if GATED:
            others = _load(linear_ptr, n, N, LINEAR_BYTES, LINEAR)
            if SHARED:
                tiles += others
        if PDL:  # the copies are under way while the launch before drains
            gdc_wait()
            gdc_launch_dependents()
        a = _zeros(1 + SHARED, (BLOCK_N,))
        for p in tl.static_range(len(INNER)):
            a = _plane_sums(a, tiles, x_ptr, b, B, D, INNER, p, EACH)
        if GATED and not SHARED:
            u = _zeros(1, (BLOCK_N,))
            for p in tl.static_range(len(LINEAR)):
                u = _plane_sums(u, others, x_ptr, b, B, D, LINEAR, p, len(others))
        row = b.to(tl.int64)
        all_x = _row_sum(x_ptr + row * D, D)
        inner = inner_scale_ptr, inner_bias_ptr
        h = _product(a[0], all_x, *inner, n, in_n, INNER_BITS, HAS_INNER_BIAS)
        score = tl.load(offset_ptr + n, mask=in_n, other=0.0).to(tl.float32)
        h = _activate(h, ACTIVATION)
        score += _half_log(h, tiny, inner_floor_ptr, n, in_n, HAS_INNER_FLOOR)
        if GATED:
            total = a[1] if SHARED else u[0]
            linear = linear_scale_ptr, linear_bias_ptr
            h = _product(total, all_x, *linear, n, in_n, LINEAR_BITS, HAS_LINEAR_BIAS)
            score += _half_log(h, tiny, linear_floor_ptr, n, in_n, HAS_LINEAR_FLOOR)
        keep = in_n & (score >= tl.load(cut_ptr))
        tl.store(index_ptr + row * N + n, tl.where(keep, n, N), mask=in_n)
        tl.store(h_ptr + row * N + n, tl.zeros((BLOCK_N,), tl.float32), mask=in_n & (keep == 0))
        flag = keep.to(tl.int32)
        held = tl.sum(flag, axis=0)
        list_ptr += (row * tl.num_programs(0) + tl.program_id(0)) * BLOCK_N
        tl.store(list_ptr + tl.cumsum(flag, axis=0) - flag, n, mask=keep)
        tl.debug_barrier()  # the list is read by other threads than wrote it
        k = tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * D + k, mask=k < D, other=0.0).to(tl.float32)
        r = tl.arange(0, ROWS)
        j, w, g = _load_rows(list_ptr, up_ptr, gate_ptr, r, held, k, D, GATED)
        for start in range(0, held, ROWS):
            now, w_now, g_now, live = j, w, g, start + r < held
            ahead = start + ROWS + r
            j, w, g = _load_rows(list_ptr, up_ptr, gate_ptr, ahead, held, k, D, GATED)
            y = _dot(w_now, x, now, live, up_scale_ptr, up_bias_ptr, HAS_SCALE, HAS_UP_BIAS)
            if GATED:
                own = gate_scale_ptr, gate_bias_ptr
                z = _dot(g_now, x, now, live, *own, HAS_SCALE, HAS_GATE_BIAS)
                y *= _activate(z, ACTIVATION)
            else:
                y = _activate(y, ACTIVATION)
            tl.store(h_ptr + row * N + now, y, mask=live)


def sketched_ffn_triton(
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
) -> Found:
    """Launches the kernel; same arguments, result and errors as the reference."""
    _check(x, cut, up, gate, offset, linear)
    (batch, width), n = x.shape, offset.shape[0]
    h = torch.empty((batch, n), dtype=torch.float32, device=x.device)
    index = torch.empty((batch, n), dtype=torch.int32, device=x.device)
    if h.numel() == 0:
        return h, index
    matrices = [planes(width, bits) for bits in (inner_bits, linear_bits) if bits]
    block_n, rows, warps = _shape(n, width, matrices, up.element_size(), x.device)
    blocks = -(-n // block_n)
    copies = (inner, linear, inner_scale, linear_scale, inner_bias, linear_bias)
    tensors = (*copies, inner_floor, linear_floor, offset, cut, up, gate)
    _sketched_kernel[(blocks, batch)](
        x.contiguous(),
        *(None if t is None else t.contiguous() for t in tensors),
        up_bias,
        gate_bias,
        up_scale,
        gate_scale,
        h,
        index,
        torch.empty(batch * blocks * block_n, dtype=torch.int32, device=x.device),
        n,
        TINY,
        D=width,
        INNER=matrices[0],
        LINEAR=matrices[-1],
        INNER_BITS=inner_bits,
        LINEAR_BITS=linear_bits,
        INNER_BYTES=fewbit.row_bytes(width, inner_bits),
        LINEAR_BYTES=fewbit.row_bytes(width, linear_bits),
        ACTIVATION=activation,
        HAS_INNER_BIAS=inner_bias is not None,
        HAS_LINEAR_BIAS=linear_bias is not None,
        HAS_INNER_FLOOR=inner_floor is not None,
        HAS_LINEAR_FLOOR=linear_floor is not None,
        HAS_UP_BIAS=up_bias is not None,
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_SCALE=up_scale is not None,
        BLOCK_N=block_n,
        BLOCK_D=power_of_two(width),
        ROWS=rows,
        num_warps=warps,
        **pdl(x.device),
    )
    return h, index


def _shape(
    n: int,
    width: int,
    matrices: list[tuple[sketch_gemv.Plane, ...]],
    size: int,
    device: torch.device,
) -> tuple[int, int, int]:
    """Neurons of a program, rows under way at once, warps.

    Three programs or more per processor; a thread has 16 bytes of a copy's tile, and each block of
    rows is 8 KB of a matrix for every four warps.
    """
    tile = min(plane[4] for matrix in matrices for plane in matrix)
    block_n = 64
    while block_n > 8 and -(-n // block_n) < 3 * processors(device):
        block_n //= 2
    warps = max(1, min(4, block_n * tile // 512))
    rows = max(1, min(8, 2048 * warps // (power_of_two(width) * max(2, size))))
    return block_n, rows, warps


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
