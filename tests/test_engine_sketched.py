"""A sketch's thresholds in the decode engine: one launch scores, decides and computes neurons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import FAMILIES, calibration, predictor
from gnomon import policies
from gnomon.budget import Budget
from gnomon.engine.agreement import agree
from gnomon.engine.decide import Dense, Fused, InputChannels, PerToken
from gnomon.engine.engine import Engine
from gnomon.engine.sketched import Sketched
from gnomon.policies.base import Policy
from gnomon.tiny import tiny_host
from tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float32]
HALF = Budget(neurons=0.5)


def ids_of(rows: int = 1, length: int = 18, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def sketch(model: Any, budget: Budget = HALF, **how: Any) -> policies.Sketch:
    made = predictor(model, "sketch").quantize()
    return policies.Sketch(made, budget, **({"choose": "threshold"} | how))


def agreement(model: Any, policy: Policy, rows: int = 1, **how: Any) -> dict[str, Any]:
    device = next(model.parameters()).device
    with Engine(model, policy, batch=rows, context=64, **how) as engine:
        found = agree(engine, model, policy, ids_of(rows).to(device), 6)
    return found | {"decider": type(engine.decider)}


def assert_same(found: dict[str, Any], tolerance: float = EXACT) -> None:
    assert found["sets"] == 1, found
    assert found["top1"] == 1, found
    assert found["logits_rms"] < tolerance, found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_the_mask(family: str) -> None:
    model, _ = tiny_host(family)
    found = agreement(model, sketch(model), 2)
    assert found["decider"] is Sketched
    assert_same(found)


@pytest.mark.parametrize(("density", "rows"), [(0.1, 1), (0.5, 6), (0.9, 3)])
def test_every_density_agrees_with_the_mask(density: float, rows: int) -> None:
    model, _ = tiny_host("llama")
    assert_same(agreement(model, sketch(model, Budget(neurons=density)), rows))


def test_triton_agrees_with_the_mask(device: torch.device) -> None:
    model, _ = tiny_host("llama", num_hidden_layers=2)
    model.to(device)
    policy, ids = sketch(model), ids_of(2, 6).to(device)
    with Engine(model, policy, batch=2, context=32, backend="triton") as engine:
        assert type(engine.decider) is Sketched
        found = agree(engine, model, policy, ids, 2)
    assert_same(found, 1e-4 if device.type == "cuda" else EXACT)


def test_biases_and_int8_weights() -> None:
    model, _ = tiny_host("llama", mlp_bias=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    assert_same(agreement(model, sketch(model), 2))
    with (
        Engine(model, policies.DenseInt8(), context=64) as rounded,
        Engine(model, sketch(model), context=64, weights=rounded.weights) as engine,
    ):
        assert type(engine.decider) is Sketched
        assert engine.weights.layers[0].up.weight.dtype == torch.int8
        found = agree(engine, model, sketch(model), ids_of(), 6)
        dense = agree(rounded, model, None, ids_of(), 6)
    assert found["sets"] > 0.97  # rounding moves a neuron or two across the threshold
    assert found["logits_rms"] < 3 * dense["logits_rms"]


def test_round_it_teals_thresholds() -> None:
    model, _ = tiny_host("llama")
    policy = policies.TealAttention(calibration(model), sketch(model, Budget(density=0.5)))
    found = agreement(model, policy, 2)
    assert found["decider"] is InputChannels
    assert_same(found)


@pytest.mark.parametrize(
    ("budget", "how", "decider"),
    [
        (Budget(density=0.5), {}, PerToken),
        (HALF, {"choose": "topk"}, Fused),
        (Budget(density=1.0), {}, Dense),
    ],
    ids=["heads too", "topk", "everything"],
)
def test_what_is_not_thresholds_of_neurons_alone(
    budget: Budget, how: dict[str, Any], decider: type
) -> None:
    model, _ = tiny_host("llama")
    found = agreement(model, sketch(model, budget, **how))
    assert found["decider"] is decider
    assert_same(found)


def test_how_many_are_kept_varies_and_meets_the_budget_in_the_mean() -> None:
    model, _ = tiny_host("llama")
    with Engine(model, sketch(model), batch=4, context=64) as engine:
        engine.prefill(ids_of(4))
        counts = []
        for _ in range(12):
            engine.step()
            active = engine.active("neurons", 1)
            counts.append((active.index < engine.spec.F).sum(1))
    kept = torch.stack(counts).float() / engine.spec.F
    assert kept.unique().numel() > 3
    assert float(kept.mean()) == pytest.approx(0.5, abs=0.12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_weights_of_skipped_neurons_are_not_read(backend: str, device: torch.device) -> None:
    model, _ = tiny_host("llama", num_hidden_layers=2)
    model.to(device)
    ids = ids_of(1, 8).to(device)
    policy = sketch(model)
    with Engine(model, policy, context=32, backend=backend) as engine:
        engine.prefill(ids)
        expected = engine.step().clone()
        skipped = [engine.active("neurons", i).index[0] == engine.spec.F for i in range(2)]
    with Engine(model, policy, context=32, backend=backend) as engine:
        engine.prefill(ids)
        for layer, rows in zip(engine.weights.layers, skipped, strict=True):
            assert 0 < int(rows.sum()) < engine.spec.F
            for matrix in (layer.up, layer.gate, layer.down_t):
                matrix.weight[rows] = torch.nan
        assert torch.equal(engine.step(), expected)


def test_a_wrong_threshold_is_caught() -> None:
    model, _ = tiny_host("llama")
    policy = sketch(model)
    with Engine(model, policy, context=64) as engine:
        engine.decider.sketch(1).cut.add_(0.3)
        policy.bind(model)
        found = agree(engine, model, policy, ids_of(), 8)
    assert found["sets"] < 1
    assert found["logits_rms"] > 1e-3


def test_generate_runs_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_host("llama")
    write = {"policy": sketch(model), "max_new_tokens": 8}
    texts = gnomon.generate(model, tokenizer, ["the sun", "a"], **write)
    assert texts == gnomon.generate(model, tokenizer, ["the sun", "a"], **write, backend="mask")
    assert "generic path" not in caplog.text


def test_thresholds_lie_on_the_quantiles() -> None:
    model, _ = tiny_host("llama")
    policy = sketch(model, Budget(neurons=0.25))
    policy.bind(model)
    table = policy.predictor.quantiles["neurons"]
    for layer in range(3):
        place = 200 * (1 - policy.counts["neurons"][layer] / policy.spec.F)
        low = int(place)
        expected = table[layer, low] + (place - low) * (table[layer, low + 1] - table[layer, low])
        torch.testing.assert_close(policy.unit_cut("neurons", layer)[0], expected)


@pytest.mark.parametrize(
    ("budget", "how", "message"),
    [
        (HALF, {"choose": "best"}, "params.choose='best'"),
        (HALF, {"batch": "shared"}, "policy.batch='shared'"),
        (Budget(heads=0.5, head_unit="group"), {}, "budget.head_unit='group'"),
        (Budget(neurons=0.5, spread="global"), {}, "budget.spread='global'"),
    ],
    ids=["unknown", "shared", "groups", "global"],
)
def test_what_thresholds_do_not_do_is_refused(
    budget: Budget, how: dict[str, Any], message: str
) -> None:
    model, _ = tiny_host("llama")
    with pytest.raises(ValueError, match=message):
        sketch(model, budget, **how)


def test_a_sketch_without_quantiles_is_refused() -> None:
    model, _ = tiny_host("llama")
    policy = sketch(model)
    policy.predictor.quantiles["neurons"].fill_(torch.nan)
    with pytest.raises(ValueError, match="no quantiles"):
        policy.bind(model)


@pytest.mark.parametrize("name", ["core", "ffsplit"])
def test_a_core_would_be_kept_beside_thresholds_and_is_refused(name: str) -> None:
    model, _ = tiny_host("llama")
    means = predictor(model)
    with pytest.raises(ValueError, match=f"policy={name} would be kept beside"):
        if name == "core":
            policies.Core(means, sketch(model), share=0.2)
        else:
            policies.FFSplit(means, inner=sketch(model), heavy=0.2)


def test_no_layer_falls_back_whose_number_varies() -> None:
    model, _ = tiny_host("llama")
    policy = policies.DenseFallback(sketch(model, Budget(neurons=0.9)), above=0.8)
    policy.bind(model)
    expected = policy.expected("neurons", policy.resolved)
    assert expected == pytest.approx([0.9] * 3, abs=0.02)
    top = policies.DenseFallback(sketch(model, Budget(neurons=0.9), choose="topk"), above=0.8)
    top.bind(model)
    assert top.expected("neurons", top.resolved) == [1.0] * 3


def test_a_layer_that_keeps_everything_has_no_threshold() -> None:
    model, _ = tiny_host("llama")
    policy = sketch(model)
    policy.bind(model)
    policy.counts["neurons"][1] = policy.spec.F
    policy._cuts = {"neurons": policy._placed("neurons")}
    assert policy.unit_cut("neurons", 1) == -torch.inf
    assert bool(policy.unit_cut("neurons", 0).isfinite())
