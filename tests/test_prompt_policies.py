"""Policies that decide from a statistic of the whole prompt: GRIFFIN, GLASS and the prior."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import gnomon
from cases import predictor
from gnomon.accounting import Density, account
from gnomon.budget import Budget
from gnomon.engine.agreement import agree
from gnomon.engine.engine import Engine
from gnomon.hooks import HostHooks
from gnomon.host import describe
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies import Glass, Griffin, Prior, Static
from gnomon.policies.griffin import flocking
from gnomon.tiny import tiny_host

HALF = Budget(neurons=0.5)


def ids_of(rows: int = 1, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def units_of(model, ids: Tensor) -> list[Tensor]:
    """Dense FFN units (B, T, F) of every layer, in float64."""
    found: list[Tensor] = []
    spec = describe(model)
    with torch.no_grad(), HostHooks(model, spec) as hooks:
        for layer in range(spec.L):
            hooks.on_units("neurons", layer, lambda u: found.append(u.double().clone()))
        model(ids, use_cache=False)
    return found


def by_hand(units: Tensor) -> Tensor:
    """s (F,) from the units (tokens, F) of one prompt, as the paper writes it."""
    rows = [row / row.norm() for row in units if row.norm() > 0]
    return torch.stack(rows).norm(dim=0)


def decided(model, policy, forwards: list[Tensor], **how) -> dict:
    """(layer) -> every decision (B, T', F) of forwards on one cache."""
    taken: dict = defaultdict(list)
    with torch.no_grad(), gnomon.sparsify(model, policy, **how) as session:
        session.on_decision = lambda kind, layer, keep, _: taken[layer].append(keep.clone())
        cache = None
        for ids in forwards:
            cache = model(ids, past_key_values=cache, use_cache=True).past_key_values
    return {layer: torch.cat(keeps, dim=1) for layer, keeps in taken.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_griffin_is_its_formula_over_positions_before_the_last(family: str) -> None:
    model, _ = tiny_host(family)
    ids = ids_of(rows=2)
    taken = decided(model, Griffin(HALF), [ids])
    moved = 0
    for layer, units in enumerate(units_of(model, ids)):
        for row in range(2):
            assert torch.equal(taken[layer][row, 0], topk_mask(by_hand(units[row, :-1]), 24))
            moved += int((topk_mask(by_hand(units[row]), 24) != taken[layer][row, 0]).sum())
    assert moved > 0, "the last prompt token would change the sets"


def test_rows_of_zeros_and_padding_add_nothing() -> None:
    units = torch.randn(1, 5, 8)
    units[0, 2] = 0
    valid = torch.tensor([[False, True, True, True, True]])
    summed = flocking(units, valid)
    assert bool(summed.isfinite().all())
    expected = by_hand(units[0, 1:].double()).square()
    torch.testing.assert_close(summed[0].double(), expected, rtol=1e-5, atol=1e-7)
    units[0, 0] = torch.nan  # what a host computes at padding may be anything
    assert torch.equal(flocking(units, valid), summed)


def test_every_prompt_token_but_the_last_is_seen_and_nothing_after() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(rows=2)

    def sets(tokens: Tensor) -> dict:
        taken: dict = {}
        how = {"protocol": "decode", "prompt_length": 7}
        with torch.no_grad(), gnomon.sparsify(model, Griffin(HALF), **how) as session:
            session.on_decision = lambda kind, layer, keep, _: taken.update({layer: keep[:, 0]})
            model(tokens)
        return taken

    base = sets(ids)
    for position, moves in ((0, True), (3, True), (5, True), (6, False), (7, False), (11, False)):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 77) % 256
        other = sets(changed)
        assert all(torch.equal(base[key], other[key]) for key in base) is not moves, position


@pytest.mark.parametrize("make", [Griffin, lambda b: Griffin(b, variant="half")])
@pytest.mark.parametrize("cuts", [(4,), (3, 6), (7,), (8,)])
def test_chunked_prefill_decides_as_one_forward(make, cuts: tuple[int, ...]) -> None:
    """With P = 9 said, chunks may end anywhere, also between P-2 and P-1."""
    model, _ = tiny_host("llama")
    ids = ids_of(rows=2, length=11)
    how = {"prompt_length": 9}
    whole = decided(model, make(HALF), [ids], **how)
    edges = (0, *cuts, 11)
    chunks = [ids[:, a:b] for a, b in zip(edges, edges[1:], strict=False)]
    parts = decided(model, make(HALF), chunks, **how)
    assert whole.keys() == parts.keys()
    for layer, keep in whole.items():
        assert torch.equal(keep, parts[layer]), layer


def test_later_turns_keep_the_set_and_a_new_sequence_gets_its_own() -> None:
    model, _ = tiny_host("llama")
    first, turn, other = ids_of(length=9), ids_of(length=4, seed=1), ids_of(length=9, seed=2)
    policy = Griffin(HALF)
    taken = decided(model, policy, [first, turn, turn[:, :1]])
    alone = decided(model, policy, [first])
    for layer, keep in taken.items():
        assert keep.shape[1] == 1 + 4 + 1
        assert bool((keep == alone[layer]).all())
    fresh = decided(model, policy, [other])
    assert any(not torch.equal(fresh[layer], alone[layer]) for layer in alone)


def test_a_cache_that_is_used_again_begins_anew() -> None:
    model, _ = tiny_host("llama")
    cache = StaticCache(model.config, max_cache_len=32)
    taken: dict = {}
    prompts = [ids_of(length=9, seed=seed) for seed in (0, 2)]
    units = [units_of(model, ids) for ids in prompts]
    with torch.no_grad(), gnomon.sparsify(model, Griffin(HALF)) as session:
        session.on_decision = lambda kind, layer, keep, _: taken.update({layer: keep[0, 0]})
        for ids, own in zip(prompts, units, strict=True):
            model(ids, past_key_values=cache)
            for layer, keep in taken.items():
                assert torch.equal(keep, topk_mask(by_hand(own[layer][0, :-1]), 24))
            cache.reset()


def test_left_padded_rows_decide_as_alone() -> None:
    model, _ = tiny_host("llama")
    short, long = ids_of(length=5, seed=1), ids_of(length=9, seed=2)
    batch = torch.full((2, 9), 256)
    batch[0, 4:], batch[1] = short[0], long[0]
    taken: dict = {}
    with torch.no_grad(), gnomon.sparsify(model, Griffin(HALF)) as session:
        session.on_decision = lambda kind, layer, keep, _: taken.update({layer: keep[:, 0]})
        model.generate(batch, attention_mask=(batch != 256).long(), max_new_tokens=1)
    for row, ids in enumerate((short, long)):
        for layer, keep in decided(model, Griffin(HALF), [ids]).items():
            assert torch.equal(taken[layer][row], keep[0, 0])


def test_a_shared_set_weights_prompts_by_one_over_the_root_of_their_length() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(rows=2, length=10)
    lengths = torch.tensor([4, 10])
    policy = Griffin(HALF, batch="shared")
    taken: dict = {}
    with torch.no_grad(), gnomon.sparsify(model, policy, prompt_length=lengths) as session:
        session.on_decision = lambda kind, layer, keep, _: taken.update({layer: keep})
        model(ids)
    different = 0
    for layer, units in enumerate(units_of(model, ids)):
        parts = [by_hand(units[row, : n - 1]) for row, n in enumerate(lengths.tolist())]
        weighted = parts[0] / 3**0.5 + parts[1] / 9**0.5
        assert torch.equal(taken[layer][0, 0], topk_mask(weighted, 24))
        assert bool((taken[layer] == taken[layer][:1]).all())
        different += int((topk_mask(parts[0] + parts[1], 24) != topk_mask(weighted, 24)).sum())
    assert different > 0, "the weights matter in this example"


def test_sampling_follows_the_statistic_and_half_keeps_the_top_half() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of()
    scores = by_hand(units_of(model, ids)[0][0, :-1])
    draws = [decided(model, Griffin(HALF, variant="sampling", seed=i), [ids])[0] for i in range(60)]
    freq = torch.stack([d[0, 0].double() for d in draws]).mean(0)
    assert all(int(d.sum()) == 24 for d in draws)
    assert 0.5 < float(torch.corrcoef(torch.stack([freq, scores]))[0, 1]) < 0.999
    again = decided(model, Griffin(HALF, variant="sampling", seed=3), [ids])[0]
    assert torch.equal(again, draws[3]) and not torch.equal(again, draws[4])
    half = decided(model, Griffin(HALF, variant="half"), [ids])[0][0, 0]
    top = topk_mask(scores, 12)
    assert int(half.sum()) == 24 and bool(half[top].all())
    assert not torch.equal(half, topk_mask(scores, 24))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_magnitude_ranks_the_weights_alone(family: str) -> None:
    model, _ = tiny_host(family)
    spec = describe(model)
    policy = Griffin(HALF, variant="magnitude")
    assert policy.refresh == "static"
    taken = decided(model, policy, [ids_of()])
    for i, layer in enumerate(spec.layers):
        norms = model.get_submodule(layer.up).weight.double().norm(dim=1)
        if layer.gate:
            norms = norms * model.get_submodule(layer.gate).weight.double().norm(dim=1)
        assert torch.equal(taken[i][0, 0], topk_mask(norms, 24))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["griffin", "shared", "glass", "prior", "prior-shared"])
