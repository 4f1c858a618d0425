"""Whole sublayers left out: formula, cache, bytes, choice, and other policies inside."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gnomon
from cases import calibration, predictor
from gnomon.accounting import Density, account
from gnomon.budget import Budget
from gnomon.host import describe
from gnomon.policies import Cats, Griffin, Shadow, SkipSublayers, Teal
from gnomon.tiny import tiny_host

GREEDY = {"do_sample": False, "pad_token_id": 256, "eos_token_id": None}


def ids_of(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, policy, ids: Tensor, **how) -> tuple[Tensor, Density]:
    how = {"protocol": "all"} | how
    with torch.no_grad(), gnomon.sparsify(model, policy, **how) as session:
        logits = model(ids).logits
        return logits, session.density()


class NoAttention(nn.Module):
    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoFfn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize("backend", ["mask", "torch"])
@pytest.mark.parametrize("what", ["attention", "ffn", "layer"])
def test_the_last_sublayers_are_gone(what: str, backend: str) -> None:
    model, _ = tiny_host("llama", num_hidden_layers=4)
    less = copy.deepcopy(model)
    for layer in less.model.layers[2:]:
        if what != "ffn":
            layer.self_attn = NoAttention()
        if what != "attention":
            layer.mlp = NoFfn()
    if what == "layer":  # nothing is left of them
        less.model.layers = less.model.layers[:2]
    ids = ids_of()
    found, density = run(model, SkipSublayers(Budget(density=0.5), what=what), ids, backend=backend)
    torch.testing.assert_close(found, less(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    assert density.heads == density.groups == (1.0 if what == "ffn" else 0.5)
    assert density.neurons == (1.0 if what == "attention" else 0.5)
    assert density.per_layer["heads"] == [1.0, 1.0, *([1.0] * 2 if what == "ffn" else [0.0] * 2)]


def test_biases_stay() -> None:
    model, _ = tiny_host("opt")
    less = copy.deepcopy(model)
    with torch.no_grad():
        for layer in less.model.decoder.layers[1:]:
            layer.self_attn.out_proj.weight.zero_()
            assert bool(layer.self_attn.out_proj.bias.abs().sum() > 0)
    ids = ids_of()
    for backend in ("mask", "torch"):
        found, _ = run(model, SkipSublayers(layers=[1, 2]), ids, backend=backend)
        torch.testing.assert_close(found, less(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_a_skipped_attention_keeps_no_cache(family: str) -> None:
    model, _ = tiny_host(family, num_hidden_layers=4)
    chunks = [ids_of(2, 9), ids_of(2, 3, 1), ids_of(2, 1, 2), ids_of(2, 1, 3)]
    outs, sizes = [], []
    for backend in ("mask", "torch"):
        policy = SkipSublayers(layers=[0, 2, 3])
        with torch.no_grad(), gnomon.sparsify(model, policy, backend=backend):
            cache, logits = None, []
            for ids in chunks:
                out = model(ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
            outs.append(torch.cat(logits, dim=1))
            sizes.append([layer.keys.shape[-2] for layer in cache.layers])
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-4)
    assert sizes[0] == [14] * 4
    assert sizes[1][1] == 14 and sizes[1][0] == 14, "the host counts tokens in the first layer"
    assert sizes[1][2:] == [0, 0] if family != "gemma3_text" else sizes[1][2:].count(14) < 2


@pytest.mark.parametrize("cache", [None, "static"])
def test_padded_rows_generate_as_under_mask(cache: str | None) -> None:
    model, _ = tiny_host("llama")
    batch, mask = ids_of(2, 9), torch.ones(2, 9, dtype=torch.long)
    batch[0, :4], mask[0, :4] = 256, 0
    outs = []
    for backend in ("mask", "torch"):
        with gnomon.sparsify(model, SkipSublayers(Budget(heads=0.34)), backend=backend):
            outs.append(
                model.generate(
                    batch,
                    attention_mask=mask,
                    max_new_tokens=5,
                    cache_implementation=cache,
                    **GREEDY,
                )
            )
    assert torch.equal(outs[0], outs[1])
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_skipped_weights_are_not_read() -> None:
    model, _ = tiny_host("llama")
    prompt, token = ids_of(1, 6), ids_of(1, 1, 3)
    with (
        torch.no_grad(),
        gnomon.sparsify(model, SkipSublayers(layers=[1, 2], what="layer"), backend="torch"),
    ):
        cache = model(prompt, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        clean = model(token, past_key_values=cache).logits
        for layer in describe(model).layers[1:]:
            for path in layer.linears:
                model.get_submodule(path).weight.fill_(torch.nan)
        poisoned = model(token, past_key_values=again).logits
    assert bool(clean.isfinite().all()) and torch.equal(clean, poisoned)


def test_bytes_of_attention_include_its_cache() -> None:
    model, _ = tiny_host("llama", num_hidden_layers=4)
    spec = describe(model)
    hidden, kv = spec.H * spec.d, spec.G * spec.d
    attention = 2 * hidden * spec.D + 2 * kv * spec.D
    ffn = 3 * spec.F * spec.D
    cats = Cats(calibration(model), Budget(neurons=0.5))
    for policy, expected in (
        (SkipSublayers(Budget(heads=0.75)), attention + 2 * kv * 100),
        (SkipSublayers(Budget(neurons=0.5), what="ffn"), 2 * ffn),
        (SkipSublayers(layers=[1], what="layer"), attention + 2 * kv * 100 + ffn),
        (
            SkipSublayers(layers=[1], what="layer", inner=Griffin(Budget(neurons=0.5))),
            attention + 2 * kv * 100 + ffn + 3 * 0.5 * ffn,
        ),
        (
            SkipSublayers(layers=[3], what="ffn", inner=cats),
            ffn + 3 * ffn * 2 / 3 * 0.5,
        ),
    ):
        how = {"protocol": "decode", "prompt_length": 6} if policy.refresh == "prompt" else {}
        density = run(model, policy, ids_of(4, 64), **how)[1]
        found = account(policy, density, context=100)
        saved = found.dense_bytes - (found.sparse_bytes - found.predictor_bytes)
        near = 0.02 if isinstance(policy.inner, Cats) else 1e-6
        assert saved == pytest.approx(4 * expected, rel=near)


def test_channels_are_those_of_the_sublayers_that_stay() -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    policy = SkipSublayers(layers=[2], what="ffn", inner=Teal(made, Budget(density=0.5)))
    _, density = run(model, policy, ids_of(4, 64))
    assert density.channels["up"] == pytest.approx(0.5, abs=0.05)
    read = policy.fractions(density)
    assert read["up"] == pytest.approx(density.channels["up"] * 2 / 3)
    assert read["q"] == pytest.approx(density.channels["q"])
    outs = [run(model, policy, ids_of(1, 1), backend=b)[0] for b in ("mask", "torch")]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


def test_similarity_takes_the_sublayers_that_change_least() -> None:
    model, _ = tiny_host("llama", num_hidden_layers=4)
    made = calibration(model)
    close = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.7], [0.3, 0.4, 0.9], [0.7, 0.8, 0.1]])
    made.similarity.copy_(close)
    for what, expected in (("attention", {1, 3}), ("ffn", {0, 3}), ("layer", {1, 2})):
        policy = SkipSublayers(Budget(density=0.5), predictor=made, what=what, choose="similarity")
        policy.bind(model)
        kind = "neurons" if what == "ffn" else "heads"
        assert {i for i in range(4) if policy.skips(kind, i)} == expected
    made.similarity[2, 0] = torch.nan
    policy = SkipSublayers(Budget(heads=0.5), predictor=made, choose="similarity")
    with pytest.raises(ValueError, match="does not tell how similar.*use what=layer"):
        policy.bind(model)


def test_inner_policies_decide_in_what_stays() -> None:
    model, _ = tiny_host("llama", num_hidden_layers=4)
    budget = Budget(neurons=0.5)
    twice = SkipSublayers(
        Budget(heads=0.75), inner=SkipSublayers(layers=[0], what="ffn"), keep_last=1
    )
    _, density = run(model, twice, ids_of())
    assert density.per_layer["heads"] == [1, 1, 0, 1] and density.per_layer["neurons"] == [
        0,
        1,
        1,
        1,
    ]
    inner = Shadow(predictor(model), budget)
    policy = SkipSublayers(layers=[3], inner=inner)
    assert policy.refresh == "token" and policy.predictor is inner.predictor
    ids = ids_of(1, 9)
    outs = []
    for backend in ("mask", "torch"):
        with torch.no_grad(), gnomon.sparsify(model, policy, backend=backend) as session:
            cache = model(ids, use_cache=True).past_key_values
            out = model(ids_of(1, 1, 4), past_key_values=cache, use_cache=True)
            outs.append(out.logits)
            found = session.density()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    assert found.heads == 0.75 and found.neurons == pytest.approx(0.5, abs=0.01)
    assert cache.layers[3].keys.numel() == 0


def test_byte_budgets_choose_how_many() -> None:
    model, _ = tiny_host("llama", num_hidden_layers=8)
    policy = SkipSublayers(Budget(bytes=0.8), what="layer")
    density = run(model, policy, ids_of())[1]
    found = account(policy, density).byte_density
    assert found <= 0.8
    one_more = SkipSublayers(layers=list(range(8 - len(policy._skipped) + 1, 8)), what="layer")
    assert account(one_more, run(model, one_more, ids_of())[1]).byte_density > 0.8


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model, _ = tiny_host("llama")
    for make, message in (
        (
            lambda: SkipSublayers(layers=[1, 7]),
            r"layers=\[1, 7\]: host tiny-.* 0 to 2",
        ),
        (lambda: SkipSublayers(Budget(heads=0.3), keep_last=2), "keep_last=2 leaves 1"),
        (
            lambda: SkipSublayers(Budget(heads=0.3), what="mlp"),
            r"what='mlp': use attention",
        ),
        (lambda: SkipSublayers(Budget(heads=0.3), choose="first"), r"params\.choose='first'"),
        (lambda: SkipSublayers(Budget(neurons=0.3)), r"budget\.neurons=0\.3: policy=skip_subl"),
        (lambda: SkipSublayers(), "needs a budget"),
        (lambda: SkipSublayers(Budget(heads=0.5), choose="similarity"), "predictor=calibration"),
        (
            lambda: SkipSublayers(Budget(heads=0.3, neurons=0.6), what="layer"),
            r"budget\.heads=0\.3 and budget\.neurons=0\.6",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make().bind(model)
