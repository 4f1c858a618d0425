"""Thresholds in the attention round another policy's neurons: the two parts, and their bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import calibration, neurons, predictor
from gnomon import policies
from gnomon.budget import Budget
from gnomon.engine.engine import Engine
from gnomon.engine.passing import InputChannels
from gnomon.engine.support import UnsupportedPolicyError
from gnomon.policies.base import Policy
from gnomon.tiny import tiny_host

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def sketch(model: Any, budget: Budget) -> Policy:
    return policies.Sketch(predictor(model, "sketch").quantize(), budget)


def halved(model: Any) -> Policy:
    return policies.TealAttention(calibration(model), policies.Random(Budget(density=0.5)))


def logits(model: Any, policy: Policy) -> Tensor:
    with torch.no_grad(), gnomon.sparsify(model, policy, "mask", protocol="all"):
        return model(IDS).logits


def test_each_part_alone_is_the_policy_that_it_is_made_of() -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    both = lambda **kept: policies.TealAttention(made, sketch(model, Budget(**kept)))  # noqa: E731
    found = logits(model, both(heads=1.0, neurons=0.5))
    assert torch.equal(found, logits(model, sketch(model, Budget(heads=1.0, neurons=0.5))))
    found = logits(model, both(heads=0.5, neurons=1.0))
    assert torch.equal(found, logits(model, policies.Teal(made, Budget(heads=0.5, neurons=1.0))))
    assert not torch.equal(found, logits(model, both(heads=0.5, neurons=0.5)))


def test_bytes_are_those_of_both_parts() -> None:
    model, _ = tiny_host("llama")
    made, budget = calibration(model), Budget(heads=0.5, neurons=0.25)
    policy = policies.TealAttention(made, sketch(model, budget))
    with torch.no_grad(), gnomon.sparsify(model, policy, "mask", protocol="all") as session:
        model(IDS)
    kept = session.density()
    assert kept.heads == 1 and kept.neurons == 0.25
    assert set(kept.channels) == {"q", "k", "v", "out"}
    read = policy.fractions(kept)
    for role in ("q", "k", "v", "out"):
        assert read[role] == kept.channels[role] < 0.75
    assert read["gate"] == read["up"] == read["down"] == 0.25
    assert policy.predictor_bytes > policy.inner.predictor_bytes > 0


def test_a_byte_budget_is_met() -> None:
    model, _ = tiny_host("llama")
    policy = policies.TealAttention(calibration(model), policies.Random(Budget(bytes=0.93)))
    policy.bind(model)
    assert policy.resolved.target("heads") == policy.resolved.target("neurons") < 0.9
    policy = policies.TealAttention(
        calibration(model), policies.Random(Budget(bytes=0.93, heads=0.9))
    )
    policy.bind(model)
    assert policy.resolved.target("neurons") < policy.resolved.target("heads") == 0.9


def test_what_cannot_be_inside_is_refused() -> None:
    model, _ = tiny_host("llama")
    made, half = calibration(model), Budget(density=0.5)
    for inner in (
        policies.Griffin(neurons(half)),
        policies.Teal(made, half),
        policies.Cats(made, neurons(half)),
        policies.Static(predictor(model), half),
        policies.SkipSublayers(layers=[1], inner=sketch(model, half)),
    ):
        with pytest.raises(ValueError, match="use sketch, shadow, dejavu, oracle or random"):
            policies.TealAttention(made, inner)
    for budget in (Budget(density=0.5, spread="global"), Budget(density=0.5, head_unit="group")):
        with pytest.raises(ValueError, match=r"teal_attention does not offer budget\."):
            policies.TealAttention(made, policies.Random(budget))
    with pytest.raises(ValueError, match="needs a calibration"):
        policies.TealAttention(predictor(model), sketch(model, half))  # type: ignore[arg-type]


def test_the_engine_takes_this_rule_and_no_derived_one() -> None:
    class Other(policies.TealAttention):
        def keep_channels(self, role: Any, layer: int, x: Tensor) -> Tensor:
            return x > 0

    model, _ = tiny_host("llama")
    parts = calibration(model), sketch(model, Budget(density=0.5))
    with Engine(model, policies.TealAttention(*parts), context=32) as engine:
        assert isinstance(engine.decider, InputChannels)
    with pytest.raises(UnsupportedPolicyError, match="by a rule of its own"):
        Engine(model, Other(*parts), context=32)


def test_a_fused_linear_is_counted_for_each_of_its_roles() -> None:
    """q, k and v of Phi-3 are one linear: gathered, they read what the mask says that they read."""
    model, _ = tiny_host("phi3")
    found: list[tuple[Counter[Any], dict[str, float]]] = []
    for backend in ("mask", "torch"):
        policy, noted = halved(model), Counter[Any]()
        with torch.no_grad(), gnomon.sparsify(model, policy, backend) as session:
            session.on_decision = lambda what, layer, keep, step, to=noted: to.update([what])
            model.generate(
                IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=256, eos_token_id=None
            )
        found.append((noted, session.density().channels))
    assert found[0] == found[1]
    assert found[0][0]["q"] == found[0][0]["k"] == found[0][0]["v"] > 0
