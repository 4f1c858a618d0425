"""Threshold GEMV: reference against double precision, kernel against reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gathered import DTYPES, poison, weights
from gnomon.kernels import cpu_threshold, threshold_launch
from gnomon.kernels.gather_common import activate
from gnomon.kernels.threshold_gemv import (
    threshold_gemv,
    threshold_gemv_reference,
    threshold_gemv_triton,
)
from tolerances import TOLERANCE, relative_rms

SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(3, 70, 33, id="odd"),
    pytest.param(2, 700, 300, id="past-blocks"),
    pytest.param(1, 2500, 20, id="long"),
]
CUTS = ["none", "some", "channel", "all"]


@torch.no_grad()
def cpu(*args: Any, **how: Any) -> Tensor:
    """The C kernel, wherever the tensors are."""
    args = tuple(a.cpu() if isinstance(a, Tensor) else a for a in args)
    how = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in how.items()}
    return cpu_threshold.threshold_gemv(*args, **how)


def threshold(kind: str, width: int, device: torch.device) -> Tensor:
    if kind == "channel":
        return torch.rand(width, device=device)
    return torch.tensor([{"none": 99.0, "some": 0.7, "all": -1.0}[kind]], device=device)


@pytest.mark.parametrize(
    ("dtype", "cut"),
    [
        (dtype, cut)
        for dtype in DTYPES
        for cut in CUTS
        if dtype in (torch.float32, torch.int8)  # in the interpreter, which is slow, others less
        or cut in ("some", "channel")
        or torch.cuda.is_available()
    ],
    ids=str,
)
@pytest.mark.parametrize(("batch", "width", "n"), SHAPES)
def test_sum_over_passing_channels(
    batch: int, width: int, n: int, dtype: torch.dtype, cut: str, device: torch.device
) -> None:
    x, bias = torch.randn(batch, width, device=device), torch.randn(n, device=device)
    w, scale = weights(width, n, dtype, device)
    t = threshold(cut, width, device)
    rows = w.double() if scale is None else w.double() * scale.double()[:, None]
    expected = torch.where(x.abs() > t, x, 0).double() @ rows + bias.double()
    poison(batch, n, device=device)
    for launch in (threshold_gemv_reference, threshold_gemv_triton, cpu):
        y = launch(x, w, t, bias, scale).to(device)
        assert y.dtype == torch.float32 and relative_rms(y, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("batch", "width", "n"), SHAPES)
def test_what_becomes_of_the_sum(
    batch: int, width: int, n: int, activation: str, device: torch.device
) -> None:
    x, (w, _) = torch.randn(batch, width, device=device), weights(width, n, torch.float32, device)
    bias, t = torch.randn(n, device=device), threshold("some", width, device)
    given, residual = torch.randn(2, batch, n, device=device)
    z = torch.where(x.abs() > t, x, 0).double() @ w.double() + bias.double()
    z = z if activation == "none" else activate(z, activation)
    expected = residual.double() + given.double() * z
    fused = {"activation": activation, "given": given, "residual": residual}
    poison(batch, n, device=device)
    for launch in (threshold_gemv_reference, threshold_gemv_triton, cpu):
        y = launch(x, w, t, bias, **fused).to(device)
        assert relative_rms(y, expected) < TOLERANCE[torch.float32]
        forgotten = launch(x, w, t, bias, **(fused | {"given": None})).to(device)
        assert n == 1 or relative_rms(forgotten, expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_once(dtype: torch.dtype, device: torch.device) -> None:
    x, (w, _) = torch.randn(2, 200, device=device).to(dtype), weights(200, 40, dtype, device)
    t = threshold("some", 200, device)
    expected = torch.where(x.float().abs() > t, x, 0).double() @ w.double()
    for launch in (threshold_gemv_reference, threshold_gemv_triton):
        y = launch(x, w, t)
        assert y.dtype == dtype and relative_rms(y, expected) < TOLERANCE[dtype]


def test_other_channels_are_not_used(device: torch.device) -> None:
    x, (w, _) = torch.randn(1, 300, device=device), weights(300, 50, torch.float32, device)
    x[0, 0], t = 0.0, threshold("channel", 300, device)
    wrong = w.masked_fill(~(x[0].abs() > t)[:, None], torch.nan)
    for launch in (threshold_gemv_reference, threshold_gemv_triton, threshold_gemv, cpu):
        assert torch.equal(launch(x, wrong, t), launch(x, w, t))


def test_repeats_bit_by_bit(device: torch.device) -> None:
    x, (w, _) = torch.randn(2, 1000, device=device), weights(1000, 70, torch.bfloat16, device)
    t = threshold("some", 1000, device)
    first = threshold_gemv_triton(x, w, t)
    assert all(torch.equal(first, threshold_gemv_triton(x, w, t)) for _ in range(3))


def test_a_wrong_comparison_is_caught(device: torch.device) -> None:
    x, (w, _) = torch.randn(1, 64, device=device), weights(64, 32, torch.float32, device)
    t = threshold("some", 64, device)
    wrong = torch.where(x > t, x, 0) @ w  # forgets the magnitude
    assert relative_rms(threshold_gemv_triton(x, w, t), wrong) > 0.1


def test_registered_and_checked(device: torch.device) -> None:
    x, (w, scale) = torch.randn(2, 64, device=device), weights(64, 32, torch.int8, device)
    t = threshold("channel", 64, device)
    torch.library.opcheck(threshold_gemv, (x, w, t, None, scale))
    assert threshold_gemv(x[:0], w, t, None, scale).shape == (0, 32)
    for launch in (threshold_gemv, threshold_gemv_triton):
        with pytest.raises(ValueError, match=r"threshold has shape \(3,\).*\(64,\) or \(1,\)"):
            launch(x, w, t[:3], None, scale)
        with pytest.raises(ValueError, match=r"given has shape \(32,\).*\(2, 32\)"):
            launch(x, w, t, None, scale, given=t[:32])
        with pytest.raises(ValueError, match="activation='swish' is unknown"):
            launch(x, w, t, None, scale, activation="swish")


def test_long_tiles_that_fill_the_processors_once_are_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threshold_launch, "processors", lambda device: 132)
    cpu = torch.device("cpu")

    def shape(width: int, n: int, gated: bool = False) -> threshold_launch.Shape:
        return threshold_launch._shape(width, n, 1, 1, gated, 2, cpu)

    assert shape(11008, 4096)[:3] == (32, 8, 2)  # Llama-2-7B: down
    assert shape(4096, 12288).splits == 1 and shape(4096, 11008, True).splits == 1
    assert shape(8960, 1536).splits == 8  # Qwen2.5-1.5B: too few tiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_that_begin_at_an_odd_place(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(1, 24, device=device)
    held = torch.randn(24 * 10 + 1, device=device).to(dtype)
    weight_t = held[1:].view(24, 10)
    cut = torch.full((1,), 0.3, device=device)
    found = threshold_gemv_triton(x, weight_t, cut)
    torch.testing.assert_close(
        found, threshold_gemv_reference(x, weight_t, cut), rtol=1e-4, atol=1e-4
    )
