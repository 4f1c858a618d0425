"""The FFN of int4 weights: kernels and references against double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gathered import poison
from gnomon.kernels.int4_ffn import (
    int4_ffn_down,
    int4_ffn_down_reference,
    int4_ffn_down_triton,
    int4_ffn_up,
    int4_ffn_up_reference,
    int4_ffn_up_triton,
    int4_rows,
)
from gnomon.policies.compressed import compress
from sketches import ACTIVATIONS
from tolerances import TOLERANCE, relative_rms

UP = {"triton": int4_ffn_up_triton, "reference": int4_ffn_up_reference, "op": int4_ffn_up}
DOWN = {"triton": int4_ffn_down_triton, "reference": int4_ffn_down_reference, "op": int4_ffn_down}
# sequences, width, neurons
SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(1, 33, 7, id="a-group-and-one"),
    pytest.param(2, 160, 70, id="pair"),
    pytest.param(1, 544, 40, id="three-tiles"),
    pytest.param(5, 64, 20, id="beyond-four"),
]


def matrix(n: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and the matrix that they stand for in double precision."""
    stored = compress(torch.randn(n, width) / width**0.5, "int4")
    tensors = (stored.tensors["codes"].to(device), stored.tensors["scale"].to(device))
    return *tensors, stored.dense().double().to(device)


def up_case(
    m: int, d: int, n: int, device: torch.device, activation: str, gated: bool, biases: bool
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the first half, and its result in double precision."""
    args: dict[str, Any] = {"x": torch.randn(m, d, device=device), "activation": activation}
    found = []
    for name in ("up", "gate") if gated else ("up",):
        args[name], args[f"{name}_scale"], w = matrix(n, d, device)
        bias = torch.randn(n, device=device) if biases else None
        y = args["x"].double() @ w.T
        args[f"{name}_bias"] = bias
        found.append(y if bias is None else y + bias.double())
    act = ACTIVATIONS[activation]
    return args, act(found[1]) * found[0] if gated else act(found[0])


def down_case(
    m: int, d: int, n: int, device: torch.device, more: bool = True
) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the second half, and its result in double precision."""
    codes, scale, w = matrix(n, d, device)
    args: dict[str, Any] = {"h": torch.randn(m, n, device=device), "down": codes, "scale": scale}
    y = args["h"].double() @ w
    if more:
        args |= {
            "bias": torch.randn(d, device=device),
            "residual": torch.randn(m, d, device=device),
        }
        y = y + args["bias"].double() + args["residual"].double()
    return args | {"width": d}, y


@pytest.mark.parametrize("run", UP)
@pytest.mark.parametrize(("m", "d", "n"), SHAPES)
def test_shapes(m: int, d: int, n: int, run: str, device: torch.device) -> None:
    args, expected = up_case(m, d, n, device, "silu", True, False)
    poison(m, n, device=device)
    assert relative_rms(UP[run](**args), expected) < TOLERANCE[torch.float32]
    args, expected = down_case(m, d, n, device)
    poison(m, d, device=device)
    assert relative_rms(DOWN[run](**args), expected) < TOLERANCE[torch.float32]
    args, expected = down_case(m, d, n, device, more=False)
    assert relative_rms(DOWN[run](**args), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool, biases: bool, device: torch.device) -> None:
    args, expected = up_case(1, 40, 20, device, activation, gated, biases)
    assert relative_rms(int4_ffn_up_triton(**args), expected) < TOLERANCE[torch.float32]


def test_many_rows_are_split_and_summed(device: torch.device) -> None:
    args, expected = down_case(1, 40, 700, device)
    first = int4_ffn_down_triton(**args)
    assert relative_rms(first, expected) < TOLERANCE[torch.float32]
    assert torch.equal(int4_ffn_down_triton(**args), first)  # the counters are zero again


def test_codes_are_those_that_compress_stores() -> None:
    """Against the formula of the module, weight by weight, and within half a step of the matrix."""
    plain = torch.randn(5, 45)
    stored = compress(plain, "int4")
    codes, scale = stored.tensors["codes"], stored.tensors["scale"]
    found = int4_rows(codes, scale, 45)
    assert codes.shape == (5, 32) and scale.shape == (5, 2)
    for j in range(5):
        for k in range(45):
            half = int(codes[j, k // 2]) >> 4 * (k % 2) & 15
            step = float(scale[j, k // 32])
            assert float(found[j, k]) == pytest.approx((half - 8) * step, abs=1e-6)
            assert abs(float(found[j, k] - plain[j, k])) <= step / 2 * 1.01


def test_no_neurons_add_nothing(device: torch.device) -> None:
    args, _ = down_case(1, 40, 3, device)
    args |= {"h": args["h"][:, :0], "down": args["down"][:0], "scale": args["scale"][:0]}
    for run in DOWN.values():
        wanted = args["residual"] + args["bias"]
        torch.testing.assert_close(run(**args), wanted)


def test_opcheck(device: torch.device) -> None:
    args, _ = up_case(2, 40, 17, device, "gelu", True, True)
    torch.library.opcheck(int4_ffn_up, (), args)
    torch.library.opcheck(int4_ffn_down, (), down_case(2, 40, 17, device)[0])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    args, _ = up_case(1, 40, 6, device, "silu", True, False)
    for wrong, message in (
        ({"up": args["up"][:, :-1]}, "codes of up have shape"),
        ({"gate_scale": args["gate_scale"][:-1]}, "scale of gate have shape"),
        ({"gate_scale": None}, "belong together"),
        ({"up": args["up"].int()}, "uint8"),
        ({"activation": "tanh"}, "activation='tanh'"),
    ):
        for run in UP.values():
            with pytest.raises(ValueError, match=message):
                run(**args | wrong)
    args, _ = down_case(1, 40, 6, device)
    for run in DOWN.values():
        with pytest.raises(ValueError, match="codes of down have shape"):
            run(**args | {"width": 72})


def test_a_wrong_result_is_caught(device: torch.device) -> None:
    args, expected = up_case(1, 64, 20, device, "silu", True, True)
    swapped = {"up": args["gate"], "gate": args["up"]}
    halves = {"up": args["up"] << 4 | args["up"] >> 4}
    for wrong in (swapped, halves, {"up_bias": None}, {"up_scale": args["up_scale"].roll(1, 1)}):
        assert relative_rms(int4_ffn_up_triton(**args | wrong), expected) > 1e-3
    args, expected = down_case(1, 64, 20, device)
    for wrong in ({"residual": None}, {"scale": args["scale"].roll(1, 0)}):
        assert relative_rms(int4_ffn_down_triton(**args | wrong), expected) > 1e-3
