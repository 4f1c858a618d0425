"""Perplexity, its interval, the dense cache and self-generated continuations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import gnomon
from gnomon.evaluation import baseline, quality
from gnomon.evaluation.baseline import dense_nll, host_key
from gnomon.evaluation.generation import compare_generation, greedy_config
from gnomon.evaluation.quality import Protocol, block_nll, perplexity, ratio_interval
from gnomon.policies import Dense, Oracle, Random
from gnomon.tiny import tiny_host

IDS = torch.arange(5 * 24).reshape(5, 24) * 7 % 256
DECODE, ALL = Protocol("decode", 10), Protocol("all", None)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    baseline.forget()


def naive_nll(model, ids, first_target):
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.double()
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[:, first_target - 1 :].sum(1)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
@pytest.mark.parametrize(("protocol", "first"), [(ALL, 1), (DECODE, 10)], ids=["all", "decode"])
def test_block_nll_is_the_plain_sum_over_the_protocols_targets(family, protocol, first):
    model, _ = tiny_host(family)
    found = block_nll(model, IDS, protocol, batch=2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, naive_nll(model, IDS, first), rtol=1e-5, atol=1e-4)


def test_chunks_and_micro_batches_do_not_change_the_sums(monkeypatch, tiny_llama):
    model, _ = tiny_llama
    whole = block_nll(model, IDS, ALL, batch=5)
    monkeypatch.setattr(quality, "_CHUNK_BYTES", 1)
    seen = []
    torch.testing.assert_close(
        block_nll(model, IDS, ALL, batch=2, advance=seen.append), whole, rtol=1e-6, atol=1e-6
    )
    assert seen == [2, 2, 1]


def test_targets_of_a_block():
    assert ALL.targets(512) == 511
    assert Protocol("decode", 256).targets(512) == 256
    with pytest.raises(ValueError, match=r"protocol.prompt=256 leaves no target in text.block=256"):
        Protocol("decode", 256).targets(256)
    with pytest.raises(ValueError, match="protocol='later' is unknown"):
        Protocol("later")
    with pytest.raises(ValueError, match=r"protocol.prompt=None"):
        Protocol("decode", None)


def test_decode_scores_only_targets_predicted_at_sparse_positions(tiny_llama):
    """Under decode the first scored target is predicted at P - 1, where the mask already bites."""
    model, _ = tiny_llama
    policy = Random(gnomon.Budget(density=0.5))
    short, long = IDS[:, :11], IDS[:, :12]
    dense = [naive_nll(model, ids, 10) for ids in (short, long)]
    with gnomon.sparsify(model, policy, prompt_length=10):
        sparse = [block_nll(model, ids, DECODE) for ids in (short, long)]
    assert all((a - b).abs().min() > 1e-6 for a, b in zip(sparse, dense, strict=True))
    density = policy_density(model, policy, long)
    assert density.neurons == pytest.approx(0.5)


def policy_density(model, policy, ids):
    with gnomon.sparsify(model, policy, prompt_length=10) as session:
        block_nll(model, ids, DECODE)
        return session.density()


def test_dense_policy_has_ratio_exactly_one(tiny_llama):
    model, _ = tiny_llama
    dense = block_nll(model, IDS, ALL)
    with gnomon.sparsify(model, Dense(), protocol="all"):
        sparse = block_nll(model, IDS, ALL)
    found = perplexity(sparse, dense, 23)
    assert (found.ratio, found.interval) == (1.0, (1.0, 1.0))
    assert found.tokens == 5 * 23
    assert found.dense == pytest.approx(math.exp(dense.sum().item() / (5 * 23)))


def test_interval_is_paired_seeded_and_near_the_normal_one():
    torch.manual_seed(1)
    dense = 100 + 30 * torch.randn(64, dtype=torch.float64)
    gaps = 5 + 2 * torch.randn(64, dtype=torch.float64)
    low, high = ratio_interval(dense + gaps, dense, 50, seed=3)
    mean, error = gaps.mean().item() / 50, gaps.std().item() / 50 / 8
    assert low == pytest.approx(math.exp(mean - 1.96 * error), rel=2e-3)
    assert high == pytest.approx(math.exp(mean + 1.96 * error), rel=2e-3)
    assert ratio_interval(dense + gaps, dense, 50, seed=3) == (low, high)
    assert ratio_interval(dense + gaps, dense, 50, seed=4) != (low, high)


def test_one_block_has_no_interval():
    one = torch.ones(1, dtype=torch.float64)
    found = perplexity(one * 2, one, 4)
    assert found.interval is None
    assert "ppl_ratio_ci" not in found.as_result()


def test_nan_logits_name_the_blocks(tiny_llama):
    model, _ = tiny_llama
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"NaN or infinite in blocks \[0, 1, 2, 3, 4\].*host.dtype"
    ):
        block_nll(model, IDS, ALL)


def dense_of(model, cache: Path | None, protocol=ALL):
    key = host_key(model, gnomon.describe(model))
    return dense_nll(model, IDS, "digest", protocol, key=key, cache=cache)


def test_dense_baseline_is_computed_once_and_kept_on_disk(monkeypatch, tmp_path, tiny_llama):
    model, _ = tiny_llama
    first = dense_of(model, tmp_path)
    assert len(list(tmp_path.glob("dense/*.json"))) == 1
    monkeypatch.setattr(baseline, "block_nll", lambda *a, **k: pytest.fail("computed again"))
    assert torch.equal(dense_of(model, tmp_path), first)
    baseline.forget()
    assert torch.equal(dense_of(model, tmp_path), first)


@pytest.mark.parametrize("damage", ["", "{}", '{"facts": {}, "nll": [1.0]}', "[1]", "\udcff"])
def test_a_damaged_cache_file_is_computed_again(tmp_path, tiny_llama, damage):
    model, _ = tiny_llama
    first = dense_of(model, tmp_path)
    file = next(tmp_path.glob("dense/*.json"))
    file.write_bytes(damage.encode("utf-8", "surrogateescape"))
    baseline.forget()
    assert torch.equal(dense_of(model, tmp_path), first)


def test_key_tells_dtype_protocol_and_weights_apart(tmp_path, tiny_llama):
    model, _ = tiny_llama
    spec = gnomon.describe(model)
    key = host_key(model, spec)
    dense_of(model, tmp_path)
    dense_of(model, tmp_path, DECODE)
    assert len(list(tmp_path.glob("dense/*.json"))) == 2
    with torch.no_grad():  # same signs, as in a quantised copy: the spec's hash does not see it
        model.model.layers[0].mlp.down_proj.weight.mul_(1.01)
    assert gnomon.describe(model).hash == spec.hash
    assert host_key(model, spec) != key
    assert host_key(model.to(torch.bfloat16), spec)["dtype"] == "bfloat16"


def test_a_dense_policy_agrees_with_itself(tiny_llama):
    model, _ = tiny_llama
    found = compare_generation(model, Dense(), IDS[:3, :8], tokens=6, batch=2)
    assert found.agreement == 1.0
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.as_result()["tokens"] == 6


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generation_matches_a_loop_without_cache(family):
    """KL and agreement against re-running the sparse model on its own text, one step at a time."""
    model, _ = tiny_host(family)
    policy, rows, steps = Oracle(gnomon.Budget(density=0.4)), IDS[:2, :8], 5
    found = compare_generation(model, policy, rows, tokens=steps)
    text, kl, agree = rows, 0.0, 0
    eos = model.generation_config.eos_token_id
    for _ in range(steps):
        with torch.no_grad():
            dense = model(input_ids=text, use_cache=False).logits[:, -1]
            with gnomon.sparsify(model, policy, prompt_length=8):
                sparse = model(input_ids=text, use_cache=False).logits[:, -1]
        p, q = dense.log_softmax(-1), sparse.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        chosen = sparse.clone()
        chosen[:, eos] = -torch.inf
        text = torch.cat([text, chosen.argmax(-1, keepdim=True)], 1)
    assert found.kl == pytest.approx(kl / (2 * steps), rel=1e-3)
    assert found.kl > 0.01
    assert found.agreement == agree / (2 * steps)


def test_a_continuation_beyond_the_context_is_refused_at_once(tiny_llama):
    model, _ = tiny_llama
    with pytest.raises(ValueError, match=r"1030 tokens .* context of 1024.*generation.tokens"):
        compare_generation(model, Dense(), IDS[:1, :10], tokens=1020)


def test_greedy_ignores_the_hosts_own_sampling_defaults(tiny_llama):
    model, _ = tiny_llama
    plain = compare_generation(model, Random(gnomon.Budget(density=0.5)), IDS[:2, :8], tokens=6)
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    again = compare_generation(model, Random(gnomon.Budget(density=0.5)), IDS[:2, :8], tokens=6)
    assert again == plain
    assert greedy_config(model, 6, exactly=True).min_new_tokens == 6
