"""Budgets and byte accounting, with the worked example of docs/budget.md."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gnomon
from cases import POLICIES, predictor
from gnomon.accounting import Density, account
from gnomon.budget import Budget, global_counts, layer_counts
from gnomon.host import describe
from gnomon.policies import Dense, DenseInt8, Shadow, Static
from gnomon.tiny import tiny_host

# The worked example: L=2, H=4, G=2, F=8 (docs/budget.md).
EXAMPLE = {"num_hidden_layers": 2, "intermediate_size": 8}
MEANS = {
    "heads": torch.tensor([[4.0, 1, 3, 2.5], [8, 7, 6, 5]]),
    "neurons": torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1], [0.8, 0.7, 0.6, 0.5, 9, 10, 11, 12]]),
}


def example():
    model, _ = tiny_host("llama", **EXAMPLE)
    return model, describe(model)


def kept(model, policy) -> dict[str, list[list[int]]]:
    """Indices kept in every layer."""
    found: dict[str, list[list[int]]] = {"heads": [], "neurons": []}
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="all") as session:
        session.on_decision = lambda kind, layer, keep, _: found[kind].append(
            keep[0, 0].nonzero().flatten().tolist()
        )
        model(torch.tensor([[1, 2]]))
    return found


def test_worked_example() -> None:
    model, spec = example()
    assert (spec.L, spec.H, spec.G, spec.F) == (2, 4, 2, 8)
    layer = kept(model, Static(MEANS, Budget(density=0.5)))
    assert layer == {"heads": [[0, 2], [0, 1]], "neurons": [[0, 1, 2, 3], [4, 5, 6, 7]]}
    ranked = kept(model, Static(MEANS, Budget(density=0.5, spread="global")))
    assert ranked == {"heads": [[0], [0, 1, 2]], "neurons": [[0, 1, 2, 3], [4, 5, 6, 7]]}
    ranked = kept(model, Static(MEANS, Budget(neurons=0.25, spread="global")))
    assert ranked == {"heads": [], "neurons": [[0], [5, 6, 7]]}
    floored = kept(model, Static(MEANS, Budget(heads=0.5, spread="hybrid", floor=0.5)))
    assert floored["heads"] == [[0, 2], [0, 1]]
    groups = kept(model, Static(MEANS, Budget(heads=0.5, head_unit="group")))
    assert groups["heads"] == [[2, 3], [0, 1]]


def test_dense_layers_count_and_the_others_go_lower() -> None:
    _, spec = example()
    assert layer_counts(Budget(neurons=0.75), spec, "neurons", [False, True]) == [8, 4]
    assert layer_counts(Budget(neurons=0.75), spec, "neurons", [True, True]) == [6, 6]
    assert layer_counts(Budget(density=0.01), spec, "heads", [True, True]) == [1, 1]
    with pytest.raises(ValueError, match=r"budget.neurons=0.5 keeps no unit.*\[0\]"):
        layer_counts(Budget(neurons=0.5), spec, "neurons", [False, True])


def test_global_counts_keep_the_total_and_the_floor() -> None:
    _, spec = example()
    ranking = MEANS["heads"].tolist()
    assert global_counts(Budget(density=0.5, spread="global"), spec, "heads", ranking) == [1, 3]
    hybrid = Budget(density=0.5, spread="hybrid", floor=0.5)
    assert global_counts(hybrid, spec, "heads", ranking) == [2, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"density": 0.0}, r"budget.density=0.0 is outside \(0, 1\]"),
        ({"density": 1.5}, r"budget.density=1.5 is outside"),
        ({"heads": -1.0}, r"budget.heads=-1.0"),
        ({"bytes": 2.0}, r"budget.bytes=2.0"),
        ({"density": 0.5, "bytes": 0.8}, "exclude each other"),
        ({}, "budget is empty"),
        ({"density": 0.5, "spread": "wide"}, "spread='wide'"),
        ({"density": 0.5, "head_unit": "pair"}, "head_unit='pair'"),
    ],
)
def test_bad_budgets_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


def test_one_kind_alone_leaves_the_other_dense() -> None:
    assert Budget(neurons=0.5).target("heads") == 1.0
    assert Budget(density=0.5, heads=0.7).target("neurons") == 0.5


# -- bytes -----------------------------------------------------------------------------------------


def bound(policy, model):
    policy.bind(model)
    return policy


def test_dense_bytes_are_the_weights_and_the_cache() -> None:
    for family in ("llama", "opt", "gemma2"):
        model, _ = tiny_host(family)
        spec = describe(model)
        result = account(bound(Dense(), model), Density(1, 1, 1), context=10)
        tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        everything = sum(p.numel() for p in model.parameters())
        rows = sum(m.weight.shape[1] for m in tables)
        embeddings = sum(m.weight.numel() for m in tables)
        head = model.get_output_embeddings().weight
        tied = any(head is m.weight for m in tables)
        read = everything - embeddings + rows + (head.numel() if tied else 0)
        assert result.dense_bytes == 4 * (read + spec.L * 2 * spec.G * spec.d * 10)
        assert result.byte_density == 1


def test_sparse_bytes_by_hand() -> None:
    model, spec = example()
    policy = bound(Static(MEANS, Budget(density=0.5)), model)
    full = account(policy, Density(1, 1, 1), context=16, dtype="bfloat16")
    half = account(policy, Density(0.5, 0.25, 0.5), context=16, dtype="bfloat16")
    q_out = 2 * spec.L * spec.H * spec.d * spec.D
    ffn = 3 * spec.L * spec.F * spec.D
    cache = 2 * spec.L * spec.G * spec.d * 16
    saved = 2 * (0.5 * q_out + 0.75 * ffn + 0.5 * cache)
    assert full.sparse_bytes - half.sparse_bytes == pytest.approx(saved)
    assert half.predictor_bytes == 0
    dropped = bound(Static(MEANS, Budget(density=0.5), kv="drop"), model)
    less = account(dropped, Density(0.5, 0.25, 0.5), context=16, dtype="bfloat16")
    kv_proj = 2 * spec.L * spec.G * spec.d * spec.D
    assert half.sparse_bytes - less.sparse_bytes == pytest.approx(2 * 0.5 * kv_proj)


def test_predictors_are_paid_for_by_how_often_they_decide() -> None:
    model, _ = tiny_host("llama")
    made = predictor(model)
    token = bound(Shadow(made, Budget(density=0.5)), model)
    prompt = bound(Shadow(made, Budget(density=0.5), refresh="prompt"), model)
    at = Density(0.5, 0.5, 0.5)
    assert account(token, at).predictor_bytes == made.nbytes
    assert account(prompt, at).predictor_bytes == pytest.approx(made.nbytes / 128)
    free = bound(Static(made, Budget(density=0.5)), model)  # the same host bytes, no predictor
    for policy in (token, prompt):
        paid = account(policy, at)
        assert paid.sparse_bytes - account(free, at).sparse_bytes == pytest.approx(
            paid.predictor_bytes
        )
        assert paid.byte_density == pytest.approx(paid.sparse_bytes / paid.dense_bytes)
    share = account(token, at)
    assert share.predictor_byte_share == pytest.approx(made.nbytes / share.dense_bytes)


@pytest.mark.parametrize("kind", ["shadow", "dejavu"])
def test_a_kind_kept_dense_costs_no_predictor_bytes(kind: str) -> None:
    model, spec = example()
    made = predictor(model, kind)
    both = bound(POLICIES[kind](model, Budget(density=0.75)), model).predictor_bytes
    neurons = bound(POLICIES[kind](model, Budget(neurons=0.75)), model).predictor_bytes
    assert both == made.nbytes == made.bytes_for(("heads", "neurons"))
    own = [m for path, m in made.named_modules() if path in ("outputs.heads", "inner.heads")]
    assert both - neurons == sum(m.nbytes for m in own) > 0


def test_int8_reads_a_byte_a_weight_and_its_scales() -> None:
    model, spec = example()
    policy = bound(DenseInt8(), model)
    result = account(policy, Density(1, 1, 1), context=1, dtype="bfloat16")
    host = policy.bytes
    weights = host.q_out + host.kv_proj + host.ffn + host.head
    rows = spec.L * (4 * 8 + 2 * 2 * 8 + 2 * 32 + 2 * 8) + spec.V
    expected = weights + 4 * rows + 2 * (host.other + host.kv_per_token)
    assert result.sparse_bytes == expected


@pytest.mark.parametrize("name", ["static", "shadow", "dejavu", "random"])
def test_byte_budgets_find_one_density_that_meets_them(name: str) -> None:
    model, _ = tiny_host("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=6)
    policy = POLICIES[name](model, Budget(bytes=0.9))
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="all") as session:
        model(torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0)))
    result = account(policy, session.density())
    assert result.byte_density == pytest.approx(0.9, abs=0.03)
    assert policy.resolved.density is not None and 0 < policy.resolved.density < 1


def test_impossible_byte_budgets_say_what_is_left() -> None:
    model, _ = tiny_host("llama")
    with pytest.raises(ValueError, match=r"budget.bytes=0.05 cannot be reached"):
        bound(POLICIES["static"](model, Budget(bytes=0.05)), model)


def test_a_kind_given_beside_bytes_stays() -> None:
    model, _ = tiny_host("llama", intermediate_size=256)
    policy = bound(POLICIES["static"](model, Budget(bytes=0.9, heads=1.0)), model)
    assert policy.resolved.target("heads") == 1.0 and policy.resolved.target("neurons") < 1
    assert replace(policy.resolved, heads=None).target("heads") < 1
