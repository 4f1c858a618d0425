"""Random arguments of ``sketch_scores``, and how far scores are from double precision.

A score is a logarithm: what is compared is the magnitude that it stands for, since the error of a
neuron that is nearly zero, which no selection looks at, would hide all others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gnomon.kernels.fewbit import levels, pack
from tolerances import TOLERANCE, relative_rms

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
LIMIT = 2 * TOLERANCE[torch.float32]  # act(a) · u doubles the relative rounding of its factors


def arguments(
    m: int,
    d: int,
    n: int,
    device: torch.device,
    bits: tuple[int, int] = (2, 2),
    activation: str = "silu",
    biases: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random copies of weights of about unit gain; ``bits[1]`` = 0 has no gate."""

    def vector() -> Tensor:
        return torch.randn(n, device=device)

    def copy(b: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 2**b, (n, d), device=device)
        spread = ((4**b - 1) / 12) ** 0.5
        return pack(codes, b), (0.5 + torch.rand(n, device=device)) / (spread * d**0.5)

    inner, inner_scale = copy(bits[0])
    linear, linear_scale = copy(bits[1]) if bits[1] else (None, None)
    return {
        "x": torch.randn(m, d, device=device).to(dtype),
        "inner": inner,
        "inner_scale": inner_scale,
        "inner_bits": bits[0],
        "activation": activation,
        "offset": vector(),
        "linear": linear,
        "linear_scale": linear_scale,
        "linear_bits": bits[1],
        "inner_bias": vector() if biases else None,
        "linear_bias": vector() if biases and bits[1] else None,
        "inner_floor": 0.1 * vector().square() if biases else None,
        "linear_floor": 0.1 * vector().square() if biases and bits[1] else None,
    }


def magnitude(given: dict[str, Any]) -> Tensor:
    """√(act(a)² + floor) · √(u² + floor) in double precision, (M, F)."""
    x = given["x"].double()

    def product(name: str) -> Tensor:
        codes = levels(given[name], given[f"{name}_bits"], x.shape[1]).double()
        y = x @ codes.T * given[f"{name}_scale"].double()
        bias = given[f"{name}_bias"]
        return y if bias is None else y + bias.double()

    def root(factor: Tensor, name: str) -> Tensor:
        floor = given[f"{name}_floor"]
        return (factor.square() + (0.0 if floor is None else floor.double())).sqrt()

    h = root(ACTIVATIONS[given["activation"]](product("inner")), "inner")
    return h if given["linear"] is None else h * root(product("linear"), "linear")


def error(score: Tensor, given: dict[str, Any]) -> float:
    """Relative RMS of the magnitudes that scores stand for."""
    assert score.dtype == torch.float32 and bool(score.isfinite().all())
    expected = magnitude(given)
    return relative_rms((score.double() - given["offset"].double()).exp(), expected)
