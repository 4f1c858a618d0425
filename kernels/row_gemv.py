"""Row-gathered projections as Triton launches: GEMV up to four sequences, with the norm fused.

    y[b, s·block + r] = scale[j] · Σ_k n(x)[b, k] · weight[j, k] + bias[j],   j = index[s]·block + r

or act(gate) · up of two such products, or given · up. Specifications: ``row_gather_reference`` and
``ffn_up_reference``; larger batches are in ``row_batch.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.gather_common import of_units
from gnomon.kernels.launch import pdl, power_of_two, processors
from gnomon.kernels.row_batch import rows_batch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate, _reads, _rows
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

if triton is not None:

    @triton.jit
    def _row_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        up_ptr,
        gate_ptr,
        index_ptr,
        count_ptr,
        up_scale_ptr,
        gate_scale_ptr,
        up_bias_ptr,
        gate_bias_ptr,
        norm_weight_ptr,
        norm_bias_ptr,
        wanted_ptr,
        given_ptr,
        y_ptr,
        B,
        S,
        N,
        before,
        eps,
        W: tl.constexpr,
        UNIT: tl.constexpr,
        HAS_INDEX: tl.constexpr,
        INDEX_STRIDE: tl.constexpr,
        HAS_COUNT: tl.constexpr,
        HAS_WANTED: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_GATE_BIAS: tl.constexpr,
        HAS_NORM_BIAS: tl.constexpr,
        NORM: tl.constexpr,
        GATED: tl.constexpr,
        GIVEN: tl.constexpr,
        ACTIVATION: tl.constexpr,
        BATCH: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_W: tl.constexpr,
        PDL: tl.constexpr,
        EARLY: tl.constexpr,
    ):
        """Rows of one matrix, or act(gate row · x) * (up row · x), for BATCH sequences.

        Every program walks over blocks of ROWS rows with x in registers, the next block's weights
        being under way while it sums this one's.
        """
        first = tl.program_id(1) * BATCH
        step = tl.num_programs(0) * ROWS
        k = tl.arange(0, BLOCK_W)
        in_w = k < W
        if PDL and not EARLY:
            gdc_wait()
        held = S
        if HAS_COUNT:
            held = tl.load(count_ptr + first * (INDEX_STRIDE > 0))
        end = held * UNIT
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        own = first * INDEX_STRIDE
        row = _rows(r, end, index_ptr, own, UNIT, HAS_INDEX)
        row_next = _rows(r + step, end, index_ptr, own, UNIT, HAS_INDEX)
        read = _reads(r < end, r, wanted_ptr, before, UNIT, HAS_WANTED)
        read_next = _reads(r + step < end, r + step, wanted_ptr, before, UNIT, HAS_WANTED)
        mask = read[:, None] & in_w[None, :]
        place = row.to(tl.int64)[:, None] * W + k[None, :]
        w = tl.load(up_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
        if GATED:
            g = tl.load(gate_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
        if NORM != "none":
            gain = tl.load(norm_weight_ptr + k, mask=in_w, other=0.0).to(tl.float32)
            if HAS_NORM_BIAS:
                shift = tl.load(norm_bias_ptr + k, mask=in_w, other=0.0).to(tl.float32)
        if PDL:  # this program's first weights are under way while the launch before drains
            if EARLY:
                gdc_wait()
            gdc_launch_dependents()
        b = (first + tl.arange(0, BATCH)).to(tl.int64)
        inside = b < B
        x_mask = inside[:, None] & in_w[None, :]
        x = tl.load(x_ptr + b[:, None] * W + k[None, :], mask=x_mask, other=0.0).to(tl.float32)
        if NORM != "none":
            mean = tl.zeros((BATCH,), dtype=tl.float32)
            if NORM == "layer":
                mean = tl.sum(x, axis=1) / W
                x = tl.where(x_mask, x - mean[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(x * x, axis=1) / W + eps)
            x = x * rstd[:, None] * gain[None, :]
            if HAS_NORM_BIAS:
                x += shift[None, :]
        for start in range(tl.program_id(0) * ROWS, end, step):
            here, now, live, used = r, row, r < end, read
            w_now = w
            r = start + step + tl.arange(0, ROWS)
            row, read = row_next, read_next
            mask = read[:, None] & in_w[None, :]
            place = row.to(tl.int64)[:, None] * W + k[None, :]
            w = tl.load(up_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
            if GATED:
                g_now = g
                g = tl.load(gate_ptr + place, mask=mask, other=0.0, eviction_policy="evict_first")
            row_next = _rows(r + step, end, index_ptr, own, UNIT, HAS_INDEX)
            read_next = _reads(r + step < end, r + step, wanted_ptr, before, UNIT, HAS_WANTED)
            if GIVEN:
                at = b[:, None] * N + now[None, :]
                factor = tl.load(given_ptr + at, mask=inside[:, None] & used[None, :], other=0.0)
            y = tl.sum(w_now.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)
            if HAS_SCALE:
                y *= tl.load(up_scale_ptr + now, mask=used, other=0.0)[None, :]
            if HAS_BIAS:
                y += tl.load(up_bias_ptr + now, mask=used, other=0.0).to(tl.float32)[None, :]
            if GATED:
                z = tl.sum(g_now.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)
                if HAS_SCALE:
                    z *= tl.load(gate_scale_ptr + now, mask=used, other=0.0)[None, :]
                if HAS_GATE_BIAS:
                    z += tl.load(gate_bias_ptr + now, mask=used, other=0.0).to(tl.float32)[None, :]
                y *= _activate(z, ACTIVATION)
            elif GIVEN:
                y *= factor
            else:
                y = _activate(y, ACTIVATION)
            tl.store(
                y_ptr + b[:, None] * (S * UNIT) + here[None, :],
                y.to(y_ptr.dtype.element_ty),
                mask=inside[:, None] & live[None, :],
            )


def launch_rows(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    index: Tensor | None,
    unit: int,
    count: Tensor | None,
    scales: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    out_dtype: torch.dtype,
    early: bool,
    wanted: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """Rows of one matrix, or of gate and up at once: y (B, S·unit). GEMV up to a batch of four.

    ``given`` (B, N) multiplies single rows.
    """
    x = x.contiguous()
    batch, width = x.shape
    own = index is not None and index.dim() == 2 and index.shape[0] > 1
    if batch > 4 and not own:
        fused = (norm_weight, norm_bias, norm, eps)
        y = rows_batch(
            x, up, gate, index, unit, count, scales, biases, *fused, activation, out_dtype, wanted
        )
        return y if given is None else y * of_units(given, index, count)
    slots = up.shape[0] // unit if index is None else index.shape[-1]
    y = torch.empty((batch, slots * unit), dtype=out_dtype, device=x.device)
    if y.numel() == 0:
        return y
    together = 1 if own else power_of_two(batch)
    rows, programs, warps = _tiles(slots * unit, up, together, x.device)
    _row_kernel[(programs, triton.cdiv(batch, together))](
        x,
        up,
        up if gate is None else gate,
        index,
        count,
        *scales,
        *biases,
        norm_weight,
        norm_bias,
        wanted,
        None if given is None else given.float().contiguous(),
        y,
        batch,
        slots,
        up.shape[0],
        0 if wanted is None else slots - wanted.numel(),
        eps,
        W=width,
        UNIT=unit,
        HAS_INDEX=index is not None,
        INDEX_STRIDE=slots if own else 0,
        HAS_COUNT=count is not None,
        HAS_WANTED=wanted is not None,
        HAS_SCALE=scales[0] is not None,
        HAS_BIAS=biases[0] is not None,
        HAS_GATE_BIAS=biases[1] is not None,
        HAS_NORM_BIAS=norm_bias is not None,
        NORM=norm,
        GATED=gate is not None,
        GIVEN=given is not None,
        ACTIVATION=activation,
        BATCH=together,
        ROWS=rows,
        BLOCK_W=power_of_two(width),
        EARLY=early or (index is None and wanted is None),
        num_warps=warps,
        **pdl(x.device),
    )
    return y


def _tiles(rows: int, weight: Tensor, batch: int, device: torch.device) -> tuple[int, int, int]:
    """Rows of a block, programs, warps.

    Sixteen warps per processor, four of them on blocks of 8 KB: whole steps of Llama-3-8B were 3 %
    faster on an H100 than with programs of eight warps on 16 KB. Prefetching later blocks into L2
    while the launch before drains gained nothing. A block of int8 has as many numbers as one of
    bf16: twice as many were a tenth to a fifth slower. (benchmarks/results/decode/tried.md)
    """
    width = power_of_two(weight.shape[1])
    tile = max(1, min(32, 8192 // (width * max(2, weight.element_size()) * min(batch, 2))))
    warps = max(4, min(16, power_of_two(width * batch // 1024)))  # at most 64 registers hold x
    return tile, max(1, min(-(-rows // tile), 16 // warps * processors(device))), warps
