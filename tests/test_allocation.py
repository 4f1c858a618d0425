"""spread=calibrated: units per layer by measured sensitivity, under unit and byte budgets."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from test_backends import assert_same, steps, text

import gnomon
from cases import POLICIES, calibration, predictor
from gnomon.accounting import account, expected_density
from gnomon.allocation import Sensitivity, Tilt, allocate, convex_hull, level, sigmoid
from gnomon.budget import Budget, layer_counts
from gnomon.calibration import measure
from gnomon.engine.agreement import agree
from gnomon.engine.decide import Fixed, Fused, PerToken
from gnomon.engine.engine import Engine
from gnomon.evaluation.results import read_results
from gnomon.host import KINDS, describe
from gnomon.policies import POLICIES as CLASSES
from gnomon.policies import SkipSublayers, Static, Teal, build_policy
from gnomon.policies.oracle import Oracle
from gnomon.predictors.calibration import Calibration
from gnomon.predictors.folder import load_predictor, write_folder
from gnomon.sensitivity import ranking
from gnomon.tiny import tiny_host
from scripts import call

# The worked example of docs/budget.md: L=2, H=4, F=8. Layer 1 loses three times as much.
EXAMPLE = Sensitivity(
    "cett", (0.0, 0.5), ((1.0, 0.25), (3.0, 0.75)), ((1.0, 0.25), (3.0, 0.75)), source="by hand"
)
OFFERING = ["oracle", "random", "static", "shadow", "dejavu", "griffin-prompt", "glass-prompt"]
WRAPPED = ["core-of-shadow", "fallback-of-shadow", "shadow-prompt", "shadow-shared"]


def host(**sizes):
    model, tokenizer = tiny_host(
        "llama", **({"num_hidden_layers": 2, "intermediate_size": 8} | sizes)
    )
    return model, describe(model), tokenizer


def calibrated(**fields) -> Budget:
    return Budget(spread="calibrated", **({"sensitivity": EXAMPLE} | fields))


def measured(model, how: str = "cett", **options) -> Sensitivity:
    spec = describe(model)
    made = Calibration.for_host(spec, how, **options)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(9))
    measure(made, model, spec, ids)
    return made.sensitivity


def test_worked_example() -> None:
    """A neuron of layer 1 saves 9/16 below four and 3/16 above; one of layer 0 3/16 and 1/16."""
    _, spec, _ = host()
    both = [True, True]
    for density, expected in ((0.25, [1, 3]), (0.5, [4, 4]), (0.625, [4, 6]), (0.75, [4, 8])):
        assert layer_counts(calibrated(neurons=density), spec, "neurons", both) == expected
    assert layer_counts(calibrated(heads=0.5), spec, "heads", both) == [2, 2]
    assert layer_counts(calibrated(heads=0.75), spec, "heads", both) == [2, 4]
    assert layer_counts(calibrated(heads=0.5, head_unit="group"), spec, "heads", both) == [1, 1]
    assert layer_counts(calibrated(neurons=0.75), spec, "neurons", [False, True]) == [8, 4]
    with pytest.raises(ValueError, match=r"budget.neurons=0.5 keeps no unit"):
        layer_counts(calibrated(neurons=0.5), spec, "neurons", [False, True])


@pytest.mark.parametrize("total", [3, 7, 24, 47, 48, 100])
def test_a_tilt_spends_the_budget_and_serves_every_density(total: int) -> None:
    tilt, decided = Tilt((), (5.0, -1.0, 0.0, 2.0)), [False, True, True, True]
    counts = tilt.counts("neurons", 16, total, decided)
    assert counts[0] == 16 and sum(counts[1:]) == min(total, 48) and min(counts) >= 1
    assert counts[1] <= counts[2] <= counts[3] <= 16
    if total == 24:  # sigmoid(tau + tilt) of the three, at a mean of a half
        shares = [sigmoid(t + level(np.array([-1.0, 0.0, 2.0]), 0.5)) for t in (-1.0, 0.0, 2.0)]
        assert sum(shares) / 3 == pytest.approx(0.5)
        assert [abs(k - 16 * s) < 1 for k, s in zip(counts[1:], shares, strict=True)] == [True] * 3
    even = Tilt((), (0.0,) * 4).counts("neurons", 16, total, decided)
    assert max(even[1:]) - min(even[1:]) <= 1


@pytest.mark.parametrize("target", [0.97, 0.94])
@pytest.mark.parametrize("how", ["alone", "fallback", "skip"])
def test_byte_budgets_are_met_under_a_learned_spread(how: str, target: float) -> None:
    model, _ = tiny_host()
    made = predictor(model, "prior")
    made.tilt_neurons.data.copy_(torch.tensor([0.0, -2.0, 9.0]))
    policy = CLASSES["prior"](made, Budget(bytes=target, spread="learned"))
    if how == "fallback":
        policy = CLASSES["dense_fallback"](policy, above=0.7)
    elif how == "skip":
        policy = SkipSublayers(layers=[1], what="ffn", inner=policy)
    policy.bind(model)
    aimed = expected_density(policy, policy.resolved)
    found = account(policy, aimed).byte_density
    assert target - 0.01 <= found <= target + 0.003  # below where a layer falls back at once


def test_a_spread_that_was_never_learned_is_refused() -> None:
    model, _ = tiny_host()
    for kind in ("shadow", "dejavu", "sketch", "prior"):
        with pytest.raises(ValueError, match=f"this {kind} predictor holds no spread"):
            build_policy(kind, Budget(neurons=0.5, spread="learned"), predictor(model, kind))
    for make in (CLASSES["griffin"], SkipSublayers):
        with pytest.raises(ValueError, match="does not offer budget.spread='learned'"):
            make(Budget(neurons=0.5, spread="learned"))
    with pytest.raises(ValueError, match="policy=shadow needs a Shadow predictor, got DejaVu"):
        CLASSES["shadow"](predictor(model, "dejavu"), Budget(neurons=0.5, spread="learned"))
    with pytest.raises(ValueError, match=r"budget.tilt is None"):
        layer_counts(Budget(neurons=0.5, spread="learned"), describe(model), "neurons", [True] * 2)


def test_hull_is_convex_and_below() -> None:
    x = np.array([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    y = np.array([1, 0.9, 0.3, 0.35, 0.0, 0.0])
    hull = convex_hull(x, y)
    assert (hull <= y + 1e-12).all() and (np.diff(hull, 2) >= -1e-12).all()
    np.testing.assert_allclose(hull, [1, 0.65, 0.3, 0.15, 0, 0])


@pytest.mark.parametrize("total", range(3, 13))
def test_greedy_equals_brute_force(total: int) -> None:
    draw = np.random.default_rng(total)
    gains = -np.sort(-draw.random((3, 4)), axis=1)
    best = max(
        sum(row[:k].sum() for row, k in zip(gains, counts, strict=True))
        for counts in itertools.product(range(1, 5), repeat=3)
        if sum(counts) == total
    )
    found = allocate(gains, total)
    assert sum(found) == total and min(found) >= 1
    kept = sum(row[:k].sum() for row, k in zip(gains, found, strict=True))
    assert kept == pytest.approx(best)


@pytest.mark.parametrize("how", ["cett", "loss"])
def test_measured_errors_fall_with_density(how: str) -> None:
    model, spec, _ = host(num_hidden_layers=3, intermediate_size=32)
    found = measured(model, how, grid=(0.25, 0.5, 0.75))
    for kind in KINDS:
        rows = np.array(getattr(found, kind))
        assert rows.shape == (3, 4) and (np.diff(rows) <= 1e-6).all() and (rows >= 0).all()
        if how == "cett":
            np.testing.assert_allclose(rows[:, 0], 1, rtol=1e-5)


def test_cett_is_its_formula() -> None:
    model, spec, _ = host(intermediate_size=32)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(9))
    taken = []
    down = model.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    with torch.no_grad():
        model(ids)
        h, w = taken[0], down.weight
        keep = (h.abs() * w.norm(dim=0)).topk(8).indices
        rest = h.clone().scatter_(-1, keep, 0.0)
        expected = ((rest @ w.T).norm(dim=-1) / (h @ w.T).norm(dim=-1)).mean()
    hook.remove()
    assert measured(model, grid=(0.25,)).neurons[1][1] == pytest.approx(float(expected), rel=1e-5)


def test_loss_is_the_divergence_when_one_layer_is_sparse() -> None:
    model, spec, _ = host(intermediate_size=32)
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(9))
    oracle = Oracle(Budget(neurons=0.5))
    oracle.bind(model, spec)
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        weights = oracle._weights[1]

        def mask(_, args):
            return (args[0] * (ranking("neurons", args[0], weights) < 16),)

        hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(mask)
        sparse = model(ids).logits.log_softmax(-1)
        hook.remove()
    expected = float((dense.exp() * (dense - sparse)).sum(-1).mean())
    found = measured(model, "loss", grid=(0.5,), sensitivity_tokens=32).neurons[1][1]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", OFFERING)
def test_density_is_met_and_one_is_dense(name: str) -> None:
    model, spec, _ = host(num_hidden_layers=4, intermediate_size=64)
    table = measured(model)
    how = {"prompt_length": 8} if "prompt" in name else {"protocol": "all"}
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    policy = POLICIES[name](model, calibrated(density=0.5, sensitivity=table))
    with torch.no_grad():
        dense = model(ids).logits
        with gnomon.sparsify(model, policy, **how) as session:
            model(ids)
            density = session.density()
        whole = POLICIES[name](model, calibrated(density=1.0, sensitivity=table))
        with gnomon.sparsify(model, whole, **how):
            assert torch.equal(model(ids).logits, dense)
    assert density.neurons == pytest.approx(0.5, abs=1e-6)
    rows = density.per_layer["neurons"]
    assert len(set(rows)) > 1
    assert rows == pytest.approx([policy.kept("neurons", i) / 64 for i in range(4)])
    if "heads" in policy.kinds:
        assert density.heads == pytest.approx(0.5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", [*OFFERING[1:], *WRAPPED])
def test_compute_backends_equal_mask(name: str, backend: str) -> None:
    model, _, _ = host(num_hidden_layers=3, intermediate_size=32)
    budget = calibrated(density=0.6, sensitivity=measured(model))
    forced = text(2, more=1 if backend == "torch" else 0)
    masked = steps(model, POLICIES[name](model, budget), "mask", forced)
    assert_same(steps(model, POLICIES[name](model, budget), backend, forced), masked)


DECIDERS = {"shadow": Fused, "dejavu": Fused, "random": PerToken, "static": Fixed}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", [*DECIDERS, "griffin-prompt"])
def test_the_decode_engine_agrees(name: str, rows: int) -> None:
    model, _, _ = host(num_hidden_layers=4, intermediate_size=64)
    policy = POLICIES[name](model, calibrated(density=0.6, sensitivity=measured(model)))
    ids = torch.randint(0, 256, (rows, 18), generator=torch.Generator().manual_seed(0))
    with Engine(model, policy, batch=rows, context=64) as engine:
        assert type(engine.decider) is DECIDERS.get(name, Fixed)
        found = agree(engine, model, policy, ids, 8)
    assert found["sets"] == 1 and found["top1"] == 1 and found["logits_rms"] < 1e-4


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oracle", "static", "shadow", "dejavu", "griffin-prompt"])
def test_byte_budgets_are_met_by_heads_and_neurons_together(name: str) -> None:
    model, spec, _ = host(hidden_size=64, intermediate_size=256, num_hidden_layers=6)
    policy = POLICIES[name](model, calibrated(bytes=0.9, sensitivity=measured(model)))
    how = {"prompt_length": 8} if "prompt" in name else {"protocol": "all"}
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), gnomon.sparsify(model, policy, **how) as session:
        model(ids)
    assert account(policy, session.density()).byte_density == pytest.approx(0.9, abs=0.03)
    for kind in KINDS:
        total = round(policy.resolved.target(kind) * spec.units(kind) * spec.L)
        assert sum(policy.counts[kind]) == total


def test_a_byte_goes_where_it_saves_most() -> None:
    """With neurons that cost nothing to skip they go first; with heads, heads."""
    model, spec, _ = host(intermediate_size=64)
    steep, flat = ((9.0, 5.0), (9.0, 5.0)), ((1e-6, 1e-7), (1e-6, 1e-7))
    means = {k: torch.rand(spec.L, spec.units(k)) for k in KINDS}
    found = {}
    for name, rows in (("neurons", (steep, flat)), ("heads", (flat, steep))):
        table = Sensitivity("loss", (0.0, 0.5), *rows)
        policy = Static(means, calibrated(bytes=0.9, sensitivity=table))
        policy.bind(model, spec)
        found[name] = policy.resolved
    assert found["neurons"].target("heads") == 1.0 > found["neurons"].target("neurons")
    assert found["heads"].target("neurons") > 0.9 > found["heads"].target("heads")


def test_a_given_kind_stays_and_the_impossible_is_said() -> None:
    model, spec, _ = host(intermediate_size=64)
    means = {k: torch.rand(spec.L, spec.units(k)) for k in KINDS}
    policy = Static(means, calibrated(bytes=0.9, heads=1.0))
    policy.bind(model, spec)
    assert policy.resolved.target("heads") == 1.0 > policy.resolved.target("neurons")
    with pytest.raises(ValueError, match="budget.bytes=0.05 cannot be reached"):
        Static(means, calibrated(bytes=0.05)).bind(model, spec)


# -- errors and folders ----------------------------------------------------------------------------


def test_what_is_missing_or_foreign_is_named() -> None:
    model, spec, _ = host()
    with pytest.raises(ValueError, match="budget.sensitivity=None.*predictor=calibration"):
        Oracle(Budget(density=0.5, spread="calibrated")).bind(model)
    other, _, _ = host(num_hidden_layers=3)
    with pytest.raises(ValueError, match="measured on a host of 2 layers"):
        Oracle(calibrated(density=0.5)).bind(other)
    with pytest.raises(ValueError, match=r"policy=teal does not offer budget.spread='calibrated'"):
        Teal(calibration(model), calibrated(density=0.5))
    with pytest.raises(ValueError, match=r"policy=skip_sublayers does not offer budget.spread"):
        SkipSublayers(calibrated(density=0.5))
    with pytest.raises(ValueError, match="holds no sensitivities.*predictor.sensitivity=loss"):
        calibration(model).sensitivity  # noqa: B018
    with pytest.raises(ValueError, match="predictor.sensitivity='size'"):
        Calibration.for_host(spec, "size")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"predictor.grid=\[0.5, 0.2\]"):
        Calibration.for_host(spec, "cett", grid=(0.5, 0.2))
    with pytest.raises(ValueError, match="sensitivity of heads has shape"):
        Sensitivity("cett", (0.0, 0.5), ((1.0,),), ((1.0, 0.5),))


def test_every_policy_says_whether_it_offers_calibrated() -> None:
    offering = {name for name, cls in CLASSES.items() if "calibrated" in cls.spreads}
    learned = {"shadow", "dejavu", "sketch", "prior"}
    assert offering == {"oracle", "random", "static", "griffin", "glass"} | learned


def test_a_folder_keeps_them_and_older_ones_still_load(tmp_path: Path) -> None:
    model, spec, _ = host(intermediate_size=32)
    for how in ("cett", None):
        made = Calibration.for_host(spec, how)  # type: ignore[arg-type]
        measure(made, model, spec, torch.randint(0, 256, (4, 16)))
        write_folder(made, tmp_path / str(how))
        back = load_predictor(tmp_path / str(how))
        assert isinstance(back, Calibration)
        assert how is None or back.sensitivity == made.sensitivity
        assert ("sensitivity" in back.params) is (how is not None)


def test_train_and_evaluate_end_to_end(tmp_path: Path) -> None:
    small = ["host=tiny", "text=synthetic", "text.block=48", f"paths.root={tmp_path}"]

    def run(script: str, *words: str) -> Path:
        return call(script, *small, *words, cwd=tmp_path).last

    small_pass = ["text.tokens=2304", "predictor.sensitivity_tokens=96", "predictor.grid=[0.5]"]
    run("train.py", "predictor=calibration", *small_pass, "predictor.sensitivity=loss")
    quick = ["text.tokens=96", "protocol.prompt=24", "measure.quality.generation.tokens=0"]
    quick += ["policy=static", "policy.predictor=auto", "budget.density=null"]
    quick += ["budget.spread=calibrated", "budget.heads=1"]
    quick += ["measure.quality.brackets=[oracle,random]"]
    results = read_results(run("evaluate.py", *quick, "budget.bytes=0.9"))
    assert results["policy"]["params"]["sensitivity"]["measure"] == "loss"
    assert results["density"]["byte_density"] == pytest.approx(0.9, abs=0.02)
    assert {b["policy"] for b in results["brackets"]} == {"oracle", "random"}
    assert "warnings" not in results
    dial = run("evaluate.py", *quick, "budget.max_ppl_increase=0.05", "validation.steps=3")
    search = read_results(dial)["policy"]["params"]["search"]
    assert search["found"]["ratio"] <= 1.05
