"""Column-gathered projection: reference against double precision, kernel against reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gathered import DTYPES, LISTS, SHAPES, lists, poison, weights
from gnomon.kernels import column_gemv
from gnomon.kernels.column_gather import (
    column_gather,
    column_gather_reference,
    column_gather_triton,
)
from gnomon.kernels.gather_common import rows_wanted
from gnomon.kernels.split_sums import at_once
from tolerances import TOLERANCE, relative_rms


def arguments(
    batch: int, width: int, n: int, block: int, kind: str, dtype: torch.dtype, device: Any
) -> dict[str, Any]:
    w, scale = weights(n, width, dtype, device)
    index, count, held = lists(kind, n // block, batch, device)
    slots = n // block if index is None else index.shape[-1]
    x = torch.randn(batch, slots * block, device=device)
    x[:, held * block :] = torch.nan
    return {
        "x": x,
        "weight_t": w,
        "index": index,
        "block": block,
        "count": count,
        "scale": scale,
        "bias": torch.randn(width, device=device),
        "residual": torch.randn(batch, width, device=device),
    }


@pytest.mark.parametrize("kind", LISTS)
def test_reference_in_double_precision(kind: str, device: torch.device) -> None:
    given = arguments(2, 40, 33, 3, kind, torch.float32, device)
    index = torch.arange(11, device=device) if given["index"] is None else given["index"]
    held = index.shape[-1] if given["count"] is None else int(given["count"])
    w = given["weight_t"].double().unflatten(0, (11, 3))
    rows = []
    for b in range(2):
        own = (index if index.dim() == 1 else index[b])[:held].long()
        rows.append(given["x"][b, : held * 3].double() @ w[own].flatten(0, 1))
    expected = torch.stack(rows) + given["bias"].double() + given["residual"].double()
    assert relative_rms(column_gather_reference(**given), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize(("batch", "width", "n", "block"), SHAPES)
def test_kernel_is_the_reference(
    batch: int, width: int, n: int, block: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    given = arguments(batch, width, n, block, kind, dtype, device)
    poison(batch, width, device=device)
    y, expected = column_gather_triton(**given), column_gather_reference(**given)
    rounded = batch > 4 and dtype in (torch.bfloat16, torch.float16) and kind != "own"
    assert relative_rms(y, expected) < TOLERANCE[dtype if rounded else torch.float32]


@pytest.mark.parametrize("batch", [1, 6])
def test_unselected_columns_are_not_used_and_runs_agree(batch: int, device: torch.device) -> None:
    given = arguments(batch, 300, 66, 3, "some", torch.float32, device)
    expected = column_gather_triton(**given)
    kept = torch.zeros(22, dtype=torch.bool, device=device)
    kept[given["index"].long()] = True
    given["weight_t"][~kept.repeat_interleave(3)] = torch.nan
    for early in (False, True, True):
        assert torch.equal(column_gather_triton(**given, early=early), expected)


@pytest.mark.parametrize("held", [0, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_entries_past_the_count_read_nothing(batch: int, held: int, device: torch.device) -> None:
    """Not even row 0, which stands in for them nowhere."""
    w = torch.randn(12, 40, device=device)
    index = torch.tensor([5, 7, 2**30, 2**30], dtype=torch.int32, device=device)
    count = torch.tensor([held], dtype=torch.int32, device=device)
    x = torch.randn(batch, 4, device=device)
    x[:, held:] = torch.nan
    expected = x[:, :held] @ w[[5, 7][:held]]
    w[[0, *range(1, 5), 6, *range(8, 12)]] = torch.nan
    if held == 0:
        w[:] = torch.nan
    for op in (column_gather_reference, column_gather_triton, column_gather):
        assert relative_rms(op(x, w, index, 1, count), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "n", "block", "before"),
    [
        pytest.param(2, 40, 33, 3, 0, id="pair"),
        pytest.param(4, 70, 40, 1, 8, id="four"),
        pytest.param(8, 100, 48, 4, 3, id="eight"),
        pytest.param(24, 130, 200, 1, 0, id="twenty-four"),
    ],
)
def test_unwanted_channels_are_not_read(
    batch: int,
    width: int,
    n: int,
    block: int,
    before: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Neither their weights nor x of them; the first ``before`` are read whatever is said."""
    given = arguments(batch, width, n, block, "all", dtype, device)
    wanted = torch.rand(n // block - before, device=device) < 0.5
    wanted[:2] = torch.tensor([True, False])
    rows = rows_wanted(wanted, n, block)
    x = torch.where(rows, given["x"], 0)
    expected = column_gather_reference(**(given | {"x": x}))
    given["x"][:, ~rows] = torch.nan
    (given["weight_t"] if given["scale"] is None else given["scale"])[~rows] = torch.nan
    poison(batch, width, device=device)
    rounded = batch > 4 and dtype in (torch.bfloat16, torch.float16)
    for op in (column_gather_reference, column_gather_triton, column_gather):
        y = op(**given, wanted=wanted)
        assert relative_rms(y, expected) < TOLERANCE[dtype if rounded else torch.float32]


def test_more_splits_than_are_asked_for_at_once(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a large GPU: several rounds of splits, the last of which is not full."""
    monkeypatch.setattr(column_gemv, "processors", lambda device: 132)
    _, _, columns, splits, warps = column_gemv._tiles(300, 256, 1, 4, device)
    together = at_once(splits, 4 * columns // (32 * warps))
    assert splits > together and splits % together
    given = arguments(3, 256, 300, 1, "all", torch.bfloat16, device)
    y = column_gather_triton(**given)
    assert relative_rms(y, column_gather_reference(**given)) < TOLERANCE[torch.bfloat16]


def test_output_dtype_and_registration(device: torch.device) -> None:
    given = arguments(2, 40, 33, 3, "counted", torch.bfloat16, device)
    y = column_gather(**given, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, column_gather_reference(**given)) < TOLERANCE[torch.bfloat16]
    torch.library.opcheck(column_gather, (), arguments(1, 40, 33, 3, "some", torch.float32, device))


def test_a_wrong_result_is_caught(device: torch.device) -> None:
    """A missing residual, a shifted list and a count ignored do not pass."""
    given = arguments(1, 40, 33, 3, "counted", torch.float32, device)
    expected = column_gather_reference(**given)
    held = int(given["count"])
    shifted = given["index"].clone()
    shifted[:held] = (shifted[:held] + 1) % 11
    for wrong in (
        given | {"residual": None},
        given | {"index": shifted},
        given | {"count": given["count"] - 1},
    ):
        assert relative_rms(column_gather_triton(**wrong), expected) > 1e-2
