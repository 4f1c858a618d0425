"""The prior: GRIFFIN's statistic and learned scores in one, from training to evaluation."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import calibration, predictor
from gnomon.accounting import Density, account
from gnomon.budget import Budget
from gnomon.endtoend import start_from
from gnomon.evaluation.results import read_results
from gnomon.host import HostSpec, describe
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies import Griffin, Policy, Prior, build_policy
from gnomon.predictors import Prior as PriorPredictor
from gnomon.predictors.folder import load_predictor
from gnomon.predictors.module import PredictorModule
from gnomon.predictors.objectives import Kl
from gnomon.runtime.softness import Softness
from gnomon.runtime.student import Student
from gnomon.tiny import tiny_host
from scripts import call

HALF = Budget(neurons=0.5)
LENGTHS = torch.tensor([5, 9, 2])


def ids_of(rows: int = 3, length: int = 14) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


def untrained(spec: HostSpec) -> PriorPredictor:
    """a = 1 and b = 0."""
    made = PriorPredictor.for_host(spec)
    made.info = replace(made.info, host=spec.name, spec_hash=spec.hash)
    return made


def sets(model: Any, policy: Policy) -> dict[int, Tensor]:
    """layer -> the active set (B, F) of prompts of several lengths."""
    taken: dict[int, Tensor] = {}
    with torch.no_grad(), gnomon.sparsify(model, policy, prompt_length=LENGTHS) as session:
        session.on_decision = lambda kind, layer, keep, _: taken.update({layer: keep[:, -1]})
        model(ids_of())
    return taken


@pytest.mark.parametrize("batch", ["per_sequence", "shared"])
@pytest.mark.parametrize("density", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_without_a_prior_it_is_griffin(family: str, density: float, batch: Any) -> None:
    model, _ = tiny_host(family)
    budget = Budget(neurons=density)
    found = sets(model, Prior(untrained(describe(model)), budget, batch=batch))
    expected = sets(model, Griffin(budget, batch=batch))
    assert found.keys() == expected.keys() and len(found) == 3
    assert all(torch.equal(found[layer], expected[layer]) for layer in found)


def test_without_the_prompt_it_is_a_fixed_choice() -> None:
    model, _ = tiny_host()
    made = predictor(model, "prior")
    assert isinstance(made, PriorPredictor)
    with torch.no_grad():
        made.slope.zero_()
    bias = made.outputs["neurons"].bias
    assert bias is not None
    for layer, keep in sets(model, Prior(made, HALF)).items():
        assert torch.equal(keep, topk_mask(bias[layer], 24).expand_as(keep))


def test_the_scores_are_the_formula() -> None:
    made = predictor(tiny_host()[0], "prior")
    assert isinstance(made, PriorPredictor)
    s, b = torch.rand(2, 1, made.F), made.outputs["neurons"].bias
    assert b is not None
    expected = made.slope[1] * (made.F**0.5 * s + 1e-3).log() + b[1]
    torch.testing.assert_close(made.from_statistic(1, s), expected)
    assert bool(made.from_statistic(1, torch.zeros(1, 1, made.F)).isfinite().all())


def test_what_is_read_and_trained_are_a_and_b_through_every_round_trip(tmp_path: Path) -> None:
    made = predictor(tiny_host()[0], "prior")
    assert isinstance(made, PriorPredictor)
    learned = {"slope", "outputs.heads.bias", "outputs.neurons.bias"}

    def trainable(of: torch.nn.Module) -> set[str]:
        return {name for name, p in of.named_parameters() if p.requires_grad}

    assert trainable(made) == learned
    s = torch.rand(2, 1, made.F)
    before = made.from_statistic(1, s).detach()
    made.quantize().save_pretrained(tmp_path)
    back = load_predictor(tmp_path)
    assert isinstance(back, PriorPredictor) and not trainable(made) and not trainable(back)
    assert torch.equal(back.from_statistic(1, s), before)
    assert trainable(back.dequantize()) == learned
    assert torch.equal(back.from_statistic(1, s).detach(), before)
    assert made.bytes_for(["neurons"]) == 4 * made.L * (made.F + 1)
    assert made.nbytes == back.nbytes == 4 * made.L * (made.F + 1)
    assert json.loads((tmp_path / "config.json").read_text())["weights"] == "fp32"
    assert f"{made.nbytes:,} bytes (fp32) |" in (tmp_path / "README.md").read_text()


def test_its_bytes_are_read_once_per_prompt() -> None:
    model, _ = tiny_host()
    policy, griffin = Prior(predictor(model, "prior"), HALF), Griffin(HALF)
    for each in (policy, griffin):
        each.bind(model)
    at = Density(1.0, 0.5, 1.0)
    own, other = account(policy, at), account(griffin, at)
    spec = policy.spec
    assert own.predictor_bytes == 4 * spec.L * (spec.F + 1) / 128 and other.predictor_bytes == 0
    assert own.dense_bytes == other.dense_bytes


def student(budget: Budget = HALF, family: str = "llama", **how: Any) -> Student:
    model, _ = tiny_host(family)
    how = {"refresh": "prompt", "protocol": "decode"} | how
    return Student(model, describe(model), predictor(model, "prior"), budget, **how)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_logits_of_the_student_are_those_of_sparsify(family: str) -> None:
    made, ids, taken = student(family=family), ids_of(), defaultdict(list)
    trained = made.sparse(ids, made.step(ids, LENGTHS))
    policy = Prior(made.predictor, HALF)  # type: ignore[arg-type]
    with (
        torch.no_grad(),
        gnomon.sparsify(made.model, policy, backend="mask", prompt_length=LENGTHS) as session,
    ):
        session.on_decision = lambda kind, layer, keep, _: taken[kind].append(keep[:, -1])
        used = made.model(ids).logits
    torch.testing.assert_close(trained, used, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, made.dense(ids), atol=1e-2)
    assert set(taken) == {"neurons"}
    assert any(not torch.equal(keep[0], keep[1]) for keep in taken["neurons"])  # its own prompt's


def test_gradients_reach_a_and_b_by_the_formula() -> None:
    """Scores are linear in both: with one row dL/da = Σ_j dL/db_j · log(√F s_j + ε)."""
    made, ids = student(), ids_of(1)
    net, step = made.predictor, made.step(ids, torch.tensor([9]))
    assert isinstance(net, PriorPredictor)
    evidence: dict[int, Tensor] = {}
    plain = untrained(made.spec)
    score = net.from_statistic

    def watched(layer: int, s: Tensor) -> Tensor:
        assert not s.requires_grad
        evidence[layer] = plain.from_statistic(layer, s).detach()
        return score(layer, s)

    net.from_statistic = watched  # type: ignore[method-assign]
    made.sparse(ids, step, Softness(2.0)).square().sum().backward()
    bias = net.outputs["neurons"].bias
    assert bias is not None and bias.grad is not None and net.slope.grad is not None
    for layer in range(net.L):
        assert bool(bias.grad[layer].any())
        wanted = (bias.grad[layer] * evidence[layer][0, 0]).sum()
        torch.testing.assert_close(net.slope.grad[layer], wanted, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in made.model.parameters())
    others = {n for n, p in net.named_parameters() if p.grad is not None}
    assert others == {"slope", "outputs.neurons.bias"}


@pytest.mark.parametrize(
    ("budget", "how", "message"),
    [
        (HALF, {"refresh": "token"}, r"^student\.refresh=token.*student\.refresh=prompt"),
        (HALF, {"refresh": "token", "protocol": "all"}, r"^student\.refresh=token"),
        (HALF, {"protocol": "all"}, r"student\.protocol=decode"),
        (Budget(density=0.5), {}, r"^density\.heads=0\.5.*use density\.heads=1\.0"),
        (Budget(heads=0.5), {}, r"^density\.heads=0\.5"),
        (Budget(density=1.0), {}, "nothing to learn"),
    ],
    ids=["token", "token-all", "all", "both", "heads", "whole"],
)
def test_what_it_does_not_learn_is_refused(
    budget: Budget, how: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        student(budget, **how)


def test_another_predictor_or_refresh_is_refused_by_name() -> None:
    model, _ = tiny_host()
    for kind in ("shadow", "sketch"):
        with pytest.raises(ValueError, match=f"policy=prior needs a Prior.*use policy={kind}"):
            build_policy("prior", HALF, predictor(model, kind))
    with pytest.raises(ValueError, match="policy=shadow needs a Shadow.*use policy=prior"):
        build_policy("shadow", HALF, predictor(model, "prior"))
    for field, value in (("refresh", "token"), ("kv", "drop"), ("prefill", "sparse")):
        with pytest.raises(ValueError, match=f"policy(=prior|.prefill).*{value}"):
            build_policy("prior", HALF, predictor(model, "prior"), **{field: value})
    with pytest.raises(ValueError, match=r"budget\.heads=0\.5: policy=prior decides neurons"):
        build_policy("prior", Budget(heads=0.5), predictor(model, "prior"))


@pytest.mark.parametrize("name", ["prior", "glass", "static", "core", "ffsplit", "shadow", "cats"])
def test_a_policy_without_the_predictor_it_needs_says_so(name: str) -> None:
    inner = {"inner": Griffin(HALF)} if name == "core" else {}
    with pytest.raises(ValueError, match=rf"^policy\.predictor=null: policy={name} .*=auto"):
        build_policy(name, HALF, None, **inner)
    model, _ = tiny_host()
    if name in ("glass", "static", "core", "ffsplit", "cats"):
        assert build_policy(name, HALF, calibration(model), **inner).name == name


def test_weight_decay_spares_what_starts_at_one() -> None:
    net = untrained(describe(tiny_host()[0]))
    make = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.01)
    module = PredictorModule(net, Kl(), make, None, {"heads": 1.0, "neurons": 0.5})
    spared = [
        g["params"] for g in module.configure_optimizers().param_groups if not g["weight_decay"]
    ]
    assert any(p is net.slope for group in spared for p in group)


def test_a_slope_that_is_given_is_not_trained_and_survives_a_warm_start(tmp_path: Path) -> None:
    model, _ = tiny_host()
    spec = describe(model)
    trained = predictor(model, "prior")
    trained.quantize().save_pretrained(tmp_path)
    made = PriorPredictor.for_host(spec, slope=0.5)
    assert not made.slope.requires_grad and made.params == trained.params
    start_from(made, str(tmp_path), spec)
    assert made.slope.tolist() == [0.5] * spec.L and not made.slope.requires_grad
    ours, theirs = made.outputs["neurons"].bias, trained.outputs["neurons"].bias
    assert torch.equal(ours, theirs) and ours.requires_grad
    free = PriorPredictor.for_host(spec)
    start_from(free, str(tmp_path), spec)
    assert torch.equal(free.slope, trained.slope) and free.slope.requires_grad


SMALL = ["host=tiny", "text=synthetic", "text.block=48"]
PROMPT = ["student.refresh=prompt", "student.protocol=decode", "density.heads=1.0"]
TRAIN = [
    *(*SMALL, "predictor=prior", "objective=kl", "text.tokens=2048", "student.blocks=2"),
    *("harvest.heldout_tokens=192", "harvest.means_tokens=192", "optimizer.lr=2e-2"),
    *("trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.enable_progress_bar=false"),
]


def test_train_py_and_evaluate_py_end_to_end(tmp_path: Path) -> None:
    folder = call("train.py", *TRAIN, *PROMPT, f"paths.root={tmp_path}", cwd=tmp_path).last
    made = load_predictor(folder)
    assert isinstance(made, PriorPredictor) and made.info.objective == "kl"
    assert made.info.metrics["student"]["refresh"] == "prompt" and bool((made.slope != 1).all())
    quick = ["text.tokens=96", "protocol.prompt=24", "measure.quality.generation.tokens=0"]
    quick += ["measure.quality.brackets=[random]", "budget.neurons=0.5", "budget.density=null"]
    for reference in (str(folder), "auto"):
        words = [*SMALL, *quick, "policy=prior", f"policy.predictor={reference}"]
        done = call("evaluate.py", *words, f"paths.root={tmp_path}", cwd=tmp_path)
        results = read_results(done.last)
        assert results["policy"]["predictor"]["class"] == "prior"
        assert results["density"]["neurons"] == pytest.approx(0.5)
        assert results["density"]["heads"] == 1.0
    words = [*SMALL, *quick, "policy=glass", "policy.predictor=null", f"paths.root={tmp_path}"]
    done = call("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 2 and "policy.predictor=null: policy=glass needs one" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=bce"], "objective=bce with predictor=prior"),
        (["objective=mse", "objective.on_policy=true"], "objective=mse with predictor=prior"),
        (["student.refresh=token"], "student.refresh=token: a prior predictor"),
        (["density.heads=0.5"], "density.heads=0.5: a prior predictor"),
    ],
    ids=["bce", "on-policy", "token", "heads"],
)
def test_train_py_refuses_before_the_harvest(
    words: list[str], message: str, tmp_path: Path
) -> None:
    given = {word.partition("=")[0] for word in words}
    kept = [word for word in (*TRAIN, *PROMPT) if word.partition("=")[0] not in given]
    extra = ["harvest.mode=online", "criterion=magnitude"]
    done = call("train.py", *kept, *words, *extra, f"paths.root={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "traces").exists()
