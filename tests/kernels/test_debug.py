"""GNOMON_DEBUG=1: indices outside what they index are named before a kernel reads there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attention import arguments
from gnomon.kernels.column_gather import column_gather_reference, column_gather_triton
from gnomon.kernels.decode_attention import decode_attention_reference, decode_attention_triton
from gnomon.kernels.gathered_ffn import ffn_up_triton
from gnomon.kernels.row_gather import row_gather_reference, row_gather_triton

GATHERS = [
    pytest.param(lambda w, i, c, op=op: op(w[:1], w, i, 1, c), id=name)
    for name, op in (("reference", row_gather_reference), ("triton", row_gather_triton))
]
GATHERS += [
    pytest.param(lambda w, i, c: ffn_up_triton(w[:1], w, None, i, c), id="ffn"),
    *(
        pytest.param(lambda w, i, c, op=op: op(w[:1, : len(i)], w, i, 1, c), id=f"column-{name}")
        for name, op in (
            ("reference", column_gather_reference),
            ("triton", column_gather_triton),
        )
    ),
]


@pytest.fixture
def debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_DEBUG", "1")


@pytest.mark.parametrize("run", GATHERS)
@pytest.mark.parametrize("bad", [12, -1, 2**30])
def test_an_index_out_of_range_is_named(
    run: Callable, bad: int, debug: None, device: torch.device
) -> None:
    w = torch.randn(12, 8, device=device)
    index = torch.tensor([3, bad, 0], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=rf"index holds {bad}, which is outside 0\.\.11"):
        run(w, index, None)


@pytest.mark.parametrize("run", GATHERS)
def test_entries_past_the_count_may_be_anything(
    run: Callable, debug: None, device: torch.device
) -> None:
    w = torch.randn(12, 8, device=device)
    index = torch.tensor([3, 11, 2**30], dtype=torch.int32, device=device)
    run(w, index, torch.tensor([2], dtype=torch.int32, device=device))


def test_blocks_count_in_blocks(debug: None, device: torch.device) -> None:
    w, x = torch.randn(12, 8, device=device), torch.randn(1, 8, device=device)
    with pytest.raises(ValueError, match=r"index holds 3, which is outside 0\.\.2"):
        row_gather_triton(x, w, torch.tensor([3], dtype=torch.int32, device=device), 4)


@pytest.mark.parametrize("op", [decode_attention_reference, decode_attention_triton])
@pytest.mark.parametrize(("field", "value"), [("slot", 6), ("slot", -2), ("position", 70)])
def test_attention(op: Callable, field: str, value: int, debug: None, device: torch.device) -> None:
    given = arguments((2, 3, 2, 20, 70, 20), "shared", torch.float32, "plain", device)
    op(**given)
    given[field] = given[field].clone()
    given[field].view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"{field} holds {value}, which is outside"):
        op(**given)
