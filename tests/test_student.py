"""The student: the masks of inference, and gradients for the predictor alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import predictor
from gnomon.budget import Budget
from gnomon.host import KINDS, Tap, describe
from gnomon.policies import build_policy
from gnomon.predictors import divergence
from gnomon.predictors.divergence import Divergence, mean_kl
from gnomon.runtime import student as student_module
from gnomon.runtime.softness import Softness
from gnomon.runtime.student import Student
from gnomon.tiny import tiny_host

HALF = Budget(density=0.5)
BOTH = Budget(heads=0.75, neurons=0.4)
LENGTHS = torch.tensor([5, 9, 2])


def ids_of(rows: int = 3, length: int = 14) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


def student(
    kind: str = "shadow", budget: Budget = BOTH, family: str = "llama", **how: Any
) -> Student:
    model, _ = tiny_host(family)
    params = how.pop("params", {}) | ({"tune": True} if kind == "sketch" else {})
    return Student(model, describe(model), predictor(model, kind, **params), budget, **how)


def both_logits(made: Student, ids: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits of the student and of ``sparsify`` under the mask backend."""
    step = made.step(ids, lengths)
    trained = made.sparse(ids, step)
    budget, refresh = made.policy.budget, made.policy.refresh
    policy = build_policy(made.predictor.name, budget, made.predictor, refresh=refresh)
    how = {"protocol": made.protocol, "prompt_length": lengths}
    with torch.no_grad(), gnomon.sparsify(made.model, policy, backend="mask", **how):
        return trained, made.model(ids).logits


REFRESH = [
    pytest.param({"refresh": "token", "protocol": "all"}, None, id="token-all"),
    pytest.param({"refresh": "token", "protocol": "decode"}, LENGTHS, id="token-decode"),
    pytest.param({"refresh": "prompt", "protocol": "decode"}, LENGTHS, id="prompt-decode"),
]


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize("kind", ["shadow", "dejavu", "sketch"])
@pytest.mark.parametrize(("how", "lengths"), REFRESH)
def test_its_logits_are_those_of_sparsify(
    how: dict[str, str], lengths: Tensor | None, kind: str, family: str
) -> None:
    made = student(kind, family=family, **how)
    ids = ids_of()
    trained, used = both_logits(made, ids, lengths)
    torch.testing.assert_close(trained, used, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(trained, made.dense(ids), atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "budget", "params"),
    [
        pytest.param("shadow", Budget(density=0.5, spread="global"), {}, id="global"),
        pytest.param("shadow", Budget(density=0.5, head_unit="group"), {}, id="groups"),
        pytest.param("shadow", Budget(neurons=0.5), {}, id="neurons-alone"),
        pytest.param("dejavu", Budget(heads=0.5), {}, id="heads-alone"),
        pytest.param("shadow", HALF, {"tap": Tap(0, "attn_context")}, id="context"),
        pytest.param("dejavu", HALF, {"lookahead": 1}, id="lookahead"),
    ],
)
def test_every_budget_and_tap_has_the_logits_of_sparsify(
    kind: str, budget: Budget, params: dict[str, Any]
) -> None:
    made = student(kind, budget, params=params)
    trained, used = both_logits(made, ids_of(), None)
    torch.testing.assert_close(trained, used, rtol=1e-5, atol=1e-5)


def gradients(made: Student) -> dict[str, bool]:
    """Which parameters of the predictor a loss on the sparse logits reaches."""
    ids = ids_of()
    logits = made.sparse(ids, made.step(ids))
    logits.float().log_softmax(-1)[..., 0].sum().backward()
    return {
        name: p.grad is not None and bool(p.grad.abs().sum() > 0)
        for name, p in made.predictor.named_parameters()
        if "tilt" not in name  # learned under a spread of its own
    }


@pytest.mark.parametrize("kind", ["shadow", "dejavu", "sketch"])
def test_gradients_reach_the_predictor_and_not_the_host(kind: str) -> None:
    made = student(kind)
    before = {name: p.clone() for name, p in made.model.state_dict().items()}
    assert all(gradients(made).values())
    assert all(p.grad is None and p.requires_grad for p in made.model.parameters())
    assert all(torch.equal(p, before[n]) for n, p in made.model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in made.model.modules())


