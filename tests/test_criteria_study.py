"""benchmarks/criteria_study.py: a row for every use that a criterion has scores for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_benchmarks import ROOT, module

from gnomon import Budget, load_host, sparsify
from gnomon.host import KINDS

SMALL = ["--host=tiny:llama", "--device=cpu", "--text=synthetic", "--tokens=256", "--block=32"]
SMALL += ["--blocks=3", "--batch=2", "--neurons=0.5", "--heads=0.5"]


@pytest.fixture(autouse=True)
def support(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "support"))
    yield


def study(*args: str) -> list[dict]:
    bench, rows = module("criteria_study"), []
    bench.run(bench.arguments([*SMALL, *args]), rows.append)
    for kind in KINDS:
        assert bench.table(rows, kind).row_count > 0
    return rows


def test_rows_of_every_use() -> None:
    rows = study("--criteria=plainact,nwot,jacov")
    json.dumps(rows)
    found = {}
    for row in rows:
        found.setdefault(row["criterion"], set()).add((row["kind"], row["use"], row["protocol"]))
        assert row["ppl_ratio"] == pytest.approx(row["ppl_sparse"] / row["ppl_dense"])
        assert row["tokens"] == 3 * (31 if row["protocol"] == "all" else 16)
        assert row["causal"] == (row["use"] in ("static", "prompt"))
        assert row["calibration_tokens"] == 256
        assert row["density"] == 0.5
    static = {(k, "static", p) for k in KINDS for p in ("all", "decode")}
    halves = {(k, use, "decode") for k in KINDS for use in ("prompt", "sequence")}
    assert found["plainact"] == static | halves | {(k, "token", "all") for k in KINDS}
    assert found["nwot"] == static | halves
    assert found["jacov"] == {s for s in static if s[0] == "heads"}
    assert found["oracle"] == {(k, "reference", p) for k in KINDS for p in ("all", "decode")}
    correlated = [r for r in rows if "spearman" in r]
    assert {r["use"] for r in correlated} == {"static", "prompt"}
    assert all(-1 <= r["spearman"] <= 1 for r in correlated)


def test_rows_of_a_local_file_and_one_use(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    lines = [
        json.dumps({"text": f"document {i} tells of a shadow at noon. " * 8}) for i in range(9)
    ]
    file.write_text("\n".join(lines))
    rows = study(f"--text={file}", "--criteria=l2norm", "--uses=static")
    assert {r["use"] for r in rows} == {"reference", "static"}
    assert {r["text"] for r in rows} == {"notes.jsonl"}
    with pytest.raises(ValueError, match="use some of static,prompt,sequence,token"):
        study("--uses=tokens")
    with pytest.raises(ValueError, match="criterion='wanda' is unknown"):
        study("--criteria=wanda")


@pytest.mark.parametrize("protocol", ["all", "decode"])
def test_given_scores_meet_their_positions(protocol: str) -> None:
    given = module("given_scores").Given(Budget(neurons=0.25))
    model, _ = load_host("tiny:llama")
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    scores = torch.rand(2, 12, 3, 48)
    given.given = {"neurons": scores}
    first = 0 if protocol == "all" else 6
    with sparsify(model, given, "mask", protocol, prompt_length=7 if first else None) as session:
        session.on_decision = lambda kind, layer, keep, step: seen.append((kind, layer, keep))
        seen: list = []
        model(ids)
    seen = [s for s in seen if s[0] == "neurons"]
    assert [layer for _, layer, _ in seen] == [0, 1, 2]
    for _, layer, keep in seen:
        chosen = scores[:, first:, layer].topk(12).indices
        assert keep.sum(-1).eq(12).all()
        assert keep.gather(-1, chosen).all()
