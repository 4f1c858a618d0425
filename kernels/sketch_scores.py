"""Scores of FFN neurons from few-bit copies of the projections that make them.

    a = scale_a · (x · levels(inner)ᵀ) + bias_a          u likewise from ``linear``
    score = ½ log(act(a)² + floor_a) + ½ log(u² + floor_u) + offset     without ``linear``: no u

x (M, D); inner and linear (F, row_bytes(D, bits)) uint8 (:mod:`gnomon.kernels.fewbit`), scales,
biases, floors and offset (F,) fp32; score (M, F) fp32. A floor is what the square of a factor errs
by: a neuron is not taken for nothing because a coarse copy of one factor gives nothing. Without
floors and with offset = log ‖w_down‖ the score is the log of a neuron's magnitude |h|·‖w_down‖ as
the copies tell it. Bytes read: F · D · (bits_inner + bits_linear) / 8, and the vectors, whatever M.

On a GPU up to 32 rows of x go through the GEMV of ``sketch_gemv.py``, four of them sharing one pass
over the copies. More rows are a GEMM and take the reference. On a CPU up to eight go through
``cpu_sketch.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels import cpu_sketch, sketch_gemv
from gnomon.kernels.fewbit import check_bits, levels, row_bytes
from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice

GEMV_ROWS = 32  # rows of x up to which the kernel is launched
TINY = 1e-18  # of a square: keeps the log of zero finite, below the score of any live neuron


def sketch_scores_reference(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    linear: Tensor | None = None,
    linear_scale: Tensor | None = None,
    linear_bits: int = 0,
    inner_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    inner_floor: Tensor | None = None,
    linear_floor: Tensor | None = None,
) -> Tensor:
    """The specification.

    Args:
        x: (M, D), the input of the FFN.
        inner: packed copy of what is activated: the gate, or the up projection without one.
        inner_scale: (F,) fp32.
        inner_bits: 1 to 4.
        activation: one of ``ACTIVATIONS``.
        offset: (F,) fp32.
        linear: packed copy of the up projection of a gated FFN; None without a gate.
        linear_scale, linear_bits: its own.
        inner_bias, linear_bias: (F,) fp32, the host's, or None.
        inner_floor, linear_floor: (F,) fp32, or None for 0.

    Returns:
        (M, F) fp32, higher = keep.

    Raises:
        ValueError: bits, activation or shapes that do not fit.
    """
    _check(x, inner, inner_bits, activation, linear, linear_scale, linear_bits)
    own = (inner_scale, offset, inner_bias, inner_floor)
    _check_vectors(inner.shape[0], own, (linear_scale, linear_bias, linear_floor))
    a = _product(x, inner, inner_scale, inner_bits, inner_bias)
    score = half_log(activate(a, activation), inner_floor) + offset
    if linear is None:
        return score
    assert linear_scale is not None
    u = _product(x, linear, linear_scale, linear_bits, linear_bias)
    return score + half_log(u, linear_floor)


def half_log(factor: Tensor, floor: Tensor | None) -> Tensor:
    """½ log(factor² + floor): the log of its magnitude, as far as it can be told."""
    square = factor.square() + TINY
    return 0.5 * (square if floor is None else square + floor).log()


def _product(x: Tensor, packed: Tensor, scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    y = torch.nn.functional.linear(x.float(), levels(packed, bits, x.shape[-1])) * scale
    return y if bias is None else y + bias


def sketch_scores_triton(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    linear: Tensor | None = None,
    linear_scale: Tensor | None = None,
    linear_bits: int = 0,
    inner_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    inner_floor: Tensor | None = None,
    linear_floor: Tensor | None = None,
) -> Tensor:
    """Launches the GEMV, any number of rows of x; as the reference, errors included."""
    _check(x, inner, inner_bits, activation, linear, linear_scale, linear_bits)
    own = (inner_scale, offset, inner_bias, inner_floor)
    _check_vectors(inner.shape[0], own, (linear_scale, linear_bias, linear_floor))
    up = (linear, linear_scale, linear_bits)
    more = (inner_bias, linear_bias, inner_floor, linear_floor)
    return sketch_gemv.launch_scores(
        x, inner, inner_scale, inner_bits, activation, offset, *up, *more, TINY
    )


def _check(
    x: Tensor,
    inner: Tensor,
    inner_bits: int,
    activation: str,
    linear: Tensor | None,
    linear_scale: Tensor | None,
    linear_bits: int,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; use floating point (M, D)")
    for name, packed, bits in (("inner", inner, inner_bits), ("linear", linear, linear_bits)):
        if packed is None:
            continue
        check_bits(bits)
        wanted = (inner.shape[0], row_bytes(x.shape[-1], bits))
        if packed.dtype != torch.uint8 or tuple(packed.shape) != wanted:
            raise ValueError(
                f"{name} is {packed.dtype} {tuple(packed.shape)}; {bits} bits of {x.shape[-1]} "
                f"columns are uint8 {wanted}"
            )
    if (linear is None) != (linear_scale is None):
        raise ValueError("linear and linear_scale belong together: give both or neither")


def _check_vectors(
    n: int, inner: tuple[Tensor | None, ...], linear: tuple[Tensor | None, ...]
) -> None:
    for name, vector in zip(("linear_bias", "linear_floor"), linear[1:], strict=True):
        if vector is not None and linear[0] is None:
            raise ValueError(f"{name} is given without linear: without a gate inner's are up's")
    names = ("inner_scale", "offset", "inner_bias", "inner_floor")
    others = ("linear_scale", "linear_bias", "linear_floor")
    for name, vector in zip((*names, *others), (*inner, *linear), strict=True):
        if vector is not None and (tuple(vector.shape) != (n,) or not vector.is_floating_point()):
            raise ValueError(
                f"{name} is {vector.dtype} {tuple(vector.shape)}; use floating point ({n},)"
            )


def _sketch_scores_cuda(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    linear: Tensor | None = None,
    linear_scale: Tensor | None = None,
    linear_bits: int = 0,
    inner_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    inner_floor: Tensor | None = None,
    linear_floor: Tensor | None = None,
) -> Tensor:
    run = sketch_scores_triton if x.shape[0] <= GEMV_ROWS else sketch_scores_reference
    up = (linear, linear_scale, linear_bits)
    more = (inner_bias, linear_bias, inner_floor, linear_floor)
    return run(x, inner, inner_scale, inner_bits, activation, offset, *up, *more)


def _sketch_scores_cpu(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    linear: Tensor | None = None,
    linear_scale: Tensor | None = None,
    linear_bits: int = 0,
    inner_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    inner_floor: Tensor | None = None,
    linear_floor: Tensor | None = None,
) -> Tensor:
    first = (x, inner, inner_scale, inner_bits, activation, offset)
    biases, floors = (inner_bias, linear_bias), (inner_floor, linear_floor)
    up = (linear, linear_scale, linear_bits)
    lib = cpu_sketch.serving(x)
    if lib is None:
        return sketch_scores_reference(*first, *up, *biases, *floors)
    _check(x, inner, inner_bits, activation, linear, linear_scale, linear_bits)
    own = (inner_scale, offset, inner_bias, inner_floor)
    _check_vectors(inner.shape[0], own, (linear_scale, linear_bias, linear_floor))
    return cpu_sketch.scores(lib, *first, *up, *biases, *floors, TINY)


sketch_scores = torch.library.custom_op(
    "gnomon::sketch_scores", sketch_scores_reference, mutates_args=()
)
sketch_scores.register_kernel("cpu", _sketch_scores_cpu)
if sketch_gemv.triton is not None:
    sketch_scores.register_kernel("cuda", _sketch_scores_cuda)


@sketch_scores.register_fake
def _(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    linear: Tensor | None = None,
    linear_scale: Tensor | None = None,
    linear_bits: int = 0,
    inner_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
    inner_floor: Tensor | None = None,
    linear_floor: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], inner.shape[0]), dtype=torch.float32)
