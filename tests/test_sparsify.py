"""Rules of truth of every backend: identity, the mask bites, causality, honest decisions."""

from __future__ import annotations

import copy
from collections import defaultdict

import pytest
import torch
from torch import Tensor

import gnomon
from cases import BACKENDS, FAMILIES, IN_THE_MEAN, POLICIES, TOKEN_POLICIES, families_of, predictor
from gnomon.budget import Budget
from gnomon.host import KINDS, describe
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies import DejaVu, Dense, DenseInt8, Oracle, Random, Shadow, Static
from gnomon.tiny import tiny_host

HALF = Budget(density=0.5)


def ids_of(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, policy, ids, **how) -> tuple[Tensor, dict]:
    """Logits, and every decision as {(kind, layer): bool (B, T', N)}."""
    taken: dict = defaultdict(list)
    how = {"protocol": "all"} | how
    with torch.no_grad(), gnomon.sparsify(model, policy, **how) as session:
        session.on_decision = lambda kind, layer, keep, _: taken[kind, layer].append(keep.clone())
        logits = model(ids).logits
    return logits, {key: torch.cat(v, dim=1) for key, v in taken.items()}


def settings(name: str) -> dict:
    return {"protocol": "decode", "prompt_length": 5} if "prompt" in name else {"protocol": "all"}


def backends_of(name: str) -> list[str]:
    return BACKENDS[:1] if name == "oracle" else BACKENDS


# Every policy on every family, and every policy on every backend; pairwise between the two.
IDENTITY = [
    (name, family, backend)
    for i, name in enumerate(POLICIES)
    for j, family in enumerate(FAMILIES)
    for k, backend in enumerate(backends_of(name))
    if family in families_of(name) and (backend == "mask" or (i + j) % len(BACKENDS) == k)
]


