"""Linears over the input channels whose magnitude passes a threshold, as one Triton launch.

    z[b] = bias + Σ_{k : |x[b, k]| > t[k]}  x[b, k] · scale[k] · weight_t[k]
    y[b] = residual[b] + given[b] · act(z[b])                 one matrix: ``threshold_gemv.py``
    y[b] = act(z_gate[b]) · z[b]                              gate and up: ``threshold_ffn.py``

A program owns a tile of outputs and walks over the channels, UNROLL x LANES at a time. Whether a
channel passes is the mask of the load of its weights: no list is written, scanned and read back
before the first weight is asked for, and x is one step ahead of the weights. Fewer bytes are under
way where fewer channels pass, which many rows a step make up for.

Tiles are narrow, so that they fill the processors and no sum is split, which would cost a store, a
ticket and a second sum (4 to 5 µs of a launch on an H100). Where there are too few tiles for that,
the last split of a tile adds them up in their order. Either way the result is the same every time.

Up to four sequences share a program: a channel is read once if it passes for any of them. An
infinite weight of such a channel makes a NaN of those for which it does not pass, as 0 · ∞.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gnomon.kernels.launch import TICKETS, pdl, power_of_two, processors, tickets

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
    from gnomon.kernels.sketch_gemv import _zeros
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None


PACKED = {torch.bfloat16: "bf16", torch.float16: "fp16"}


LONG = 8192  # channels of a tile that two programs share


class Shape(NamedTuple):
    """How a launch is cut.

    Attributes:
        block_n: outputs of a program.
        unroll: rows that a thread sums in its registers at a step.
        splits: programs that share the channels of a tile.
        warps: of a program.
    """

    block_n: int
    unroll: int
    splits: int
    warps: int


if triton is not None:

    @triton.jit
    def _passing(  # type: ignore[no-untyped-def]
        x_ptr,
        threshold_ptr,
        scale_ptr,
        first,
        B,
        r,
        end,
        W,
        STRIDE: tl.constexpr,
        ROUNDS: tl.constexpr,
        PER_CHANNEL: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        BATCH: tl.constexpr,
    ):
        """x of channels r (LANES, UNROLL), 0 where they do not pass, and which are read for any.

        Tuples: of ROUNDS blocks, each STRIDE channels behind the one before, times BATCH sequences;
        and of ROUNDS.
        """
        xs, reads = (), ()
        for j in tl.static_range(ROUNDS):
            k = r + j * STRIDE
            live = k < end
            if PER_CHANNEL:
                cut = tl.load(threshold_ptr + k, mask=live, other=0.0)
            else:
                cut = tl.load(threshold_ptr)
            read = live & (k < 0)
            for i in tl.static_range(BATCH):
                b = tl.minimum(first + i, B - 1)
                x = tl.load(x_ptr + b * W + k, mask=live, other=0.0).to(tl.float32)
                keep = live & (tl.abs(x) > cut)
                x = tl.where(keep, x, 0.0)
                if HAS_SCALE:
                    x *= tl.load(scale_ptr + k, mask=keep, other=0.0)
                xs += (x,)  # type: ignore[assignment]
                read = read | keep
            reads += (read,)  # type: ignore[assignment]
        return xs, reads

    @triton.jit
    def _rows(  # type: ignore[no-untyped-def]
        weight_ptr, r, reads, n, in_n, N: tl.constexpr, BLOCK_N: tl.constexpr, STRIDE: tl.constexpr
    ):
        """Weights (LANES, UNROLL, BLOCK_N) of the channels that are read, a tuple of blocks."""
        rows = ()
        for j in tl.static_range(len(reads)):
            mask = reads[j][:, :, None]
            if N % BLOCK_N != 0:
                mask = mask & in_n[None, None, :]
            at = weight_ptr + (r + j * STRIDE).to(tl.int64)[:, :, None] * N + n[None, None, :]
            rows += (tl.load(at, mask=mask, other=0, eviction_policy="evict_first"),)  # type: ignore[assignment]
        return rows

    @triton.jit
    def _numbers(w, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
        """fp32 of loaded weights: of words, those of even and of odd outputs."""
        if PACKED == "bf16":
            even = (w << 16).to(tl.float32, bitcast=True)
            return even, (w & -65536).to(tl.float32, bitcast=True)
        elif PACKED == "fp16":
            even = w.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            return even, (w >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            return (w.to(tl.float32),)

    @triton.jit
    def _added(sums, rows, xs, BATCH: tl.constexpr, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
        """Sums (LANES, BLOCK_N) of every sequence, with a step's rows more in every lane."""
        for j in tl.static_range(len(rows)):
            numbers = _numbers(rows[j], PACKED)
            found = ()
            for i in tl.static_range(BATCH):
                x = xs[j * BATCH + i][:, :, None]
                for h in tl.static_range(len(numbers)):
                    y = sums[i * len(numbers) + h] + tl.sum(numbers[h] * x, axis=1)
                    found += (y,)  # type: ignore[assignment]
            sums = found
        return sums

    @triton.jit
    def _joined(own, mask, stride, SPLITS: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
        """The sum of the splits, in their order; CHUNK independent loads at a time."""
        y = tl.zeros(mask.shape, dtype=tl.float32)
        for start in range(0, SPLITS, CHUNK):
            for i in tl.static_range(CHUNK):
                s = start + i + tl.zeros(mask.shape, dtype=tl.int32)
                held = mask & (s < SPLITS)
                y += tl.load(own + s * stride, mask=held, other=0.0, cache_modifier=".cg")
        return y

    @triton.jit
    def _finish(  # type: ignore[no-untyped-def]
        y,
        z,
        bias_ptr,
        gate_bias_ptr,
        given_ptr,
        residual_ptr,
        y_ptr,
        b,
        n,
        mask,
        N: tl.constexpr,
        ACTIVATION: tl.constexpr,
        GATED: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_GATE_BIAS: tl.constexpr,
        HAS_GIVEN: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
    ):
        """What becomes of the sums y, and z of the gate, is stored."""
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            if HAS_GATE_BIAS:
                z += tl.load(gate_bias_ptr + n, mask=mask, other=0.0).to(tl.float32)
            y *= _activate(z, ACTIVATION)
        else:
            y = _activate(y, ACTIVATION)
        place = b * N + n
        if HAS_GIVEN:
            y *= tl.load(given_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _walk_kernel(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        gate_ptr,
        threshold_ptr,
        bias_ptr,
        gate_bias_ptr,
        scale_ptr,
        given_ptr,
        residual_ptr,
        y_ptr,
        partial_ptr,
        ticket_ptr,
        B,
        W,
        N: tl.constexpr,
        PACKED: tl.constexpr,
        GATED: tl.constexpr,
        PER_CHANNEL: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_GATE_BIAS: tl.constexpr,
        HAS_SCALE: tl.constexpr,
        HAS_GIVEN: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        ACTIVATION: tl.constexpr,
        BATCH: tl.constexpr,
        SPLITS: tl.constexpr,
        ROUNDS: tl.constexpr,
        UNROLL: tl.constexpr,
        LANES: tl.constexpr,
        BLOCK_N: tl.constexpr,
        CHUNK: tl.constexpr,
        PDL: tl.constexpr,
    ):
        """BLOCK_N outputs of up to BATCH sequences over one of SPLITS parts of the channels."""
        STRIDE: tl.constexpr = UNROLL * LANES
        STEP: tl.constexpr = ROUNDS * STRIDE
        PLANES: tl.constexpr = 1 + GATED
        EACH: tl.constexpr = 1 if PACKED == "none" else 2  # outputs of what is loaded at once
        WORDS: tl.constexpr = N // EACH
        BLOCK: tl.constexpr = BLOCK_N // EACH
        tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        part = tl.cdiv(tl.cdiv(W, SPLITS), STEP) * STEP
        begin = split * part
        end = tl.minimum(begin + part, W)
        n = tile * BLOCK + tl.arange(0, BLOCK)
        in_n = n < WORDS
        lane = tl.arange(0, UNROLL)[None, :] * LANES + tl.arange(0, LANES)[:, None]
        r = begin + lane
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        first = (group * BATCH).to(tl.int64)  # past the last sequence stands the last again
        source = x_ptr, threshold_ptr, scale_ptr, first, B
        x, read = _passing(*source, r, end, W, STRIDE, ROUNDS, PER_CHANNEL, HAS_SCALE, BATCH)
        w = _rows(weight_ptr, r, read, n, in_n, WORDS, BLOCK, STRIDE)
        if GATED:
            g = _rows(gate_ptr, r, read, n, in_n, WORDS, BLOCK, STRIDE)
        x_next, read_next = _passing(
            *source, r + STEP, end, W, STRIDE, ROUNDS, PER_CHANNEL, HAS_SCALE, BATCH
        )
        ups = _zeros(BATCH * EACH, (LANES, BLOCK))
        gates = _zeros(BATCH * EACH, (LANES, BLOCK))
        for start in range(begin, end, STEP):
            x_now, w_now = x, w
            x, read, r = x_next, read_next, start + STEP + lane
            w = _rows(weight_ptr, r, read, n, in_n, WORDS, BLOCK, STRIDE)
            if GATED:
                g_now = g
                g = _rows(gate_ptr, r, read, n, in_n, WORDS, BLOCK, STRIDE)
            x_next, read_next = _passing(
                *source, r + STEP, end, W, STRIDE, ROUNDS, PER_CHANNEL, HAS_SCALE, BATCH
            )
            ups = _added(ups, w_now, x_now, BATCH, PACKED)
            if GATED:
                gates = _added(gates, g_now, x_now, BATCH, PACKED)
        epilogue = bias_ptr, gate_bias_ptr, given_ptr, residual_ptr, y_ptr
        if SPLITS == 1:
            for j in tl.static_range(BATCH * EACH):
                b, at = tl.minimum(first + j // EACH, B - 1), n * EACH + j % EACH
                y = tl.sum(ups[j], axis=0)
                z = y
                if GATED:
                    z = tl.sum(gates[j], axis=0)
                _finish(
                    y,
                    z,
                    *epilogue,
                    b,
                    at,
                    in_n,
                    N,
                    ACTIVATION,
                    GATED,
                    HAS_BIAS,
                    HAS_GATE_BIAS,
                    HAS_GIVEN,
                    HAS_RESIDUAL,
                )
        else:
            for j in tl.static_range(BATCH * EACH):
                b, at = tl.minimum(first + j // EACH, B - 1), n * EACH + j % EACH
                own = partial_ptr + (b * SPLITS + split) * (PLANES * N) + at
                tl.store(own, tl.sum(ups[j], axis=0), mask=in_n)
                if GATED:
                    tl.store(own + N, tl.sum(gates[j], axis=0), mask=in_n)
            tl.debug_barrier()
            ticket = ticket_ptr + group * tl.num_programs(0) + tile
            if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1:
                tl.store(ticket, 0)
                for j in tl.static_range(BATCH * EACH):
                    b, at = tl.minimum(first + j // EACH, B - 1), n * EACH + j % EACH
                    own = partial_ptr + b * (SPLITS * PLANES * N) + at
                    y = _joined(own, in_n, PLANES * N, SPLITS, CHUNK)
                    z = y
                    if GATED:
                        z = _joined(own + N, in_n, PLANES * N, SPLITS, CHUNK)
                    _finish(
                        y,
                        z,
                        *epilogue,
                        b,
                        at,
                        in_n,
                        N,
                        ACTIVATION,
                        GATED,
                        HAS_BIAS,
                        HAS_GATE_BIAS,
                        HAS_GIVEN,
                        HAS_RESIDUAL,
                    )


def launch_walk(
    x: Tensor,
    weight_t: Tensor,
    gate_t: Tensor | None,
    threshold: Tensor,
    bias: Tensor | None,
    gate_bias: Tensor | None,
    scale: Tensor | None,
    out_dtype: torch.dtype | None,
    activation: str,
    given: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y (B, N) of checked arguments: x (B, W), weight_t and gate_t (W, N)."""
    (batch, width), n = x.shape, weight_t.shape[1]
    y = torch.empty((batch, n), dtype=out_dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    together = min(4, power_of_two(batch))
    groups, gated = -(-batch // together), gate_t is not None
    size = weight_t.element_size()
    shape = _shape(width, n, together, groups, gated, size, x.device)
    tiles = -(-n // shape.block_n)
    if groups * tiles > TICKETS:
        raise ValueError(f"a batch of {batch} with N={n} is more than one launch serves: split x")
    lanes = _lanes(shape, size)
    # fewer numbers of x than threads: Triton then loads them where they are used
    rounds = min(shape.unroll, power_of_two(-(-shape.unroll * lanes // (shape.warps * 32)) + 1))
    partial = y
    if shape.splits > 1:
        sums = (batch, shape.splits, 1 + gated, n)
        partial = torch.empty(sums, dtype=torch.float32, device=x.device)
    words = [t if t is None else t.contiguous() for t in (weight_t, gate_t)]
    even = n % 2 == 0 and all(t is None or t.storage_offset() % 2 == 0 for t in words)
    packed = PACKED.get(weight_t.dtype, "none") if even else "none"
    if packed != "none":  # a loop that carries words, not halves, need not wait for them to part
        words = [t if t is None else t.view(torch.int32) for t in words]
    tensors = (*words, threshold.float(), bias, gate_bias, scale, given, residual)
    _walk_kernel[(tiles, shape.splits, groups)](
        x.contiguous(),
        *(None if t is None else t.contiguous() for t in tensors),
        y,
        partial,
        tickets(x.device),
        batch,
        width,
        N=n,
        PACKED=packed,
        GATED=gated,
        PER_CHANNEL=threshold.shape[0] > 1 or width == 1,
        HAS_BIAS=bias is not None,
        HAS_GATE_BIAS=gate_bias is not None,
        HAS_SCALE=scale is not None,
        HAS_GIVEN=given is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        BATCH=together,
        SPLITS=shape.splits,
        ROUNDS=rounds,
        UNROLL=shape.unroll // rounds,
        LANES=lanes,
        BLOCK_N=shape.block_n,
        CHUNK=-(-shape.splits // -(-shape.splits // 16)),
        num_warps=shape.warps,
        **pdl(x.device),
    )
    return y


def _lanes(shape: Shape, size: int) -> int:
    """Rows that the threads of a program read at once, 16 bytes each."""
    return max(1, shape.warps * 32 * (16 // size) // shape.block_n)


def _shape(
    width: int, n: int, together: int, groups: int, gated: bool, size: int, device: torch.device
) -> Shape:
    """32 KB a step in 8 warps; the widest tiles that nearly fill the processors, or splits.

    Where tiles fill the processors about once and are long, two programs share each.
    """
    unroll = max(1, (4 if gated else 8) // together)
    enough = 0.9 * processors(device)
    for block_n in (64, 32):
        block_n = min(block_n, max(16, power_of_two(n)))
        programs = -(-n // block_n) * groups
        if programs >= enough:
            long = width >= LONG and programs < 1.2 * processors(device)
            return Shape(block_n, unroll, 2 if long else 1, 8)
    block_n = min(64, max(16, power_of_two(n)))
    programs = -(-n // block_n) * groups
    step = unroll * _lanes(Shape(block_n, unroll, 1, 8), size)
    splits = min(round(1.5 * processors(device) / programs), -(-width // step))
    return Shape(block_n, unroll, max(1, splits), 8)
