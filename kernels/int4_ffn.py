"""Feed-forward network of neurons whose weights are int4, 32 to a scale: FFSplit's rest.

    h[b, j] = act(x[b] · gate[j] + gate_bias[j]) · (x[b] · up[j] + up_bias[j])      (gated)
    h[b, j] = act(x[b] · up[j] + up_bias[j])                                        (plain)
    y[b]    = residual[b] + bias + Σ_j h[b, j] · down_t[j]

A matrix (N, W), one row per neuron, is codes (N, 16·⌈W/32⌉) uint8, two a byte, the lower half
first, and scales (N, ⌈W/32⌉) fp16: w[j, k] = (code[j, k] − 8) · scale[j, ⌊k/32⌋], as
:func:`gnomon.policies.compressed.compress` makes them. x (B, D) floating point, h (B, N) and
y (B, D) fp32, accumulated in fp32. Every neuron is computed: what is compressed is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.gather_common import ACTIVATIONS, activate, check_choice
from gnomon.kernels.int4_down import launch_down
from gnomon.kernels.int4_up import launch_up, triton

GROUP = 32  # weights that share a scale


def int4_rows(codes: Tensor, scale: Tensor, width: int) -> Tensor:
    """The matrix that codes and scales stand for, (N, width) fp32.

    Args:
        codes: (N, 16·⌈width/32⌉) uint8.
        scale: (N, ⌈width/32⌉).
        width: W.
    """
    whole = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).float() - 8
    return (whole.unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1)[:, :width]


def int4_ffn_up_reference(
    x: Tensor,
    up: Tensor,
    up_scale: Tensor,
    gate: Tensor | None = None,
    gate_scale: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """The specification of the first half.

    Args:
        x: (B, D), normed.
        up, gate: codes; gate None for a plain FFN.
        up_scale, gate_scale: their scales.
        activation: ``relu``, ``silu``, ``gelu_tanh`` or ``gelu``.
        up_bias, gate_bias: (N,) or None.

    Returns:
        h (B, N) fp32.

    Raises:
        ValueError: an unknown activation, or codes, scales and x that do not fit each other.
    """
    _check_up(x, up, up_scale, gate, gate_scale, activation)
    h = _product(x, up, up_scale, up_bias)
    if gate is None or gate_scale is None:
        return activate(h, activation)
    return activate(_product(x, gate, gate_scale, gate_bias), activation) * h


def int4_ffn_up_triton(
    x: Tensor,
    up: Tensor,
    up_scale: Tensor,
    gate: Tensor | None = None,
    gate_scale: Tensor | None = None,
    activation: str = "silu",
    up_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    _check_up(x, up, up_scale, gate, gate_scale, activation)
    return launch_up(x, up, up_scale, gate, gate_scale, activation, up_bias, gate_bias)


def int4_ffn_down_reference(
    h: Tensor,
    down: Tensor,
    scale: Tensor,
    width: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The specification of the second half.

    Args:
        h: (B, N).
        down, scale: of the transposed down projection, one row per neuron.
        width: D.
        bias: (D,) or None.
        residual: (B, D) or None.

    Returns:
        y (B, D) fp32.

    Raises:
        ValueError: codes, scales and h that do not fit each other.
    """
    _check("down", down, scale, h.shape[-1], width)
    y = h.float() @ int4_rows(down, scale, width)
    y = y if bias is None else y + bias.float()
    return y if residual is None else y + residual.float()


def int4_ffn_down_triton(
    h: Tensor,
    down: Tensor,
    scale: Tensor,
    width: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Launches the kernel; same arguments, result and errors as the reference."""
    _check("down", down, scale, h.shape[-1], width)
    return launch_down(h.float(), down, scale, width, bias, residual)


def _product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = x.float() @ int4_rows(codes, scale, x.shape[-1]).T
    return y if bias is None else y + bias.float()


def _check_up(
    x: Tensor,
    up: Tensor,
    up_scale: Tensor,
    gate: Tensor | None,
    gate_scale: Tensor | None,
    activation: str,
) -> None:
    check_choice("activation", activation, ACTIVATIONS)
    if (gate is None) != (gate_scale is None):
        raise ValueError("gate and gate_scale belong together: give both, or none")
    _check("up", up, up_scale, up.shape[0], x.shape[-1])
    if gate is not None and gate_scale is not None:
        _check("gate", gate, gate_scale, up.shape[0], x.shape[-1])


def _check(field: str, codes: Tensor, scale: Tensor, rows: int, width: int) -> None:
    groups = -(-width // GROUP)
    wanted = {"codes": (rows, groups * GROUP // 2), "scale": (rows, groups)}
    for part, tensor in (("codes", codes), ("scale", scale)):
        if tuple(tensor.shape) != wanted[part]:
            raise ValueError(
                f"{part} of {field} have shape {tuple(tensor.shape)}; use {wanted[part]} for "
                f"{rows} neurons of {width} weights, {GROUP} to a scale"
            )
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes of {field} are {codes.dtype}; use uint8, two weights a byte")


int4_ffn_up = torch.library.custom_op("gnomon::int4_ffn_up", int4_ffn_up_reference, mutates_args=())
int4_ffn_down = torch.library.custom_op(
    "gnomon::int4_ffn_down", int4_ffn_down_reference, mutates_args=()
)
if triton is not None:
    int4_ffn_up.register_kernel("cuda", int4_ffn_up_triton)
    int4_ffn_down.register_kernel("cuda", int4_ffn_down_triton)


@int4_ffn_up.register_fake
def _(x: Tensor, up: Tensor, *rest: object, **named: object) -> Tensor:
    return x.new_empty((x.shape[0], up.shape[0]), dtype=torch.float32)


@int4_ffn_down.register_fake
def _(h: Tensor, down: Tensor, scale: Tensor, width: int, *rest: object, **named: object) -> Tensor:
    return h.new_empty((h.shape[0], width), dtype=torch.float32)
