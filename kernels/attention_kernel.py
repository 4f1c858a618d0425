"""The Triton kernel of :mod:`gnomon.kernels.decode_attention`; its maths and shapes stand there.

A sequence's programs are SPLITS for each of its active KV groups, then writers that store the new
keys and values. A program serves every active head of its group, so K and V are read once; groups
without an active head get no program. The split that arrives last at its group's ticket merges the
partial results, in an order that does not depend on who that is. Tokens are dealt out by the
length on the device, so one launch serves every length of a cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gnomon.kernels.attention_parts import (
    LOG2E,
    _capped,
    _group_of,
    _load_tile,
    _merge,
    _rotated,
    _take_tile,
)


@triton.jit
def _write_new(  # type: ignore[no-untyped-def]
    k_new_ptr,
    v_new_ptr,
    k_cache_ptr,
    v_cache_ptr,
    kv_slot_ptr,
    kv_slot_row,
    first_group,
    position,
    C,
    angle,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    D: tl.constexpr,
    ROT: tl.constexpr,
    G: tl.constexpr,
    HAS_KV_SLOT: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Stores the new keys and values of BLOCK_G groups of one sequence."""
    j = tl.arange(0, BLOCK_D)
    g = first_group + tl.arange(0, BLOCK_G)
    row = g
    if HAS_KV_SLOT:
        row = tl.load(kv_slot_ptr + kv_slot_row + g, mask=g < G, other=-1)
    live = (g < G) & (row >= 0) & (position + tl.zeros((BLOCK_G,), tl.int32) < C)
    key = _rotated(
        k_new_ptr, row, live, angle, k_norm_ptr, cos_ptr, sin_ptr, eps, D, ROT, HAS_K_NORM, BLOCK_D
    )
    mask = live[:, None] & (j < D)[None, :]
    value = tl.load(v_new_ptr + row[:, None] * D + j[None, :], mask=mask, other=0.0)
    place = (g.to(tl.int64)[:, None] * C + position) * D + j[None, :]
    tl.store(k_cache_ptr + place, key.to(k_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(v_cache_ptr + place, value.to(v_cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_new_ptr,
    v_new_ptr,
    k_cache_ptr,
    v_cache_ptr,
    ctx_ptr,
    partial_ptr,
    stat_ptr,
    ticket_ptr,
    position_ptr,
    first_ptr,
    slot_ptr,
    kv_slot_ptr,
    cos_ptr,
    sin_ptr,
    q_norm_ptr,
    k_norm_ptr,
    alibi_ptr,
    q_stride,
    k_stride,
    v_stride,
    SH,
    GROUPS,
    C,
    P,
    eps,
    scaling,
    softcap,
    D: tl.constexpr,
    ROT: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    KV_SLOT_STRIDE: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_KV_SLOT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
    G_POW2: tl.constexpr,
    R_POW2: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STAGES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program p of sequence b: split p % SPLITS of active group p // SPLITS, or a writer."""
    p, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = tl.arange(0, BLOCK_D)
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(position_ptr + b)
    angle = tl.minimum(position, P - 1).to(tl.int64)
    if p >= GROUPS * SPLITS:
        if PDL and EARLY:
            gdc_wait()
            gdc_launch_dependents()
        _write_new(
            k_new_ptr + b * k_stride, v_new_ptr + b * v_stride,
            k_cache_ptr + b * G * C * D, v_cache_ptr + b * G * C * D,
            kv_slot_ptr, b * KV_SLOT_STRIDE, (p - GROUPS * SPLITS) * BLOCK_G, position, C, angle,
            k_norm_ptr, cos_ptr, sin_ptr, eps,
            D, ROT, G, HAS_KV_SLOT, HAS_K_NORM, BLOCK_D, BLOCK_G,
        )  # fmt: skip
    else:
        a, split = p // SPLITS, p % SPLITS
        slots_ptr = slot_ptr
        g, active = a, a < GROUPS
        if HAS_SLOT:
            slots_ptr += b * SLOT_STRIDE
            g, active = _group_of(slots_ptr, a, G, R, G_POW2, R_POW2)
        low = 0
        if HAS_FIRST:
            low = tl.maximum(tl.load(first_ptr + b), 0)
        if WINDOW > 0:
            low = tl.maximum(low, position - WINDOW + 1)
        high = tl.minimum(position, C)
        length = tl.maximum(high - low, 0)
        part = BLOCK_T  # whole tiles, and no more splits than there are tiles
        if not ONE_TILE:
            part = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_T), 1) * BLOCK_T
        used = tl.maximum(tl.cdiv(length, part), 1)
        begin = low + split * part
        end = tl.minimum(begin + part, high)
        active = active & (split < used)
        start = (b * G + g) * C * D
        k_ptr, v_ptr = k_cache_ptr + start, v_cache_ptr + start
        r = tl.arange(0, R_PAD)
        slot = g * R + r
        merged = g * R + tl.arange(0, R_POW2)  # the same without padding, as the merge takes it
        row = tl.zeros((1,), dtype=tl.int32) + g
        if HAS_SLOT:
            slot = tl.load(slots_ptr + g * R + r, mask=r < R, other=-1)
            merged = tl.load(slots_ptr + merged, mask=tl.arange(0, R_POW2) < R, other=-1)
        if HAS_KV_SLOT:
            row = tl.load(kv_slot_ptr + b * KV_SLOT_STRIDE + row)
        if ONE_TILE:  # its keys and values are under way while the projection drains
            stop = tl.where(active, end, begin)
            k = _load_tile(k_ptr, begin, stop, D, BLOCK_D, BLOCK_T)
            v = _load_tile(v_ptr, begin, stop, D, BLOCK_D, BLOCK_T)
        if PDL and EARLY:
            gdc_wait()
            gdc_launch_dependents()
        if active:
            head = (r < R) & (slot >= 0)
            q = _rotated(
                q_ptr + b * q_stride, slot, head, angle, q_norm_ptr, cos_ptr, sin_ptr, eps,
                D, ROT, HAS_Q_NORM, BLOCK_D,
            )  # fmt: skip
            slope = tl.zeros((R_PAD,), dtype=tl.float32)
            if HAS_ALIBI:
                slope = tl.load(alibi_ptr + g * R + r, mask=r < R, other=0.0).to(tl.float32) * LOG2E
            # The new token belongs to the last split: its key is rounded as the cache's are.
            last = tl.zeros((1,), dtype=tl.int32) + split == used - 1
            here = (row >= 0) & last
            key = _rotated(
                k_new_ptr + b * k_stride, row, here, angle, k_norm_ptr, cos_ptr, sin_ptr, eps,
                D, ROT, HAS_K_NORM, BLOCK_D,
            )  # fmt: skip
            key = key.to(k_cache_ptr.dtype.element_ty).to(tl.float32)
            value = tl.load(
                v_new_ptr + b * v_stride + row.to(tl.int64)[:, None] * D + j[None, :],
                mask=here[:, None] & (j < D)[None, :],
                other=0.0,
            )
            value = value.to(v_cache_ptr.dtype.element_ty).to(tl.float32)
            s = _capped(tl.sum(q * key, axis=1) * scaling, softcap, HAS_SOFTCAP)
            m = tl.where(last, s, -float("inf"))
            mass = tl.where(last, 1.0, 0.0) + tl.zeros((R_PAD,), dtype=tl.float32)
            acc = value + tl.zeros((R_PAD, BLOCK_D), dtype=tl.float32)
            if DOT and not UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
                q = q.to(k_cache_ptr.dtype.element_ty)
            if ONE_TILE:
                m, mass, acc = _take_tile(
                    q, k, v, slope, m, mass, acc, begin, end, position, scaling, softcap,
                    HAS_SOFTCAP, BLOCK_T, DOT,
                )  # fmt: skip
            else:
                for at in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
                    k = _load_tile(k_ptr, at, end, D, BLOCK_D, BLOCK_T)
                    v = _load_tile(v_ptr, at, end, D, BLOCK_D, BLOCK_T)
                    m, mass, acc = _take_tile(
                        q, k, v, slope, m, mass, acc, at, end, position, scaling, softcap,
                        HAS_SOFTCAP, BLOCK_T, DOT,
                    )  # fmt: skip
            out_row = b * SH
            mask = head[:, None] & (j < D)[None, :]
            if SPLITS == 1:
                y = acc / mass[:, None]
                place = (out_row + slot)[:, None] * D + j[None, :]
                tl.store(ctx_ptr + place, y.to(ctx_ptr.dtype.element_ty), mask=mask)
            else:
                at = (out_row + slot) * SPLITS + split
                tl.store(partial_ptr + at[:, None] * D + j[None, :], acc, mask=mask)
                tl.store(stat_ptr + 2 * at, m, mask=head)
                tl.store(stat_ptr + 2 * at + 1, mass, mask=head)
                tl.debug_barrier()
                ticket = ticket_ptr + b * GROUPS + a
                if tl.atomic_add(ticket, 1, sem="acq_rel") == used - 1:
                    tl.store(ticket, 0)
                    _merge(
                        ctx_ptr, partial_ptr, stat_ptr, out_row, merged, used,
                        D, R, SPLITS, R_POW2, BLOCK_D, BLOCK_S,
                    )  # fmt: skip