@pytest.mark.parametrize(("name", "family", "backend"), IDENTITY)
def test_density_one_is_bit_identical_and_exit_leaves_no_trace(
    name: str, family: str, backend: str
) -> None:
    model, _ = tiny_host(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = ids_of()
    dense = model(ids).logits
    how = settings(name) | {"backend": backend}
    full, _ = run(model, POLICIES[name](model, Budget(density=1.0)), ids, **how)
    assert torch.equal(full, dense)
    sparse, taken = run(model, POLICIES[name](model, HALF), ids, **how)
    assert taken and not torch.equal(sparse, dense)
    assert torch.equal(model(ids).logits, dense)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def delete_units(model, keep: dict) -> None:
    """Really deletes: zero columns of the out- and down-projection of units not kept."""
    spec = describe(model)
    with torch.no_grad():
        for (kind, layer), mask in keep.items():
            path = spec.layers[layer].out if kind == "heads" else spec.layers[layer].down
            columns = mask.repeat_interleave(spec.d) if kind == "heads" else mask
            model.get_submodule(path).weight[:, ~columns] = 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_bites_like_deleted_weights(family: str, backend: str) -> None:
    model, _ = tiny_host(family)
    spec = describe(model)
    means = {k: torch.rand(spec.L, spec.units(k)) for k in KINDS}
    ids = ids_of()
    masked, taken = run(model, Static(means, HALF), ids, backend=backend)
    deleted = copy.deepcopy(model)
    delete_units(deleted, {key: keep[0, 0] for key, keep in taken.items()})
    torch.testing.assert_close(masked, deleted(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(masked, model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_skipped_units_feel_nothing_even_nan(kind: str, backend: str) -> None:
    """Everything that makes an unselected unit may become NaN after the decision."""
    model, _ = tiny_host("llama")
    spec = describe(model)
    means = {k: torch.rand(spec.L, spec.units(k)) for k in KINDS}
    budget = Budget(heads=0.5) if kind == "heads" else Budget(neurons=0.5)
    ids = ids_of()
    clean, taken = run(model, Static(means, budget), ids, backend=backend)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        for (_, layer), keep in taken.items():
            path = spec.layers[layer].q if kind == "heads" else spec.layers[layer].up
            rows = keep[0, 0].repeat_interleave(spec.d) if kind == "heads" else keep[0, 0]
            broken.get_submodule(path).weight[~rows] = torch.nan
    poisoned, _ = run(broken, Static(means, budget), ids, backend=backend)
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("name", TOKEN_POLICIES)
@pytest.mark.parametrize("how", [{"protocol": "all"}, {"protocol": "decode", "prompt_length": 4}])
def test_a_later_token_changes_no_earlier_decision(name: str, how: dict) -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(rows=1 if "shared" in name else 2)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    first = run(model, POLICIES[name](model, HALF), ids, **how)
    other = run(model, POLICIES[name](model, HALF), changed, **how)
    start = 0 if how["protocol"] == "all" else how["prompt_length"] - 1
    for key, keep in first[1].items():
        assert torch.equal(keep[:, : 7 - start], other[1][key][:, : 7 - start])
    assert torch.equal(first[0][:, :7], other[0][:, :7])
    assert not torch.equal(first[0][:, 7:], other[0][:, 7:])


@pytest.mark.parametrize("name", ["shadow-prompt", "dejavu-prompt"])
def test_prompt_decisions_see_nothing_after_p_minus_2(name: str) -> None:
    model, _ = tiny_host("llama")
    ids = ids_of()
    policy = POLICIES[name]
    base = run(model, policy(model, HALF), ids, protocol="decode", prompt_length=6)[1]
    for position, moves in ((5, False), (8, False), (4, True)):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 1) % 256
        other = run(model, policy(model, HALF), changed, protocol="decode", prompt_length=6)[1]
        same = all(torch.equal(base[key], other[key]) for key in base)
        assert same is not moves


def test_other_sequences_do_not_matter_unless_shared() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(rows=3)
    alone = run(model, POLICIES["shadow"](model, HALF), ids[:1])
    among = run(model, POLICIES["shadow"](model, HALF), ids)
    for key, keep in alone[1].items():
        assert torch.equal(keep[0], among[1][key][0])
    shared = run(model, POLICIES["shadow-shared"](model, HALF), ids)[1]
    assert all(bool((shared["neurons", i] == shared["neurons", i][:1]).all()) for i in (1, 2))
    assert not bool((shared["heads", 1] == shared["heads", 1][:1]).all())


@pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name in POLICIES for backend in backends_of(name)]
)
def test_achieved_density_meets_the_budget(name: str, backend: str) -> None:
    model, _ = tiny_host("llama", num_hidden_layers=4)
    policy = POLICIES[name](model, Budget(heads=0.75, neurons=0.5))
    how = settings(name) | {"backend": backend}
    with torch.no_grad(), gnomon.sparsify(model, policy, **how) as session:
        model(ids_of())
    density = session.density()
    neurons = 0.5 if "neurons" in policy.kinds else 1.0
    heads = 0.75 if "heads" in policy.kinds else 1.0
    assert policy.resolved.target("heads") == heads
    if "layers-of" in name:  # one of four is gone
        neurons, heads = neurons * 0.75, heads * 0.75
    assert density.neurons == pytest.approx(neurons, abs=0.05 if name in IN_THE_MEAN else 0.01)
    if policy.channels:  # of the attention, not its heads
        heads, read = 1.0, density.channels["q"]
        assert read == pytest.approx(0.75, abs=0.05)
    assert density.heads == pytest.approx(
        heads, abs=0.1 if "threshold" in name else 0.07
    )  # heads come in fours
    assert len(density.per_layer["heads"]) == 4


SPREADS = [
    ("static", Budget(density=0.75, spread="global")),
    ("static", Budget(density=0.75, spread="hybrid", floor=0.6)),
    ("shadow", Budget(density=0.75, spread="global")),
    ("shadow", Budget(density=0.75, spread="hybrid", floor=0.6)),
    ("shadow", Budget(density=0.75, spread="global", head_unit="group")),
    ("shadow-shared", Budget(density=0.75, spread="global")),
    ("dejavu", Budget(density=0.75, spread="global")),
    ("dejavu", Budget(density=0.75, spread="hybrid", floor=0.6)),
]


@pytest.mark.parametrize(
    ("name", "budget"), SPREADS, ids=[f"{n}-{b.spread}-{b.head_unit}" for n, b in SPREADS]
)
def test_global_spreads_meet_the_budget_in_the_mean(name: str, budget: Budget) -> None:
    model, _ = tiny_host("llama", num_hidden_layers=6, intermediate_size=96)
    policy = POLICIES[name](model, budget)
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="all") as session:
        model(ids_of(rows=4, length=64))
    density = session.density()
    tolerance = 0.1 if name == "dejavu" else 0.005  # its threshold was calibrated on other rows
    for kind in KINDS:
        assert getattr(density, kind) == pytest.approx(0.75, abs=tolerance), kind
        layers = density.per_layer[kind]
        if budget.spread == "hybrid":
            assert min(layers) >= 0.5  # two of four heads, 58 of 96 neurons
        else:
            assert max(layers) - min(layers) > 0.01


def test_a_calibrated_threshold_meets_the_budget_on_its_own_rows() -> None:
    model, _ = tiny_host("llama", num_hidden_layers=6, intermediate_size=96)
    made = predictor(model, "dejavu")
    rows = torch.randn(256, len(made.taps), made.width, generator=torch.Generator().manual_seed(3))
    scores = {k: v.detach() for k, v in made(rows).items()}
    q = torch.linspace(0, 1, 201)
    made.calibrate(
        {k: torch.quantile(s.transpose(0, 1).flatten(1), q, dim=1).T for k, s in scores.items()}
    )
    for budget in (Budget(density=0.3, spread="global"), Budget(density=0.3, spread="hybrid")):
        policy = DejaVu(made, budget)
        policy.bind(model)
        values = scores["neurons"]  # of four heads, the one that is always kept would be a quarter
        kept = (values >= policy._threshold("neurons")) | topk_mask(values, policy.least("neurons"))
        assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.01)


