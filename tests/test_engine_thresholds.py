"""CATS, CHESS and TEAL in the decode engine: the mask's sets and logits, and nothing else read."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import GATED_ONLY, POLICIES, THRESHOLDS, calibration, families_of
from gnomon import policies
from gnomon.budget import Budget
from gnomon.engine.agreement import agree
from gnomon.engine.decide import Dense, PerToken
from gnomon.engine.engine import Engine
from gnomon.engine.passing import Passing
from gnomon.engine.support import UnsupportedPolicyError
from gnomon.policies.base import Policy
from gnomon.tiny import tiny_host
from tolerances import TOLERANCE, relative_rms

HALF = Budget(density=0.5)
EXACT = TOLERANCE[torch.float32]


def ids_of(rows: int = 1, length: int = 18, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def agreement(model: Any, policy: Policy, rows: int = 1, **how: Any) -> dict[str, Any]:
    device = next(model.parameters()).device
    with Engine(model, policy, batch=rows, context=64, **how) as engine:
        assert isinstance(engine.decider, Passing)
        return agree(engine, model, policy, ids_of(rows).to(device), 8)


def assert_same(found: dict[str, Any], tolerance: float = EXACT) -> None:
    assert found["sets"] == 1 and found["top1"] == 1, found
    assert found["logits_rms"] < tolerance, found


@pytest.mark.parametrize(("density", "rows"), [(0.15, 1), (0.5, 6), (0.85, 3)])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_every_density_agrees_with_the_mask(name: str, density: float, rows: int) -> None:
    model, _ = tiny_host("llama")
    assert_same(agreement(model, POLICIES[name](model, Budget(density=density)), rows))


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in THRESHOLDS for f in families_of(n)], ids=str
)
def test_every_family_agrees_with_the_mask(name: str, family: str) -> None:
    model, _ = tiny_host(family)
    assert_same(agreement(model, POLICIES[name](model, HALF), 2))


@pytest.mark.parametrize(
    "overrides",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", THRESHOLDS)
def test_biases_groups_and_activations(name: str, overrides: dict[str, Any]) -> None:
    model, _ = tiny_host("llama", **overrides)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if parameter_name.endswith("bias"):
                p.normal_()
    budget = Budget(density=0.3)  # half of what a ReLU leaves is zero
    assert_same(agreement(model, POLICIES[name](model, budget), 2))


def test_norms_after_the_residual() -> None:
    model, _ = tiny_host("opt", do_layer_norm_before=False)
    assert_same(agreement(model, POLICIES["teal"](model, HALF), 2))


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("teal", Budget(heads=0.5)),
        ("teal", Budget(neurons=0.5)),
        ("teal", Budget(heads=0.3, neurons=0.7)),
        ("chess", Budget(heads=0.5)),
        ("chess", Budget(heads=0.8, neurons=0.2)),
        ("chess", Budget(bytes=0.9)),
        ("cats", Budget(bytes=0.95)),
    ],
    ids=str,
)
def test_every_budget_agrees_with_the_mask(name: str, budget: Budget) -> None:
    model, _ = tiny_host("llama")
    assert_same(agreement(model, POLICIES[name](model, budget)))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("name", "family"), [*((n, "llama") for n in THRESHOLDS), ("teal", "opt")])
def test_triton_agrees_with_the_mask(
    name: str, family: str, rows: int, device: torch.device
) -> None:
    model, _ = tiny_host(family, num_hidden_layers=2)
    model.to(device)
    policy, ids = POLICIES[name](model, HALF), ids_of(rows, 6).to(device)
    with Engine(model, policy, batch=rows, backend="triton", context=32) as engine:
        found = agree(engine, model, policy, ids, 2)
    assert_same(found, 1e-4 if device.type == "cuda" else EXACT)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_density_one_is_the_dense_engine(name: str) -> None:
    model, _ = tiny_host("llama")
    with Engine(model, POLICIES[name](model, Budget(density=1.0)), context=64) as engine:
        assert type(engine.decider) is Dense
        engine.prefill(ids_of())
        found = engine.step().clone()
    with torch.no_grad():
        assert relative_rms(found, model(ids_of()).logits[:, -1]) < EXACT


@pytest.mark.parametrize(
    ("backend", "rows"), [("torch", 1), ("torch", 3), ("triton", 1), ("triton", 2)]
)
@pytest.mark.parametrize(("name", "family"), [*((n, "llama") for n in THRESHOLDS), ("teal", "opt")])
def test_what_does_not_pass_is_not_read(
    name: str, family: str, rows: int, backend: str, device: torch.device
) -> None:
    """Rule 2: after the decision, weights of what no sequence keeps may be anything."""
    model, _ = tiny_host(family, num_hidden_layers=2)
    policy = POLICIES[name](model.to(device), Budget(density=0.3))
    ids = ids_of(rows).to(device)
    with Engine(model, policy, batch=rows, backend=backend, context=32) as engine:
        engine.prefill(ids)
        expected = engine.step(ids[:, -1]).clone()
        assert forget_skipped(engine) > 0
        engine._cache.position.sub_(1)  # type: ignore[union-attr]
        again = engine.step(ids[:, -1])
    assert bool(expected.isfinite().all()) and torch.equal(again, expected)


def forget_skipped(engine: Engine) -> int:
    """Weights of neurons and input channels that no sequence kept become NaN; how many."""
    forgotten = 0
    for layer, w in enumerate(engine.weights.layers):
        matrices = {"out": w.out_t, "gate": w.gate, "up": w.up, "down": w.down_t}
        matrices["q"] = w.kvq if w.q_t is None else w.q_t
        for role, matrix in matrices.items():
            keep = engine.channels(role, layer)  # type: ignore[arg-type]
            if keep is not None and matrix is not None:
                matrix.weight[~keep.any(0)] = torch.nan
                forgotten += int((~keep.any(0)).sum())
        found = engine.active("neurons", layer)
        if found is None:
            continue
        skipped = torch.ones(engine.spec.F, dtype=torch.bool, device=engine.device)
        assert found.count is not None
        for row, held in zip(found.index, found.count.tolist(), strict=True):
            skipped[row[:held].long()] = False
        for weight in (w.up.weight, w.down_t.weight):
            weight[skipped] = torch.nan
        forgotten += int(skipped.sum())
    return forgotten


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_wrong_threshold_is_caught(name: str, factor: float) -> None:
    model, _ = tiny_host("llama")
    policy = POLICIES[name](model, HALF)
    for layer in range(3):
        with Engine(model, policy, context=64) as engine:
            cuts: dict[Any, Tensor] = engine.decider.cuts | engine.decider.gate_cuts  # type: ignore[attr-defined]
            for key, cut in cuts.items():
                if key == layer or key == ("up", layer):
                    cut.mul_(factor)
            found = agree(engine, model, policy, ids_of(), 8)
        assert found["sets"] < 1 and found["logits_rms"] > 1e-3
        policy.bind(model)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "family"), [*((n, "llama") for n in THRESHOLDS), ("teal", "opt")])
def test_ragged_prompts_continue_as_the_mask_does(name: str, family: str, side: str) -> None:
    model, _ = tiny_host(family)
    batch, mask = ids_of(rows=2, length=9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    batch[mask == 0] = 256
    policy = POLICIES[name](model, HALF)
    how = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    with gnomon.sparsify(model, policy, backend="mask"):
        expected = model.generate(batch, attention_mask=mask, **how)[:, 9:]
    if side == "right":
        batch = torch.stack([r.roll(-int(9 - m.sum())) for r, m in zip(batch, mask, strict=True)])
        mask = mask.flip(1)
    with Engine(model, policy, batch=2, context=64) as engine:
        engine.prefill(batch, mask, 10)
        found = torch.cat(list(engine.run(10)), dim=1)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", THRESHOLDS)
def test_generate_runs_the_engine(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_host("llama")
    policy = POLICIES[name](model, HALF)
    write = {"policy": policy, "max_new_tokens": 8}
    texts = gnomon.generate(model, tokenizer, ["the sun", "a"], **write)
    masked = gnomon.generate(model, tokenizer, ["the sun", "a"], **write, backend="mask")
    assert texts == masked and all(texts)
    assert "generic path" not in caplog.text


@pytest.mark.parametrize("name", THRESHOLDS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_host_keeps_its_weights(name: str, family: str) -> None:
    """Own weights are laid out once; those of a dense twin are copied where they are turned."""
    if name in GATED_ONLY and family == "opt":
        return
    model, _ = tiny_host(family)
    policy, ids = POLICIES[name](model, HALF), ids_of()
    before = {key: p.clone() for key, p in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
    with Engine(model, policy, context=64) as engine:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        for layer in engine.weights.layers:
            for matrix in (layer.kvq, layer.q_t, layer.up, layer.gate, layer.down_t, layer.out_t):
                assert matrix is None or matrix.weight.untyped_storage().data_ptr() in own
                assert matrix is None or matrix.weight.is_contiguous()
        with torch.no_grad():
            assert relative_rms(model(ids).logits, expected) < EXACT
    with Engine(model, context=64) as dense:
        with Engine(model, policy, context=64, weights=dense.weights) as sparse:
            assert_same(agree(sparse, model, policy, ids, 4))
            shared = sparse.weights.layers[0].down_t.weight
            assert shared.data_ptr() == dense.weights.layers[0].down_t.weight.data_ptr()
            if sparse.weights.turned:
                with pytest.raises(ValueError, match="share those of an engine without a policy"):
                    Engine(model, context=64, weights=sparse.weights)
        dense.prefill(ids)
        assert relative_rms(dense.step(), expected[:, -1]) < EXACT
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.parameters())


def test_rows_of_int8_are_listed_and_channels_refused() -> None:
    model, _ = tiny_host("llama")
    with Engine(model, policies.DenseInt8(), context=64) as int8:
        for name in ("cats", "chess-ffn"):
            policy = POLICIES[name](model, HALF)
            with Engine(model, policy, context=64, weights=int8.weights) as engine:
                found = agree(engine, model, policy, ids_of(), 8)
            assert found["logits_rms"] < 0.1 and 0.9 < found["sets"] <= 1
        for name in ("chess", "teal"):
            with pytest.raises(UnsupportedPolicyError, match="does not read of int8 weights"):
                Engine(model, POLICIES[name](model, HALF), context=64, weights=int8.weights)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_half_precision_is_nearer_to_fp32_than_the_mask_is(name: str) -> None:
    """Hidden states stay fp32, so a value beside its threshold changes sides less often."""
    model, _ = tiny_host("llama")
    policy, ids = POLICIES[name](model, HALF), ids_of()
    model.half()
    found = []
    for host in (copy.deepcopy(model).float(), model):
        with torch.no_grad(), gnomon.sparsify(host, policy, backend="mask", prompt_length=18):
            found.append(host(ids).logits[:, -1].float())
    with Engine(model, policy, context=64) as engine:
        engine.prefill(ids)
        nearer = relative_rms(engine.step(), found[0])
    assert nearer < 0.01 and nearer < relative_rms(found[1], found[0])


def test_wrapped_gates_are_seen_and_wrapped_channels_refused() -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    cats = policies.Cats(made, Budget(neurons=0.5))
    for wrapped in (
        policies.DenseFallback(cats, layers=(1,)),
        policies.Core(made, policies.Cats(made, Budget(neurons=0.5)), share=0.2),
        policies.SkipSublayers(
            inner=policies.Cats(made, Budget(neurons=0.5)), what="layer", layers=(1,)
        ),
    ):
        for rows in (1, 2):
            with Engine(model, wrapped, batch=rows, context=64) as engine:
                assert type(engine.decider) is PerToken
                assert_same(agree(engine, model, wrapped, ids_of(rows), 8))
    with pytest.raises(UnsupportedPolicyError, match="skips input channels by a rule of its own"):
        Engine(model, policies.DenseFallback(policies.Teal(made, HALF)), context=64)


class Upside(policies.Cats):
    """Keeps small gates: its scores are no longer what CATS' cut was made for."""

    def scores(self, kind: Any, layer: int, seen: Any) -> Tensor:
        return -super().scores(kind, layer, seen)


class Uneven(policies.Teal):
    """A density of its own for one of the linears that one launch reads together."""

    alone = "k"

    def channel_density(self, role: Any, budget: Budget) -> float:
        return 0.3 if role == self.alone else super().channel_density(role, budget)


class UnevenGate(Uneven):
    """The gate's instead of k's."""

    alone = "gate"


def test_a_policy_derived_from_a_threshold_is_not_taken_for_it() -> None:
    """It runs as it decides, or is refused; never as its base."""
    model, _ = tiny_host("llama")
    made = Upside(calibration(model), Budget(neurons=0.5))
    with Engine(model, made, batch=1, context=64) as engine:
        assert isinstance(engine.decider, PerToken)
        assert_same(agree(engine, model, made, ids_of(), 8))
    for uneven in (Uneven, UnevenGate):
        with pytest.raises(UnsupportedPolicyError, match="skips input channels"):
            Engine(model, uneven(calibration(model), HALF), batch=1, context=64)
