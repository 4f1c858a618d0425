"""The gathered operators on a CPU: kept rows and columns at the speed of the memory.

    row_gather, ffn_up, column_gather, norm_add    as in their files: same arguments, result, errors

Kernels in C (`cpu_gather.c`) serve up to eight sequences, with the norm, biases, activation and
residual inside; the references serve the rest and machines without a compiler.
"""

from __future__ import annotations

from ctypes import CDLL
from functools import cache

import torch
from torch import Tensor

from gnomon.kernels.column_gather import column_gather_reference
from gnomon.kernels.cpu_library import library
from gnomon.kernels.gather_common import ACTIVATIONS, NORMS, check_choice, check_list, of_units
from gnomon.kernels.gathered_ffn import check_given, ffn_up_reference
from gnomon.kernels.norm_add import norm_add_reference
from gnomon.kernels.row_gather import row_gather_reference

MOST_ROWS = 8  # sequences; beyond that a matrix product reuses weights better
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_NORMS = {name: i for i, name in enumerate(NORMS)}
ACTIVATION_CODES = {name: i for i, name in enumerate(("none", *ACTIVATIONS))}


def row_gather(
    x: Tensor,
    weight: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """As :func:`gnomon.kernels.row_gather.row_gather_reference`."""
    norms = (norm_weight, norm_bias, norm, eps)
    lib = serving(x, weight)
    if lib is None:
        return row_gather_reference(
            x, weight, index, block, count, scale, bias, *norms, out_dtype, early, wanted
        )
    lists, whole = _lists(index, block, count, weight, wanted, x)
    y = rows(lib, x, (weight, scale, bias), None, lists, norms, "none", whole)
    return y.to(out_dtype or x.dtype)


def ffn_up(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None = None,
    index: Tensor | None = None,
    count: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_scale: Tensor | None = None,
    gate_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-6,
    early: bool = False,
    wanted: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """As :func:`gnomon.kernels.gathered_ffn.ffn_up_reference`."""
    norms = (norm_weight, norm_bias, norm, eps)
    lib = serving(x, up, gate)
    if lib is None:
        affine = (up_bias, gate_bias, up_scale, gate_scale)
        return ffn_up_reference(
            x, up, gate, index, count, activation, *affine, *norms, early, wanted, given
        )
    check_given(x, up, gate, activation, given)
    gated = None if gate is None else (gate, gate_scale, gate_bias)
    lists, whole = _lists(index, 1, count, up, wanted, x)
    act = activation if given is None else "none"
    h = rows(lib, x, (up, up_scale, up_bias), gated, lists, norms, act, whole)
    return h if given is None else h * of_units(given, index, count)


def column_gather(
    x: Tensor,
    weight_t: Tensor,
    index: Tensor | None = None,
    block: int = 1,
    count: Tensor | None = None,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    early: bool = False,
    wanted: Tensor | None = None,
) -> Tensor:
    """As :func:`gnomon.kernels.column_gather.column_gather_reference`."""
    lib = serving(x, weight_t)
    if lib is None:
        return column_gather_reference(
            x, weight_t, index, block, count, scale, bias, residual, out_dtype, early, wanted
        )
    lists, whole = _lists(index, block, count, weight_t, wanted, x)
    y = columns(lib, x, weight_t, lists, scale, bias, residual, whole)
    return y.to(out_dtype or x.dtype)


def norm_add(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As :func:`gnomon.kernels.norm_add.norm_add_reference`."""
    lib = serving(x) if x.dim() == 2 else None
    odd = any(t is not None and t.shape != x.shape[1:] for t in (weight, bias))
    odd |= residual is not None and residual.shape != x.shape
    if lib is None or odd:
        return norm_add_reference(x, weight, bias, norm, eps, residual, out_dtype)
    check_choice("norm", norm, NORMS)
    y = torch.empty(x.shape)
    held: list[Tensor] = []
    lib.gnomon_norm(
        *(address_fp32(t, held) for t in (x, weight, bias, residual)),
        y.data_ptr(),
        *(*x.shape, _NORMS[norm], eps),
    )
    return y.to(out_dtype or x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """A dense linear of a few rows: x (..., W), weight (N, W) -> (..., N) in x's dtype."""
    flat = x.reshape(-1, x.shape[-1])
    y = row_gather(flat, weight, None, 1, None, scale, bias)
    return y.reshape(*x.shape[:-1], -1)


Matrix = tuple[Tensor, Tensor | None, Tensor | None]  # weight (N, W), scale (N,), bias (N,)
Lists = tuple[Tensor | None, int, Tensor | None]  # index, block, count
Norms = tuple[Tensor | None, Tensor | None, str, float]  # weight (W,), bias (W,), name, eps


def rows(
    lib: CDLL,
    x: Tensor,
    up: Matrix,
    gate: Matrix | None,
    lists: Lists,
    norms: Norms,
    activation: str,
    whole: bool = False,
) -> Tensor:
    """Kept rows, compact (B, S·block) fp32; ``whole``: each at its own place of (B, N), else 0."""
    index, block, count = lists
    gain, shift, norm, eps = norms
    check_choice("norm", norm, NORMS)
    weight, scale, bias = up
    check_list(index, count, x.shape[0], weight.shape[0] // block)
    gate_weight, gate_scale, gate_bias = (None, None, None) if gate is None else gate
    (batch, width), n = x.shape, weight.shape[0]
    slots = n // block if index is None else index.shape[-1]
    y = torch.zeros(batch, n) if whole else torch.empty(batch, slots * block)
    held: list[Tensor] = []  # conversions live until the kernel has run
    wrong = lib.gnomon_rows(
        address_fp32(x, held),
        weight.data_ptr(),
        address(gate_weight, held),
        address(index, held),
        address(count, held),
        address_fp32(scale, held),
        address_fp32(gate_scale, held),
        address_fp32(bias, held),
        address_fp32(gate_bias, held),
        address_fp32(gain, held),
        address_fp32(shift, held),
        y.data_ptr(),
        *(batch, width, n, slots, block, _own(index), TYPES[weight.dtype]),
        *(_NORMS[norm], ACTIVATION_CODES[activation], whole, torch.get_num_threads(), eps),
    )
    return _in_range(y, wrong, n // block)


def columns(
    lib: CDLL,
    x: Tensor,
    weight_t: Tensor,
    lists: Lists,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    whole: bool = False,
) -> Tensor:
    """Sum over kept channels, (B, D) fp32; x is compact, or (B, N) where ``whole``."""
    index, block, count = lists
    (n, width), batch = weight_t.shape, x.shape[0]
    check_list(index, count, batch, n // block)
    slots = n // block if index is None else index.shape[-1]
    y = torch.empty(batch, width)
    held: list[Tensor] = []
    wrong = lib.gnomon_columns(
        address_fp32(x, held),
        weight_t.data_ptr(),
        address(index, held),
        address(count, held),
        address_fp32(scale, held),
        address_fp32(bias, held),
        address_fp32(residual, held),
        y.data_ptr(),
        *(batch, width, n, slots, block, _own(index), TYPES[weight_t.dtype]),
        *(whole, torch.get_num_threads()),
    )
    return _in_range(y, wrong, n // block)


def _lists(
    index: Tensor | None,
    block: int,
    count: Tensor | None,
    weight: Tensor,
    wanted: Tensor | None,
    x: Tensor,
) -> tuple[Lists, bool]:
    """The list to follow, and whether results and operands stand at the units' own places."""
    units = weight.shape[0] // block
    check_list(index, count, x.shape[0], units, wanted)
    if wanted is None:
        return (index, block, count), False
    before = torch.arange(units - wanted.numel(), dtype=torch.int32)
    return (torch.cat([before, len(before) + wanted.nonzero()[:, 0].int()]), block, None), True


def serving(x: Tensor, *weights: Tensor | None) -> CDLL | None:
    """The C kernels if they can run on these: a few rows x (B, W) and contiguous CPU weights."""
    if not x.is_cpu or not 0 < x.shape[0] <= MOST_ROWS or torch.is_grad_enabled():
        return None
    for w in weights:
        if w is not None and not (w.dtype in TYPES and w.is_contiguous() and w.is_cpu):
            return None
    lib = library()
    half = bool(weights) and weights[0] is not None and weights[0].dtype is torch.float16
    return None if lib is None or (half and not _half(lib)) else lib


@cache
def _half(lib: CDLL) -> bool:
    return bool(lib.gnomon_has_fp16())


def address_fp32(x: Tensor | None, held: list[Tensor]) -> int | None:
    """The same of the values as fp32."""
    if x is None:
        return None
    if x.dtype is not torch.float32 or not x.is_contiguous():
        x = x.float().contiguous()
        held.append(x)
    return x.data_ptr()


def address(x: Tensor | None, held: list[Tensor]) -> int | None:
    """Address of the values, contiguous; copies are added to ``held``."""
    if x is None:
        return None
    if not x.is_contiguous():
        x = x.contiguous()
        held.append(x)
    return x.data_ptr()


def _own(index: Tensor | None) -> bool:
    return index is not None and index.dim() == 2 and index.shape[0] > 1


def _in_range(y: Tensor, wrong: int, units: int) -> Tensor:
    if wrong:
        raise IndexError(f"index names units outside 0..{units - 1}")
    return y
