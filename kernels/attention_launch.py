"""How decode attention is checked and launched: tiles, splits and scratch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.kernels.gather_common import check_choice, check_range
from gnomon.kernels.launch import (
    TICKETS,
    debugging,
    interpreted,
    pdl,
    power_of_two,
    processors,
    tickets,
)

try:
    import triton

    from gnomon.kernels.attention_kernel import _attention_kernel
except ImportError:  # Triton ships for Linux only; the reference needs nothing
    triton = None

WRITER_GROUPS = 4  # groups whose new keys and values one program stores


@dataclass(frozen=True)
class Plan:
    """Tokens of a tile, splits of a group's tokens, warps and pipeline stages of a program.

    ``dot`` takes the tensor cores, for which a group's heads are padded to 16.
    """

    block_t: int
    splits: int
    warps: int
    stages: int
    dot: bool = False


def plan(items: int, tokens: int, d: int, size: int, heads: int, device: torch.device) -> Plan:
    """The launch for ``items`` pairs of sequence and active group over caches of ``tokens``.

    Args:
        items: B times active groups at most.
        tokens: C.
        d: head size.
        size: bytes of a cached number.
        heads: of a group.
        device: whose processors are to be filled.

    Few items: one tile of K and one of V in registers for every program, asked for before the
    projection has ended, so that latencies pass once and side by side; tiles of 32 KB, or smaller
    ones where those would leave processors idle. Eight warps: four would take 255 registers each.
    Many: pipelined tiles of 8 KB, or of 16 KB for several heads, far over the 18 KB in flight that
    3 TB/s takes; up to 16 programs per processor one after another, so that the last of them is
    short, but no split under 256 tokens. Tensor cores serve two-byte caches, and groups of several
    heads.
    """
    dot, row = heads > 1 or size == 2, power_of_two(d) * size
    if not items:  # no active head: writers alone
        return Plan(16, 1, 4, 1, dot)
    tiles = [t for t in (32768 // row, 16384 // row, 8192 // row) if t >= 16] or [16]
    filling = [t for t in tiles if 2 * items * -(-tokens // t) >= 3 * processors(device)]
    block_t = filling[0] if filling else tiles[-1]
    splits = max(1, -(-tokens // block_t))
    if splits <= 64 and items * splits <= 16 * processors(device):
        return Plan(block_t, splits, 8, 1, dot)
    level = min(16 * processors(device) // items, tokens // 256)
    fill = min(4 * processors(device) // items, -(-tokens // 32)) // 2
    wide = heads > 1 and size == 2
    block_t = max(16, min(128, (16384 if wide else 8192) // row))
    splits = max(1, min(128, max(fill, level)))
    return Plan(block_t, splits, 8 if heads > 32 else 4, 3 if wide else 4, dot)


def check(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    slot: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    alibi: Tensor | None,
    write: str,
    kv_slot: Tensor | None,
    first: Tensor | None = None,
) -> None:
    """Raises ValueError for arguments of decode attention that do not fit each other."""
    check_choice("write", write, ("all", "active"))
    if (write == "active") != (kv_slot is not None):
        raise ValueError(f"write={write!r} with kv_slot {kv_slot is not None}; use both or neither")
    if k_cache.dim() != 4 or k_cache.shape != v_cache.shape or k_cache.dtype != v_cache.dtype:
        raise ValueError(
            f"k_cache is {tuple(k_cache.shape)} {k_cache.dtype}, v_cache {tuple(v_cache.shape)} "
            f"{v_cache.dtype}; both must be (B, G, C, d) of one dtype"
        )
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("k_cache and v_cache are written in place; they must be contiguous")
    batch, groups, _, d = k_cache.shape
    heads = q.shape[1] // d if slot is None else slot.shape[1]
    if heads == 0 or heads % groups or q.shape != (batch, q.shape[1] // d * d):
        raise ValueError(
            f"q {tuple(q.shape)} has {heads} heads for caches {tuple(k_cache.shape)}; "
            "use (B, heads · d), the heads a multiple of G"
        )
    for field, new in (("k_new", k_new), ("v_new", v_new)):
        if new.shape != (batch, new.shape[1] // d * d) or (
            kv_slot is None and new.shape[1] != groups * d
        ):
            raise ValueError(f"{field} is {tuple(new.shape)} for caches {tuple(k_cache.shape)}")
    if position.dtype != torch.int32 or position.shape != (batch,):
        raise ValueError(f"position is {position.dtype} {tuple(position.shape)}; use int32 (B,)")
    for field, places, n in (("slot", slot, heads), ("kv_slot", kv_slot, groups)):
        if places is not None and (
            places.dtype != torch.int32 or places.shape not in ((batch, n), (1, n))
        ):
            raise ValueError(
                f"{field} is {places.dtype} {tuple(places.shape)}; use int32 ({batch} or 1, {n})"
            )
        if debugging() and places is not None:
            most = (q if field == "slot" else k_new).shape[1] // d
            check_range(field, places, -1, most)
    if debugging():
        check_range("position", position, 0, k_cache.shape[2])
        if first is not None:
            check_range("first", first, 0, k_cache.shape[2])
    if (cos is None) != (sin is None) or (cos is not None and cos.shape[1] > d):
        raise ValueError(f"cos and sin must both be (P, rot), rot <= d={d}, or both None")
    if cos is not None and cos.shape[0] < k_cache.shape[2]:
        raise ValueError(
            f"cos has {cos.shape[0]} positions and the caches {k_cache.shape[2]}: use as many"
        )
    if alibi is not None and alibi.shape != (heads,):
        raise ValueError(f"alibi is {tuple(alibi.shape)} for {heads} heads")


def _rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, as slices of a fused projection are."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: Tensor,
    slot: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scaling: float,
    window: int,
    softcap: float,
    first: Tensor | None,
    alibi: Tensor | None,
    kv_slot: Tensor | None,
    out_dtype: torch.dtype,
    early: bool,
    chosen: Plan | None = None,
) -> Tensor:
    """One launch for all of decode attention; ``chosen`` replaces :func:`plan`'s choice."""
    batch, groups, tokens, d = k_cache.shape
    places = q.shape[1] // d
    group = (places if slot is None else slot.shape[1]) // groups
    active = groups if slot is None else min(groups, places)
    if batch * active > TICKETS:
        raise ValueError(f"B={batch} times {active} groups exceeds {TICKETS}; lower the batch")
    size = k_cache.element_size()
    p = chosen or plan(batch * active, tokens, d, size, group, q.device)
    ctx = torch.empty((batch, places * d), dtype=out_dtype, device=q.device)
    scratch = 0 if p.splits == 1 else batch * places * p.splits
    partial = torch.empty((scratch, d), dtype=torch.float32, device=q.device)
    stat = torch.empty((scratch, 2), dtype=torch.float32, device=q.device)
    q, k_new, v_new = _rows(q), _rows(k_new), _rows(v_new)
    together, block_d = power_of_two(group), max(16, power_of_two(d))
    _attention_kernel[(active * p.splits + -(-groups // WRITER_GROUPS), batch)](
        q,
        k_new,
        v_new,
        k_cache,
        v_cache,
        ctx,
        partial,
        stat,
        tickets(q.device),
        position,
        first,
        slot,
        kv_slot,
        cos,
        sin,
        q_norm,
        k_norm,
        alibi,
        q.stride(0),
        k_new.stride(0),
        v_new.stride(0),
        places,
        active,
        tokens,
        1 if cos is None else cos.shape[0],
        eps,
        scaling,
        softcap,
        D=d,
        ROT=0 if cos is None else cos.shape[1],
        G=groups,
        R=group,
        SPLITS=p.splits,
        WINDOW=window,
        SLOT_STRIDE=0 if slot is None or slot.shape[0] == 1 else slot.shape[1],
        KV_SLOT_STRIDE=0 if kv_slot is None or kv_slot.shape[0] == 1 else groups,
        HAS_SLOT=slot is not None,
        HAS_KV_SLOT=kv_slot is not None,
        HAS_FIRST=first is not None,
        HAS_Q_NORM=q_norm is not None,
        HAS_K_NORM=k_norm is not None,
        HAS_ALIBI=alibi is not None,
        HAS_SOFTCAP=softcap > 0,
        DOT=p.dot,
        G_POW2=power_of_two(groups),
        R_POW2=together,
        R_PAD=max(16, together) if p.dot else together,
        BLOCK_D=block_d,
        BLOCK_T=p.block_t,
        BLOCK_G=WRITER_GROUPS,
        BLOCK_S=min(16, p.splits, max(1, 16384 // (together * block_d))),
        STAGES=p.stages,
        ONE_TILE=p.splits * p.block_t >= tokens,
        UPCAST=interpreted(),
        EARLY=early,
        num_warps=p.warps,
        **pdl(q.device),
    )
    return ctx
