"""The parts of the attention kernel: rotation, online softmax over a tile, merge of the splits.

Scores are kept in base 2. A partial result of a head over a split is its highest score m, its mass
l = Σ 2^(s − m) and the sum of 2^(s − m) · v, so that partial results join exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rotated(  # type: ignore[no-untyped-def]
    ptr,
    row,
    live,
    position,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    D: tl.constexpr,
    ROT: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Head rows (R, BLOCK_D) at ptr, RMS-normed and rotated, in fp32; zero where not live."""
    j = tl.arange(0, BLOCK_D)
    start = row.to(tl.int64)[:, None] * D
    mask = live[:, None] & (j < D)[None, :]
    x = tl.load(ptr + start + j[None, :], mask=mask, other=0.0).to(tl.float32)
    HALF: tl.constexpr = ROT // 2
    turned = j < ROT
    pair = tl.where(j < HALF, j + HALF, j - HALF)
    if ROT > 0:
        y_mask = live[:, None] & turned[None, :]
        y = tl.load(ptr + start + pair[None, :], mask=y_mask, other=0.0).to(tl.float32)
        at = position * ROT + j
        cos = tl.load(cos_ptr + at, mask=turned, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + at, mask=turned, other=0.0).to(tl.float32)
        sin = tl.where(j < HALF, -sin, sin)
    if HAS_NORM:
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        x *= rstd[:, None] * tl.load(norm_ptr + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
        if ROT > 0:
            gain = tl.load(norm_ptr + pair, mask=turned, other=0.0).to(tl.float32)
            y *= rstd[:, None] * gain[None, :]
    if ROT > 0:
        x = x * cos[None, :] + y * sin[None, :]
    return x


@triton.jit
def _capped(s, softcap, HAS_SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores, soft-capped, in base 2."""
    if HAS_SOFTCAP:  # tanh(z) = 1 - 2 / (e^(2z) + 1), without libdevice; a series where it cancels
        z = s / softcap
        z2 = z * z
        near = z * (1.0 - z2 * (0.33333334 - z2 * (0.13333334 - z2 * 0.05396825)))
        far = 1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2E)) + 1.0)
        s = softcap * tl.where(z2 < 0.04, near, far)
    return s * LOG2E


@triton.jit
def _load_tile(ptr, start, end, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens [start, start + BLOCK_T) of a group's cache; zero from ``end`` on."""
    j, t = tl.arange(0, BLOCK_D), start + tl.arange(0, BLOCK_T)
    mask = (t < end)[:, None] & (j < D)[None, :]
    return tl.load(ptr + t[:, None] * D + j[None, :], mask=mask, other=0.0)


@triton.jit
def _take_tile(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    slope,
    m,
    mass,
    acc,
    start,
    end,
    position,
    scaling,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DOT: tl.constexpr,
):
    """Online softmax over one tile: q (R, BLOCK_D), k and v (BLOCK_T, BLOCK_D).

    Tensor cores pay even for one head padded to 16: sums over d take hundreds of shuffles a tile.
    """
    t = start + tl.arange(0, BLOCK_T)
    if DOT:
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scaling
    else:
        s = tl.sum(q[:, None, :] * k.to(tl.float32)[None, :, :], axis=2) * scaling
    s = _capped(s, softcap, HAS_SOFTCAP) + slope[:, None] * (t - position)[None, :]
    s = tl.where((t < end)[None, :], s, -float("inf"))
    higher = tl.maximum(m, tl.max(s, axis=1))
    p = tl.exp2(s - higher[:, None])
    shrink = tl.exp2(m - higher)
    if DOT:
        p = p.to(q.dtype)  # rounded before it is summed, too
        acc = acc * shrink[:, None] + tl.dot(p, v.to(q.dtype), input_precision="ieee")
    else:
        weighed = p[:, :, None] * v.to(tl.float32)[None, :, :]
        acc = acc * shrink[:, None] + tl.sum(weighed, axis=1)
    mass = mass * shrink + tl.sum(p.to(tl.float32), axis=1)
    return higher, mass, acc


@triton.jit
def _group_of(  # type: ignore[no-untyped-def]
    slot_ptr,
    a,
    G: tl.constexpr,
    R: tl.constexpr,
    G_POW2: tl.constexpr,
    R_POW2: tl.constexpr,
):
    """The a-th group with an active head, and whether there is one."""
    g, r = tl.arange(0, G_POW2), tl.arange(0, R_POW2)
    inside = (g < G)[:, None] & (r < R)[None, :]
    slots = tl.load(slot_ptr + g[:, None] * R + r[None, :], mask=inside, other=-1)
    active = (tl.max(slots, axis=1) >= 0).to(tl.int32)
    rank = tl.cumsum(active, axis=0)
    return tl.sum(tl.where((active > 0) & (rank == a + 1), g, 0)), tl.sum(active) > a


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    ctx_ptr,
    partial_ptr,
    stat_ptr,
    out_row,
    slot,
    used,
    D: tl.constexpr,
    R: tl.constexpr,
    SPLITS: tl.constexpr,
    R_POW2: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Joins a group's partial sums, BLOCK_S splits at a time, and stores its heads' context.

    ``slot`` holds the places of the group's heads.

    A tile of splits, reduced across threads, took two thirds of the whole launch on an H100.
    """
    j = tl.arange(0, BLOCK_D)
    head = (tl.arange(0, R_POW2) < R) & (slot >= 0)
    row = out_row + slot
    m = tl.full((R_POW2,), -float("inf"), dtype=tl.float32)
    mass = tl.zeros((R_POW2,), dtype=tl.float32)
    acc = tl.zeros((R_POW2, BLOCK_D), dtype=tl.float32)
    for start in range(0, used, BLOCK_S):
        for i in tl.static_range(BLOCK_S):  # independent loads, and sums within a thread
            s = start + i + tl.zeros((R_POW2,), dtype=tl.int32)
            held, at = head & (s < used), row * SPLITS + s
            top = tl.load(stat_ptr + 2 * at, mask=held, other=-float("inf"), cache_modifier=".cg")
            part = tl.load(stat_ptr + 2 * at + 1, mask=held, other=0.0, cache_modifier=".cg")
            sums = tl.load(
                partial_ptr + at[:, None] * D + j[None, :],
                mask=held[:, None] & (j < D)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            higher = tl.where(head, tl.maximum(m, top), 0.0)  # a padded head has no finite top
            weight, shrink = tl.exp2(top - higher), tl.exp2(m - higher)
            mass = mass * shrink + weight * part
            acc = acc * shrink[:, None] + weight[:, None] * sums
            m = higher
    y = acc / tl.where(head, mass, 1.0)[:, None]
    place = row[:, None] * D + j[None, :]
    tl.store(ctx_ptr + place, y.to(ctx_ptr.dtype.element_ty), mask=head[:, None] & (j < D)[None, :])
