"""prefill=sparse: fixed policies that skip in the prompt too, alike in every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import BACKENDS, FAMILIES, calibration, neurons, predictor
from gnomon import policies
from gnomon.budget import Budget
from gnomon.engine.agreement import agree
from gnomon.engine.engine import Engine
from gnomon.engine.support import UnsupportedPolicyError
from gnomon.evaluation.quality import Protocol, block_nll
from gnomon.host import describe
from gnomon.policies.base import Policy
from gnomon.tiny import byte_tokenizer, tiny_host
from tolerances import TOLERANCE, relative_rms

HALF = Budget(density=0.5)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton runs
GREEDY = {"do_sample": False, "pad_token_id": 256, "eos_token_id": None}
FIXED: dict[str, Callable[..., Policy]] = {
    "static": lambda m, **how: policies.Static(predictor(m), HALF, **how),
    "static-drop": lambda m, **how: policies.Static(predictor(m), HALF, kv="drop", **how),
    "random": lambda m, **how: policies.Random(HALF, refresh="static", **how),
    "griffin": lambda m, **how: policies.Griffin(neurons(HALF), variant="magnitude", **how),
    "skip-attention": lambda m, **how: policies.SkipSublayers(layers=[1], **how),
    "skip-layers": lambda m, **how: policies.SkipSublayers(layers=[1], what="layer", **how),
    "skip-of-static": lambda m, **how: policies.SkipSublayers(
        layers=[1], what="ffn", inner=policies.Static(predictor(m), HALF, **how)
    ),
    "core-of-static": lambda m, **how: policies.Core(
        predictor(m), policies.Static(predictor(m), HALF, **how)
    ),
    "ffsplit": lambda m, **how: policies.FFSplit(calibration(m), heavy=0.25, **how),
    "ffsplit-of-static": lambda m, **how: policies.FFSplit(
        calibration(m), heavy=0.25, inner=policies.Static(predictor(m), HALF), **how
    ),
}
ENGINE = [name for name in FIXED if "ffsplit" not in name]


def ids_of(rows: int = 1, length: int = 14, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, policy: Policy, ids: Tensor, backend: str, **how: Any) -> Tensor:
    """A prompt, then token by token on its cache."""
    with torch.no_grad(), gnomon.sparsify(model, policy, backend, **how) as session:
        out = model(ids[:, :-3], use_cache=True)
        found = [out.logits]
        for t in range(ids.shape[1] - 3, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
        assert session.density().heads <= 1
    return torch.cat(found, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FIXED)
def test_the_prompt_is_as_under_all(name: str, backend: str) -> None:
    """And not as under a dense prefill, where anything is skipped."""
    model, _ = tiny_host("llama")
    model.to(DEVICE)
    ids = ids_of(2).to(DEVICE)
    found = logits(model, FIXED[name](model, prefill="sparse"), ids, backend)
    expected = logits(model, FIXED[name](model), ids, "mask", protocol="all")
    assert relative_rms(found, expected) < TOLERANCE[torch.float32]
    dense = logits(model, FIXED[name](model), ids, "mask")
    moved = relative_rms(dense[:, :-4], expected[:, :-4])
    assert moved == 0 if name == "ffsplit" else moved > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_without_cache_needs_no_boundary(backend: str) -> None:
    model, _ = tiny_host("llama")
    model.to(DEVICE)
    ids, outs = ids_of(2).to(DEVICE), []
    for how in ({}, {"prompt_length": 5}, {"protocol": "all"}):
        policy = FIXED["static"](model, prefill="sparse")
        with torch.no_grad(), gnomon.sparsify(model, policy, backend, **how) as session:
            outs.append(model(ids).logits)
            assert session.gathers == (backend != "mask")
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    with (
        torch.no_grad(),
        gnomon.sparsify(model, FIXED["static"](model), backend),
        pytest.raises(ValueError, match="no prompt boundary"),
    ):
        model(ids)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_agrees_with_the_mask(name: str, rows: int) -> None:
    model, _ = tiny_host("llama")
    policy, ids = FIXED[name](model, prefill="sparse"), ids_of(rows, 18)
    with Engine(model, policy, batch=rows, context=64) as engine:
        found = agree(engine, model, policy, ids, 8)
        assert found["sets"] == 1 and found["top1"] == 1
        assert found["logits_rms"] < TOLERANCE[torch.float32]
        dense = agree(engine, model, FIXED[name](model), ids, 8)
    assert dense["sets"] == 1 and dense["logits_rms"] > 1e-3, "the prompt was not dense"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_the_mask(family: str) -> None:
    model, _ = tiny_host(family)
    for name in ("static", "static-drop"):
        policy = FIXED[name](model, prefill="sparse")
        with Engine(model, policy, context=64) as engine:
            found = agree(engine, model, policy, ids_of(1, 18), 8)
        assert found["sets"] == 1 and found["logits_rms"] < TOLERANCE[torch.float32]
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_triton_agrees_with_the_mask(device: torch.device) -> None:
    model, _ = tiny_host("llama")
    policy = FIXED["static-drop"](model.to(device), prefill="sparse")
    with Engine(model, policy, backend="triton", context=32) as engine:
        found = agree(engine, model, policy, ids_of(1, 6).to(device), 3)
    assert found["sets"] == 1
    assert found["logits_rms"] < (1e-4 if device.type == "cuda" else TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_hosts(dtype: torch.dtype) -> None:
    model, _ = tiny_host("qwen2")  # its q, k and v have biases
    policy = FIXED["static-drop"](model.to(dtype), prefill="sparse")
    with Engine(model, policy, context=64) as engine:
        assert agree(engine, model, policy, ids_of(1, 18), 8)["logits_rms"] < 0.03


def test_the_engines_prefill_reads_the_compacted_weights_alone() -> None:
    """Rule 2 in the prompt: what is not kept may be anything once it has been compacted."""
    model, _ = tiny_host("llama")
    spec, policy = describe(model), FIXED["static"](model, prefill="sparse")
    with Engine(model, policy, context=64) as engine:
        engine.prefill(ids_of())
        expected = engine.step().clone()
        for layer, w in enumerate(engine.weights.layers):
            kept = torch.zeros(spec.F, dtype=torch.bool)
            kept[engine.active("neurons", layer).index[0].long()] = True
            for matrix in (w.up, w.gate, w.down_t):
                matrix.weight[~kept] = torch.nan
            kept = torch.zeros(spec.H, dtype=torch.bool)
            kept[engine.active("heads", layer).index[0].long()] = True
            w.kvq.weight.unflatten(0, (-1, spec.d))[2 * spec.G :][~kept] = torch.nan
            w.out_t.weight.unflatten(0, (-1, spec.d))[~kept] = torch.nan
        engine.prefill(ids_of())
        assert torch.equal(engine.step(), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_continue_as_under_mask(side: str) -> None:
    model, _ = tiny_host("llama")
    batch, mask = ids_of(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :2] = 0, 0
    batch[mask == 0] = 256
    outs = []
    for backend in ("mask", "torch"):
        policy = FIXED["static"](model, prefill="sparse")
        with gnomon.sparsify(model, policy, backend) as session:
            outs.append(
                model.generate(batch, attention_mask=mask, max_new_tokens=8, **GREEDY)[:, 9:]
            )
            counted = session.density()
        assert counted.neurons == pytest.approx(0.5) and counted.heads == pytest.approx(0.5)
    assert torch.equal(*outs)
    if side == "right":
        batch = torch.stack([r.roll(-int(9 - m.sum())) for r, m in zip(batch, mask, strict=True)])
        mask = mask.flip(1)
    with Engine(model, policy, batch=3, context=64) as engine:
        engine.prefill(batch, mask, 8)
        assert torch.equal(torch.cat(list(engine.run(8)), dim=1), outs[0])


def test_padding_does_not_keep_a_prompt_from_being_gathered() -> None:
    model, _ = tiny_host("llama")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    policy = FIXED["static"](model, prefill="sparse")
    with torch.no_grad(), gnomon.sparsify(model, policy, "torch") as session:
        model(ids_of(2, 9), attention_mask=mask, use_cache=True)
        assert session.gathers


def test_generate_is_the_same_everywhere() -> None:
    model, _ = tiny_host("llama")
    policy = FIXED["static"](model, prefill="sparse")
    texts = [
        gnomon.generate(model, byte_tokenizer(), ["the gnomon", "x"], policy, 12, backend)
        for backend in ("auto", "mask", "torch")
    ]
    assert texts[0] == texts[1] == texts[2]


def test_quality_equals_protocol_all_at_the_same_positions() -> None:
    model, _ = tiny_host("llama")
    ids, decode = ids_of(4, 24), Protocol("decode", 8)

    def nll(policy: Policy, protocol: str) -> Tensor:
        with gnomon.sparsify(model, policy, "mask", protocol, decode.prompt_length):
            return block_nll(model, ids, decode, batch=2)

    sparse = nll(FIXED["static"](model, prefill="sparse"), "decode")
    assert torch.equal(sparse, nll(FIXED["static"](model), "all"))
    assert not torch.equal(sparse, nll(FIXED["static"](model), "decode"))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda m: policies.Random(HALF, prefill="sparse"), "policy=random with refresh=token"),
        (
            lambda m: policies.Griffin(neurons(HALF), prefill="sparse"),
            "policy=griffin with refresh=prompt",
        ),
        (
            lambda m: policies.SkipSublayers(
                layers=[1], inner=policies.Shadow(predictor(m), HALF), prefill="sparse"
            ),
            "policy=skip_sublayers with refresh=token",
        ),
        (
            lambda m: policies.build_policy("shadow", HALF, predictor(m), prefill="sparse"),
            "policy=shadow with refresh=token",
        ),
        (
            lambda m: policies.build_policy("teal", HALF, calibration(m), prefill="sparse"),
            "policy=teal with refresh=token",
        ),
    ],
)
def test_contextual_policies_refuse(make: Callable[..., Policy], named: str) -> None:
    model, _ = tiny_host("llama")
    with pytest.raises(ValueError, match=f"{named}.*refresh=static"):
        make(model)


def test_int8_weights_are_refused_before_the_prompt() -> None:
    model, _ = tiny_host("llama")
    named = r"^policy\.prefill='sparse': policy={}.*policy\.prefill=dense"

    def skipping(prefill: str) -> Policy:
        return policies.SkipSublayers(
            layers=[1],
            what="layer",
            inner=policies.DenseInt8(),
            prefill=prefill,  # type: ignore[arg-type]
        )

    with pytest.raises(UnsupportedPolicyError, match=named.format("skip_sublayers")):
        Engine(model, skipping("sparse"), context=64)
    whole = policies.build_policy("dense_int8", HALF, prefill="sparse")  # nothing is skipped
    for policy in (skipping("dense"), whole):
        with Engine(model, policy, context=64) as engine:
            engine.prefill(ids_of())
            assert engine.step().isfinite().all()
    static = FIXED["static"](model, prefill="sparse")
    with (
        Engine(model, context=64) as dense,
        pytest.raises(UnsupportedPolicyError, match=named.format("static")),
    ):
        Engine(model, static, context=64, weights=dense.weights.quantized())
    texts = [
        gnomon.generate(model, byte_tokenizer(), ["the gnomon"], skipping("sparse"), 8, backend)
        for backend in ("auto", "mask")
    ]
    assert texts[0] == texts[1]


def test_building_from_a_config() -> None:
    model, _ = tiny_host("llama")
    for name, params in (
        ("static", {}),
        ("dense", {}),
        ("core", {"inner": FIXED["static"](model)}),
    ):
        made = policies.build_policy(name, HALF, predictor(model), prefill="sparse", **params)
        assert made.prefill == "sparse"
        left = policies.build_policy(name, HALF, predictor(model), prefill=None, **params)
        assert left.prefill == "dense"
    with pytest.raises(ValueError, match="does not offer prefill='none': use dense, sparse"):
        policies.Static(predictor(model), HALF, prefill="none")  # type: ignore[arg-type]
