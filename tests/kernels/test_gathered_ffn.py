"""Gathered FFN: reference against double precision, kernel against reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gathered import DTYPES, LISTS, SHAPES, lists, poison, weights
from gnomon.kernels.gathered_ffn import ffn_up, ffn_up_reference, ffn_up_triton, gathered_ffn
from tolerances import TOLERANCE, relative_rms

ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def arguments(
    batch: int, width: int, n: int, kind: str, dtype: torch.dtype, device: Any, gated: bool = True
) -> tuple[dict[str, Any], int]:
    up, up_scale = weights(n, width, dtype, device)
    gate, gate_scale = weights(n, width, dtype, device) if gated else (None, None)
    index, count, held = lists(kind, n, batch, device)
    given = {
        "x": torch.randn(batch, width, device=device),
        "up": up,
        "gate": gate,
        "index": index,
        "count": count,
        "up_bias": torch.randn(n, device=device),
        "gate_bias": torch.randn(n, device=device) if gated else None,
        "up_scale": up_scale,
        "gate_scale": gate_scale,
        "norm_weight": torch.rand(width, device=device) + 0.5,
        "norm": "rms",
    }
    return given, held


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_in_double_precision(activation: str, gated: bool, device: torch.device) -> None:
    given, _ = arguments(2, 40, 33, "some", torch.float32, device, gated)
    x = given["x"].double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * given["norm_weight"].double()
    up = x @ given["up"].double().T + given["up_bias"].double()
    if gated:
        h = ACTIVATIONS[activation](x @ given["gate"].double().T + given["gate_bias"].double()) * up
    else:
        h = ACTIVATIONS[activation](up)
    y = ffn_up_reference(**given, activation=activation)
    assert relative_rms(y, h[:, given["index"].long()]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_activations(activation: str, gated: bool, device: torch.device) -> None:
    for batch in (1, 6):
        given, _ = arguments(batch, 40, 33, "some", torch.float32, device, gated)
        y = ffn_up_triton(**given, activation=activation)
        assert relative_rms(y, ffn_up_reference(**given, activation=activation)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize(("batch", "width", "n", "block"), SHAPES)
def test_kernel_is_the_reference(
    batch: int, width: int, n: int, block: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    given, held = arguments(batch, width, n, kind, dtype, device)
    poison(batch, n, device=device)
    y, expected = ffn_up_triton(**given)[:, :held], ffn_up_reference(**given)[:, :held]
    rounded = batch > 4 and dtype in (torch.bfloat16, torch.float16) and kind != "own"
    # act(gate) · up doubles the relative rounding of its factors
    assert relative_rms(y, expected) < 2 * TOLERANCE[dtype if rounded else torch.float32]


@pytest.mark.parametrize("batch", [1, 6])
def test_unselected_neurons_are_not_used(batch: int, device: torch.device) -> None:
    given, _ = arguments(batch, 40, 33, "counted", torch.float32, device)
    held = int(given["count"])
    expected = ffn_up_triton(**given)[:, :held]
    kept = torch.zeros(33, dtype=torch.bool, device=device)
    kept[given["index"][:held].long()] = True
    for matrix in ("up", "gate"):
        given[matrix][~kept] = torch.nan
    assert torch.equal(ffn_up_triton(**given)[:, :held], expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [2, 8])
def test_unwanted_neurons_are_not_read(batch: int, gated: bool, device: torch.device) -> None:
    given, _ = arguments(batch, 40, 33, "all", torch.float32, device, gated)
    wanted = torch.rand(33, device=device) < 0.5
    expected = torch.where(wanted, ffn_up_reference(**given), 0)
    for field in ("up", "gate", "up_bias", "gate_bias"):
        if given[field] is not None:
            given[field][~wanted] = torch.nan
    for op in (ffn_up_reference, ffn_up_triton, ffn_up):
        y = op(**given, wanted=wanted)
        assert bool((y[:, ~wanted] == 0).all())
        assert relative_rms(y, expected) < 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", [*LISTS, "wanted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_a_given_gate(batch: int, dtype: torch.dtype, kind: str, device: torch.device) -> None:
    """act(gate), computed before for every neuron, and up rows of the listed ones alone."""
    listed = "all" if kind == "wanted" else kind
    plain, held = arguments(batch, 40, 33, listed, dtype, device, gated=False)
    wanted = torch.rand(33, device=device) < 0.5 if kind == "wanted" else None
    factor = torch.randn(batch, 33, device=device)
    x, rows = plain["x"], plain["up"].double()
    rows = rows if plain["up_scale"] is None else rows * plain["up_scale"].double()[:, None]
    x = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = factor.double() * (x * plain["norm_weight"] @ rows.T + plain["up_bias"])
    if wanted is not None:
        expected = torch.where(wanted, expected, 0)
    elif plain["index"] is not None:
        places = plain["index"][..., :held].long().expand(batch, -1)
        expected = expected.gather(1, places)
    rounded = batch > 4 and dtype in (torch.bfloat16, torch.float16) and kind != "own"
    for op in (ffn_up_reference, ffn_up_triton, ffn_up):
        y = op(**plain, wanted=wanted, given=factor)[:, :held]
        tolerance = TOLERANCE[dtype if rounded and op is not ffn_up_reference else torch.float32]
        assert relative_rms(y, expected) < 2 * tolerance
    if held:
        assert relative_rms(ffn_up_triton(**plain, wanted=wanted)[:, :held], expected) > 1e-2
    with pytest.raises(ValueError, match="gate and given are both set"):
        ffn_up_triton(**(plain | {"gate": plain["up"]}), given=factor)
    with pytest.raises(ValueError, match=r"given has shape .* every neuron of every sequence"):
        ffn_up_triton(**plain, given=factor[:, 1:])


def test_whole_ffn_and_registration(device: torch.device) -> None:
    given, _ = arguments(2, 40, 33, "some", torch.float32, device)
    for key in ("norm", "norm_weight"):
        del given[key]
    down_t, bias = torch.randn(33, 20, device=device), torch.randn(20, device=device)
    h = ffn_up_reference(**given)
    expected = h @ down_t[given["index"].long()] + bias
    for early in (False, True):
        y = gathered_ffn(**given, down_t=down_t, down_bias=bias, early=early)
        assert relative_rms(y, expected) < TOLERANCE[torch.float32]
    torch.library.opcheck(ffn_up, (), given)


def test_a_wrong_result_is_caught(device: torch.device) -> None:
    """Swapped matrices, a missing bias and another activation do not pass."""
    given, _ = arguments(1, 40, 33, "some", torch.float32, device)
    expected = ffn_up_reference(**given)
    for wrong in (
        given | {"up": given["gate"], "gate": given["up"]},
        given | {"gate_bias": None},
        given | {"activation": "gelu"},
    ):
        assert relative_rms(ffn_up_triton(**wrong), expected) > 1e-2


def test_unknown_activation(device: torch.device) -> None:
    given, _ = arguments(1, 40, 33, "all", torch.float32, device)
    for op in (ffn_up_reference, ffn_up_triton):
        with pytest.raises(ValueError, match="activation='swish' is unknown"):
            op(**given, activation="swish")
