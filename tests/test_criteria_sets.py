"""Criteria of sets of tokens against the matrices that define them; what each criterion is of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gnomon import Budget, policies, sparsify
from gnomon.data.capture import Probe, capture
from gnomon.data.criteria import CRITERIA, SetCriterion, criterion
from gnomon.data.datamodule import OnlineDataModule
from gnomon.data.harvest import harvest
from gnomon.data.plan import Plan, make_plan
from gnomon.data.sets import EpeNas, Jacov, Nwot
from gnomon.data.sources import SyntheticText
from gnomon.data.static import static_scores
from gnomon.host import KINDS, Tap, describe
from gnomon.tiny import tiny_host

HOST, TOKENIZER = tiny_host()
SPEC = describe(HOST)
BLOCK = 32
GRANULARITIES = {
    "nwot": ("prompt", "static"),
    "jacov": ("static",),
    "epenas": ("static",),
}


def ids_of(rows: int = 4, length: int = BLOCK, vocab: int = 256) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(1))


def text() -> SyntheticText:
    return SyntheticText(block=BLOCK, tokens=8 * BLOCK)


def agreement(patterns: Tensor) -> float:
    """log det(I + K) with K written out: patterns (n, d) of one unit."""
    on = patterns.double().numpy()
    k = np.array([[(a == b).sum() for b in on] for a in on], dtype=float)
    return float(np.linalg.slogdet(np.eye(len(on)) + k)[1])


def test_nwot_is_the_log_determinant_of_its_kernel() -> None:
    found = capture(HOST, SPEC, [Tap(1)], criterion("nwot"), ids_of())
    first = 10
    heads, neurons = (found.pooled(kind, first) for kind in KINDS)
    for layer, unit in itertools.product(range(SPEC.L), range(SPEC.H)):
        expected = agreement(found.heads[1, first:-1, layer, unit])
        assert heads[1, layer, unit] == pytest.approx(expected, rel=1e-5)
    for layer, unit in itertools.product(range(SPEC.L), range(0, SPEC.F, 7)):
        expected = agreement(found.neurons[2, first:-1, layer, unit, None])
        assert neurons[2, layer, unit] == pytest.approx(expected, rel=1e-5)
    dead, half = torch.zeros(20, 1, 1), torch.arange(20.0).remainder(2)[:, None, None]
    assert Nwot().pool("neurons", dead, ids_of()) < Nwot().pool("neurons", half, ids_of())


def test_patterns_are_the_signs_of_the_unit_tensors() -> None:
    patterns = capture(HOST, SPEC, [Tap(1)], criterion("nwot"), ids_of())
    magnitude = capture(HOST, SPEC, [Tap(1)], criterion("l2norm"), ids_of())
    assert patterns.neurons.unique().tolist() == [0, 1]
    assert patterns.heads.shape == (4, BLOCK, SPEC.L, SPEC.H, SPEC.d)
    assert magnitude.neurons.gt(0).all()
    assert 0.2 < patterns.neurons.mean() < 0.8


def head_gradients() -> Tensor:
    """(n, L, H, d) that share a direction, more so in some heads than in others."""
    draw = torch.Generator().manual_seed(2)
    shared = torch.randn(1, 3, 4, 8, generator=draw)
    return torch.randn(260, 3, 4, 8, generator=draw) + torch.arange(4.0)[:, None] * shared


def test_jacov_is_of_the_eigenvalues_of_the_token_correlations() -> None:
    g = head_gradients()
    found = Jacov().pool("heads", g, torch.zeros(260))
    draw = torch.Generator().manual_seed(0)
    expected = np.zeros((3, 4))
    for _ in range(10):
        some = torch.randperm(260, generator=draw)[:200]
        for layer, head in itertools.product(range(3), range(4)):
            v = np.linalg.eigvalsh(np.corrcoef(g[some, layer, head].double().numpy()))
            assert np.abs(v[:-7]).max() < 1e-9, "rank d - 1"
            expected[layer, head] -= (np.log(v[-7:] + 1e-5) + 1 / (v[-7:] + 1e-5)).sum() / 10
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
    assert (found[:, 0] < found[:, 3]).all(), "of more tokens than dimensions, as documented"


def test_epenas_compares_classes_of_targets() -> None:
    g = head_gradients()
    targets = torch.arange(260) % 7
    targets[250:] = torch.arange(10) + 100  # too rare to count
    found = EpeNas().pool("heads", g, targets)
    for layer, head in itertools.product(range(3), range(4)):
        sums = []
        for c in range(7):
            r = np.corrcoef(g[targets == c][:, layer, head].double().numpy())
            sums.append(np.log(np.abs(r) + 1e-5).sum())
        expected = sum(abs(a - b) for a in sums for b in sums)
        assert found[layer, head] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"0 of 260 do in 260 tokens.*text\.tokens"):
        EpeNas().pool("heads", g, torch.arange(260))


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_granularities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = criterion(name)
    assert one.granularities == GRANULARITIES.get(name, ("token", "prompt", "static"))
    assert isinstance(one, SetCriterion) == (name in GRANULARITIES)
    assert one.kinds == (("heads",) if name in ("jacov", "epenas") else KINDS)
    if "token" in one.granularities:
        return
    monkeypatch.setattr(Probe, "__call__", lambda *a: pytest.fail("the host was run"))
    message = f"criterion={name} has no token scores.*use .*static_scores.*criterion=plainact"
    with pytest.raises(ValueError, match=message):
        harvest(HOST, TOKENIZER, SPEC, text(), one, [Tap(1)], "unused")
    with pytest.raises(ValueError, match=message):
        OnlineDataModule(HOST, TOKENIZER, SPEC, text(), one, [Tap(1)])
    if name != "nwot":
        with pytest.raises(ValueError, match=f"{name} has no prompt scores.*defined for static"):
            harvest(HOST, TOKENIZER, SPEC, text(), one, [Tap(1)], "unused", granularity="prompt")
    monkeypatch.undo()
    found = capture(HOST, SPEC, [Tap(1)], one, ids_of())
    with pytest.raises(ValueError, match="has no token scores"):
        found.scores("heads")


def test_nwot_is_harvested_by_prompt(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"granularity": "prompt", "prompts": [8, 20], "progress": False}
    settings |= {"heldout_tokens": 4 * BLOCK, "input_dtype": "float32"}
    one = criterion("nwot")
    store = harvest(HOST, TOKENIZER, SPEC, text(), one, [Tap(1)], tmp_path / "t", **settings)
    blocks = text().blocks(TOKENIZER, "train").ids
    found = capture(HOST, SPEC, [Tap(1)], one, blocks)
    for kind in KINDS:
        expected = torch.cat([found.pooled(kind, p - 1) for p in (8, 20)])
        peaks = torch.cat([r[f"{kind}_peak"] for r in store.iterate("train")])
        torch.testing.assert_close(peaks.sum(0), expected.amax(-1).sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(store.means[kind], found.pooled(kind).mean(0))
    static = static_scores(HOST, SPEC, one, blocks, batch=3)
    for kind in KINDS:
        torch.testing.assert_close(static[kind], store.means[kind])


def test_static_scores_are_means_of_token_scores() -> None:
    found = capture(HOST, SPEC, [Tap(1)], criterion("plainact"), ids_of())
    static = static_scores(HOST, SPEC, criterion("plainact"), ids_of(), batch=3)
    for kind in KINDS:
        expected = found.scores(kind)[:, :-1].mean((0, 1))
        torch.testing.assert_close(static[kind], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["jacov", "epenas"])
def test_criteria_of_a_whole_text_decide_heads(name: str) -> None:
    ids = ids_of(vocab=8)
    one = criterion(name)
    static = static_scores(HOST, SPEC, one, ids, batch=3)
    g = capture(HOST, SPEC, [Tap(1)], one, ids).heads[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        static["heads"], one.pool("heads", g, ids[:, 1:].flatten()), rtol=1e-2, atol=1e-2
    )
    assert static["neurons"].eq(0).all()
    few = static_scores(HOST, SPEC, one, ids, batch=3, sample=62)
    every = slice(None, None, 2)
    expected = one.pool("heads", g[every], ids[:, 1:].flatten()[every])
    torch.testing.assert_close(few["heads"], expected, rtol=1e-2, atol=1e-2)
    with sparsify(HOST, policies.Static(static, Budget(heads=0.5)), protocol="all") as session:
        HOST(ids)
    assert session.density().heads == 0.5


def test_every_criterion_has_traces_of_its_own() -> None:
    def planned(name: str, dtype: str = "float32") -> Plan:
        return make_plan(
            SPEC,
            text(),
            criterion(name),
            [Tap(1)],
            dtype,
            granularity="prompt",
            prompts=None,
            format="int8",
            label_density=0.5,
            token_rate=1.0,
            shard_blocks=8,
            heldout_tokens=BLOCK,
            input_dtype="float16",
            seed=0,
            world=1,
        )

    names = [n for n in CRITERIA if "prompt" in CRITERIA[n].granularities]
    assert len({planned(n).key for n in names}) == len(names)
    dtypes = ("float32", "float16", "bfloat16")
    assert len({planned("plainact", d).key for d in dtypes}) == 3
    scaled = [("loss_scales" in planned("fisher", d).identity) for d in dtypes]
    assert scaled == [False, True, False], "traces of other hosts are used as before"
    assert "loss_scales" not in planned("magnitude", "float16").identity
