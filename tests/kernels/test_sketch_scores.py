"""Scores from few-bit copies: reference and kernel against double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gathered import poison
from gnomon.kernels import sketch_gemv
from gnomon.kernels.fewbit import PLANES, levels, pack, padded
from gnomon.kernels.sketch_scores import (
    GEMV_ROWS,
    TINY,
    sketch_scores,
    sketch_scores_reference,
    sketch_scores_triton,
)
from sketches import ACTIVATIONS, LIMIT, arguments, error, magnitude
from tolerances import relative_rms

# rows of x, inputs, neurons
SHAPES = [
    pytest.param(1, 1, 1, id="one"),
    pytest.param(1, 70, 17, id="odd"),
    pytest.param(1, 576, 5, id="three-tiles"),
    pytest.param(3, 40, 9, id="three-rows"),
    pytest.param(4, 264, 4, id="four-rows"),
    pytest.param(5, 31, 9, id="two-groups"),
]


def both(given: dict[str, Any]) -> tuple[float, float]:
    m, n = given["x"].shape[0], given["inner"].shape[0]
    poison(m, n, device=given["x"].device)
    return error(sketch_scores_triton(**given), given), error(
        sketch_scores_reference(**given), given
    )


@pytest.mark.parametrize("linear", [0, *PLANES])
@pytest.mark.parametrize("inner", PLANES)
def test_every_pair_of_bits(inner: int, linear: int, device: torch.device) -> None:
    given = arguments(1, 33, 7, device, (inner, linear))
    assert max(both(given)) < LIMIT


@pytest.mark.parametrize("bits", [(2, 2), (3, 4), (1, 0)], ids=["2+2", "3+4", "1"])
@pytest.mark.parametrize(("m", "d", "n"), SHAPES)
def test_shapes(m: int, d: int, n: int, bits: tuple[int, int], device: torch.device) -> None:
    assert max(both(arguments(m, d, n, device, bits))) < LIMIT


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, gated: bool, biases: bool, device: torch.device) -> None:
    given = arguments(1, 33, 7, device, (4, 4 * gated), activation, biases)
    assert max(both(given)) < LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_x(dtype: torch.dtype, device: torch.device) -> None:
    """Whatever x is, it is read exactly and summed in fp32."""
    for bits in ((2, 2), (4, 1)):
        assert max(both(arguments(2, 100, 10, device, bits, dtype=dtype))) < LIMIT


def test_scores_themselves(device: torch.device) -> None:
    """Dead neurons have log of TINY, and offsets are added."""
    given = arguments(1, 40, 24, device, (2, 0), "relu") | {"inner_floor": None}
    score = sketch_scores_triton(**given)
    dead = magnitude(given) == 0
    assert 0 < int(dead.sum()) < 24
    expected = torch.tensor(TINY).log().item() / 2 + given["offset"]
    torch.testing.assert_close(score[dead], expected[None][dead])
    torch.testing.assert_close(score, sketch_scores_reference(**given), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", PLANES)
def test_padding_reads_no_x(bits: int, device: torch.device) -> None:
    """Columns past D hold another code, and x past its end NaN: neither is seen."""
    given = arguments(2, 13, 10, device, (bits, bits))
    wide = torch.nn.functional.pad(given["x"], (0, 3), value=torch.nan)[:, :13]
    expected = sketch_scores_triton(**given)
    for name in ("inner", "linear"):
        codes = levels(given[name], bits, padded(13)) + (2**bits - 1) / 2
        codes[:, 13:] = 2**bits - 1
        given[name] = pack(codes, bits)
    assert torch.equal(sketch_scores_triton(**given | {"x": wide}), expected)


@pytest.mark.parametrize("gain", [1e-8, 1e8], ids=["small", "large"])
def test_range_of_x(gain: float, device: torch.device) -> None:
    """Fields are denormals that x brings back to the normal range."""
    given = arguments(1, 64, 16, device, (4, 0), "relu", biases=False)
    given["x"] *= gain
    assert (
        relative_rms(
            sketch_scores_triton(**given).exp(),
            (magnitude(given).square() + TINY).sqrt() * given["offset"].double().exp(),
        )
        < LIMIT
    )


def test_strided_arguments(device: torch.device) -> None:
    given = arguments(1, 40, 7, device)
    expected = sketch_scores_triton(**given)
    for name in ("x", "inner", "linear"):
        given[name] = given[name].T.contiguous().T
    given["offset"] = torch.stack([given["offset"], given["offset"]], -1)[:, 0]
    assert torch.equal(sketch_scores_triton(**given), expected)


@pytest.mark.parametrize("m", [0, 1, GEMV_ROWS + 1])
def test_registered_for_any_number_of_rows(m: int, device: torch.device) -> None:
    given = arguments(m, 24, 7, device, (4, 4))
    for score in (sketch_scores(**given), sketch_scores_triton(**given)):
        assert score.shape == (m, 7)
        assert m == 0 or error(score, given) < LIMIT


def test_opcheck(device: torch.device) -> None:
    torch.library.opcheck(sketch_scores, (), arguments(2, 40, 17, device))
    torch.library.opcheck(sketch_scores, (), arguments(2, 40, 17, device, (3, 0), "relu", False))


def test_a_wrong_result_is_caught(device: torch.device) -> None:
    """Swapped matrices, a missing bias, another activation, codes off by one plane: none pass."""
    given = arguments(1, 40, 8, device)
    for wrong in (
        given | {"inner": given["linear"], "linear": given["inner"]},
        given | {"inner_bias": None},
        given | {"inner_floor": None},
        given | {"linear_floor": given["inner_floor"]},
        given | {"activation": "relu"},
        given | {"inner": given["inner"].roll(1, -1)},
        given | {"linear_scale": given["linear_scale"].flip(0)},
        given | {"offset": given["offset"] + 0.01},
    ):
        assert error(sketch_scores_triton(**wrong), given) > 5e-3


def test_tiles_cover_a_row() -> None:
    for bits in PLANES:
        for width in (1, 8, 33, 576, 1536, 4096, 5120, 28672, 53248):
            for _, _, _, size, block, _ in sketch_gemv.planes(width, bits):
                tiles = -(-size // block)
                assert block <= 2048 and block & (block - 1) == 0
                assert (tiles - 1) * block < size <= tiles * block


BAD: list[tuple[dict[str, Any], str]] = [
    ({"activation": "swish"}, "activation='swish' is unknown"),
    ({"inner_bits": 5}, "bits=5: use 1, 2, 3, 4"),
    ({"linear_bits": 0}, "bits=0: use 1, 2, 3, 4"),
    ({"inner_bits": 4}, r"inner is torch.uint8 \(9, 6\); 4 bits of 24 columns are uint8 \(9, 12\)"),
    ({"linear": torch.zeros(8, 6, dtype=torch.uint8)}, r"linear is torch.uint8 \(8, 6\)"),
    ({"inner": torch.zeros(9, 6, dtype=torch.int8)}, r"inner is torch.int8 \(9, 6\)"),
    ({"linear": None}, "linear and linear_scale belong together"),
    ({"linear_scale": None}, "linear and linear_scale belong together"),
    ({"linear": None, "linear_scale": None}, "linear_bias is given without linear"),
    ({"linear": None, "linear_scale": None, "linear_bias": None}, "linear_floor is given without"),
    ({"inner_floor": torch.zeros(8)}, r"inner_floor is torch.float32 \(8,\)"),
    ({"x": torch.zeros(24)}, r"x is torch.float32 \(24,\); use floating point \(M, D\)"),
    ({"x": torch.zeros(1, 24, dtype=torch.int32)}, r"x is torch.int32 \(1, 24\)"),
    ({"inner_scale": torch.zeros(8)}, r"inner_scale is torch.float32 \(8,\); .* \(9,\)"),
    ({"offset": torch.zeros(1, 9)}, r"offset is torch.float32 \(1, 9\)"),
    ({"linear_scale": torch.zeros(9).long()}, r"linear_scale is torch.int64 \(9,\)"),
    ({"inner_bias": torch.zeros(1)}, r"inner_bias is torch.float32 \(1,\)"),
    ({"linear_bias": torch.zeros(10)}, r"linear_bias is torch.float32 \(10,\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m[:28] for _, m in BAD])
def test_refused(change: dict[str, Any], message: str, device: torch.device) -> None:
    change = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in change.items()}
    given = arguments(1, 24, 9, device) | change
    for op in (sketch_scores_reference, sketch_scores_triton, sketch_scores):
        with pytest.raises(ValueError, match=message):
            op(**given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("m", [1, 2, 5])
def test_no_sync_and_repeatable_in_a_graph(m: int) -> None:
    given = arguments(m, 1536, 1000, torch.device("cuda"), dtype=torch.bfloat16)
    sketch_scores(**given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        score = sketch_scores(**given)
    for _ in range(5):
        given["x"].copy_(torch.randn_like(given["x"]))
        graph.replay()
        assert torch.equal(score, sketch_scores(**given)) and error(score, given) < LIMIT
