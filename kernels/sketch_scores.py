"""Scores of FFN neurons from few-bit copies of the projections that make them.

    a = scale_a · (x · levels(inner)ᵀ) + bias_a          u likewise from ``linear``
    score = log(|act(a) · u| + 1e-9) + offset            without ``linear``: u = 1

x (M, D); inner and linear (F, row_bytes(D, bits)) uint8 (:mod:`gnomon.kernels.fewbit`), scales,
biases and offset (F,) fp32; score (M, F) fp32. With offset = log ‖w_down‖ the score is the log of a
neuron's magnitude |h|·‖w_down‖ as the copies tell it. Bytes read: F · D · (bits_inner +
bits_linear) / 8, whatever M.

On a GPU up to 32 rows of x go through the GEMV of ``sketch_gemv.py``, four of them sharing one pass
over the copies. More rows are a GEMM and take the reference. On a CPU up to eight go through
``cpu_sketch.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels import cpu_sketch
from gnomon.kernels.fewbit import check_bits, levels, row_bytes
from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice
from gnomon.kernels.sketch_gemv import launch_scores

GEMV_ROWS = 32  # rows of x up to which the kernel is launched
TINY = 1e-9  # keeps the log of an exact zero finite, below any score of a live neuron


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

    Returns:
        (M, F) fp32, higher = keep.

    Raises:
        ValueError: bits, activation or shapes that do not fit.
    """
    _check(x, inner, inner_bits, activation, linear, linear_scale, linear_bits)
    _check_vectors(inner.shape[0], inner_scale, offset, linear_scale, inner_bias, linear_bias)
    a = _product(x, inner, inner_scale, inner_bits, inner_bias)
    h = activate(a, activation)
    if linear is not None:
        assert linear_scale is not None
        h = h * _product(x, linear, linear_scale, linear_bits, linear_bias)
    return (h.abs() + TINY).log() + offset


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
) -> Tensor:
    """Launches the GEMV, any number of rows of x; as the reference, errors included."""
    _check(x, inner, inner_bits, activation, linear, linear_scale, linear_bits)
    _check_vectors(inner.shape[0], inner_scale, offset, linear_scale, inner_bias, linear_bias)
    up = (linear, linear_scale, linear_bits)
    biases = (inner_bias, linear_bias)
    return launch_scores(x, inner, inner_scale, inner_bits, activation, offset, *up, *biases, TINY)


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
    n: int,
    inner_scale: Tensor,
    offset: Tensor,
    linear_scale: Tensor | None,
    inner_bias: Tensor | None,
    linear_bias: Tensor | None,
) -> None:
    if linear_bias is not None and linear_scale is None:
        raise ValueError("linear_bias is given without linear: without a gate inner_bias is up's")
    for name, vector in (
        ("inner_scale", inner_scale),
        ("offset", offset),
        ("linear_scale", linear_scale),
        ("inner_bias", inner_bias),
        ("linear_bias", linear_bias),
    ):
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
) -> Tensor:
    run = sketch_scores_triton if x.shape[0] <= GEMV_ROWS else sketch_scores_reference
    up = (linear, linear_scale, linear_bits)
    return run(x, inner, inner_scale, inner_bits, activation, offset, *up, inner_bias, linear_bias)


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
) -> Tensor:
    first = (x, inner, inner_scale, inner_bits, activation, offset)
    rest = (linear, linear_scale, linear_bits, inner_bias, linear_bias)
    lib = cpu_sketch.serving(x)
    if lib is None:
        return sketch_scores_reference(*first, *rest)
    _check(x, inner, inner_bits, activation, linear, linear_scale, linear_bits)
    _check_vectors(inner.shape[0], inner_scale, offset, linear_scale, inner_bias, linear_bias)
    return cpu_sketch.scores(lib, *first, *rest, TINY)


sketch_scores = torch.library.custom_op(
    "gnomon::sketch_scores", sketch_scores_reference, mutates_args=()
)
sketch_scores.register_kernel("cpu", _sketch_scores_cpu)
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
) -> Tensor:
    return x.new_empty((x.shape[0], inner.shape[0]), dtype=torch.float32)
