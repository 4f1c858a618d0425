"""The student: the masks of inference, and gradients for the predictor alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import predictor
from gnomon.budget import Budget
from gnomon.host import Tap, describe
from gnomon.policies import build_policy
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
    params = how.pop("params", {})
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
@pytest.mark.parametrize("kind", ["shadow", "dejavu"])
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
