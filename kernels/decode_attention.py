"""Attention of one decode step over the active heads, with everything around it fused.

    q_h = rope(norm(q[slot h])),  k_g = rope(norm(k_new[g])),  v_g = v_new[g],  n = position[b]
    k_cache[b, g, n] = k_g,  v_cache[b, g, n] = v_g
    s_t = cap(scaling · q_h · k_cache[b, g, t]) + alibi_h · (t − n),   low <= t <= n
    ctx[slot h] = Σ_t softmax(s)_t · v_cache[b, g, t],   g = h // (H / G)

q and ctx (B, SH·d) are compact, SH <= H places for heads; slot (B, H) says which; caches are
(B, G, C, d). cap(s) = softcap · tanh(s / softcap); low = max(first, n − window + 1, 0). The norm
is an RMS norm of each head, the rotation that of Hugging Face's ``rotate_half`` over the first
``rot`` columns. A group whose heads are all skipped has none of its cache read. All is fp32 but
the caches, and, where several heads share a group, the operands of the kernel's matrix products.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gnomon.kernels.attention_launch import check, launch
from gnomon.kernels.gather_common import normalise


def decode_attention_reference(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    slot: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    scaling: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    first: Tensor | None = None,
    alibi: Tensor | None = None,
    write: str = "all",
    kv_slot: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
) -> Tensor:
    """The specification. On a CPU only the tokens and groups in use are read, without a copy.

    Args:
        q: (B, SH·d) queries, neither normed nor rotated.
        k_new: (B, G·d) keys of the new token, likewise.
        v_new: (B, G·d).
        k_cache: (B, G, C, d), contiguous; its entry at ``position`` is written.
        v_cache: (B, G, C, d), likewise.
        position: (B,) int32 tokens already cached, below C: the new token's place.
        slot: (B, H) or (1, H) int32 place of each head in q, -1 if skipped; None: all, in order.
        cos: (P, rot) fp32 by position, P >= C; None for no rotation.
        sin: (P, rot).
        q_norm: (d,) weight of the queries' RMS norm, as multiplied; None for no norm.
        k_norm: (d,) of the keys'.
        eps: of both norms.
        scaling: of the scores; None takes d^-0.5.
        window: tokens attended to, the new one among them; 0 for all.
        softcap: of the scores; 0 for none.
        first: (B,) int32 first position that may be attended to.
        alibi: (H,) slopes of linear position biases.
        write: ``all``: every group's key and value is stored; ``active``: those with a place in
            ``kv_slot``, by which k_new and v_new are then compact. It covers every active head's.
        kv_slot: (B, G) or (1, G) int32, -1 if absent; only with ``write="active"``.
        out_dtype: of ctx; None takes q's.
        early: promises that ``slot``, ``kv_slot``, ``first`` and ``position`` were complete before
            the launch that precedes this one; changes no result.

    Returns:
        ctx (B, SH·d); places that no head has are undefined.

    Raises:
        ValueError: shapes or types that do not fit each other.
    """
    check(q, k_new, v_new, k_cache, v_cache, position, slot, cos, sin, alibi, write, kv_slot, first)
    batch, groups, _, d = k_cache.shape
    places = q.shape[1] // d
    heads = q.reshape(batch, places, d).float()
    keys = k_new.reshape(batch, -1, d).float()
    if q_norm is not None:
        heads = normalise(heads, "rms", q_norm, None, eps)
    if k_norm is not None:
        keys = normalise(keys, "rms", k_norm, None, eps)
    if cos is not None and sin is not None:
        at = position.long()
        both = _rotate(torch.cat([heads, keys], 1), cos[at][:, None], sin[at][:, None])
        heads, keys = both[:, :places], both[:, places:]
    values = v_new.reshape(batch, -1, d)
    scaling = d**-0.5 if scaling is None else scaling
    if slot is not None and places:
        heads = heads.gather(1, slot.clamp(min=0).long()[:, :, None].expand(batch, -1, d))
    elif slot is not None:
        heads = heads.new_zeros(batch, slot.shape[1], d)
    attend = _attend_sliced if q.device.type == "cpu" else _attend_masked
    ctx = attend(
        heads * scaling, keys, values, k_cache, v_cache, position, slot, first, alibi, window,
        softcap, kv_slot,
    )  # fmt: skip
    out_dtype = out_dtype or q.dtype
    if slot is None:
        return ctx.reshape(batch, -1).to(out_dtype)
    compact = ctx.new_zeros(batch, places + 1, d)  # the last place takes what skipped heads hold
    place = slot.masked_fill(slot < 0, places).long()[:, :, None].expand(batch, -1, d)
    return compact.scatter_(1, place, ctx)[:, :places].reshape(batch, -1).to(out_dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, N, d), tables (B, 1, rot): the first rot columns are turned."""
    rot = cos.shape[-1]
    turned = x[..., :rot]
    low, high = turned.chunk(2, -1)
    y = turned * cos + torch.cat([-high, low], -1) * sin
    return y if rot == x.shape[-1] else torch.cat([y, x[..., rot:]], -1)


