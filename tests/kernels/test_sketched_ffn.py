"""Neurons scored, decided and computed in one launch: against reference and double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gathered import poison
from gnomon.kernels.sketch_scores import sketch_scores_reference
from gnomon.kernels.sketched_ffn import (
    sketched_ffn,
    sketched_ffn_gather,
    sketched_ffn_reference,
    sketched_ffn_triton,
)
from sketches import ACTIVATIONS, arguments
from tolerances import TOLERANCE, relative_rms

RUNS = {"triton": sketched_ffn_triton, "gather": sketched_ffn_gather, "op": sketched_ffn}
# rows of x, inputs, neurons
SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(1, 70, 17, id="odd"),
    pytest.param(1, 576, 40, id="three-tiles"),
    pytest.param(2, 40, 70, id="two-rows"),
]


def given(
    m: int,
    d: int,
    n: int,
    device: torch.device,
    bits: tuple[int, int] = (2, 2),
    activation: str = "silu",
    biases: bool = True,
    dtype: torch.dtype = torch.float32,
    kept: float = 0.5,
) -> dict[str, Any]:
    """Random weights, copies that say nothing of them, and a cut that no score lies near."""
    found = arguments(m, d, n, device, bits, activation, biases)
    gated = bool(bits[1])
    own: dict[str, Any] = {"up_scale": None, "gate_scale": None}
    for name in ("up", "gate") if gated else ("up",):
        weight = torch.randn(n, d, device=device) / d**0.5
        if dtype == torch.int8:
            weight = torch.randint(-127, 128, (n, d), device=device)
            own[f"{name}_scale"] = (0.5 + torch.rand(n, device=device)) / (73 * d**0.5)
        own[name] = weight.to(dtype)
        own[f"{name}_bias"] = torch.randn(n, device=device) if biases else None
    if not gated:
        own |= {"gate": None, "gate_bias": None}
    scores = sketch_scores_reference(**found).flatten().sort().values
    place = min(max(1, round((1 - kept) * len(scores))), len(scores) - 1)
    cut = scores[place - 1 : place + 1].mean()[None] if len(scores) > 1 else scores - 1
    return found | own | {"cut": cut}


def exact(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """h in double precision, and which neurons are kept."""
    x = args["x"].double()

    def product(name: str) -> Tensor:
        y = x @ args[name].double().T
        scale, bias = args[f"{name}_scale"], args[f"{name}_bias"]
        y = y if scale is None else y * scale.double()
        return y if bias is None else y + bias.double()

    act, up = ACTIVATIONS[args["activation"]], product("up")
    h = act(up) if args["gate"] is None else act(product("gate")) * up
    names = ("inner", "inner_scale", "inner_bits", "activation", "offset", "linear")
    names += ("linear_scale", "linear_bits", "inner_bias", "linear_bias")
    scores = sketch_scores_reference(
        args["x"], *(args[n] for n in names), args["inner_floor"], args["linear_floor"]
    )
    keep = scores >= args["cut"]
    return torch.where(keep, h, 0), keep


def check(args: dict[str, Any], run: str) -> None:
    expected, keep = exact(args)
    poison(*keep.shape, device=keep.device)
    h, index = RUNS[run](**args)
    n = keep.shape[1]
    assert h.dtype == torch.float32
    assert index.dtype == torch.int32
    assert torch.equal(index < n, keep)
    assert torch.equal(index[keep], torch.arange(n, device=h.device).int().expand_as(index)[keep])
    assert bool((index[~keep] == n).all())
    assert relative_rms(h, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("run", ["triton", "gather"])
@pytest.mark.parametrize("bits", [(2, 2), (3, 4), (2, 0)], ids=["2+2", "3+4", "2"])
@pytest.mark.parametrize(("m", "d", "n"), SHAPES)
def test_shapes(
    m: int, d: int, n: int, bits: tuple[int, int], run: str, device: torch.device
) -> None:
    check(given(m, d, n, device, bits), run)


PAIRS = [(1, 1), (3, 3), (4, 4), (1, 0), (3, 0), (2, 4), (3, 1)]


@pytest.mark.parametrize("bits", PAIRS, ids=lambda b: f"{b[0]}+{b[1]}")
def test_pairs_of_bits(bits: tuple[int, int], device: torch.device) -> None:
    check(given(1, 33, 40, device, bits), "triton")


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool, biases: bool, device: torch.device) -> None:
    for run in ("triton", "gather"):
        check(given(1, 17, 20, device, (2, 2 * gated), activation, biases), run)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dtypes_of_weights(dtype: torch.dtype, device: torch.device) -> None:
    """Weights are read as they are and summed in fp32."""
    for run in RUNS:
        check(given(2, 50, 24, device, dtype=dtype), run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_weights_that_are_not_contiguous(dtype: torch.dtype, device: torch.device) -> None:
    args = given(1, 64, 40, device, dtype=dtype)
    turned = {name: args[name].T.contiguous().T for name in ("up", "gate")}
    expected = sketched_ffn_reference(**args)[0]
    assert relative_rms(sketched_ffn_triton(**(args | turned))[0], expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("run", RUNS)
def test_none_one_and_all(run: str, device: torch.device) -> None:
    args = given(2, 24, 50, device)
    names = ("x", "inner", "inner_scale", "inner_bits", "activation", "offset", "linear")
    names += ("linear_scale", "linear_bits", "inner_bias", "linear_bias", "inner_floor")
    scores = sketch_scores_reference(*(args[n] for n in names), args["linear_floor"])
    top = scores.flatten().sort().values[-2:].mean()[None]
    for cut, kept in ((scores.max()[None] + 1, 0), (top, 1), (scores.min()[None] - 1, 100)):
        assert int(exact(args | {"cut": cut})[1].sum()) == kept
        check(args | {"cut": cut}, run)


@pytest.mark.parametrize("run", ["triton", "gather"])
def test_rows_that_are_not_kept_are_not_read(run: str, device: torch.device) -> None:
    args = given(1, 40, 64, device)
    expected, index = RUNS[run](**args)
    skipped = index[0] == 64
    assert 0 < int(skipped.sum()) < 64
    for name in ("up", "gate"):
        args[name] = torch.where(skipped[:, None], torch.nan, args[name])
    assert torch.equal(RUNS[run](**args)[0], expected)


def test_a_score_that_is_not_a_number_is_not_kept(device: torch.device) -> None:
    args = given(1, 24, 20, device, kept=1.0)
    args["cut"] = torch.full((1,), -1e9, device=device)
    args["offset"][3] = torch.nan
    for run in RUNS.values():
        h, index = run(**args)
        assert int(index[0, 3]) == 20
        assert float(h[0, 3]) == 0
        assert int((index == 20).sum()) == 1


def test_repeated_launches_agree(device: torch.device) -> None:
    args = given(1, 24, 40, device)
    first = sketched_ffn_triton(**args)
    for _ in range(2):
        assert all(
            torch.equal(a, b) for a, b in zip(sketched_ffn_triton(**args), first, strict=True)
        )


def test_opcheck(device: torch.device) -> None:
    torch.library.opcheck(sketched_ffn, (), given(2, 40, 17, device))
    torch.library.opcheck(sketched_ffn, (), given(1, 40, 17, device, (3, 0), "relu", False))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    args = given(1, 24, 20, device)
    for wrong, message in (
        ({"up": args["up"][:-1]}, "up has shape"),
        ({"gate": args["gate"][:, :-1]}, "gate has shape"),
        ({"cut": args["cut"].expand(2)}, "cut has shape"),
        ({"gate": None}, "gate and linear belong together"),
    ):
        for run in (sketched_ffn_reference, sketched_ffn_triton, sketched_ffn_gather):
            with pytest.raises(ValueError, match=message):
                run(**args | wrong)


def test_a_wrong_result_is_caught(device: torch.device) -> None:
    args = given(1, 24, 30, device)
    expected, keep = exact(args)
    for wrong in (
        {"up": args["gate"], "gate": args["up"]},
        {"gate_bias": None},
        {"up_bias": None},
        {"activation": "relu"},
        {"up": args["up"].roll(1, 0)},
    ):
        h, _ = sketched_ffn_triton(**args | wrong)
        assert relative_rms(h, expected) > 1e-3
    _, index = sketched_ffn_triton(**args | {"inner": args["inner"].roll(1, -1)})
    assert not torch.equal(index < 30, keep)
    assert sketched_ffn_reference(**args)[1].dtype == torch.int32
