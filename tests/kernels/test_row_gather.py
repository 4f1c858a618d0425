"""Row-gathered projection: reference against double precision, kernel against reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gathered import DTYPES, LISTS, SHAPES, lists, poison, weights
from gnomon.kernels.gather_common import rows_wanted
from gnomon.kernels.row_gather import row_gather, row_gather_reference, row_gather_triton
from tolerances import TOLERANCE, relative_rms


def arguments(
    batch: int,
    width: int,
    n: int,
    block: int,
    kind: str,
    dtype: torch.dtype,
    norm: str,
    device: Any,
) -> tuple[dict[str, Any], int]:
    w, scale = weights(n, width, dtype, device)
    index, count, held = lists(kind, n // block, batch, device)
    given = {
        "x": torch.randn(batch, width, device=device) + 0.3,
        "weight": w,
        "index": index,
        "block": block,
        "count": count,
        "scale": scale,
        "bias": torch.randn(n, device=device),
        "norm_weight": torch.rand(width, device=device) + 0.5,
        "norm_bias": torch.randn(width, device=device) if norm == "layer" else None,
        "norm": norm,
    }
    return given, held * block


@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("kind", LISTS)
def test_reference_in_double_precision(kind: str, norm: str, device: torch.device) -> None:
    given, held = arguments(2, 40, 33, 3, kind, torch.float32, norm, device)
    x, w = given["x"].double(), given["weight"].double()
    if norm == "rms":
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * given["norm_weight"].double()
    if norm == "layer":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        x = x * given["norm_weight"].double() + given["norm_bias"].double()
    dense = (x @ w.T + given["bias"].double()).unflatten(1, (11, 3))
    index = torch.arange(11, device=device) if given["index"] is None else given["index"]
    rows = [dense[b, (index if index.dim() == 1 else index[b])[: held // 3]] for b in range(2)]
    y = row_gather_reference(**given)[:, :held]
    assert relative_rms(y, torch.stack(rows).flatten(1)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize(("batch", "width", "n", "block"), SHAPES)
def test_kernel_is_the_reference(
    batch: int, width: int, n: int, block: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    norm = {"all": "rms", "some": "layer", "counted": "rms"}.get(kind, "none")
    given, held = arguments(batch, width, n, block, kind, dtype, norm, device)
    poison(batch, n, device=device)
    y = row_gather_triton(**given, out_dtype=torch.float32)[:, :held]
    expected = row_gather_reference(**given, out_dtype=torch.float32)[:, :held]
    # Beyond a batch of four the input is rounded to the weights' dtype, as in any bf16 GEMM.
    rounded = batch > 4 and dtype in (torch.bfloat16, torch.float16) and kind != "own"
    assert relative_rms(y, expected) < TOLERANCE[dtype if rounded else torch.float32]


@pytest.mark.parametrize("batch", [1, 6])
def test_unselected_rows_are_not_used(batch: int, device: torch.device) -> None:
    given, _ = arguments(batch, 40, 33, 3, "some", torch.float32, "rms", device)
    expected = row_gather_triton(**given)
    kept = torch.zeros(11, dtype=torch.bool, device=device)
    kept[given["index"].long()] = True
    given["weight"][~kept.repeat_interleave(3)] = torch.nan
    assert torch.equal(row_gather_triton(**given), expected)
    assert torch.equal(row_gather_triton(**given, early=True), expected)


WANTED = [
    pytest.param(2, 40, 33, 3, 0, id="pair"),
    pytest.param(4, 70, 40, 1, 8, id="four"),
    pytest.param(8, 100, 48, 4, 3, id="eight"),
    pytest.param(24, 130, 96, 1, 0, id="twenty-four"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width", "n", "block", "before"), WANTED)
def test_unwanted_rows_are_zero_and_not_read(
    batch: int,
    width: int,
    n: int,
    block: int,
    before: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Units that no sequence keeps; the first ``before`` are read whatever is said."""
    given, _ = arguments(batch, width, n, block, "all", dtype, "rms", device)
    wanted = torch.rand(n // block - before, device=device) < 0.5
    wanted[:2] = torch.tensor([True, False])
    rows = rows_wanted(wanted, n, block)
    assert bool(rows[: before * block].all()) and not bool(rows.all())
    expected = torch.where(rows, row_gather_reference(**given, out_dtype=torch.float32), 0)
    (given["weight"] if given["scale"] is None else given["scale"])[~rows] = torch.nan
    given["bias"][~rows] = torch.nan
    poison(batch, n, device=device)
    for op in (row_gather_reference, row_gather_triton, row_gather):
        y = op(**given, wanted=wanted, out_dtype=torch.float32)
        assert bool((y[:, ~rows] == 0).all())
        rounded = batch > 4 and dtype in (torch.bfloat16, torch.float16)
        assert relative_rms(y, expected) < TOLERANCE[dtype if rounded else torch.float32]
    nothing = row_gather_triton(**given, wanted=torch.zeros_like(wanted))
    assert bool((nothing[:, before * block :] == 0).all())


def test_output_dtype_and_registration(device: torch.device) -> None:
    given, held = arguments(2, 40, 33, 3, "counted", torch.bfloat16, "rms", device)
    y = row_gather(**given, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    exact = row_gather_reference(**given, out_dtype=torch.float32)
    assert relative_rms(y[:, :held], exact[:, :held]) < TOLERANCE[torch.bfloat16]
    full, _ = arguments(1, 40, 33, 3, "some", torch.float32, "rms", device)
    torch.library.opcheck(row_gather, (), full)


def test_a_wrong_result_is_caught(device: torch.device) -> None:
    """A kernel that ignores the norm's weight, or reads a neighbouring row, does not pass."""
    given, held = arguments(1, 40, 33, 3, "some", torch.float32, "rms", device)
    expected = row_gather_reference(**given)[:, :held]
    for wrong in (
        given | {"norm_weight": torch.ones_like(given["norm_weight"])},
        given | {"index": (given["index"] + 1) % 11},
        given | {"bias": None},
    ):
        assert relative_rms(row_gather_triton(**wrong)[:, :held], expected) > 1e-2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm", "batch", "norm='batch' is unknown"),
        ("index", torch.zeros(3, dtype=torch.int64), "use int32"),
        ("index", torch.zeros(5, 3, dtype=torch.int32), "has 5 rows for a batch of 2"),
        ("count", torch.zeros(2, dtype=torch.int32), "count holds 2 numbers"),
        ("wanted", torch.ones(11, dtype=torch.bool), "wanted is given with an index"),
    ],
)
def test_bad_arguments(field: str, value: Any, message: str) -> None:
    given, _ = arguments(2, 40, 33, 3, "some", torch.float32, "none", torch.device("cpu"))
    for op in (row_gather_reference, row_gather_triton):
        with pytest.raises(ValueError, match=message):
            op(**(given | {field: value}))
    for wanted in (torch.ones(12, dtype=torch.bool), torch.ones(11)):
        with pytest.raises(ValueError, match="use bool, 11 at most"):
            row_gather_triton(**(given | {"index": None}), wanted=wanted)