def _store(cache: Tensor, new: Tensor, kv_slot: Tensor | None, at: tuple[Any, ...]) -> None:
    """Writes new (B, G | KG, d) at (rows, groups, position) of a cache; absent groups keep."""
    if kv_slot is not None:
        if new.shape[1] == 0:
            return
        place = kv_slot.expand(new.shape[0], -1)[:, :, None]
        new = new.to(cache.dtype).gather(1, place.clamp(min=0).long().expand(-1, -1, new.shape[2]))
        new = torch.where(place >= 0, new, cache[at])
    cache[at] = new.to(cache.dtype)


def _weigh(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    """q (..., R, d) over k, v (..., T, d), in fp32; bias broadcasts to (..., R, T)."""
    s = q @ k.float().transpose(-1, -2)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s if bias is None else s + bias
    return s.softmax(-1) @ v.float()


def _attend_masked(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    slot: Tensor | None,
    first: Tensor | None,
    alibi: Tensor | None,
    window: int,
    softcap: float,
    kv_slot: Tensor | None,
) -> Tensor:
    """q (B, H, d) -> (B, H, d) over whole caches, with no synchronisation."""
    batch, groups, tokens, d = k_cache.shape
    at = (torch.arange(batch, device=q.device), slice(None), position.long())
    _store(k_cache, keys, kv_slot, at)
    _store(v_cache, values, kv_slot, at)
    past = torch.arange(tokens, device=q.device) - position[:, None]
    live = past <= 0
    if window:
        live &= past > -window
    if first is not None:
        live &= past >= (first - position)[:, None]
    live = live[:, None, None]
    bias = torch.zeros_like(live, dtype=torch.float32).masked_fill(~live, float("-inf"))
    if alibi is not None:
        bias = bias + alibi.view(1, groups, -1, 1).float() * past[:, None, None]
    # What lies beyond the length may be NaN, which no weight of zero removes.
    v = v_cache.masked_fill(~live.transpose(-1, -2), 0)
    k = k_cache.masked_fill(~live.transpose(-1, -2), 0)
    return _weigh(q.reshape(batch, groups, -1, d), k, v, bias, softcap).reshape(batch, -1, d)


def _attend_sliced(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    slot: Tensor | None,
    first: Tensor | None,
    alibi: Tensor | None,
    window: int,
    softcap: float,
    kv_slot: Tensor | None,
) -> Tensor:
    """The same on views of the tokens and groups in use: sequences of one length at a time."""
    batch, groups, _, d = k_cache.shape
    ends = position.tolist()
    starts = [0] * batch if first is None else first.tolist()
    even = len(set(zip(ends, starts, strict=True))) == 1 and (slot is None or slot.shape[0] == 1)
    q = q.reshape(batch, groups, -1, d)
    ctx = torch.zeros_like(q)
    for rows in [slice(None)] if even else [slice(b, b + 1) for b in range(batch)]:
        b = rows.start or 0
        end = ends[b]
        low = max(starts[b], end - window + 1 if window else 0, 0)
        own = kv_slot if kv_slot is None or kv_slot.shape[0] == 1 else kv_slot[rows]
        _store(k_cache[rows], keys[rows], own, (slice(None), slice(None), end))
        _store(v_cache[rows], values[rows], own, (slice(None), slice(None), end))
        row = None if slot is None else slot[b if slot.shape[0] > 1 else 0]
        for g in _runs(row, groups):
            k, v = k_cache[rows, g, low : end + 1], v_cache[rows, g, low : end + 1]
            bias = None
            if alibi is not None:
                slopes = alibi.view(groups, -1, 1)[g].float()
                bias = slopes * torch.arange(low - end, 1, dtype=torch.float32)
            ctx[rows, g] = _weigh(q[rows, g], k, v, bias, softcap)
    return ctx.reshape(batch, -1, d)


def _runs(slot: Tensor | None, groups: int) -> list[slice]:
    """Runs of neighbouring groups with an active head: views of a cache, where a list copies."""
    if slot is None:
        return [slice(0, groups)]
    live = (slot.view(groups, -1) >= 0).any(1).tolist()
    runs = [list(run) for active, run in groupby(range(groups), live.__getitem__) if active]
    return [slice(run[0], run[-1] + 1) for run in runs]


def decode_attention_triton(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    slot: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    scaling: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    first: Tensor | None = None,
    alibi: Tensor | None = None,
    write: str = "all",
    kv_slot: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    check(q, k_new, v_new, k_cache, v_cache, position, slot, cos, sin, alibi, write, kv_slot, first)
    return launch(
        q, k_new, v_new, k_cache, v_cache, position, slot, cos, sin, q_norm, k_norm, eps,
        k_cache.shape[3] ** -0.5 if scaling is None else scaling,
        window, softcap, first, alibi, kv_slot, out_dtype or q.dtype, early,
    )  # fmt: skip


decode_attention = torch.library.custom_op(
    "gnomon::decode_attention", decode_attention_reference, mutates_args=("k_cache", "v_cache")
)
decode_attention.register_kernel("cuda", decode_attention_triton)


@decode_attention.register_fake
def _(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    slot: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    scaling: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    first: Tensor | None = None,
    alibi: Tensor | None = None,
    write: str = "all",
    kv_slot: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
) -> Tensor:
    return q.new_empty(q.shape, dtype=out_dtype or q.dtype)
