"""gnomon.find_split: heads, neurons and predictors share a byte budget, by validation text."""

from __future__ import annotations

from typing import Any

import pytest

import gnomon
from cases import predictor
from gnomon import policies
from gnomon.budget import Budget
from gnomon.data.sources import SyntheticText
from gnomon.evaluation import baseline, split
from gnomon.evaluation.split import Point
from gnomon.tiny import tiny_host

TEXT = SyntheticText(block=48, tokens=192)
AT = Budget(bytes=0.93)


@pytest.fixture(autouse=True)
def fresh() -> None:
    baseline.forget()


TEN_HEADS = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 10, "head_dim": 4}


def find(
    make: dict[str, Any], budget: Budget = AT, sizes: Any = None, **how: Any
) -> split.FoundSplit:
    model, tokenizer = tiny_host("llama", **{"intermediate_size": 96} | (sizes or {}))
    return gnomon.find_split(model, tokenizer, make, TEXT, budget, **({"protocol": "all"} | how))


def scripted(monkeypatch: pytest.MonkeyPatch, ratio: Any) -> list[tuple[str, float]]:
    """Replaces the measurement by ``ratio(name, heads)``; returns the points that are tried."""
    tried: list[tuple[str, float]] = []

    def measured(bench: Any, name: str, make: Any, budget: Budget) -> Point:
        tried.append((name, budget.heads))
        found = ratio(name, budget.heads)
        return Point(budget.heads, found, refusal=None if found else "out of reach", name=name)

    monkeypatch.setattr(split, "_measured", measured)
    return tried


def test_densities_that_keep_as_many_heads_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = scripted(monkeypatch, lambda name, heads: heads)
    find(oracles("a"), heads=(1.0, 0.95, 0.8, 0.75, 0.5))  # of four heads
    assert [heads for _, heads in tried] == [1.0, 0.8, 0.5]


def oracles(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, policies.Oracle)


def test_heads_are_given_up_while_the_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = scripted(monkeypatch, lambda name, heads: 1 + abs(heads - 0.8))
    found = find(oracles("a"), sizes=TEN_HEADS)
    assert [heads for _, heads in tried] == [1.0, 0.9, 0.8, 0.7]
    assert found.budget == Budget(bytes=0.93, heads=0.8)
    assert found.point.ratio == 1


def test_the_best_of_several_predictors(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"small": 1.3, "medium": 1.1, "large": 1.2}
    tried = scripted(monkeypatch, lambda name, heads: best[name] + (1 - heads))
    found = find(oracles(*best), sizes=TEN_HEADS)
    assert found.name == "medium"
    assert found.budget.heads == 1.0
    assert tried == [(name, heads) for name in best for heads in (1.0, 0.9)]


def test_a_point_out_of_reach_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, lambda name, heads: None if heads > 0.8 else 2 - heads)
    found = find(oracles("a"), sizes=TEN_HEADS)
    assert found.budget.heads == 0.8
    assert [point.ratio is None for point in found.points] == [True, True, False, False]
    assert found.points[0].as_result() == {"name": "a", "setting": 1.0, "refusal": "out of reach"}


def test_a_real_search_meets_the_bytes_and_takes_the_least_loss() -> None:
    model, _ = tiny_host("llama", intermediate_size=96)
    small, large = (predictor(model, "shadow", rank=r) for r in (2, 16))
    make = {
        "small": lambda b: policies.Shadow(small, b),
        "large": lambda b: policies.Shadow(large, b),
    }
    found = find(make, heads=(1.0, 0.75, 0.5))
    measured = [point for point in found.points if point.ratio is not None]
    assert {point.name for point in found.points} == set(make)
    assert all(point.byte_density < 0.93 + 0.05 for point in measured)  # all neurons may cost less
    assert found.point.ratio == min(point.ratio for point in measured)
    shares = {point.name: point.predictor_byte_share for point in measured}
    assert shares["small"] < shares["large"]
    policy = make[found.name](found.budget)
    policy.bind(model)
    assert policy.resolved.target("heads") == found.budget.heads


def test_bytes_may_be_counted_in_another_dtype() -> None:
    model, _ = tiny_host("llama", intermediate_size=96)
    own = predictor(model, "shadow")
    make = {"shadow": lambda b: policies.Shadow(own, b)}
    whole, half = (find(make, heads=(1.0,), bytes_dtype=d).points[0] for d in (None, "bfloat16"))
    assert half.predictor_byte_share > 1.5 * whole.predictor_byte_share
    assert half.neurons < whole.neurons


def test_what_keeps_all_heads_has_one_point() -> None:
    found = find({"griffin": policies.Griffin}, protocol="decode", prompt=24)
    assert len(found.points) == 1
    assert found.points[0].heads == 1
    given = find(oracles("a"), Budget(bytes=0.93, heads=0.5))
    assert [point.setting for point in given.points] == [0.5]


@pytest.mark.parametrize(
    ("make", "budget", "message"),
    [
        (oracles("a"), Budget(density=0.5), "budget.bytes is not set"),
        (oracles("a"), Budget(bytes=0.93, neurons=0.5), "budget.neurons=0.5 beside"),
        ({}, AT, "something to choose from"),
        (oracles("a"), Budget(bytes=0.1), "budget.bytes=0.1 cannot be reached"),
    ],
    ids=["no bytes", "neurons", "nothing", "out of reach"],
)
def test_what_cannot_be_split_is_refused(make: Any, budget: Budget, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(make, budget)
