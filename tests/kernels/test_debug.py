"""GNOMON_DEBUG=1: indices outside what they index are named before a kernel reads there.

A captured CUDA graph cannot wait for a check: there the device asserts, which ends its process, so
that this is tried in one of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attention import arguments
from debug_replay import WRONG
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


@pytest.mark.parametrize("run", GATHERS)
@pytest.mark.parametrize("bad", [-1, 4])
def test_a_count_beyond_the_list_is_named(
    run: Callable, bad: int, debug: None, device: torch.device
) -> None:
    w, index = torch.randn(12, 8, device=device), torch.tensor([3, 11, 0], device=device).int()
    with pytest.raises(ValueError, match=rf"count holds {bad}, which is outside 0\.\.3"):
        run(w, index, torch.tensor([bad], dtype=torch.int32, device=device))


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


@pytest.mark.parametrize("op", [decode_attention_reference, decode_attention_triton])
def test_the_first_position_and_the_tables(op: Callable, debug: None, device: torch.device) -> None:
    given = arguments((2, 3, 2, 20, 70, 20), "shared", torch.float32, "first", device)
    first = torch.tensor([0, 70], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="first holds 70, which is outside"):
        op(**(given | {"first": first}))
    with pytest.raises(ValueError, match="cos has 69 positions and the caches 70"):
        op(**(given | {"cos": given["cos"][:69], "sin": given["sin"][:69]}))


SCRIPT = Path(__file__).resolve().parent.parent / "debug_replay.py"


def replayed(field: str, device: torch.device, debug: str) -> subprocess.CompletedProcess[str]:
    """The program's end: a captured step, replayed with a wrong value in ``field``."""
    root = str(SCRIPT.parent.parent)
    env = {**os.environ, "GNOMON_DEBUG": debug, "PYTHONPATH": root, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(SCRIPT), field, device.type]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("field", WRONG)
def test_a_replayed_graph_asserts(field: str) -> None:
    """The wrong value is written after the capture: no check on the host can see it."""
    done = replayed(field, torch.device("cuda"), "1")
    name = "index" if field in ("column", "ffn") else field
    assert done.stdout.splitlines() == ["replayed"], done.stdout + done.stderr
    assert done.returncode != 0
    assert "device-side assert" in done.stderr
    assert f"{name} holds a value outside" in done.stdout + done.stderr


def test_the_program_replays_what_is_right_and_names_what_is_not(device: torch.device) -> None:
    """Without a graph the check itself stops it; and nothing stops what is right."""
    right = replayed("none", device, "1")
    assert right.stdout.splitlines() == ["replayed", "went on"], right.stderr
    if device.type == "cpu":
        wrong = replayed("position", device, "1")
        assert wrong.stdout.splitlines() == ["replayed"]
        assert "position holds 9, which is outside 0..7" in wrong.stderr
