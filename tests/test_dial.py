"""budget.max_ppl_increase: the least budget within a limit, found on validation text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_evaluate import settings, train_shadow

import gnomon
from cases import POLICIES, predictor
from gnomon.budget import Budget
from gnomon.data.sources import SyntheticText
from gnomon.evaluation import baseline, bench, dial, run
from gnomon.evaluation.results import read_results
from gnomon.policies import Dense, Griffin, Oracle
from gnomon.tiny import tiny_host
from scripts import call

ALLOW = Budget(max_ppl_increase=0.02)
TEXT = SyntheticText(block=48, tokens=192)
SIZES = {"num_hidden_layers": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def fresh() -> None:
    baseline.forget()
    bench.forget()
    run._last.clear()


def ratios(monkeypatch: pytest.MonkeyPatch, ratio) -> list[float]:
    """Replaces the measurement by ``ratio(density)``; returns the densities that are tried."""
    tried: list[float] = []

    def trial(bench, make, budget, setting):
        tried.append(setting)
        return dial.Trial(setting, ratio(setting), setting, setting, setting)

    monkeypatch.setattr(dial, "_try", trial)
    return tried


def found(budget: Budget = ALLOW, make=Oracle, **how):
    model, tokenizer = tiny_host("llama", **SIZES)
    return gnomon.find_budget(
        model, tokenizer, make, TEXT, budget, **({"protocol": "all", "steps": 5} | how)
    )


def test_halving_finds_the_least_density_within_the_limit(monkeypatch) -> None:
    tried = ratios(monkeypatch, lambda density: 1 + 0.1 * (1 - density))
    search = found(steps=7)
    assert search.budget == Budget(density=103 / 128)  # 1 + 0.1·(1 - d) <= 1.02 from d = 0.8 on
    assert tried[:3] == [0.5, 0.75, 0.875] and len(tried) == 7
    assert search.trial.setting == 103 / 128 and search.limit == pytest.approx(1.02)


def test_all_but_one_unit_is_tried_before_giving_up(monkeypatch) -> None:
    tried = ratios(monkeypatch, lambda density: 1.0 if density > 0.98 else 2.0)
    assert found(steps=3).budget.density == tried[-1] == 1 - 1 / 64
    ratios(monkeypatch, lambda density: 1.5)
    with pytest.raises(ValueError, match=r"max_ppl_increase=0.02 is not reached.*0.9844.*1.5000"):
        found(steps=3)


def test_the_other_fields_of_the_budget_stay(monkeypatch) -> None:
    ratios(monkeypatch, lambda density: 2 - density)
    budget = Budget(max_ppl_increase=0.3, heads=1.0, head_unit="group", floor=0.2)
    expected = Budget(density=0.75, heads=1.0, head_unit="group", floor=0.2)
    assert found(budget, steps=2).budget == expected


def test_the_found_budget_keeps_its_promise_on_the_validation_text() -> None:
    search = found()
    by_setting = sorted((t.setting, t.ratio, t.byte_density) for t in search.trials)
    assert search.trial.ratio <= 1.02
    assert all(t.ratio > 1.02 for t in search.trials if t.setting < search.budget.density)
    bytes_ = [b for _, _, b in by_setting]
    assert bytes_ == sorted(bytes_) and search.trial.byte_density in bytes_
    assert search.text["split"] == "validation" and search.text["tokens"] == 4 * 47


@pytest.mark.parametrize(
    "name", ["static", "shadow", "dejavu", "griffin-prompt", "cats", "teal", "skip-ffn"]
)
def test_any_policy_is_turned(name: str) -> None:
    model, tokenizer = tiny_host("llama", **SIZES)
    search = gnomon.find_budget(
        *(model, tokenizer, lambda b: POLICIES[name](model, b), TEXT),
        Budget(max_ppl_increase=0.05),
        prompt=24,
        steps=3,
    )
    assert search.trial.ratio <= 1.05
    policy = POLICIES[name](model, search.budget)
    with torch.no_grad(), gnomon.sparsify(model, policy, prompt_length=24):
        model(torch.zeros(1, 30, dtype=torch.long))


def test_refused_densities_count_as_too_low() -> None:
    """Layer 0 of a shadow predictor stays dense: below half of two layers nothing is left."""
    model, tokenizer = tiny_host("llama", **SIZES)
    made = predictor(model)
    search = gnomon.find_budget(
        *(model, tokenizer, lambda b: gnomon.policies.Shadow(made, b), TEXT),
        Budget(max_ppl_increase=9.0),
        protocol="all",
        steps=3,
    )
    assert search.budget.density == 0.625
    assert [t.setting for t in search.trials if t.refusal] == [0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_ppl_increase": 0.0}, "max_ppl_increase=0.0 is a relative increase above 0"),
        ({"max_ppl_increase": 0.1, "density": 0.5}, "exclude each other.*budget.density=null"),
        ({"max_ppl_increase": 0.1, "bytes": 0.5}, "exclude each other.*budget.bytes=null"),
        ({"max_ppl_increase": 0.1, "heads": 0.5, "neurons": 0.5}, "leave none to find"),
    ],
)
def test_bad_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


def test_a_budget_that_was_not_found_is_refused_everywhere() -> None:
    model, _ = tiny_host("llama", **SIZES)
    with (
        pytest.raises(ValueError, match="gnomon.find_budget"),
        gnomon.sparsify(model, Oracle(ALLOW)),
    ):
        pass
    with pytest.raises(ValueError, match="gnomon.find_budget"):
        POLICIES["skip-ffn"](model, ALLOW).bind(model)
    with pytest.raises(ValueError, match="max_ppl_increase is not set"):
        found(Budget(density=0.5))


def test_what_cannot_be_searched_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to find"):
        found(make=lambda b: Dense())
    with pytest.raises(ValueError, match="budget.heads=0.5: policy=griffin"):
        found(Budget(max_ppl_increase=0.1, heads=0.5), make=Griffin)
    model, tokenizer = tiny_host("llama", **SIZES)
    text = SyntheticText(block=48, tokens=192, heldout=0.0)
    with pytest.raises(ValueError, match="split 'validation' is empty under text.heldout=0"):
        gnomon.find_budget(model, tokenizer, Oracle, text, ALLOW)


# -- evaluate.py -----------------------------------------------------------------------------------

ASKED = {"_target_": "gnomon.budget.Budget", "max_ppl_increase": 0.02}
QUICK = {"measure__quality__generation__tokens": 0, "measure__quality__brackets": ["random"]}


def asked(tmp_path: Path, policy: str = "oracle", **changes) -> dict:
    return settings(tmp_path, policy, budget=dict(ASKED), **QUICK, **changes)


def test_a_run_searches_on_validation_and_reports_on_heldout(tmp_path, monkeypatch) -> None:
    passes: list[str] = []
    whole = bench.Bench._run
    monkeypatch.setattr(
        bench.Bench, "_run", lambda self, p: passes.append(self.blocks.split) or whole(self, p)
    )
    outcome = run.evaluate(asked(tmp_path), tmp_path / "run", "x")
    results = read_results(outcome.path)
    search = results["policy"]["params"]["search"]
    assert search["max_ppl_increase"] == 0.02 and search["text"]["split"] == "validation"
    assert search["found"] in search["trials"] and search["found"]["ratio"] <= 1.02
    assert passes.count("validation") == len(search["trials"])
    assert results["density"]["target"]["neurons"] == search["found"]["setting"]
    assert results["quality"]["texts"]["synthetic"]["split"] == "heldout"
    assert [b["policy"] for b in results["brackets"]] == ["random"]

    passes.clear()  # another limit over the same points: those are remembered
    config = asked(tmp_path)
    config["budget"]["max_ppl_increase"] = 0.5
    again = run.evaluate(config, tmp_path / "again", "x").results
    trials = again["policy"]["params"]["search"]["trials"]
    assert trials[0] == search["trials"][0]
    assert passes.count("validation") < len(trials)


def test_a_predictor_is_turned_too(tmp_path) -> None:
    train_shadow(tmp_path)
    config = asked(tmp_path, "shadow", policy__predictor="auto", validation={"steps": 3})
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert results["policy"]["params"]["search"]["found"]["ratio"] <= 1.02


def test_text_that_is_evaluated_is_never_searched(tmp_path) -> None:
    file = tmp_path / "text.jsonl"
    lines = [f"The river {word} stone and water." for word in ("holds", "turns", "finds") * 40]
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    text = {"_target_": "gnomon.data.sources.FileText", "path": str(file)}
    text |= {"block": 48, "tokens": 96, "batch": 2, "heldout": 0.4}
    with pytest.raises(ValueError, match=r"text.split=all evaluates.*validation.path=<file>"):
        config = asked(tmp_path, text=text | {"split": "auto"})
        run.evaluate(config, tmp_path / "run", "x")
    with pytest.raises(ValueError, match="is the evaluated text itself"):
        same = {"path": str(file)}
        config = asked(tmp_path, text=text | {"split": "auto"}, validation=same)
        run.evaluate(config, tmp_path / "run", "x")
    run.evaluate(asked(tmp_path, text=text | {"split": "heldout"}), tmp_path / "held", "x")
    other = tmp_path / "other.jsonl"
    other.write_text(file.read_text().replace("river", "island"))
    apart = {"path": str(other), "tokens": 48, "steps": 2}
    config = asked(tmp_path, text=text | {"split": "auto"}, validation=apart)
    search = run.evaluate(config, tmp_path / "other", "x").results["policy"]["params"]["search"]
    assert (search["text"]["name"], search["text"]["blocks"]) == ("other", 1)


def test_evaluate_py_finds_budgets_in_a_sweep(tmp_path) -> None:
    command = ["-m", "host=tiny", "text=synthetic"]
    command += ["text.block=48", "text.tokens=96", "protocol.prompt=24", "policy=random,oracle"]
    command += ["policy.predictor=null", "budget.density=null", "budget.max_ppl_increase=0.05"]
    command += ["validation.steps=3", "measure.quality.generation.tokens=0"]
    command += ["measure.quality.brackets=[]", f"paths.root={tmp_path}"]
    done = call("evaluate.py", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [read_results(p) for p in sorted(tmp_path.glob("runs/**/results.json"))]
    assert [r["policy"]["name"] for r in found] == ["random", "oracle"]
    assert all(r["policy"]["params"]["search"]["found"]["ratio"] <= 1.05 for r in found)
