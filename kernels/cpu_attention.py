"""Decode attention on a CPU: the operator of :mod:`gnomon.kernels.decode_attention`, compiled.

Same arguments, result and errors; the reference serves what the C kernel (`cpu_attention.c`) does
not, and machines without a compiler. For one token the reference's many small PyTorch calls cost
more than the work in them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.attention_launch import check
from gnomon.kernels.cpu_gather import TYPES, address, address_fp32, serving
from gnomon.kernels.decode_attention import decode_attention_reference


def decode_attention(
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
    """As :func:`gnomon.kernels.decode_attention.decode_attention_reference`."""
    lib = serving(q[:1], k_cache, v_cache)
    if lib is None or k_cache.dtype is torch.int8:
        return decode_attention_reference(
            q, k_new, v_new, k_cache, v_cache, position, slot, cos, sin, q_norm, k_norm, eps,
            scaling, window, softcap, first, alibi, write, kv_slot, out_dtype, early,
        )  # fmt: skip
    check(q, k_new, v_new, k_cache, v_cache, position, slot, cos, sin, alibi, write, kv_slot, first)
    batch, groups, tokens, d = k_cache.shape
    places = q.shape[1] // d
    heads = places if slot is None else slot.shape[1]
    y = torch.zeros(batch, places * d)
    held: list[Tensor] = []
    first = None if first is None else first.int()
    wrong = lib.gnomon_attention(
        address_fp32(q, held),
        address_fp32(k_new, held),
        address_fp32(v_new, held),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        address(position, held),
        address(slot, held),
        address_fp32(cos, held),
        address_fp32(sin, held),
        address_fp32(q_norm, held),
        address_fp32(k_norm, held),
        address(first, held),
        address_fp32(alibi, held),
        address(kv_slot, held),
        y.data_ptr(),
        *(batch, groups, tokens, d, heads, places, k_new.shape[1] // d),
        *(0 if cos is None else cos.shape[1], _own(slot), _own(kv_slot), window),
        *(TYPES[k_cache.dtype], torch.get_num_threads()),
        *(eps, d**-0.5 if scaling is None else scaling, softcap),
    )
    if wrong:
        raise IndexError(f"position {position.tolist()} lies outside a cache of {tokens} tokens")
    return y.to(out_dtype or q.dtype)


def _own(places: Tensor | None) -> bool:
    return places is not None and places.shape[0] > 1
