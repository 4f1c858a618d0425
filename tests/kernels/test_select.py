"""Selection: lists against a sort in Python, the kernels against the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gathered import poison
from gnomon.kernels import compact, select
from gnomon.kernels.compact import compact_mask, select_above, select_passing, slots
from gnomon.kernels.select import select_segments, select_topk
from gnomon.kernels.topk_mask import topk_mask

SIZES = [
    pytest.param(1, id="one"),
    pytest.param(9, id="heads"),
    pytest.param(300, id="odd"),
    pytest.param(1536, id="neurons"),
    pytest.param(17000, id="two-blocks"),
]


def awkward(n: int, device: Any, rows: int = 4) -> Tensor:
    """Scores (rows, n): plain, tied, with NaN and infinities and both zeros, all equal."""
    scores = torch.randn(rows, n)
    scores[1] = (scores[1] * 2).round() / 2
    scores[2, ::3], scores[2, 1::5], scores[2, 2::7] = torch.nan, -torch.inf, torch.inf
    scores[1, ::4] *= 0.0
    scores[3] = 1.0
    return scores.to(device)


def best(row: Tensor, k: int) -> list[int]:
    """Indices of the k best, ascending: NaN as −inf, the lower index first among equals."""
    values = row.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).tolist()
    return sorted(sorted(range(len(values)), key=lambda j: (-values[j], j))[:k])


def listed(index: Tensor, count: Tensor) -> list[list[int]]:
    return [index[r, :c].tolist() for r, c in enumerate(count.tolist())]


@pytest.mark.parametrize("n", SIZES)
def test_topk_of_every_size_of_set(n: int, device: torch.device) -> None:
    scores = awkward(n, device)
    for k in sorted({0, 1, n // 3, n}):
        expected = [best(row, k) for row in scores.cpu()]
        mask = topk_mask(scores, k)
        assert [row.nonzero().flatten().tolist() for row in mask.cpu()] == expected
        for launch in (select.select_topk_triton, select.select_topk_reference):
            poison(4, n, device=device)
            assert listed(*launch(scores, None, k, n)) == expected, (launch.__name__, k)


@pytest.mark.parametrize("n", SIZES)
def test_topk_with_a_count_per_row(n: int, device: torch.device) -> None:
    scores = awkward(n, device)
    k = torch.tensor([0, n + 5, n // 2, -1], dtype=torch.int32, device=device)
    for launch in (select.select_topk_triton, select.select_topk_reference):
        sets = listed(*launch(scores, k, 0, n))
        assert sets == [best(r, c) for r, c in zip(scores.cpu(), (0, n, n // 2, 0), strict=True)]
    capacity = max(1, n // 4)
    a, b = select_topk(scores, k, capacity), select.select_topk_triton(scores, k, 0, capacity)
    assert a[0].shape == (4, capacity) and listed(*a) == listed(*b)
    assert a[1].max() <= capacity


@pytest.mark.parametrize("n", [5000, 40000])
def test_parts_of_one_row_make_one_list(n: int, device: torch.device) -> None:
    """Several programs list a row: none repeats or misses a unit, ties across parts included."""
    for row in (*awkward(n, device), torch.randn(n).exp().pow(3).to(device)):
        for k in (0, 1, n // 2, n - 1):
            poison(1, n, device=device)
            found = listed(*select.select_topk_triton(row[None], None, k, n))
            assert found == [best(row.cpu(), k)], k
        kept = (row > 0.5).nonzero().flatten().tolist()
        poison(1, n, device=device)
        mask = compact.compact_mask_triton(row[None] > 0.5, n)
        assert listed(*mask) == [kept]
        few = compact.compact_mask_triton(row[None] > 0.5, 7)
        assert listed(*few) == [kept[:7]]


def test_topk_mask_keeps_any_shape_and_dtype(device: torch.device) -> None:
    for n in (9, 200):
        scores = torch.randn(2, 3, n, device=device).bfloat16()
        mask = topk_mask(scores, 5)
        assert mask.shape == scores.shape and mask.sum(-1).eq(5).all()
        sets = [row.nonzero().flatten().tolist() for row in mask.flatten(0, 1).cpu()]
        assert sets == [best(row, 5) for row in scores.flatten(0, 1).float().cpu()]


@pytest.mark.parametrize(("n", "keep", "segment"), [(48, 5, 16), (300, 128, 256), (7, 3, 16)])
def test_segments(n: int, keep: int, segment: int, device: torch.device) -> None:
    scores = awkward(n, device)
    expected = []
    for row in scores.cpu():
        parts = [(s, row[s : s + segment]) for s in range(0, n, segment)]
        sets = [[s + j for j in best(p, -(-keep * len(p) // segment))] for s, p in parts]
        expected.append([j for part in sets for j in part])
    for launch in (select.select_segments_triton, select.select_segments_reference):
        index, count = launch(scores, keep, segment)
        assert index.shape[1] == len(expected[0]) and listed(index, count) == expected


@pytest.mark.parametrize("n", SIZES)
def test_masks_and_thresholds(n: int, device: torch.device) -> None:
    scores = awkward(n, device)
    per_unit, per_row = torch.randn(1, n, device=device), torch.randn(4, 1, device=device)
    for cut in (torch.tensor(0.25, device=device), per_unit, per_row):
        mask = scores >= cut
        expected = [row.nonzero().flatten().tolist() for row in mask.cpu()]
        assert listed(*compact.compact_mask_triton(mask, n)) == expected
        assert listed(*compact.compact_mask_reference(mask, n)) == expected
        assert listed(*compact.select_above_triton(scores, cut, n)) == expected
        assert listed(*select_above(scores, cut, n)) == expected
        passing = [row.nonzero().flatten().tolist() for row in (scores.abs() > cut).cpu()]
        assert listed(*compact.select_passing_triton(scores, cut, n)) == passing
        assert listed(*select_passing(scores, cut, n)) == passing
        few = [row[:3] for row in expected]
        assert listed(*compact.compact_mask_triton(mask, 3)) == few
        assert listed(*compact_mask(mask, 3)) == few


def test_slots_are_the_inverse(device: torch.device) -> None:
    index = torch.tensor([[3, 0, 6, 99], [5, -7, 1, 2]], dtype=torch.int32, device=device)
    count = torch.tensor([3, 1], dtype=torch.int32, device=device)
    expected = [[1, -1, -1, 0, -1, -1, 2], [-1, -1, -1, -1, -1, 0, -1]]
    for launch in (compact.slots_triton, compact.slots_reference, slots):
        poison(2, 7, device=device)
        assert launch(index, count, 7).tolist() == expected


def test_a_wrong_tie_rule_is_caught(device: torch.device) -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0]], device=device)
    wrong = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[0, :2]
    assert sorted((3 - wrong).tolist()) != best(scores[0].cpu(), 2) == [0, 1]


def test_bad_arguments_are_named(device: torch.device) -> None:
    scores = torch.randn(3, 3, device=device)
    for launch in (select_topk, lambda s, k, c: select.select_topk_triton(s, None, k, c)):
        with pytest.raises(ValueError, match="k=4 is outside 0..3"):
            launch(scores, 4, 8)
    with pytest.raises(ValueError, match="capacity=2"):
        select_topk(scores, 3, 2)
    with pytest.raises(ValueError, match=r"k has shape \(2,\)"):
        select_topk(scores, torch.zeros(2, dtype=torch.int32, device=device), 2)
    with pytest.raises(ValueError, match="keep=300 is outside 0..256"):
        select_segments(scores, 300)
    with pytest.raises(ValueError, match=r"use \(\), \(1, 3\) or \(3, 1\)"):
        select_above(scores, torch.zeros(3, device=device), 3)


def test_registered(device: torch.device) -> None:
    scores = torch.randn(2, 40, device=device)
    k = torch.tensor([3, 4], dtype=torch.int32, device=device)
    index, count = select_topk(scores, k, 40)
    index = index.masked_fill(torch.arange(40, device=device) >= count[:, None], 0)
    for op, args in (
        (select.select_topk_op, (scores, None, 3, 5)),
        (select_segments, (scores, 3, 16)),
        (compact_mask, (scores > 0, 40)),
        (select_above, (scores, k[:, None].float(), 40)),
        (select_passing, (scores, k[:, None].float(), 40)),
        (slots, (index, count, 40)),
    ):
        # Values past a count are undefined, so the tests that compare two runs leave them out.
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_sync_and_repeatable_in_a_graph() -> None:
    scores = torch.randn(62, 11008, device="cuda")
    k = torch.full((62,), 5504, dtype=torch.int32, device="cuda")

    def run() -> tuple[Tensor, ...]:
        index, count = select_topk(scores, k, 5504)
        mask = topk_mask(scores, 5504)
        return index, count, mask, *compact_mask(mask, 5504), slots(index, count, 11008)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(20):
        scores.copy_(torch.randn_like(scores))
        graph.replay()
        for a, b in zip(out, run(), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(out[0], out[3])
