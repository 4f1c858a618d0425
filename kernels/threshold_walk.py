"""Linears over the input channels whose magnitude passes a threshold, as one Triton launch.

    z[b] = bias + Σ_{k : |x[b, k]| > t[k]}  x[b, k] · scale[k] · weight_t[k]
    y[b] = residual[b] + given[b] · act(z[b])                 one matrix: ``threshold_gemv.py``
    y[b] = act(z_gate[b]) · z[b]                              gate and up: ``threshold_ffn.py``

A program owns a tile of outputs and walks over the channels, UNROLL x LANES at a time. Whether a
channel passes is the mask of the load of its weights: no list is written, scanned and read back
before the first weight is asked for, and x is one step ahead of the weights. Fewer bytes are under
way where fewer channels pass, which many rows a step make up for.

Up to four sequences share a program: a channel is read once if it passes for any of them. An
infinite weight of such a channel makes a NaN of those for which it does not pass, as 0 · ∞.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    from gnomon.kernels.gather_common import _activate
    from gnomon.kernels.packed import _numbers
    from gnomon.kernels.sketch_gemv import _zeros
    from gnomon.kernels.split_sums import _addend, _joined
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None


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
    def _added(sums, rows, xs, BATCH: tl.constexpr, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        """Sums (LANES, BLOCK_N) of every sequence, with a step's rows more in every lane."""
        for j in tl.static_range(len(rows)):
            numbers = _numbers(rows[j], KIND)
            found = ()
            for i in tl.static_range(BATCH):
                x = xs[j * BATCH + i][:, :, None]
                for h in tl.static_range(len(numbers)):
                    y = sums[i * len(numbers) + h] + tl.sum(numbers[h] * x, axis=1)
                    found += (y,)  # type: ignore[assignment]
            sums = found
        return sums

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
        KIND: tl.constexpr,
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
        EACH: tl.constexpr = 1 if KIND == "none" else 2  # outputs of what is loaded at once
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
            ups = _added(ups, w_now, x_now, BATCH, KIND)
            if GATED:
                gates = _added(gates, g_now, x_now, BATCH, KIND)
        last = True
        if SPLITS > 1:
            for j in tl.static_range(BATCH * EACH):
                b, at = tl.minimum(first + j // EACH, B - 1), n * EACH + j % EACH
                own = partial_ptr + (b * SPLITS + split) * (PLANES * N) + at
                tl.store(own, tl.sum(ups[j], axis=0), mask=in_n)
                if GATED:
                    tl.store(own + N, tl.sum(gates[j], axis=0), mask=in_n)
            tl.debug_barrier()
            ticket = ticket_ptr + group * tl.num_programs(0) + tile
            last = tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1
        if last:
            if SPLITS > 1:
                tl.store(ticket, 0)
            for j in tl.static_range(BATCH * EACH):
                b, at = tl.minimum(first + j // EACH, B - 1), n * EACH + j % EACH
                own = partial_ptr + b * (SPLITS * PLANES * N) + at
                place = b * N + at
                bias = _addend(bias_ptr, at, in_n, HAS_BIAS)
                gate_bias = _addend(gate_bias_ptr, at, in_n, HAS_GATE_BIAS)
                residual = _addend(residual_ptr, place, in_n, HAS_RESIDUAL)
                if SPLITS > 1:
                    y = _joined(own, in_n, PLANES * N, SPLITS, CHUNK) + bias
                else:
                    y = tl.sum(ups[j], axis=0) + bias
                if GATED:
                    if SPLITS > 1:
                        z = _joined(own + N, in_n, PLANES * N, SPLITS, CHUNK)
                    else:
                        z = tl.sum(gates[j], axis=0)
                    y *= _activate(z + gate_bias, ACTIVATION)
                else:
                    y = _activate(y, ACTIVATION)
                if HAS_GIVEN:
                    y *= tl.load(given_ptr + place, mask=in_n, other=0.0).to(tl.float32)
                tl.store(y_ptr + place, (y + residual).to(y_ptr.dtype.element_ty), mask=in_n)
