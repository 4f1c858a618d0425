"""evaluate.py end to end on the tiny host: results, shared baselines, early errors, sweeps."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

import gnomon
from gnomon.data import hub
from gnomon.data.sources import FileText, SyntheticText, WikiText2
from gnomon.data.text import Text
from gnomon.evaluation import baseline, bench, log, run
from gnomon.evaluation.brackets import bracket_budget
from gnomon.evaluation.quality import Protocol
from gnomon.evaluation.results import read_results
from gnomon.evaluation.subject import (
    Found,
    describe_predictor,
    find,
    find_means,
    overlap,
    predictor_digest,
)
from gnomon.predictors.base import PredictorInfo
from gnomon.predictors.folder import write_folder
from gnomon.predictors.shadow import Shadow
from gnomon.predictors.static import Static as LearnedMask
from gnomon.tiny import tiny_host
from gnomon.tracking import folder_sha256
from scripts import call

ROOT = Path(__file__).resolve().parent.parent
_LEARNED = {"recall": 0.8, "mass": 0.9, "spearman": 0.6}
METRICS = {
    "density": {"heads": 0.5, "neurons": 0.5},
    **{kind: (_LEARNED | {"static": _LEARNED}) for kind in ("heads", "neurons")},
}


def settings(tmp_path: Path, policy: str = "oracle", **changes) -> dict:
    base = {
        "policy": {"name": policy, "refresh": None, "batch": "per_sequence", "kv": "keep"}
        | {"predictor": None, "params": {}},
        "budget": {"_target_": "gnomon.budget.Budget", "density": 0.5},
        "host": {"_target_": "gnomon.loading.load_host", "name": "tiny", "family": "llama"},
        "text": {"_target_": "gnomon.data.sources.SyntheticText", "block": 48, "tokens": 240}
        | {"batch": 2, "split": "auto"},
        "protocol": {"name": "decode", "prompt": 24},
        "measure": {
            "quality": {
                "_target_": "gnomon.evaluation.measure.Quality",
                "_convert_": "all",
                "brackets": ["dense_int8", "oracle", "static", "random"],
                "generation": {
                    "_target_": "gnomon.evaluation.measure.Continuations",
                    **{"tokens": 4, "prompts": 2, "prompt": 8},
                },
            }
        },
        "backend": "auto",
        "bytes": {"dtype": None},
        "paths": {"cache": str(tmp_path / "cache"), "predictors": str(tmp_path / "predictors")},
        "seed": 0,
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = base
        for key in parents:
            place = place[key]
        place[last] = value
    return copy.deepcopy(base)


def train_shadow(tmp_path: Path, **info) -> Path:
    """A predictor of the tiny host with random weights and means, as train.py would save it."""
    model, _ = tiny_host()
    spec = gnomon.describe(model)
    torch.manual_seed(0)
    predictor = Shadow.for_host(spec, hidden=8, rank=8)
    predictor.set_means(
        {"heads": torch.rand(spec.L, spec.H), "neurons": torch.rand(spec.L, spec.F)}
    )
    facts = PredictorInfo(
        host=spec.name, spec_hash=spec.hash, metrics=METRICS, created="2026-01-01"
    )
    predictor.info = replace(facts, **info)
    folder = tmp_path / "predictors" / spec.name / "shadow-1"
    write_folder(predictor, folder)
    return folder


@pytest.fixture(autouse=True)
def fresh() -> None:
    baseline.forget()
    bench.forget()
    run._last.clear()


def test_a_run_writes_valid_results_with_brackets_and_metrics(tmp_path):
    folder = train_shadow(tmp_path)
    config = settings(tmp_path, "shadow", policy__predictor="auto")
    outcome = run.evaluate(config, tmp_path / "run", "python evaluate.py x")
    results = read_results(outcome.path)
    assert results["policy"]["predictor"]["source"] == str(folder)
    assert results["policy"]["refresh"] == "token"
    assert results["protocol"] == {"name": "decode", "prompt": 24, "block": 48, "batch": 2}
    text = results["quality"]["texts"]["synthetic"]
    assert (text["tokens"], text["blocks"], text["split"]) == (5 * 24, 5, "heldout")
    assert text["ppl_ratio_ci"][0] <= text["ppl_ratio"] <= text["ppl_ratio_ci"][1]
    assert results["quality"]["generation"]["tokens"] == 4
    assert results["quality"]["predictor"]["recall"] == {"heads": 0.8, "neurons": 0.8}
    assert results["density"]["predictor_byte_share"] > 0
    assert len(results["density"]["per_layer"]["neurons"]) == 3
    assert [b["policy"] for b in results["brackets"]] == [
        "dense_int8",
        "oracle",
        "static",
        "random",
    ]
    assert outcome.ratio == text["ppl_ratio"]
    assert outcome.warning is None
    assert "warnings" not in results


def test_settings_of_a_measure_that_was_not_chosen_stay_behind(tmp_path):
    """experiment=compare says something of quality; measure=[tasks] leaves it out."""
    config = settings(tmp_path, "dense", measure__quality__brackets=[])
    config["measure"] |= {"tasks": {"brackets": []}, "speed": None}
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert results["quality"]["texts"] and "speed" not in results


def test_dense_has_ratio_one_and_everything_kept(tmp_path):
    config = settings(tmp_path, "dense", measure__quality__brackets=[])
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert results["quality"]["texts"]["synthetic"]["ppl_ratio"] == 1.0
    assert results["density"]["byte_density"] == 1.0
    assert results["quality"]["generation"]["agreement"] == 1.0
    assert "brackets" not in results
    assert "predictor" not in results["quality"]


def test_a_sweep_measures_host_baseline_and_brackets_once(tmp_path, monkeypatch):
    passes: list[str] = []
    whole = bench.Bench._run
    monkeypatch.setattr(
        bench.Bench, "_run", lambda self, policy: passes.append(policy.name) or whole(self, policy)
    )
    train_shadow(tmp_path)
    plan = {"measure__quality__generation__tokens": 0}
    names = ("shadow", "static", "oracle", "random")
    results = {}
    for name in names:
        predictor = "auto" if name in ("shadow", "static") else None
        config = settings(tmp_path, name, policy__predictor=predictor, **plan)
        results[name] = run.evaluate(config, tmp_path / name, "x").results
    assert sorted(passes) == sorted([*names, "dense_int8"])
    ratios = {n: r["quality"]["texts"]["synthetic"]["ppl_ratio"] for n, r in results.items()}
    brackets = {b["policy"]: b["quality"] for b in results["shadow"]["brackets"]}
    for name in ("static", "oracle", "random"):
        assert brackets[name]["texts"]["synthetic"]["ppl_ratio"] == ratios[name]
    assert "generation" not in results["shadow"]["quality"]


def test_static_bracket_is_left_out_without_any_predictor(tmp_path, caplog):
    results = run.evaluate(settings(tmp_path), tmp_path / "run", "x").results
    assert [b["policy"] for b in results["brackets"]] == ["dense_int8", "random"]
    assert "bracket `static` left out" in caplog.text
    assert ["bracket `static` left out" in message for message in results["warnings"]] == [True]


def test_a_bracket_that_cannot_meet_the_budget_is_left_out_and_recorded(tmp_path, monkeypatch):
    whole = bench.Bench.measure

    def refuse(message: str) -> None:
        def measure(self, policy, identity):
            if policy.name == "random":
                raise ValueError(message)
            return whole(self, policy, identity)

        monkeypatch.setattr(bench.Bench, "measure", measure)

    config = settings(tmp_path, measure__quality__brackets=["random", "dense_int8"])
    refuse("budget.bytes=0.1 cannot be reached by policy=random")
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert [b["policy"] for b in results["brackets"]] == ["dense_int8"]
    assert results["warnings"] == [
        "Bracket `random` left out: budget.bytes=0.1 cannot be reached by policy=random"
    ]
    refuse("means of heads have shape (1, 2)")
    with pytest.raises(ValueError, match="means of heads"):
        run.evaluate(config, tmp_path / "again", "x")
    assert not (tmp_path / "again").exists()


def test_a_bracket_that_is_spread_otherwise_is_recorded(tmp_path):
    train_shadow(tmp_path)
    config = settings(tmp_path, "static", policy__predictor="auto", budget__spread="hybrid")
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert [b["policy"] for b in results["brackets"]] == ["dense_int8", "oracle", "random"]
    assert [message.split("`")[1] for message in results["warnings"]] == ["oracle", "random"]
    assert all("budget.spread=hybrid" in message for message in results["warnings"])


def test_dense_int8_stands_beside_a_shared_batch(tmp_path):
    names = ["dense_int8", "random"]
    changes = {"policy__batch": "shared", "measure__quality__brackets": names}
    results = run.evaluate(settings(tmp_path, **changes), tmp_path / "run", "x").results
    assert [b["policy"] for b in results["brackets"]] == names


def test_byte_budget_is_recorded_and_met(tmp_path):
    config = settings(tmp_path, budget__density=None, budget__bytes=0.7)
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert results["density"]["target"]["bytes"] == 0.7
    assert results["density"]["target"]["heads"] == results["density"]["target"]["neurons"] < 1


def test_protocol_all_scores_every_target(tmp_path):
    config = settings(tmp_path, protocol={"name": "all", "prompt": None})
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert results["quality"]["texts"]["synthetic"]["tokens"] == 5 * 47
    assert "prompt" not in results["protocol"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy__name": "deja"}, r"policy='deja' is unknown; use one of .*dejavu"),
        ({"budget__density": 1.5}, r"budget.density=1.5 is outside"),
        ({"text__split": "test"}, r"text.split='test' is unknown"),
        ({"text__block": 24}, r"protocol.prompt=24 leaves no target in text.block=24"),
        ({"protocol": {"name": "x", "prompt": 1}}, r"protocol='x' is unknown"),
        ({"measure__quality__generation__prompt": 49}, r"generation.prompt=49 must be between"),
        ({"measure__quality__generation__tokens": 2000}, r"exceed the host's context of 1024"),
        ({"policy__name": "shadow", "policy__predictor": "auto"}, r"Train one: python train.py"),
        (
            {"policy__name": "shadow", "policy__predictor": "pretrained"},
            r"no shadow ships for host",
        ),
        ({"policy__name": "shadow", "policy__predictor": "no/such/dir"}, r"neither a folder nor"),
        ({"policy__params": {"rank": 3}}, r"policy=oracle has no rank"),
        ({"backend": "fast"}, r"backend='fast' is not available"),
        ({"measure__quality__brackets": ["best"]}, r"brackets='best' is unknown"),
    ],
)
def test_bad_input_is_named_before_anything_is_measured(tmp_path, changes, message):
    with pytest.raises(Exception, match=message):
        run.evaluate(settings(tmp_path, **changes), tmp_path / "run", "x")
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("cache/dense/*"))


def test_existing_results_are_refused_first(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(run, "open_bench", lambda *a, **k: pytest.fail("went on"))
    with pytest.raises(FileExistsError, match="never overwritten"):
        run.evaluate(settings(tmp_path), tmp_path, "x")
    assert (tmp_path / "results.json").read_text() == "{}"


def test_a_predictor_of_another_host_is_refused_by_name(tmp_path):
    folder = train_shadow(tmp_path)
    spec = gnomon.describe(tiny_host("llama", seed=1)[0])
    with pytest.raises(ValueError, match=r"tiny-llama-0.*tiny-llama-1|tiny-llama-1.*tiny-llama-0"):
        find("shadow", str(folder), tmp_path, spec)


def test_auto_and_the_bracket_pass_over_a_learned_fixed_mask(tmp_path):
    harvested, spec = train_shadow(tmp_path), gnomon.describe(tiny_host()[0])
    learned = LearnedMask.for_host(spec)
    learned.info = PredictorInfo(
        host=spec.name, spec_hash=spec.hash, objective="kl", created="2026-02-01"
    )
    folder = harvested.with_name("static-2")
    write_folder(learned, folder)
    root, means = tmp_path / "predictors", gnomon.load_predictor(harvested).means
    for policy in ("static", "glass", "core"):
        assert find(policy, "auto", root, spec).source == str(harvested)
    explicit = find("static", str(folder), root, spec)
    assert describe_predictor(explicit)["objective"] == "kl"
    for found in (Found(), explicit):
        bracket = find_means(found, root, spec)
        assert all(torch.equal(bracket[kind], means[kind]) for kind in means)
    with pytest.raises(ValueError, match="no predictor for host"):
        find("static", "auto", folder, spec)
    assert find_means(explicit, folder, spec) is None


@pytest.mark.parametrize(
    ("split", "target", "expected"),
    [
        ("auto", "gnomon.data.sources.EmbeddedText", "heldout"),
        ("auto", "gnomon.data.sources.FileText", "all"),
        ("auto", "gnomon.data.sources.WikiText2", "all"),
        ("train", "gnomon.data.sources.EmbeddedText", "train"),
        ("validation", "gnomon.data.sources.EmbeddedText", "validation"),
    ],
)
def test_split_auto(split, target, expected):
    assert run.choose_split(split, target) == expected


def opened(text: Text, split: str) -> bench.Bench:
    """A bench that overlap() can look at: only its blocks are real."""
    model, tokenizer = tiny_host()
    blocks = text.blocks(tokenizer, split, tokens=text.block)
    spec = gnomon.describe(model)
    return bench.Bench(model, tokenizer, spec, {}, blocks, Protocol("all"))


def trained_on(text: Text | None, name: str = "", text_digest: str = "abc") -> Found:
    """A predictor that was trained on a text, as a folder gives it back."""
    predictor = Shadow.for_host(gnomon.describe(tiny_host()[0]), hidden=8, rank=8)
    facts = text.facts("train", "validation") if text else {}
    predictor.info = PredictorInfo(
        text=text.name if text else name, text_digest=text_digest, text_split=facts
    )
    return Found(predictor, "p")


def synthetic(**changes) -> SyntheticText:
    return SyntheticText(**({"documents": 40, "block": 32, "tokens": 64} | changes))


@pytest.mark.parametrize(
    ("split", "said"),
    [("all", "flattered"), ("train", "flattered"), ("validation", "flattered"), ("heldout", None)],
)
def test_training_text_is_warned_about_unless_held_out(split, said):
    warning = overlap(opened(synthetic(), split), trained_on(synthetic()))
    assert said in warning if said else warning is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"seed": 1}, "seed 1 there and 0 here"), ({"heldout": 0.3}, "heldout 0.3 there and 0.1 here")]
    + [({"sentences": 9}, "fingerprint")],
)
def test_another_split_of_the_training_text_is_warned_about(changes, said):
    warning = overlap(opened(synthetic(), "heldout"), trained_on(synthetic(**changes)))
    assert "may have seen some" in warning and said in warning


def test_older_predictors_are_known_by_name_or_digest():
    bench_ = opened(synthetic(), "all")
    assert overlap(bench_, trained_on(None, name="other")) is None
    assert "flattered" in overlap(bench_, trained_on(None, name="synthetic"))
    same = bench_.blocks.digest
    assert "flattered" in overlap(bench_, trained_on(None, name="other", text_digest=same))
    held = opened(synthetic(), "heldout")
    assert "does not say" in overlap(held, trained_on(None, name="synthetic"))
    assert overlap(held, trained_on(None, name="other")) is None
    assert overlap(held, Found()) is None


def test_a_renamed_file_and_wikitext2_are_known_by_their_content(tmp_path, monkeypatch):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    for i, path in enumerate((one, two)):
        path.write_text("".join(f"line {n} of text {i}\n" for n in range(2000)))
    copy_ = tmp_path / "copy.txt"
    copy_.write_text(one.read_text())
    small = {"block": 32, "tokens": 64}
    renamed = opened(FileText(copy_, **small), "all")
    assert "flattered" in overlap(renamed, trained_on(FileText(one, **small)))
    assert overlap(renamed, trained_on(FileText(two, **small))) is None

    wiki = opened(WikiText2(one, **small), "all")
    assert "flattered" in overlap(wiki, trained_on(WikiText2(one, **small)))
    assert overlap(wiki, trained_on(WikiText2(two, **small))) is None
    assert overlap(wiki, trained_on(None, name="wikitext2")) is None

    rows = [{"text": line + "\n"} for line in one.read_text().splitlines()]
    monkeypatch.setattr(hub, "rows", lambda *a, **k: rows)
    trained = trained_on(WikiText2(**small))
    assert overlap(opened(WikiText2(**small), "all"), trained) is None
    assert "flattered" in overlap(opened(WikiText2(part="train", **small), "all"), trained)
    assert "parts" in overlap(opened(WikiText2(part="train", **small), "heldout"), trained)


def test_the_overlap_reaches_the_results(tmp_path):
    config = settings(tmp_path, "shadow", policy__predictor="auto", text__split="all")
    split = SyntheticText(block=48, tokens=240).facts("train", "validation")
    train_shadow(tmp_path, text="synthetic", text_split=split)
    config["measure"]["quality"]["brackets"] = []
    outcome = run.evaluate(config, tmp_path / "run", "x")
    assert read_results(outcome.path)["warnings"] == [outcome.warning]
    assert "the shadow predictor was trained on this text (synthetic)" in outcome.warning
    assert outcome.results["policy"]["predictor"]["text_split"] == split
    config["text"]["split"] = "heldout"
    assert "warnings" not in run.evaluate(config, tmp_path / "held", "x").results


def test_predictor_digest_sees_one_changed_bit():
    spec = gnomon.describe(tiny_host()[0])
    predictor = Shadow.for_host(spec, hidden=8, rank=8).quantize()
    before = predictor_digest(predictor)
    assert predictor_digest(predictor) == before
    predictor.means["heads"][0, 0] += 1
    assert predictor_digest(predictor) != before


class FakeRun:
    finished = False

    def finish(self) -> None:
        self.finished = True


def test_logging_records_metrics_brackets_and_the_predictor(tmp_path, monkeypatch):
    folder = train_shadow(tmp_path)
    config = settings(tmp_path, "shadow", policy__predictor="auto")
    results = run.evaluate(config, tmp_path / "run", "x").results
    assert results["policy"]["predictor"]["sha256"] == folder_sha256(folder)
    fake, used = FakeRun(), []
    monkeypatch.setattr(log, "wandb_run", lambda loggers: fake)
    monkeypatch.setattr(log, "use_predictor", lambda run, path, host: used.append((path, host)))
    log.log_run(CSVLogger(tmp_path, name="", version=""), config, results)
    assert used == [(folder, "tiny-llama-0")]
    assert fake.finished
    logged = (tmp_path / "metrics.csv").read_text()
    assert "eval/ppl_ratio" in logged
    assert "bracket/oracle/byte_density" in logged
    assert log.metrics(results)["eval/kl"] == results["quality"]["generation"]["kl"]


def test_brackets_take_a_spread_they_offer():
    budget = gnomon.Budget(density=0.5, spread="global")
    assert bracket_budget("static", budget) == budget
    assert bracket_budget("oracle", budget).spread in ("layer", "global")


@pytest.mark.slow
def test_script_runs_anywhere_and_ends_with_the_path_of_its_results(tmp_path):
    words = ["experiment=smoke_eval", "measure.quality.generation.tokens=0"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "GNOMON_ROOT": str(tmp_path / "outputs")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.rstrip().splitlines()[-1])
    results = read_results(path)
    assert results["command"].startswith("python evaluate.py experiment=smoke_eval measure.quality")
    assert "(random)" in done.stdout
    assert (path.parent / "layers.png").exists()


def test_sweep_writes_one_table_and_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("GNOMON_ROOT", str(tmp_path / "outputs"))
    train_shadow(tmp_path / "outputs")
    done = call(
        "evaluate.py",
        "-m",
        "experiment=smoke_eval",
        "policy=shadow,random",
        "budget.density=0.75,0.9",
        "measure.quality.generation.tokens=0",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.rstrip().splitlines()[-1]).parent
    assert {p.name for p in folder.glob("sweep.*")} == {"sweep.csv", "sweep.md", "sweep.png"}
    table = (folder / "sweep.csv").read_text().splitlines()
    assert len(table) == 1 + 2 + 2 + 1  # shadow, random (brackets give way), dense int8
    assert len(list((tmp_path / "outputs" / "cache" / "dense").iterdir())) == 1
    assert len(list(folder.glob("*/results.json"))) == 4
    assert json.loads((folder / "0" / "results.json").read_text())["policy"]["name"] == "shadow"


@pytest.mark.parametrize(("field", "value"), [("criterion", "fisher"), ("rank", 16)])
def test_a_predictor_other_than_stated_is_refused(tmp_path, field, value):
    folder = train_shadow(tmp_path, criterion="plainact")
    wanted = settings(tmp_path, "shadow", policy__predictor=str(folder))
    wanted["policy"][field] = value
    with pytest.raises(ValueError, match=f"{field}={value!r} was asked for"):
        run.evaluate(wanted, tmp_path / "run", "test")
