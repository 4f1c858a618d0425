"""The CPU's C kernels against double precision, and what happens without a compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gathered import DTYPES, LISTS, SHAPES, lists, weights
from gnomon.kernels import cpu_gather, cpu_library
from gnomon.kernels.column_gather import column_gather_reference
from gnomon.kernels.gather_common import rows_wanted
from gnomon.kernels.gathered_ffn import ffn_up_reference
from gnomon.kernels.norm_add import norm_add_reference
from gnomon.kernels.row_gather import row_gather_reference
from gnomon.kernels.rowscaled_linear import rowscaled_linear, rowscaled_linear_reference
from tolerances import TOLERANCE, relative_rms

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    if cpu_library.library() is None:
        pytest.skip("no C compiler on this machine: the CPU path is the reference")
    with torch.no_grad():
        yield


def counted(y: Tensor, count: Tensor | None, block: int) -> Tensor:
    return y if count is None else y[:, : int(count[0]) * block]


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width", "n", "block"), SHAPES)
def test_kernels_equal_their_references(
    batch: int, width: int, n: int, block: int, dtype: torch.dtype, kind: str
) -> None:
    w, scale = weights(n, width, dtype, CPU)
    index, count, k = lists(kind, n // block, batch, CPU)
    bias, gain = torch.randn(n), torch.rand(width)
    x = torch.randn(batch, width)
    how = (index, block, count, scale, bias, gain, None, "rms")
    y, expected = cpu_gather.row_gather(x, w, *how), row_gather_reference(x, w, *how)
    assert relative_rms(counted(y, count, block), counted(expected, count, block)) < 1e-5
    compact = torch.randn(batch, k * block if count is None else n)
    compact[:, k * block :] = torch.nan
    out, residual = torch.randn(width), torch.randn(batch, width)
    how = (index, block, count, scale, out, residual)
    y, expected = (f(compact, w, *how) for f in (cpu_gather.column_gather, column_gather_reference))
    assert relative_rms(y, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_ffn_up(activation: str, gated: bool, norm: str) -> None:
    up, gate = torch.randn(33, 40), torch.randn(33, 40) if gated else None
    index = torch.randperm(33)[:17].int()
    norms = {"norm_weight": torch.rand(40), "norm_bias": torch.randn(40), "norm": norm}
    args = (torch.randn(2, 40), up, gate, index, None, activation, torch.randn(33))
    y, expected = cpu_gather.ffn_up(*args, **norms), ffn_up_reference(*args, **norms)
    assert relative_rms(y, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_norm_add(norm: str, residual: bool) -> None:
    assert cpu_library.library() is not None
    for rows, width, dtype in ((1, 1, torch.float32), (3, 50, torch.bfloat16)):
        x, gain = torch.randn(rows, width).to(dtype), torch.rand(width).to(dtype)
        more = torch.randn(rows, width) if residual else None
        how = (gain, torch.randn(width), norm, 1e-5, more, torch.float32)
        with torch.no_grad():
            y = cpu_gather.norm_add(x, *how)
        assert relative_rms(y, norm_add_reference(x, *how)) < TOLERANCE[torch.float32]
    with torch.no_grad(), pytest.raises(ValueError, match="norm='batch'"):
        cpu_gather.norm_add(x, gain, norm="batch")


def test_whole_places_rows_and_reads_channels_where_they_are() -> None:
    lib = cpu_library.library()
    assert lib is not None
    x, w, index = torch.randn(2, 40), torch.randn(30, 40), torch.tensor([[7, 2], [0, 9]]).int()
    lists = (index, 3, None)
    plain = (None, None, "none", 0.0)
    y = cpu_gather.rows(lib, x, (w, None, None), None, lists, plain, "none", True)
    expected, keep = x @ w.T, torch.zeros(2, 10, dtype=torch.bool)
    keep.scatter_(1, index.long(), True)
    keep = keep.repeat_interleave(3, -1)
    torch.testing.assert_close(y, torch.where(keep, expected, 0))
    back = cpu_gather.columns(lib, y, w, lists, None, None, None, True)
    torch.testing.assert_close(back, torch.where(keep, expected, 0) @ w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "before"), [(2, 0), (8, 3)])
def test_units_that_no_sequence_wants_are_not_read(
    batch: int, before: int, dtype: torch.dtype
) -> None:
    w, scale = weights(30, 40, dtype, CPU)
    wanted = torch.rand(10 - before) < 0.5
    rows = rows_wanted(wanted, 30, 3)
    (w if scale is None else scale)[~rows] = torch.nan
    how = (None, 3, None, scale)
    x, h = torch.randn(batch, 40), torch.randn(batch, 30)
    h[:, ~rows] = torch.nan
    for fast, plain, given in (
        (cpu_gather.row_gather, row_gather_reference, x),
        (cpu_gather.column_gather, column_gather_reference, h),
    ):
        y = fast(given, w, *how, wanted=wanted)
        expected = plain(given, w, *how, wanted=wanted)
        assert bool(y.isfinite().all())
        assert relative_rms(y, expected) < TOLERANCE[torch.float32]
    up = (x, w, w, None, None, "silu", None, None, scale, scale)
    fast_h, plain_h = (f(*up, wanted=rows) for f in (cpu_gather.ffn_up, ffn_up_reference))
    assert relative_rms(fast_h, plain_h) < TOLERANCE[torch.float32]
    assert bool((fast_h[:, ~rows] == 0).all())


def test_unselected_weights_are_not_read_and_threads_change_nothing() -> None:
    x, w = torch.randn(1, 64), torch.randn(96, 64)
    index = torch.randperm(96)[:40].int()
    poisoned = torch.full_like(w, torch.nan)
    poisoned[index.long()] = w[index.long()]
    clean = cpu_gather.row_gather(x, w, index), cpu_gather.column_gather(x[:, :40], w, index)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        other = (
            cpu_gather.row_gather(x, poisoned, index),
            cpu_gather.column_gather(x[:, :40], poisoned, index),
        )
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(clean[0], other[0]) and torch.equal(clean[1], other[1])


@pytest.mark.parametrize("bad", [-1, 12, 2**31 - 1])
def test_indices_out_of_range_are_an_error(bad: int) -> None:
    index = torch.tensor([3, bad], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"outside 0\.\.11"):
        cpu_gather.row_gather(torch.randn(1, 8), torch.randn(12, 8), index)
    with pytest.raises(IndexError, match=r"outside 0\.\.11"):
        cpu_gather.column_gather(torch.randn(1, 2), torch.randn(12, 8), index)


def test_predictors_use_the_kernel_for_a_few_rows() -> None:
    q = torch.randint(-127, 128, (50, 40), dtype=torch.int8)
    x, scale, bias = torch.randn(2, 1, 40), torch.rand(50), torch.randn(50)
    expected = rowscaled_linear_reference(x, q, scale, bias)
    assert relative_rms(rowscaled_linear(x, q, scale, bias), expected) < 1e-6


def test_without_a_compiler_the_references_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_CPU_KERNELS", "0")
    cpu_library.library.cache_clear()
    try:
        x, w, index = torch.randn(1, 40), torch.randn(30, 40), torch.tensor([4, 1]).int()
        assert cpu_gather.serving(x, w) is None
        assert torch.equal(cpu_gather.row_gather(x, w, index), row_gather_reference(x, w, index))
    finally:
        cpu_library.library.cache_clear()


def test_a_broken_compiler_is_reported_and_survived(
    monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo broken >&2; exit 1; }\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path))
    cpu_library.library.cache_clear()
    try:
        assert cpu_library.library() is None
    finally:
        cpu_library.library.cache_clear()
    assert "broken" in caplog.text
