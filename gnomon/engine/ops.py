"""The operators of a decode step, as PyTorch references or as Triton launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gnomon.kernels import (
    column_gather,
    cpu_attention,
    cpu_gather,
    cpu_threshold,
    decode_attention,
    gathered_ffn,
    int4_ffn,
    norm_add,
    row_gather,
    sketched_ffn,
    threshold_ffn,
    threshold_gemv,
)


@dataclass(frozen=True)
class Ops:
    """One implementation of each operator; signatures are those of the references."""

    name: str
    row_gather: Callable[..., Tensor]
    ffn_up: Callable[..., Tensor]
    column_gather: Callable[..., Tensor]
    norm_add: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]
    threshold_gemv: Callable[..., Tensor]
    threshold_ffn: Callable[..., Tensor]
    sketched_ffn: Callable[..., tuple[Tensor, Tensor]]
    int4_ffn_up: Callable[..., Tensor]
    int4_ffn_down: Callable[..., Tensor]


TORCH = Ops(
    "torch",
    cpu_gather.row_gather,
    cpu_gather.ffn_up,
    cpu_gather.column_gather,
    cpu_gather.norm_add,
    cpu_attention.decode_attention,
    cpu_threshold.threshold_gemv,
    cpu_threshold.threshold_ffn,
    sketched_ffn.sketched_ffn_gather,
    int4_ffn.int4_ffn_up_reference,
    int4_ffn.int4_ffn_down_reference,
)
TRITON = Ops(
    "triton",
    row_gather.row_gather_triton,
    gathered_ffn.ffn_up_triton,
    column_gather.column_gather_triton,
    norm_add.norm_add_triton,
    decode_attention.decode_attention_triton,
    threshold_gemv.threshold_gemv_triton,
    threshold_ffn.threshold_ffn_triton,
    sketched_ffn.sketched_ffn_triton,
    int4_ffn.int4_ffn_up_triton,
    int4_ffn.int4_ffn_down_triton,
)


def ops(name: str) -> Ops:
    """``torch`` or ``triton``.

    Raises:
        ValueError: another name.
    """
    if name not in ("torch", "triton"):
        raise ValueError(f"backend={name!r} has no decode operators: use torch or triton")
    return TORCH if name == "torch" else TRITON