def test_dejavu_refuses_what_its_threshold_was_not_calibrated_for() -> None:
    model, _ = tiny_host("llama")
    made = predictor(model, "dejavu")
    wide = Budget(density=0.5, spread="global", head_unit="group")
    with pytest.raises(ValueError, match="calibrates budget.spread='global'"):
        DejaVu(made, wide)
    with pytest.raises(ValueError, match="calibrates budget.spread='global'"):
        DejaVu(made, Budget(density=0.5, spread="global"), batch="shared")


def test_head_groups_are_decided_whole() -> None:
    model, _ = tiny_host("llama")
    policy = POLICIES["shadow"](model, Budget(heads=0.7, head_unit="group"))
    _, taken = run(model, policy, ids_of())
    for (kind, _), keep in taken.items():
        assert kind == "heads"
        pairs = keep.unflatten(-1, (2, 2))
        assert bool((pairs[..., 0] == pairs[..., 1]).all())


def test_oracle_captures_most_magnitude_and_random_least() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(rows=4, length=64)
    dense = model(ids).logits.detach()

    def error(policy) -> float:
        return float((run(model, policy, ids)[0] - dense).norm())

    oracle, random = error(Oracle(HALF)), error(Random(HALF))
    assert oracle < 0.8 * random


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_does_not_depend_on_how_the_text_is_run(backend: str) -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(rows=1, length=12 if backend != "triton" else 5)
    whole = run(model, Random(HALF), ids)[0]
    with torch.no_grad(), gnomon.sparsify(model, Random(HALF), backend, protocol="all"):
        cache, steps = None, []
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    other = run(model, Random(HALF, seed=1), ids)[0]
    assert not torch.allclose(other, whole, atol=1e-3)


def test_random_draws_are_uniform() -> None:
    model, _ = tiny_host("llama", intermediate_size=128)
    _, taken = run(model, Random(Budget(neurons=0.25)), ids_of(rows=1, length=800))
    kept = taken["neurons", 1].float().mean((0, 1))
    assert float((kept - 0.25).abs().max()) < 0.07  # four standard deviations of 800 draws
    a, b = taken["neurons", 0].float(), taken["neurons", 1].float()
    assert float((a * b).mean()) == pytest.approx(0.0625, abs=0.005)


def test_dense_int8_moves_logits_a_little_and_restores_weights() -> None:
    model, _ = tiny_host("llama", tie_word_embeddings=True)
    ids = ids_of()
    dense, weights = model(ids).logits, [p for p in model.parameters()]
    rounded, _ = run(model, DenseInt8(), ids)
    error = float((rounded - dense).norm() / dense.norm())
    assert 0 < error < 0.05
    assert torch.equal(model(ids).logits, dense)
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of()
    dense = model(ids).logits
    with pytest.raises(RuntimeError, match="mine"), gnomon.sparsify(model, DenseInt8()):
        raise RuntimeError("mine")
    assert torch.equal(model(ids).logits, dense)
    with gnomon.sparsify(model, Dense()):
        pass


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"protocol": "sometimes"}, "protocol='sometimes'"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict, message: str) -> None:
    model, _ = tiny_host("llama")
    with pytest.raises(ValueError, match=message), gnomon.sparsify(model, Dense(), **kwargs):
        pass


def test_refusals_name_the_way_out() -> None:
    model, _ = tiny_host("llama")
    prompt = POLICIES["shadow-prompt"](model, HALF)
    with (
        pytest.raises(ValueError, match="protocol='all' has no prompt"),
        gnomon.sparsify(model, prompt, protocol="all"),
    ):
        pass
    with (
        gnomon.sparsify(model, Dense()),
        pytest.raises(ValueError, match="sparsified already"),
        gnomon.sparsify(model, Dense()),
    ):
        pass
    with pytest.raises(ValueError, match="refresh='static'"):
        Shadow(prompt.predictor, HALF, refresh="static")
    with pytest.raises(ValueError, match=r"kv='drop'"):
        Shadow(prompt.predictor, HALF, kv="drop")
    with pytest.raises(ValueError, match="dejavu does not|needs a DejaVu predictor"):
        DejaVu(prompt.predictor, HALF)
    other, _ = tiny_host("llama", seed=5)
    with (
        pytest.raises(ValueError, match="tiny-llama-0.*tiny-llama-5"),
        gnomon.sparsify(other, POLICIES["shadow"](model, HALF)),
    ):
        pass
    with pytest.raises(ValueError, match="policy='griffon' is unknown"):
        gnomon.policies.build_policy("griffon", HALF)
    with pytest.raises(ValueError, match=r"policy.refresh='prompt'"):
        gnomon.policies.build_policy("oracle", HALF, refresh="prompt")
