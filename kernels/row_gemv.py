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
from gnomon.kernels.packed import packing, per_word, words
from gnomon.kernels.row_batch import rows_batch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate, _reads, _rows
    from gnomon.kernels.packed import _factors, _numbers, _products
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
        KIND: tl.constexpr,
        EACH: tl.constexpr,
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
        WORDS: tl.constexpr = W // EACH
        word = tl.arange(0, BLOCK_W // EACH)
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
        mask = read[:, None] & (word < WORDS)[None, :]
        place = row.to(tl.int64)[:, None] * WORDS + word[None, :]
        w = tl.load(up_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
        if GATED:
            g = tl.load(gate_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
        if NORM != "none":
            gain = tl.load(norm_weight_ptr + k, mask=in_w, other=0.0).to(tl.float32)
            if HAS_NORM_BIAS:
                shift = tl.load(norm_bias_ptr + k, mask=in_w, other=0.0).to(tl.float32)
        if PDL:  # this program's first weights are under way while the launch before drains
            if EARLY:
                gdc_wait()
            gdc_launch_dependents()
        xs, offsets = (), ()
        for m in tl.static_range(BATCH):  # past the last sequence stands the last again
            b = tl.minimum(first + m, B - 1).to(tl.int64)
            x = tl.load(x_ptr + b * W + k, mask=in_w, other=0.0).to(tl.float32)
            if NORM == "layer":
                x = tl.where(in_w, x - tl.sum(x, axis=0) / W, 0.0)
            if NORM != "none":
                x = x * tl.rsqrt(tl.sum(x * x, axis=0) / W + eps) * gain
                if HAS_NORM_BIAS:
                    x += shift
            if KIND == "int8":
                offsets += (128.0 * tl.sum(x, axis=0),)  # type: ignore[assignment]
            xs += _factors(x, KIND, EACH)
        for start in range(tl.program_id(0) * ROWS, end, step):
            here, now, used, w_now = r, row, read, w
            r = start + step + tl.arange(0, ROWS)
            row, read = row_next, read_next
            mask = read[:, None] & (word < WORDS)[None, :]
            place = row.to(tl.int64)[:, None] * WORDS + word[None, :]
            w = tl.load(up_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
            if GATED:
                g_now = g
                g = tl.load(gate_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
            row_next = _rows(r + step, end, index_ptr, own, UNIT, HAS_INDEX)
            read_next = _reads(r + step < end, r + step, wanted_ptr, before, UNIT, HAS_WANTED)
            numbers = _numbers(w_now, KIND)
            if GATED:
                gates = _numbers(g_now, KIND)
            for m in tl.static_range(BATCH):
                y = _products(numbers, xs, m, EACH)
                if GATED:  # one sum across threads for both
                    both = tl.join(y, _products(gates, xs, m, EACH))
                    y, z = tl.split(tl.sum(both, axis=1))
                else:
                    y = tl.sum(y, axis=1)
                if KIND == "int8":  # rows that are not read are 0, which is not the code of 0
                    y = tl.where(used, y * 2.0**85 - offsets[m], 0.0)
                if HAS_SCALE:
                    y *= tl.load(up_scale_ptr + now, mask=used, other=0.0)
                if HAS_BIAS:
                    y += tl.load(up_bias_ptr + now, mask=used, other=0.0).to(tl.float32)
                if GATED:
                    if KIND == "int8":
                        z = z * 2.0**85 - offsets[m]
                    if HAS_SCALE:
                        z *= tl.load(gate_scale_ptr + now, mask=used, other=0.0)
                    if HAS_GATE_BIAS:
                        z += tl.load(gate_bias_ptr + now, mask=used, other=0.0).to(tl.float32)
                    y *= _activate(z, ACTIVATION)
                elif GIVEN:
                    b = tl.minimum(first + m, B - 1).to(tl.int64)
                    y *= tl.load(given_ptr + b * N + now, mask=used, other=0.0)
                else:
                    y = _activate(y, ACTIVATION)
                to = y_ptr + (first + m).to(tl.int64) * (S * UNIT) + here
                ends = tl.where(first + m < B, end, 0)
                tl.store(to, y.to(y_ptr.dtype.element_ty), mask=here < ends)


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
    kind = packing(up) if gate is None else packing(up, gate)
    size = up.element_size() if kind != "none" else max(2, up.element_size())
    rows, programs, warps = _tiles(slots * unit, width, size, gate is not None, together, x.device)
    _row_kernel[(programs, triton.cdiv(batch, together))](
        x,
        words(up, kind),
        words(up if gate is None else gate, kind),
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
        KIND=kind,
        EACH=per_word(up, kind),
        BATCH=together,
        ROWS=rows,
        BLOCK_W=power_of_two(width),
        EARLY=early or (index is None and wanted is None),
        num_warps=warps,
        **pdl(x.device),
    )
    return y


def _tiles(
    rows: int, width: int, size: int, gated: bool, batch: int, device: torch.device
) -> tuple[int, int, int]:
    """Rows of a block, programs, warps.

    Blocks of 16 KB, half of them gate rows, half as much beside several sequences, and sixteen
    warps per processor, or 24 where rows are short: of what was tried, with this the whole steps of
    Llama-3-8B, OPT-13B and Qwen2.5-1.5B are fastest on an H100. More programs make single launches
    faster and steps slower, as they leave no room for the launch that follows
    (benchmarks/results/kernels/h100_words_tuning.txt). Bytes that are no words count double: they
    take a register each.
    """
    width = power_of_two(width)
    block = 8192 if gated else 16384
    tile = max(1, min(32, block // (width * size * min(batch, 2))))
    warps = max(4, min(16, power_of_two(width * batch // 1024)))  # at most 64 registers hold x
    programs = max(1, (24 if width <= 2048 else 16) // warps) * processors(device)
    return tile, max(1, min(-(-rows // tile), programs)), warps
