"""Scores of FFN neurons from few-bit copies of the projections that make them.

    a = scale_a · (x · levels(inner)ᵀ) + bias_a          u likewise from ``linear``
    score = ½ log(act(a)² + floor_a) + ½ log(u² + floor_u) + offset     without ``linear``: no u

x (M, D); inner and linear (F, row_bytes(D, bits)) uint8 (:mod:`gnomon.kernels.fewbit`), scales,
biases, floors and offset (F,) fp32; score (M, F) fp32. A floor is what the square of a factor errs
by: a neuron whose copy happens to give nothing is not taken to be nothing. With floors of 0 and
offset = log ‖w_down‖ the score is the log of a neuron's magnitude |h|·‖w_down‖ as the copies tell
it. Bytes read: F · D · (bits_inner + bits_linear) / 8 and the vectors, whatever M.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.fewbit import check_bits, levels, row_bytes
from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice

TINY = 1e-18  # of a square: keeps the log of zero finite, below any score of a live neuron


def sketch_scores_reference(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    inner_floor: Tensor,
    linear: Tensor | None = None,
    linear_scale: Tensor | None = None,
    linear_bits: int = 0,
    linear_floor: Tensor | None = None,
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
        offset, inner_floor: (F,) fp32.
        linear: packed copy of the up projection of a gated FFN; None without a gate.
        linear_scale, linear_bits, linear_floor: its own.
        inner_bias, linear_bias: (F,) fp32, the host's, or None.

    Returns:
        (M, F) fp32, higher = keep.

    Raises:
        ValueError: bits, activation or shapes that do not fit.
    """
    _check(x, inner, inner_bits, linear, linear_scale, linear_bits, linear_floor, activation)
    a = _product(x, inner, inner_scale, inner_bits, inner_bias)
    score = half_log(activate(a, activation), inner_floor) + offset
    if linear is not None:
        assert linear_scale is not None and linear_floor is not None
        u = _product(x, linear, linear_scale, linear_bits, linear_bias)
        score = score + half_log(u, linear_floor)
    return score


def half_log(factor: Tensor, floor: Tensor) -> Tensor:
    """½ log(factor² + floor): the log of its magnitude, as far as it can be told."""
    return 0.5 * (factor.square() + (floor + TINY)).log()


def _product(x: Tensor, packed: Tensor, scale: Tensor, bits: int, bias: Tensor | None) -> Tensor:
    y = torch.nn.functional.linear(x.float(), levels(packed, bits, x.shape[-1])) * scale
    return y if bias is None else y + bias


def _check(
    x: Tensor,
    inner: Tensor,
    inner_bits: int,
    linear: Tensor | None,
    linear_scale: Tensor | None,
    linear_bits: int,
    linear_floor: Tensor | None,
    activation: str,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
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
    if not (linear is None) == (linear_scale is None) == (linear_floor is None):
        raise ValueError("linear, linear_scale and linear_floor belong together: give all or none")


sketch_scores = torch.library.custom_op(
    "gnomon::sketch_scores", sketch_scores_reference, mutates_args=()
)


@sketch_scores.register_fake
def _(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bits: int,
    activation: str,
    offset: Tensor,
    inner_floor: Tensor,
    linear: Tensor | None = None,
    linear_scale: Tensor | None = None,
    linear_bits: int = 0,
    linear_floor: Tensor | None = None,
    inner_bias: Tensor | None = None,
    linear_bias: Tensor | None = None,
) -> Tensor:
    return x.new_empty((x.shape[0], inner.shape[0]), dtype=torch.float32)