def test_the_engine_decides_the_same_sets(name: str, rows: int) -> None:
    model, _ = tiny_host("llama")
    policy = {
        "griffin": lambda: Griffin(HALF),
        "shared": lambda: Griffin(HALF, batch="shared"),
        "glass": lambda: Glass(predictor(model), HALF),
        "prior": lambda: Prior(predictor(model, "prior"), HALF),
        "prior-shared": lambda: Prior(predictor(model, "prior"), HALF, batch="shared"),
    }[name]()
    with Engine(model, policy, batch=rows, context=64) as engine:
        found = agree(engine, model, policy, ids_of(rows, 24), 8)
    assert found["sets"] == 1.0 and found["top1"] == 1.0 and found["logits_rms"] < 1e-5


def test_glass_lies_between_griffin_and_static() -> None:
    model, _ = tiny_host("llama")
    made, ids = predictor(model), ids_of(rows=2)

    def sets(policy) -> dict:
        return {layer: keep[:, :1] for layer, keep in decided(model, policy, [ids]).items()}

    local, whole = sets(Griffin(HALF)), sets(Static(made, HALF))
    for found, expected in (
        (sets(Glass(made, HALF, weight=0.0)), local),
        (sets(Glass(made, HALF, weight=1.0)), whole),
    ):
        assert all(torch.equal(found[i], expected[i].expand_as(found[i])) for i in found)
    mixed = sets(Glass(made, HALF, weight=0.3))
    for i, units in enumerate(units_of(model, ids)):
        own = by_hand(units[0, :-1]).argsort().argsort()
        model_rank = made.means["neurons"][i].argsort().argsort()
        assert torch.equal(mixed[i][0, 0], topk_mask(0.7 * own + 0.3 * model_rank, 24))


