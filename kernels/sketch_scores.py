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

from collections.abc import Callable

import torch
from torch import Tensor

from gnomon.kernels import cpu_sketch, sketch_gemv
from gnomon.kernels.fewbit import Copy, check_bits, levels, row_bytes
from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice

GEMV_ROWS = 32  # rows of x up to which the kernel is launched
TINY = 1e-18  # of a square: keeps the log of zero finite, below the score of any live neuron


def _operator(
    run: Callable[[Tensor, str, Tensor, Copy, Copy | None], Tensor],
) -> Callable[..., Tensor]:
    """An implementation under the operator's signature, which is checked and grouped for it."""

    def scores(
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
        """Scores of F neurons.

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
        first = Copy(inner, inner_scale, inner_bits, inner_bias, inner_floor)
        second = second_copy(linear, linear_scale, linear_bits, linear_bias, linear_floor)
        check_copies(x, activation, offset, first, second)
        return run(x, activation, offset, first, second)

    return scores


def second_copy(
    packed: Tensor | None,
    scale: Tensor | None,
    bits: int,
    bias: Tensor | None,
    floor: Tensor | None,
) -> Copy | None:
    """The copy ``linear`` of a gated FFN, or None where nothing of it is given.

    Raises:
        ValueError: a part of it alone.
    """
    if packed is not None and scale is not None:
        return Copy(packed, scale, bits, bias, floor)
    if packed is not None or scale is not None:
        raise ValueError("linear and linear_scale belong together: give both or neither")
    if bias is not None or floor is not None:
        field = "linear_bias" if bias is not None else "linear_floor"
        raise ValueError(f"{field} is given without linear: without a gate inner's are up's")
    return None


def scores_reference(
    x: Tensor, activation: str, offset: Tensor, inner: Copy, linear: Copy | None
) -> Tensor:
    """The specification on grouped arguments: scores (M, F)."""
    score = half_log(activate(_product(x, inner), activation), inner.floor) + offset
    return score if linear is None else score + half_log(_product(x, linear), linear.floor)


def _product(x: Tensor, copy: Copy) -> Tensor:
    weight = levels(copy.packed, copy.bits, x.shape[-1])
    y = torch.nn.functional.linear(x.float(), weight) * copy.scale
    return y if copy.bias is None else y + copy.bias


def half_log(factor: Tensor, floor: Tensor | None) -> Tensor:
    """½ log(factor² + floor): the log of its magnitude, as far as it can be told."""
    square = factor.square() + TINY
    return 0.5 * (square if floor is None else square + floor).log()


def _triton(x: Tensor, activation: str, offset: Tensor, inner: Copy, linear: Copy | None) -> Tensor:
    return sketch_gemv.launch_scores(x, activation, offset, inner, linear, TINY)


def _cuda(x: Tensor, activation: str, offset: Tensor, inner: Copy, linear: Copy | None) -> Tensor:
    run = _triton if x.shape[0] <= GEMV_ROWS else scores_reference
    return run(x, activation, offset, inner, linear)


def scores_cpu(
    x: Tensor, activation: str, offset: Tensor, inner: Copy, linear: Copy | None
) -> Tensor:
    """The same by the C kernels, where they serve x."""
    lib = cpu_sketch.serving(x)
    if lib is None:
        return scores_reference(x, activation, offset, inner, linear)
    return cpu_sketch.scores(lib, x, activation, offset, inner, linear, TINY)


def check_copies(
    x: Tensor, activation: str, offset: Tensor, inner: Copy, linear: Copy | None
) -> None:
    """Raises ValueError for bits, an activation or shapes that do not fit."""
    check_choice("activation", activation, ACTIVATIONS)
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; use floating point (M, D)")
    n = inner.packed.shape[0]
    _check_vector("offset", offset, n)
    for name, copy in (("inner", inner), ("linear", linear)):
        if copy is None:
            continue
        check_bits(copy.bits)
        packed, wanted = copy.packed, (n, row_bytes(x.shape[-1], copy.bits))
        if packed.dtype != torch.uint8 or tuple(packed.shape) != wanted:
            raise ValueError(
                f"{name} is {packed.dtype} {tuple(packed.shape)}; {copy.bits} bits of "
                f"{x.shape[-1]} columns are uint8 {wanted}"
            )
        for field in ("scale", "bias", "floor"):
            _check_vector(f"{name}_{field}", getattr(copy, field), n)


def _check_vector(name: str, vector: Tensor | None, n: int) -> None:
    if vector is not None and (tuple(vector.shape) != (n,) or not vector.is_floating_point()):
        raise ValueError(
            f"{name} is {vector.dtype} {tuple(vector.shape)}; use floating point ({n},)"
        )


sketch_scores_reference = _operator(scores_reference)  # the specification
sketch_scores_triton = _operator(_triton)  # the launch, any number of rows of x
sketch_scores = torch.library.custom_op(
    "gnomon::sketch_scores", sketch_scores_reference, mutates_args=()
)
sketch_scores.register_kernel("cpu", _operator(scores_cpu))
if sketch_gemv.triton is not None:
    sketch_scores.register_kernel("cuda", _operator(_cuda))


@sketch_scores.register_fake
def _(x: Tensor, inner: Tensor, *rest: object) -> Tensor:
    return x.new_empty((x.shape[0], inner.shape[0]), dtype=torch.float32)