def test_a_kind_that_is_kept_whole_has_no_gradient() -> None:
    made = student("dejavu", Budget(neurons=0.5))
    found = gradients(made)
    assert not any(reached for name, reached in found.items() if "heads" in name)
    assert all(reached for name, reached in found.items() if "neurons" in name)
    whole = [p for n, p in made.predictor.named_parameters() if "heads" in n]
    assert whole and not any(p.requires_grad for p in whole)


def test_the_gradient_is_that_of_the_sigmoid_times_what_the_unit_does() -> None:
    """One layer masked: dL/ds = soft'(s) · Σ h·dL/dh, dropped units included."""
    made = student("dejavu", Budget(neurons=0.5))
    made.masked = [("neurons", 2)]
    ids, held = ids_of(1, 6), {}
    down = made.model.get_submodule(made.spec.layers[2].down)

    def visit(kind: str, layer: int, scores: Tensor, units: Tensor, sparse: Tensor) -> None:
        held["units"], held["scores"] = units, scores

    step = made.step(ids)
    with torch.no_grad():
        made.sparse(ids, step, visit=visit)
    logits, bias = made.sparse(ids, step, Softness(2.0)), made.predictor.outputs["neurons"].bias
    assert bias is not None
    (got,) = torch.autograd.grad(logits.square().sum(), bias)
    scores, units = held["scores"], held["units"]
    cut = scores.topk(made.policy.counts["neurons"][2], -1).values[..., -1:]
    soft, free = ((scores - cut) / 2.0).sigmoid(), (scores >= cut).float().requires_grad_()
    handle = down.register_forward_pre_hook(lambda *_: (units * free,))
    (by_mask,) = torch.autograd.grad(made.model(ids).logits.square().sum(), free)
    handle.remove()
    wanted = (by_mask * soft * (1 - soft) / 2.0).sum((0, 1))
    torch.testing.assert_close(got[2], wanted, rtol=1e-4, atol=1e-4)


def test_softness_mixes_the_forward_and_balance_keeps_the_mass() -> None:
    made = student("shadow")
    ids = ids_of()
    step = made.step(ids)
    hard, soft = made.sparse(ids, step), made.sparse(ids, step, Softness(hardness=0.0))
    assert not torch.allclose(hard, soft, atol=1e-2)
    cold = made.sparse(ids, step, Softness(temperature=1e-4, hardness=0.0))
    assert (cold - hard).norm() < (soft - hard).norm()  # but for the threshold's own unit, at 0.5
    balanced = made.sparse(ids, step, Softness(balanced=True))
    torch.testing.assert_close(balanced, hard)
    scores = torch.randn(2, 9, requires_grad=True)
    cut = scores.detach().topk(4).values[..., -1:]
    total = Softness(balanced=True).of(scores, cut).sum(-1)
    (gradient,) = torch.autograd.grad(total.sum(), scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_visits_see_units_before_their_mask_and_train_scores_alone() -> None:
    made = student("dejavu", BOTH)
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def visit(kind: str, layer: int, scores: Tensor, units: Tensor, sparse: Tensor) -> None:
        seen[kind, layer] = scores, units
        assert bool(sparse.all()) and scores.requires_grad and not units.requires_grad

    ids = ids_of()
    logits = made.sparse(ids, made.step(ids), visit=visit)
    assert not logits.requires_grad and torch.equal(logits, made.sparse(ids, made.step(ids)))
    assert set(seen) == {(kind, layer) for kind in KINDS for layer in range(made.spec.L)}
    assert seen["heads", 1][1].shape == (3, 14, 4, 8) and (seen["neurons", 1][1] != 0).all()


@pytest.mark.parametrize("kind", ["sketch", "dejavu", "shadow"])
def test_thresholds_meet_the_budget_in_the_mean_and_decide_units_by_themselves(kind: str) -> None:
    made = student(kind, Budget(heads=1.0, neurons=0.4), choose="threshold")
    seen: dict[int, Tensor] = {}

    def visit(kind: str, layer: int, scores: Tensor, units: Tensor, sparse: Tensor) -> None:
        seen[layer] = scores[sparse]

    ids = ids_of(4, 32)
    step = made.step(ids)
    made.sparse(ids, step, visit=visit)
    first = made.predictor.first("neurons")
    dense = [torch.full((1,), -torch.inf)] * first
    cuts = torch.cat([*dense, *(made._quantile("neurons", i, seen[i]) for i in sorted(seen))])
    kept = torch.stack([(seen[i] >= cuts[i]).float() for i in sorted(seen)])
    wanted = torch.tensor(made.policy.counts["neurons"][first:]) / made.spec.F
    torch.testing.assert_close(kept.mean((1, 2)), wanted, atol=2e-3, rtol=0)
    assert len(kept.sum(-1).unique()) > 3  # tokens differ in how many they take
    for quantiles in made.predictor.quantiles.values():  # the same cut at every share
        quantiles.copy_(cuts[:, None].expand(-1, quantiles.shape[1]))
    placed = build_policy(kind, made.policy.budget, made.predictor, choose="threshold")
    with torch.no_grad(), gnomon.sparsify(made.model, placed, backend="mask", protocol="all"):
        expected = made.model(ids).logits
    found = made.sparse(ids, step)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    found.square().mean().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in made.predictor.parameters())


