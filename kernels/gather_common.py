"""What the gathered operators share: norms and activations fused into them, and index lists.

An index list (S,) or (R, S) of int32 names kept units, R being 1 or the batch B; ``count`` (1,) or
(R,) says on the device how many of them hold. Entries past the count may be anything.

Without a list, ``wanted`` (M,) bool may name the last M units of the weights that are read, of the
others nothing is: where sequences keep units of their own, and so many together that one pass over
the weights reads less than a list for each. Units before the last M are all read.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gnomon.kernels.launch import debugging

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton ships for Linux only; the references need nothing
    triton = None

Norm = Literal["none", "rms", "layer"]
NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("relu", "silu", "gelu_tanh", "gelu")


def normalise(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The norm that precedes a projection: x (B, W) -> (B, W) fp32."""
    x = x.float()
    if norm == "none":
        return x
    assert weight is not None
    if norm == "rms":
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        return x if bias is None else x + bias.float()
    return F.layer_norm(
        x, x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps
    )


def activate(x: Tensor, activation: str) -> Tensor:
    """One of ``ACTIVATIONS``, elementwise."""
    if activation == "relu":
        return x.relu()
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def rows_of(index: Tensor, block: int, count: Tensor | None) -> Tensor:
    """Rows that a list names: index (..., S) -> int64 (..., S * block).

    Past the count the list's first entry stands again, so that no unselected row is read; 0 where
    nothing holds.
    """
    rows = index.long()
    if count is not None and rows.numel():
        count = count[0] if index.dim() == 1 else count[:, None]
        first = torch.where(count > 0, rows[..., :1], 0)
        rows = torch.where(torch.arange(index.shape[-1], device=index.device) < count, rows, first)
    if block == 1:
        return rows
    within = torch.arange(block, device=index.device)
    return (rows[..., None] * block + within).flatten(-2)


def of_units(values: Tensor, index: Tensor | None, count: Tensor | None) -> Tensor:
    """Values (B, N) of all units -> (B, S), those that a list names, in its order."""
    if index is None:
        return values
    return values.gather(1, rows_of(index, 1, count).expand(values.shape[0], -1))


def rows_wanted(wanted: Tensor, rows: int, block: int) -> Tensor:
    """Rows of the weights that are read, (rows,) bool, where ``wanted`` names the last units."""
    before = wanted.new_ones(rows // block - wanted.numel())
    return torch.cat([before, wanted]).repeat_interleave(block)


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError for a value that is not offered."""
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is unknown; use one of {', '.join(allowed)}")


def check_list(
    index: Tensor | None,
    count: Tensor | None,
    batch: int,
    units: int,
    wanted: Tensor | None = None,
) -> None:
    """Raises ValueError for a list of the wrong type or number of rows, or for two answers.

    With ``GNOMON_DEBUG=1`` also for a count beyond the list, and for an entry that holds and is
    outside 0..units - 1, which waits for the device.
    """
    if index is None:
        if count is not None:
            raise ValueError("count is given without index: a count belongs to a list")
        if wanted is not None and (wanted.dtype != torch.bool or not 0 < wanted.numel() <= units):
            raise ValueError(
                f"wanted is {wanted.dtype} of {wanted.numel()} units; use bool, {units} at most"
            )
        return
    if wanted is not None:
        raise ValueError("wanted is given with an index: a list says itself what is read")
    if index.dtype != torch.int32 or index.dim() not in (1, 2):
        raise ValueError(
            f"index is {index.dtype} of {index.dim()} dimensions; use int32 (S,), (B, S)"
        )
    if index.dim() == 2 and index.shape[0] not in (1, batch):
        raise ValueError(f"index has {index.shape[0]} rows for a batch of {batch}")
    if count is not None and count.numel() != (index.shape[0] if index.dim() == 2 else 1):
        raise ValueError(
            f"count holds {count.numel()} numbers for an index of {tuple(index.shape)}"
        )

    if debugging():
        if count is not None:
            check_range("count", count, 0, index.shape[-1] + 1)
        held = index if index.dim() == 2 else index[None]
        place = torch.arange(held.shape[-1], device=held.device)
        inside = None if count is None else place < count.view(-1, 1)
        check_range("index", held, 0, units, inside)


def check_range(
    field: str, values: Tensor, low: int, high: int, held: Tensor | None = None
) -> None:
    """Raises ValueError where a value, of those that are ``held``, is outside low..high - 1.

    Inside the capture of a CUDA graph, which cannot wait, the device asserts at every replay.
    """
    wrong = (values < low) | (values >= high)
    wrong = wrong if held is None else wrong & held
    if values.is_cuda and torch.cuda.is_current_stream_capturing():
        torch._assert_async(~wrong.any(), f"{field} holds a value outside {low}..{high - 1}")
        return
    if bool(wrong.any()):
        raise ValueError(
            f"{field} holds {int(values[wrong][0])}, which is outside {low}..{high - 1}"
        )


if triton is not None:

    @triton.jit
    def _activate(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
        if ACTIVATION == "relu":
            x = tl.maximum(x, 0.0)
        if ACTIVATION == "silu":
            x = x * tl.sigmoid(x)
        if ACTIVATION == "gelu":
            x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        if ACTIVATION == "gelu_tanh":
            z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
            x = x * tl.sigmoid(2.0 * z)  # 0.5 (1 + tanh z), without libdevice
        return x

    @triton.jit
    def _rows(r, end, index_ptr, own, UNIT: tl.constexpr, HAS_INDEX: tl.constexpr):  # type: ignore[no-untyped-def]
        """Weight rows of compact rows r, through the list if there is one."""
        row = r
        if HAS_INDEX:
            row = tl.load(index_ptr + own + r // UNIT, mask=r < end, other=0) * UNIT + r % UNIT
        return row

    @triton.jit
    def _reads(live, r, wanted_ptr, before, UNIT: tl.constexpr, HAS_WANTED: tl.constexpr):  # type: ignore[no-untyped-def]
        """Which of the live rows r are read; ``before`` units precede those that may not be."""
        if HAS_WANTED:
            unit = r // UNIT - before
            live = live & (tl.load(wanted_ptr + unit, mask=live & (unit >= 0), other=1) != 0)
        return live

    @triton.jit
    def _load_rows(weight_ptr, row, live, n, in_n, N: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Weights (…, …, BLOCK) of rows, columns or words n."""
        mask = live[:, :, None]
        if N % BLOCK != 0:
            mask = mask & in_n[None, None, :]
        place = row.to(tl.int64)[:, :, None] * N + n[None, None, :]
        return tl.load(weight_ptr + place, mask=mask, other=0, eviction_policy="evict_first")
