"""Weights read as words: every code is exact, walks and splits add up, the rest is right too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gathered import weights
from gnomon.kernels import column_words, int4_down, rowscaled_linear
from gnomon.kernels.column_gather import column_gather_reference, column_gather_triton
from gnomon.kernels.gathered_ffn import ffn_up_reference, ffn_up_triton
from gnomon.kernels.int4_ffn import (
    int4_ffn_down_reference,
    int4_ffn_down_triton,
    int4_ffn_up_reference,
    int4_ffn_up_triton,
    int4_rows,
)
from gnomon.kernels.packed import packing
from gnomon.kernels.row_gather import row_gather_reference, row_gather_triton
from gnomon.kernels.rowscaled_linear import (
    rowscaled_linear_reference,
    rowscaled_linear_triton,
)
from gnomon.policies.compressed import compress
from tolerances import TOLERANCE, relative_rms

SIZES = [2.0**-60, 1.0, 2.0**50]  # of x: the fields are denormals
CLOSE = TOLERANCE[torch.float32]


@pytest.mark.parametrize("size", SIZES)
def test_every_byte_in_every_place_is_exact(
    size: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowscaled_linear, "WORDS_FROM", 0)
    code = torch.arange(64)[:, None] + 64 * (torch.arange(16) // 4) - 128  # (64, 16)
    weight, scale = code.to(device, torch.int8), torch.ones(64, device=device)
    for x in (torch.eye(16, device=device) * size).split(4):
        expected = (x @ weight.T.float()).contiguous()
        y = row_gather_triton(x, weight, scale=scale, out_dtype=torch.float32)
        assert torch.equal(y, expected)
        assert torch.equal(rowscaled_linear_triton(x, weight, scale), expected)
    for x in (torch.eye(64, device=device) * size).split(4):
        y = column_gather_triton(x, weight, scale=scale, out_dtype=torch.float32)
        assert torch.equal(y, x @ weight.float())


@pytest.mark.parametrize("size", SIZES)
def test_every_half_byte_in_every_place_is_exact(size: float, device: torch.device) -> None:
    codes = (torch.arange(16) * 17).to(device, torch.uint8)[:, None].repeat(1, 16)  # (16, 32)
    scale = torch.ones(16, 1, dtype=torch.float16, device=device)
    whole = int4_rows(codes, scale, 32)
    x = torch.eye(32, device=device) * size
    y = int4_ffn_up_triton(x, codes, scale, activation="relu")  # passes one sign at a time
    y -= int4_ffn_up_triton(-x, codes, scale, activation="relu")
    assert torch.equal(y, whole.T * size)
    h = torch.eye(16, device=device) * size
    assert torch.equal(int4_ffn_down_triton(h, codes, scale, 32), whole * size)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_rows_of_several_steps(batch: int, dtype: torch.dtype, device: torch.device) -> None:
    (up, up_scale), (gate, gate_scale) = (weights(1700, 64, dtype, device) for _ in "ug")
    x = torch.randn(batch, 64, device=device)
    given: dict[str, Any] = {"up_scale": up_scale, "gate_scale": gate_scale}
    y = ffn_up_triton(x, up, gate, **given)
    assert relative_rms(y, ffn_up_reference(x, up, gate, **given)) < CLOSE
    y = row_gather_triton(x, up, scale=up_scale, out_dtype=torch.float32)
    assert relative_rms(y, row_gather_reference(x, up, scale=up_scale)) < CLOSE


def columns(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A sum of four splits of several steps, by the kernel and by the reference."""
    weight, scale = weights(2400, 192, torch.int8, device)
    index = torch.randperm(2400, device=device)[:2300].int()
    x, residual = torch.randn(batch, 2300, device=device), torch.randn(batch, 192, device=device)
    count = torch.tensor([2222], dtype=torch.int32, device=device)
    args = (x, weight, index, 1, count, scale, torch.randn(192, device=device), residual)
    return column_gather_triton(*args, out_dtype=torch.float32), column_gather_reference(*args)


@pytest.mark.parametrize("batch", [1, 3])
def test_columns_of_several_splits_and_steps(batch: int, device: torch.device) -> None:
    y, expected = columns(batch, device)
    assert relative_rms(y, expected) < CLOSE