@pytest.mark.parametrize("choose", ["topk", "threshold"])
@pytest.mark.parametrize("kind", ["sketch", "dejavu", "shadow"])
def test_a_learned_spread_moves_units_to_where_they_are_worth_most(kind: str, choose: str) -> None:
    made = student(kind, Budget(heads=1.0, neurons=0.4, spread="learned"), choose=choose)
    first, tilt = made.predictor.first("neurons"), made.predictor.tilt_neurons
    assert not made.predictor.tilt_heads.requires_grad
    ids = ids_of(4, 32)
    step = made.step(ids)

    def error() -> Tensor:
        return mean_kl(made.sparse(ids, step).flatten(0, 1), made.dense(ids).flatten(0, 1))

    error().backward()
    assert tilt.grad is not None and bool(tilt.grad[first:].any())
    free = slice(first, None)
    shares = torch.tensor(made.policy.counts["neurons"][free]) / made.spec.F
    assert not bool(tilt.grad[:first].any())
    # all tilts together change nothing, whatever their shares are
    assert float(tilt.grad[free].sum()) == pytest.approx(0, abs=1e-3 * float(tilt.grad.abs().sum()))
    with torch.no_grad():
        tilt[-1] += 1.0
    made.sparse(ids, step)
    moved = torch.tensor(made.policy.counts["neurons"][free]) / made.spec.F
    assert moved[-1] > shares[-1] + 0.03 and (moved[:-1] <= shares[:-1]).all()
    assert float(moved.sum()) == pytest.approx(float(shares.sum()), abs=1 / made.spec.F)
    (seen := made._shares["neurons"][free]).sum().backward()
    torch.testing.assert_close(seen.detach(), moved, atol=1 / made.spec.F, rtol=0)
    trained = made.sparse(ids, step)
    if choose == "topk":
        policy = build_policy(kind, made.policy.budget, made.predictor)
        with torch.no_grad(), gnomon.sparsify(made.model, policy, backend="mask", protocol="all"):
            torch.testing.assert_close(trained, made.model(ids).logits, rtol=1e-5, atol=1e-5)


