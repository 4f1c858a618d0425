"""Objectives against their formulas, and the bias that training starts from."""

from __future__ import annotations

import math

import pytest
import torch

from gnomon.data.codes import top_k
from gnomon.predictors.objectives import (
    Bce,
    Kl,
    Mse,
    Objective,
    Ranking,
    minmax,
    objective,
    total_loss,
)


def test_bce_weighs_negatives_by_the_positive_rate() -> None:
    z, y = torch.randn(4, 3, 10), torch.rand(4, 3, 10) < 0.3
    rate = y.float().mean()
    p = torch.sigmoid(z)
    expected = torch.where(y, -p.log(), -rate * (1 - p).log()).mean()
    torch.testing.assert_close(Bce().loss(z, y), expected)
    expected = torch.where(y, -p.log(), -0.5 * (1 - p).log()).mean()
    torch.testing.assert_close(Bce(0.5).loss(z, y), expected)
    with pytest.raises(ValueError, match="negative_weight"):
        Bce(0)


def test_mse_targets_are_scaled_within_each_row_and_layer() -> None:
    s = torch.rand(2, 3, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None]
    target = minmax(s)
    assert torch.equal(target.amin(-1), torch.zeros(2, 3))
    assert torch.equal(target.amax(-1), torch.ones(2, 3))
    assert minmax(torch.full((1, 1, 4), 7.0)).eq(0).all()
    z = torch.rand(2, 3, 5)
    torch.testing.assert_close(Mse().loss(z, s), (z - target).square().mean())


@pytest.mark.parametrize("k", [3, 6])
def test_ranking_bounds_the_recall_that_is_lost(k: int) -> None:
    z = torch.randn(40, 3, 9)
    y = top_k(torch.rand(40, 3, 9), k / 9)
    expected, misses = [], []
    for scores, kept in zip(z.flatten(0, 1), y.flatten(0, 1), strict=True):
        low, high = scores[kept].sort().values, scores[~kept].sort(descending=True).values
        pairs = list(zip(low.tolist(), high.tolist(), strict=False))
        wrong = sum(b > a for a, b in pairs)
        assert wrong == k - int(kept[scores.topk(k).indices].sum()), "misses are pairs turned over"
        expected.append(sum(math.log1p(math.exp(b - a)) for a, b in pairs) / k)
        misses.append(wrong / k)
    loss = Ranking().loss(z, y)
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert loss / math.log(2) > sum(misses) / len(misses)
    apart = torch.where(y, 1.0, -1.0)
    assert Ranking().loss(50 * apart, y) < 1e-6
    torch.testing.assert_close(Ranking().loss(apart + 8, y), Ranking().loss(apart, y))


def test_ranking_of_odd_labels() -> None:
    z = torch.randn(2, 1, 4, requires_grad=True)
    Ranking().loss(z, torch.ones(2, 1, 4, dtype=torch.bool)).backward()
    assert z.grad is not None and z.grad.eq(0).all(), "nothing to rank"
    with pytest.raises(ValueError, match="these keep 1 to 2"):
        Ranking().loss(z, torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 0]]]).bool())


@pytest.mark.parametrize("chosen", [Mse(), Bce(), Ranking(), Kl()], ids=lambda o: o.name)
def test_training_starts_at_the_fixed_choice(chosen: Objective) -> None:
    means = torch.rand(3, 16) + 0.1
    bias = chosen.bias(means, 0.5)
    assert torch.equal(bias.argsort(-1), means.argsort(-1))
    if not isinstance(chosen, Mse):
        assert bias.ge(0).sum(-1).tolist() == [8, 8, 8]
    assert chosen.bias(torch.zeros(2, 4), 0.5).isfinite().all()
    wide = torch.logspace(-12, 6, 48).expand(3, -1)
    assert isinstance(chosen, Mse) or bool(chosen.bias(wide, 0.5).diff(dim=-1).gt(0).all())


def test_missing_rows_and_names_are_named() -> None:
    with pytest.raises(ValueError, match="known are mse, bce, ranking, kl"):
        objective("rank")
    assert objective("mse").needs == "scores"
    with pytest.raises(ValueError, match="bce needs labels"):
        total_loss(Bce(), {}, {"heads": torch.zeros(1)}, {"heads": 0, "neurons": 0})


def test_kl_anneals_its_mask() -> None:
    chosen = Kl(mask_temperature=1.0, final_mask_temperature=0.25, relaxed=0.5)
    assert chosen.softness(0.0) == (1.0, 0.0)
    assert chosen.softness(0.25) == pytest.approx((0.25**0.25, 0.5))
    assert chosen.softness(1.0) == (0.25, 1.0)
    assert Kl().softness(0.0) == (1.0, 1.0)


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0}, {"mask_temperature": -1.0}, {"relaxed": 1.5}, {"layers_weight": -1.0}],
    ids=lambda f: next(iter(f)),
)
def test_kl_names_a_bad_field(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"objective.{next(iter(fields))}="):
        Kl(**fields)


def test_what_runs_the_host_is_judged_by_its_divergence() -> None:
    assert Bce().monitor == Mse().monitor == ("val/recall", "max")
    assert Kl().monitor == Bce(on_policy=True).monitor == ("val/kl", "min")
    assert Bce(on_policy=True).label == "bce, on policy" and Kl().label == "kl"