def int4(rows: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Both halves of an int4 FFN, by the kernels and by the references."""
    found = [compress(torch.randn(700, 130) / 11, "int4").tensors for _ in range(3)]
    up, gate, down = ((t["codes"].to(device), t["scale"].to(device)) for t in found)
    x, h = torch.randn(rows, 130, device=device), torch.randn(rows, 700, device=device)
    return [
        (int4_ffn_up_triton(x, *up, *gate), int4_ffn_up_reference(x, *up, *gate)),
        (int4_ffn_down_triton(h, *down, 130), int4_ffn_down_reference(h, *down, 130)),
    ]


@pytest.mark.parametrize("rows", [1, 2])
def test_int4_of_several_splits_and_steps(rows: int, device: torch.device) -> None:
    for y, expected in int4(rows, device):
        assert relative_rms(y, expected) < CLOSE


@pytest.mark.parametrize(
    ("n", "k", "m", "dtype"),
    [
        pytest.param(41, 200, 3, torch.float32, id="tails"),
        pytest.param(9, 4100, 1, torch.bfloat16, id="more-than-a-block"),
        pytest.param(30, 8, 5, torch.float16, id="two-groups"),
    ],
)
def test_rowscaled_as_words(
    n: int,
    k: int,
    m: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rowscaled_linear, "WORDS_FROM", 0)
    q, scale = weights(n, k, torch.int8, device)
    args = (torch.randn(m, k, device=device).to(dtype), q, scale, torch.randn(n, device=device))
    y, expected = rowscaled_linear_triton(*args), rowscaled_linear_reference(*args)
    assert relative_rms(y, expected) < TOLERANCE[dtype]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter takes another function")
@pytest.mark.parametrize("kernel", ["columns", "int4"])
def test_a_wrong_power_is_caught(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(i: Any, bits: Any) -> float:
        place = int(i) * int(bits)
        return 2.0 ** -(place - 8 * (place + int(bits) > 16))  # moves the third byte down too

    module = column_words if kernel == "columns" else int4_down
    monkeypatch.setattr(module, "_power", wrong)
    cpu = torch.device("cpu")
    y, expected = columns(1, cpu) if kernel == "columns" else int4(1, cpu)[1]
    assert not relative_rms(y, expected) < CLOSE


def test_what_is_read_as_words(device: torch.device) -> None:
    store = torch.zeros(4 * 96 + 8, dtype=torch.int8, device=device)
    whole, odd = store[: 4 * 96].view(4, 96), store[1 : 1 + 4 * 96].view(4, 96)
    assert packing(whole) == "int8"
    assert packing(odd) == packing(whole, odd) == packing(store[: 4 * 94].view(4, 94)) == "none"
    halves = torch.zeros(3, 6, dtype=torch.bfloat16, device=device)
    assert (packing(halves), packing(halves[:, :5].contiguous())) == ("bf16", "none")
    assert packing(halves.half()) == "fp16"
    assert packing(halves.float()) == packing(halves, halves.half()) == "none"


def test_what_is_no_words_is_right_too(device: torch.device) -> None:
    store = torch.randint(-127, 128, (4 * 96 + 8,), device=device).to(torch.int8)
    odd, scale = store[1 : 1 + 4 * 96].view(4, 96), torch.rand(4, device=device)
    x, h = torch.randn(1, 96, device=device), torch.randn(1, 4, device=device)
    y = row_gather_triton(x, odd, scale=scale)
    assert relative_rms(y, row_gather_reference(x, odd, scale=scale)) < CLOSE
    y = column_gather_triton(h, odd, scale=scale)
    assert relative_rms(y, column_gather_reference(h, odd, scale=scale)) < CLOSE
    codes = store[1 : 1 + 4 * 48].view(torch.uint8).view(4, 48)
    with pytest.raises(ValueError, match="no multiple of 4"):
        int4_ffn_down_triton(h, codes, torch.ones(4, 3, dtype=torch.float16, device=device), 96)


def test_rows_left_out_are_zero_without_a_scale(device: torch.device) -> None:
    wanted = torch.arange(40, device=device) % 2 == 0
    q = torch.randint(-127, 128, (40, 64), device=device).to(torch.int8)
    y = row_gather_triton(torch.randn(2, 64, device=device), q, wanted=wanted)
    assert not y[:, ~wanted].any()
    assert y[:, wanted].all()


def test_compiles_for_hopper_without_flushing_denormals(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    tests = Path(__file__).resolve().parent.parent
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}", "PYTHONSAFEPATH": "1"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", str(tests / "compile_packed.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    rows = [line.split() for line in done.stdout.splitlines()]
    counts = [(name, *map(int, rest)) for name, *rest in rows]
    names = [name for name, *_ in counts]
    packed = [
        "_row_kernel",
        "_column_words_kernel",
        "_rowscaled_gemv_kernel",
        "_up_kernel",
        "_down_kernel",
    ]
    assert names == ["_sketch_kernel", "_sketched_kernel"] * 2 + packed, done.stderr
    assert all(plain > 3 * flushing for _, plain, flushing, _ in counts[:4]), counts
    assert not any(flushing or conversions for *_, flushing, conversions in counts[4:]), counts