def test_balance_keeps_the_mass_of_all_positions_that_one_threshold_serves() -> None:
    scores = torch.randn(2, 9, requires_grad=True)
    cut = scores.detach().flatten().topk(7).values[-1:]
    total = Softness(balanced=True).of(scores, cut).sum()
    (gradient,) = torch.autograd.grad(total, scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
    sparse = torch.tensor([True, False])
    own = Softness(balanced=True).of(scores, cut, counted=sparse)[sparse].sum()
    (gradient,) = torch.autograd.grad(own, scores)  # what is dense has no part in it
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
    share = torch.tensor(7 / 18, requires_grad=True)
    mean = Softness().of(scores, cut, share, sparse)[sparse].mean()
    (gradient,) = torch.autograd.grad(mean, share)
    torch.testing.assert_close(gradient, torch.ones(()), atol=1e-5, rtol=0)
    for at in (cut, scores.detach().topk(4).values[..., -1:]):
        mean = Softness(temperature=0.5).of(scores, at, share).mean()
        (gradient,) = torch.autograd.grad(mean, share)  # of a larger share so much more is kept
        torch.testing.assert_close(gradient, torch.ones(()), atol=1e-5, rtol=0)


def test_thresholds_are_placed_on_a_sample_of_every_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    made = student("sketch", Budget(heads=1.0, neurons=0.25), choose="threshold")
    units, rows = made.spec.F, 64
    scores = torch.rand(rows, units) + 10 * (torch.arange(units) % 8 == 0)  # as the stride is
    exact = made._quantile("neurons", 0, scores)
    monkeypatch.setattr(student_module, "SAMPLE", rows * units // 8)
    sampled = made._quantile("neurons", 0, scores)
    share = made.policy.counts["neurons"][0] / units
    for cut in (exact, sampled):
        assert float((scores >= cut).float().mean()) == pytest.approx(share, abs=0.02)
    whole = student("sketch", Budget(heads=1.0, neurons=0.999), choose="threshold")
    assert float(whole._quantile("neurons", 0, scores)) == -torch.inf


def test_decisions_are_fp32_under_autocast() -> None:
    made, ids, seen = student("dejavu", BOTH), ids_of(), []

    def visit(kind: str, layer: int, scores: Tensor, units: Tensor, sparse: Tensor) -> None:
        seen.append((scores.dtype, units.dtype))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        made.sparse(ids, made.step(ids), visit=visit)
        logits = made.sparse(ids, made.step(ids))
    assert {scores for scores, _ in seen} == {torch.float32}
    assert torch.bfloat16 in {units for _, units in seen} and logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all()) and logits.requires_grad


@pytest.mark.parametrize(
    ("kind", "budget", "how", "message"),
    [
        ("shadow", Budget(density=1.0), {}, "nothing to learn"),
        ("shadow", HALF, {"refresh": "prompt"}, "student.protocol=decode"),
        ("shadow", HALF, {"protocol": "published"}, "use all or decode"),
        ("dejavu", Budget(density=0.5, spread="global"), {}, "student.spread=layer"),
        (
            "prior",
            Budget(heads=1.0, neurons=0.5),
            {"choose": "threshold", "refresh": "prompt", "protocol": "decode"},
            "predictor=sketch, dejavu or shadow",
        ),
        (
            "shadow",
            Budget(density=0.5, spread="global"),
            {"choose": "threshold"},
            "student.spread=layer or learned",
        ),
        ("sketch", HALF, {"choose": "best"}, "topk or threshold"),
        (
            "sketch",
            HALF,
            {"choose": "threshold", "refresh": "prompt", "protocol": "decode"},
            "student.refresh=token",
        ),
    ],
    ids=[
        *("whole", "prompt-all", "published", "dejavu-global"),
        *("cut", "cut-global", "best", "cut-prompt"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    kind: str, budget: Budget, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        student(kind, budget, **how)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_in_chunks_is_kl(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK", 3)
    own, wanted = torch.randn(10, 7, requires_grad=True), torch.randn(10, 7)
    log_own, log_wanted = ((x / temperature).log_softmax(-1) for x in (own, wanted))
    expected = (log_wanted.exp() * (log_wanted - log_own)).sum(-1).mean() * temperature**2
    found = mean_kl(own, wanted, temperature)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(3 * x, own)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_divergence_sums_kl_and_both_perplexities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "CHUNK", 4)
    sparse, dense = torch.randn(10, 7), torch.randn(10, 7)
    targets = torch.randint(0, 7, (10,))
    targets[3] = -100
    total = Divergence(torch.device("cpu"))
    total.update(sparse[:6], dense[:6], targets[:6])
    total.update(sparse[6:], dense[6:], targets[6:])
    found = total.compute()
    ce = [torch.nn.functional.cross_entropy(x, targets) for x in (sparse, dense)]
    assert found["ppl_sparse"] == pytest.approx(float(ce[0].exp()), rel=1e-5)
    assert found["ppl_dense"] == pytest.approx(float(ce[1].exp()), rel=1e-5)
    assert found["ppl_ratio"] == pytest.approx(float((ce[0] - ce[1]).exp()), rel=1e-5)
    assert found["kl"] == pytest.approx(float(mean_kl(sparse, dense)), rel=1e-5)
    assert found["positions"] == 10