def test_bytes_are_those_of_the_neurons_and_of_the_ranking_once_per_prompt() -> None:
    model, spec = tiny_host("llama")[0], describe(tiny_host("llama")[0])
    at = Density(1.0, 0.5, 1.0)
    griffin, glass = Griffin(HALF), Glass(predictor(model), HALF)
    for policy in (griffin, glass):
        policy.bind(model)
    found = account(griffin, at)
    assert found.dense_bytes - found.sparse_bytes == 4 * spec.L * 3 * spec.D * spec.F * 0.5
    assert found.predictor_bytes == 0
    assert account(glass, at).predictor_bytes == 4 * spec.L * spec.F / 128


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model, _ = tiny_host("llama")
    made = predictor(model)
    made.info = replace(made.info, criterion="plainact")
    for make, message in (
        (lambda: Griffin(Budget(heads=0.5)), r"budget\.heads=0\.5: policy=griffin decides neurons"),
        (lambda: Griffin(HALF, variant="best"), r"policy\.params\.variant='best': use topk"),
        (lambda: Glass(made, HALF, weight=1.5), r"policy\.params\.weight=1\.5"),
        (lambda: Glass(made, HALF, variant="activation"), "means of plainact"),
        (lambda: Glass(made, HALF, variant="rank"), r"variant='rank': use activation"),
        (lambda: gnomon.policies.build_policy("griffin", HALF, refresh="token"), "griffin"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert Glass(made, HALF, variant="impact").weight == 0.5
    with (
        pytest.raises(ValueError, match="protocol='all' has no prompt"),
        gnomon.sparsify(model, Griffin(HALF), protocol="all"),
    ):
        pass


def test_a_prompt_that_was_not_seen_from_its_start_is_refused() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(length=9)
    with torch.no_grad():
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with (
            gnomon.sparsify(model, Griffin(HALF), prompt_length=9),
            pytest.raises(ValueError, match=r"8\] tokens before its last.*seen \[4\]"),
        ):
            model(ids[:, 4:], past_key_values=cache)
        with (
            gnomon.sparsify(model, Griffin(HALF)),
            pytest.raises(ValueError, match="at least 2 tokens"),
        ):
            model(ids[:, :1], use_cache=True)
        uneven = torch.tensor([5, 9])
        with (
            gnomon.sparsify(model, Griffin(HALF), prompt_length=uneven),
            pytest.raises(ValueError, match="not every prompt ends in this forward"),
        ):
            both = ids_of(rows=2, length=9)
            cache = model(both[:, :6], use_cache=True).past_key_values
