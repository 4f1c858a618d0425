"""Held-out metrics on cases small enough to count by hand."""

from __future__ import annotations

import pytest
import torch

from gnomon.predictors.metrics import UnitMetrics, ranks, summary


def test_ranks_share_ties() -> None:
    x = torch.tensor([[3.0, 1.0, 1.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert ranks(x).tolist() == [[4, 1, 1, 3, 1], [2, 2, 2, 2, 2]]


def test_counted_by_hand() -> None:
    means = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    units = UnitMetrics(means, density=0.5)
    truth = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[4.0, 3.0, 2.0, 1.0]]])
    predicted = torch.tensor([[[0.0, 9.0, 1.0, 8.0]], [[4.0, 3.0, 2.0, 1.0]]])
    units.update(predicted[:1], truth[:1])
    units.update(predicted[1:], truth[1:])
    found = units.compute()
    assert found["predictor"]["recall"].item() == pytest.approx((0.5 + 1) / 2)
    assert found["predictor"]["mass"].item() == pytest.approx((6 / 10 + 7 / 10) / 2)
    assert found["static"]["recall"].item() == pytest.approx((0 + 1) / 2)
    assert found["static"]["mass"].item() == pytest.approx((3 / 10 + 7 / 10) / 2)
    assert found["static"]["spearman"].item() == pytest.approx(0)
    assert found["predictor"]["spearman"].item() == pytest.approx((0.4 + 1) / 2)
    assert found["oracle"]["mass"].item() == pytest.approx(0.7)


def test_dense_layers_are_left_out_and_zero_rows_do_no_harm() -> None:
    results, decided = {}, {}
    for kind, n in (("heads", 4), ("neurons", 8)):
        units = UnitMetrics(torch.rand(2, n), 0.5)
        units.update(torch.zeros(3, 2, n), torch.zeros(3, 2, n))
        results[kind], decided[kind] = units.compute(), torch.tensor([False, True])
    out = summary(results, {"heads": 0.5, "neurons": 0.5}, decided, rows=3)
    assert out["heads"]["layers"]["predictor"]["recall"][0] is None
    assert out["neurons"]["mass"] == 1.0 and out["neurons"]["spearman"] == 0.0
    assert out["rows"] == 3 and out["mass"] == 1.0
