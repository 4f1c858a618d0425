"""measure=[speed]: real steps of a tiny host on the CPU; structure, byte identities, reports."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from test_evaluate import settings, train_shadow
from torch import Tensor

from cases import POLICIES, THRESHOLDS, predictor
from gnomon import policies
from gnomon.accounting import HostBytes, account, expected_density
from gnomon.budget import Budget
from gnomon.evaluation import baseline, bench, decoding, run, speed
from gnomon.evaluation.decoding import Cell, decode_row, open_dense
from gnomon.evaluation.generic import agree_generic
from gnomon.evaluation.hf_decode import hf_decode, hf_mode
from gnomon.evaluation.report import show_run, show_sweep
from gnomon.evaluation.results import commit, read_results
from gnomon.evaluation.speed import prompts
from gnomon.evaluation.speed_tables import LIMITS, at_quality, markdown_speed, merge_speed
from gnomon.evaluation.stopwatch import Times, interleave
from gnomon.evaluation.traffic import Kept, observe, step_traffic
from gnomon.host import UnsupportedHostError, describe
from gnomon.tiny import tiny_host

CPU = torch.device("cpu")
PLAN = {"_target_": "gnomon.evaluation.speed.Speed", "batch": [1, 2], "context": 64}
PLAN |= {"steps": 50, "warmup": 2, "check_steps": 6, "hf": "eager"}
KEYS = {
    *("device", "engine", "batch", "context", "ms_dense", "ms_sparse", "speedup"),
    *("speedup_ideal", "gbps_dense", "gbps_sparse", "ms_hf", "ttft_ms", "peak_bytes", "agreement"),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    baseline.forget()
    bench.forget()
    speed.forget()
    run._last.clear()


def timed_settings(tmp_path: Path, policy: str = "shadow", **changes) -> dict:
    needs = policy in ("shadow", "static")
    base = {"policy__predictor": "auto" if needs else None, "measure": {"speed": dict(PLAN)}}
    return settings(tmp_path, policy, **(base | changes))


def cell_of(model, policy, batch: int = 1, context: int = 64) -> tuple[dict, Kept]:
    cell = Cell(batch, context, 50, 2, 6)
    ids = prompts(torch.randint(0, 250, (2, 60)), batch, cell.prompt)
    dense = open_dense(model, ids, cell)
    try:
        return decode_row(model, policy, dense, ids, cell)
    finally:
        dense.engine.close()


def test_a_run_writes_a_row_for_every_batch(tmp_path, capsys):
    train_shadow(tmp_path)
    outcome = run.evaluate(timed_settings(tmp_path), tmp_path / "run", "x")
    results = read_results(outcome.path)
    assert [row["batch"] for row in results["speed"]] == [1, 2]
    for row in results["speed"]:
        assert set(row) >= KEYS
        assert (row["engine"], row["backend"], row["context"]) == ("lean", "torch", 64)
        assert row["speedup"] == pytest.approx(row["ms_dense"] / row["ms_sparse"])
        fastest = min(row["ms_dense"], row["ms_hf"])
        assert row["speedup_fastest"] == pytest.approx(fastest / row["ms_sparse"])
        assert row["ms_dense_p95"] >= row["ms_dense"]
        assert row["agreement"]["sets"] == 1
        assert row["agreement"]["logits_rms"] < 1e-5
        assert row["gbps_sparse"] == pytest.approx(row["bytes_sparse"] / row["ms_sparse"] / 1e6)
    assert results["density"]["neurons"] == pytest.approx(0.5)
    assert results["backend"] == "torch"
    assert "quality" not in results
    show_run(results, tmp_path)
    printed = capsys.readouterr().out
    assert "speed-up" in printed
    assert "ideal" in printed
    assert "ppl" not in printed


def test_the_model_is_bit_identical_afterwards(tiny_llama):
    model, _ = tiny_llama
    before = {name: p.clone() for name, p in model.named_parameters()}
    cell_of(model, POLICIES["shadow"](model, Budget(density=0.5)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("name", ["static", "shadow", "dejavu", "shadow-prompt", "random"])
def test_density_ideal_and_agreement_belong_to_the_policy(tiny_llama, name):
    model, _ = tiny_llama
    row, kept = cell_of(model, POLICIES[name](model, Budget(density=0.5)), batch=2)
    assert kept.each.neurons == pytest.approx(0.5)
    assert kept.union.neurons >= kept.each.neurons - 1e-6
    assert row["speedup_ideal"] == pytest.approx(row["bytes_dense"] / row["bytes_sparse"])
    assert row["agreement"]["sets"] == 1
    assert row["peak_bytes"] > 0
    assert row["ttft_ms"] > 0


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_are_timed_in_the_engine(name, batch, tiny_llama):
    model, _ = tiny_llama
    policy = POLICIES[name](model, Budget(density=0.5))
    row, kept = cell_of(model, policy, batch)
    assert row["engine"] == "lean"
    assert row["agreement"]["sets"] == 1
    assert row["agreement"]["logits_rms"] < 1e-5
    read = policy.fractions(kept.union)
    some = step_traffic(policy.bytes, kept, context=64, batch=batch, read=read)
    assert row["bytes_sparse"] == pytest.approx(some.total + policy.predictor_bytes)
    assert row["bytes_sparse"] < row["bytes_dense"]
    assert (read["gate"] < 1) == (name == "teal")


def test_dense_int8_is_timed_on_int8_weights(tiny_llama):
    row, kept = cell_of(tiny_llama[0], policies.DenseInt8())
    assert kept == Kept.all()
    assert row["bytes_sparse"] < 0.6 * row["bytes_dense"]
    assert 1e-5 < row["agreement"]["logits_rms"] < 0.1  # other scales than under mask


@pytest.mark.parametrize("name", ["shadow", "static", "dejavu"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bytes_of_a_single_row_are_the_reference_accounting(name, family):
    model, _ = tiny_host(family)
    policy = POLICIES[name](model, Budget(heads=0.5, neurons=0.75))
    policy.bind(model)
    aimed = expected_density(policy, policy.resolved)
    kept = Kept(aimed, aimed)
    found = step_traffic(policy.bytes, kept, context=300, predictor=policy.predictor_bytes)
    expected = account(policy, aimed, context=300)
    if policy.refresh == "static":
        found = step_traffic(policy.bytes, kept, context=300)
    assert found.total == pytest.approx(expected.sparse_bytes)
    assert step_traffic(policy.bytes, Kept.all(), context=300).total == expected.dense_bytes


def test_a_batch_reads_weights_once_and_every_rows_cache(tiny_llama):
    host = HostBytes.of(tiny_llama[0], describe(tiny_llama[0]))
    one = step_traffic(host, Kept.all(), context=100)
    four = step_traffic(host, Kept.all(), context=100, batch=4)
    assert (four.weights, four.cache) == (one.weights, 4 * one.cache)
    int8 = step_traffic(host, Kept.all(), context=100, int8=True)
    assert int8.weights < one.weights / 2
    assert int8.cache == one.cache


def test_the_union_is_what_any_row_keeps(tiny_llama):
    model, _ = tiny_llama
    spec = describe(model)
    policy = policies.Static(predictor(model), Budget(density=0.5))
    kept = observe(model, policy, spec, torch.randint(0, 250, (3, 20)), 8)
    assert kept.union.neurons == pytest.approx(kept.each.neurons)  # one choice for all rows
    policy = POLICIES["shadow"](model, Budget(density=0.5))
    kept = observe(model, policy, spec, torch.randint(0, 250, (3, 20)), 8)
    assert 0.5 < kept.union.neurons <= 1


def test_contenders_take_turns_and_change_places():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = interleave(steps, 3, 1, CPU)
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [len(times[name].ms) for name in "ab"] == [3, 3]
    assert Times((1.0, 2.0, 9.0)).median == 2


def test_the_middle_step_attends_to_the_context(tiny_llama, monkeypatch):
    seen: dict[str, list[int]] = {}

    def watch(steps, rounds, warmup, device):
        engines = {name: step.__self__ for name, step in steps.items()}

        def noted(name: str) -> None:
            engines[name].step()
            seen.setdefault(name, []).append(int(engines[name]._cache.position[0]))

        return interleave({n: lambda n=n: noted(n) for n in steps}, rounds, warmup, device)

    monkeypatch.setattr(decoding, "interleave", watch)
    cell_of(tiny_llama[0], POLICIES["static"](tiny_llama[0], Budget(density=0.5)), context=70)
    assert set(seen) == {"dense", "sparse"}
    assert seen["dense"] == seen["sparse"]
    assert sorted(seen["dense"][2:])[(50 - 1) // 2] == 70


def test_prompts_are_running_text_that_starts_again():
    ids = torch.arange(12).view(3, 4)
    assert prompts(ids, 2, 8).tolist() == [list(range(8)), [*range(6, 12), 0, 1]]
    assert prompts(ids, 1, 14).tolist() == [[*range(12), 0, 1]]


def test_hugging_face_decode_is_timed(tiny_llama):
    ids = torch.randint(0, 250, (2, 9))
    times = hf_decode(tiny_llama[0], ids, 5, 2, "eager")
    assert len(times.ms) == 5
    assert min(times.ms) > 0
    assert (hf_mode("auto", CPU), hf_mode("auto", torch.device("cuda"))) == ("eager", "compiled")


def test_a_host_without_an_engine_is_timed_on_the_generic_path(tmp_path, monkeypatch):
    train_shadow(tmp_path)

    def refuse(*args, **kwargs):
        raise UnsupportedHostError("the step of this host cannot be expressed")

    monkeypatch.setattr(speed, "open_dense", refuse)
    config = timed_settings(tmp_path, measure={"speed": PLAN | {"batch": 1}})
    results = run.evaluate(config, tmp_path / "run", "x").results
    row = results["speed"][0]
    assert row["engine"] == "generic"
    assert row["agreement"]["sets"] == 1
    assert row["agreement"]["logits_rms"] < 1e-4
    assert row["speedup"] > 0
    assert "generic path" in " ".join(results["warnings"])


def test_the_generic_agreement_sees_a_wrong_backend(tiny_llama, monkeypatch):
    model, _ = tiny_llama
    policy = POLICIES["shadow"](model, Budget(density=0.5))
    ids = torch.randint(0, 250, (1, 20))
    whole = policy.scores

    def scores(kind, layer, seen) -> Tensor:
        found = whole(kind, layer, seen)
        return -found if backend["now"] != "mask" else found

    import gnomon

    backend, real = {"now": ""}, gnomon.sparsify

    def noting(*args, **kwargs):
        backend["now"] = kwargs["backend"]
        return real(*args, **kwargs)

    monkeypatch.setattr(gnomon, "sparsify", noting)
    monkeypatch.setattr(policy, "scores", scores)
    assert agree_generic(model, policy, ids, 6, "torch")["sets"] < 0.5


def test_the_oracle_has_no_speed(tmp_path):
    with pytest.raises(ValueError, match="policy=oracle exists under backend=mask alone"):
        run.evaluate(timed_settings(tmp_path, "oracle"), tmp_path / "a", "x")
    both = settings(tmp_path, "oracle", measure__quality__brackets=[])["measure"]
    both["quality"]["generation"]["tokens"] = 0
    config = timed_settings(tmp_path, "oracle", measure=both | {"speed": PLAN})
    results = run.evaluate(config, tmp_path / "b", "x").results
    assert "speed" not in results
    assert any("never has a speed" in message for message in results["warnings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 49}, r"speed.steps=49: use 50 or more"),
        ({"batch": 0}, r"speed.batch=0: use 1 or more"),
        ({"batch": []}, r"name nothing to time"),
        ({"context": 20}, r"speed.context=20 leaves no prompt .* use a context of \d+ or more"),
        ({"context": 1024}, r"the host's context is 1024: lower speed.context to 999"),
        ({"hf": "fast"}, r"speed.hf='fast' is unknown; use one of auto, compiled"),
    ],
)
def test_bad_settings_are_named_before_anything_is_timed(tmp_path, monkeypatch, changes, message):
    train_shadow(tmp_path)
    monkeypatch.setattr(speed, "open_dense", lambda *a, **k: pytest.fail("went on"))
    config = timed_settings(tmp_path, measure={"speed": PLAN | changes})
    with pytest.raises(ValueError, match=message):
        run.evaluate(config, tmp_path / "run", "x")


def test_a_sweep_quotes_the_speed_up_at_a_quality(tmp_path, capsys):
    train_shadow(tmp_path)
    results = run.evaluate(timed_settings(tmp_path), tmp_path / "run", "x").results
    for number, (ratio, gain) in enumerate([(1.02, 1.3), (1.04, 1.6), (1.3, 2.5)]):
        folder = tmp_path / "sweep" / str(number)
        (folder / ".hydra").mkdir(parents=True)
        text = {"tokens": 9, "ppl_dense": 9.0, "ppl_sparse": 9 * ratio, "ppl_ratio": ratio}
        rows = [row | {"speedup_fastest": gain} for row in results["speed"]]
        made = results | {"quality": {"texts": {"wiki": text}}, "speed": rows}
        (folder / "results.json").write_text(json.dumps(made))
    show_sweep(tmp_path / "sweep")
    assert "speed-up" in capsys.readouterr().out
    text = (tmp_path / "sweep" / "speed.md").read_text()
    assert "| shadow | 1 | 1.30× | 1.60× | 1.60× |" in text
    assert (tmp_path / "sweep" / "speed.png").read_bytes()[:4] == b"\x89PNG"
    table = list(csv.DictReader((tmp_path / "sweep" / "speed.csv").open()))
    assert len(table) == 6
    assert all(float(row["speedup_ideal"]) > 1 for row in table)


def test_speed_tables_without_quality(tmp_path):
    train_shadow(tmp_path)
    results = run.evaluate(timed_settings(tmp_path), tmp_path / "run", "x").results
    rows = merge_speed([results])
    assert at_quality(rows) == []
    text = markdown_speed(rows)
    assert "Speed-up at" not in text
    assert "ratio" not in text.splitlines()[2]
    assert LIMITS == (1.03, 1.05, 1.10)


def test_the_commit_may_be_told(monkeypatch):
    commit.cache_clear()
    monkeypatch.setenv("GNOMON_COMMIT", "abc123")
    assert commit() == "abc123"
    commit.cache_clear()
