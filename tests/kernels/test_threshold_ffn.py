"""Gate and up by input channel in one launch: reference against doubles, kernel against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gathered import poison, weights
from gnomon.kernels import cpu_threshold, threshold_launch
from gnomon.kernels.gather_common import ACTIVATIONS, activate
from gnomon.kernels.threshold_ffn import (
    threshold_ffn,
    threshold_ffn_reference,
    threshold_ffn_triton,
)
from gnomon.kernels.threshold_launch import Shape
from tolerances import TOLERANCE, relative_rms

SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(3, 70, 33, id="odd"),
    pytest.param(2, 300, 330, id="past-blocks"),
    pytest.param(4, 1500, 20, id="long"),
    pytest.param(5, 40, 24, id="beyond-four"),
]
# Blocks, splits and a load before the launch in front has ended, whatever a launch would choose.
CUT = [Shape(16, 2, 3, 4), Shape(32, 1, 1, 4), Shape(16, 4, 2, 4), Shape(64, 8, 1, 8)]


@torch.no_grad()
def cpu(*args: Any, **how: Any) -> Tensor:
    """The C kernel, wherever the tensors are."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    how = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in how.items()}
    return cpu_threshold.threshold_ffn(*args, **how)


def threshold(kind: str, width: int, device: torch.device) -> Tensor:
    if kind == "channel":
        return torch.rand(width, device=device)
    return torch.tensor([{"none": 99.0, "some": 0.7, "all": -1.0}[kind]], device=device)


def product(x: Tensor, w: Tensor, t: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.where(x.float().abs() > t, x, 0).double() @ w.double()
    return y if bias is None else y + bias.double()


def case(
    batch: int, width: int, n: int, cut: str, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    x, t = torch.randn(batch, width, device=device), threshold(cut, width, device)
    (up, _), (gate, _) = (weights(width, n, dtype, device) for _ in "ug")
    return x, up, gate, t, torch.randn(n, device=device), torch.randn(n, device=device)


@pytest.mark.parametrize(
    ("dtype", "cut"),
    [
        (dtype, cut)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for cut in ("none", "some", "channel", "all")
        if dtype == torch.float32 or cut == "some" or torch.cuda.is_available()
    ],
    ids=str,
)
@pytest.mark.parametrize(("batch", "width", "n"), SHAPES)
def test_product_over_passing_channels(
    batch: int, width: int, n: int, dtype: torch.dtype, cut: str, device: torch.device
) -> None:
    x, up, gate, t, up_bias, gate_bias = case(batch, width, n, cut, dtype, device)
    expected = activate(product(x, gate, t, gate_bias), "silu") * product(x, up, t, up_bias)
    poison(batch, n, device=device)
    for launch in (threshold_ffn_reference, threshold_ffn_triton, cpu):
        h = launch(x, up, gate, t, "silu", up_bias, gate_bias).to(device)
        assert h.dtype == torch.float32 and relative_rms(h, expected) < TOLERANCE[torch.float32]
        turned = launch(x, gate, up, t, "silu", gate_bias, up_bias).to(device)
        assert n == 1 or relative_rms(turned, expected) > 1e-2


@pytest.mark.parametrize("shape", CUT, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_way_to_cut_a_launch(
    batch: int, shape: Shape, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, up, gate, t, up_bias, _ = case(batch, 205, 70, "some", torch.float32, device)
    expected = activate(product(x, gate, t, None), "relu") * product(x, up, t, up_bias)
    for w in (up, gate):  # what no sequence keeps may be anything, though it may be loaded
        w[~(x.abs() > t).any(0)] = torch.nan
    monkeypatch.setattr(threshold_launch, "_shape", lambda *_: shape)
    poison(batch, 70, device=device)
    poison(batch, shape.splits, 2, 70, device=device)
    found = [threshold_ffn_triton(x, up, gate, t, "relu", up_bias) for _ in range(3)]
    assert relative_rms(found[0], expected) < TOLERANCE[torch.float32]
    assert all(torch.equal(found[0], again) for again in found[1:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, device: torch.device) -> None:
    x, up, gate, t, *_ = case(2, 90, 50, "channel", torch.float32, device)
    expected = activate(product(x, gate, t, None), activation) * product(x, up, t, None)
    for launch in (threshold_ffn_reference, threshold_ffn_triton, cpu):
        h = launch(x, up, gate, t, activation).to(device)
        assert relative_rms(h, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(dtype: torch.dtype, device: torch.device) -> None:
    x, up, gate, t, *_ = case(2, 200, 40, "some", dtype, device)
    x = x.to(dtype)
    expected = activate(product(x, gate, t, None), "silu") * product(x, up, t, None)
    for launch in (threshold_ffn_reference, threshold_ffn_triton):
        h = launch(x, up, gate, t, "silu")
        assert h.dtype == dtype and relative_rms(h, expected) < TOLERANCE[dtype]


def test_other_channels_are_not_used(device: torch.device) -> None:
    x, up, gate, t, *_ = case(2, 300, 50, "channel", torch.float32, device)
    x[0, 5], x[1, 5] = torch.nan, 0.0  # passes for nobody
    lost = ~(x.abs() > t).any(0)
    wrong = [w.masked_fill(lost[:, None], torch.nan) for w in (up, gate)]
    assert lost.any()
    for launch in (threshold_ffn_reference, threshold_ffn_triton, threshold_ffn, cpu):
        h = launch(x, *wrong, t, "silu")
        assert bool(h.isfinite().all()) and torch.equal(h, launch(x, up, gate, t, "silu"))


def test_a_sequence_does_not_depend_on_the_others(device: torch.device) -> None:
    x, up, gate, t, *_ = case(4, 300, 50, "some", torch.float32, device)
    together = threshold_ffn_triton(x, up, gate, t, "silu")
    alone = torch.cat([threshold_ffn_triton(row, up, gate, t, "silu") for row in x.split(1)])
    assert relative_rms(together, alone) < TOLERANCE[torch.float32]


def test_registered_and_checked(device: torch.device) -> None:
    x, up, gate, t, up_bias, gate_bias = case(2, 64, 32, "channel", torch.float32, device)
    torch.library.opcheck(threshold_ffn, (x, up, gate, t, "silu", up_bias, gate_bias))
    assert threshold_ffn(x[:0], up, gate, t, "silu").shape == (0, 32)
    for launch in (threshold_ffn, threshold_ffn_triton, threshold_ffn_reference):
        for args, message in (
            ((x, up, gate, t[:3], "silu"), r"threshold has shape \(3,\).*\(64,\) or \(1,\)"),
            ((x, up, gate[1:], t, "silu"), r"gate_t is .* of shape \(63, 32\).*\(64, 32\)"),
            (
                (x, up, gate.half(), t, "silu"),
                r"gate_t is torch.float16 .*torch.float32",
            ),
            ((x, up.char(), gate.char(), t, "silu"), "up_t is torch.int8; use fp32, fp16 or bf16"),
            ((x, up, gate, t, "silu", t), r"up_bias has shape \(64,\); use \(32,\)"),
            ((x, up, gate, t, "none"), "activation='none' is unknown"),
        ):
            with pytest.raises(ValueError, match=message):
                launch(*args)
