"""The decode engine: the very sets and logits of ``mask``, prefill, generation, life and errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import gnomon
from cases import ENGINE_POLICIES, FAMILIES, POLICIES, PROMPT_POLICIES, predictor
from gnomon import policies
from gnomon.budget import Budget
from gnomon.engine import graph
from gnomon.engine.agreement import agree
from gnomon.engine.decide import Dense, Fixed, Fused, PerToken
from gnomon.engine.engine import Engine
from gnomon.engine.sampling import Sampling, next_token
from gnomon.engine.support import UnsupportedPolicyError, bucket
from gnomon.engine.text import GrowingText
from gnomon.host import KINDS
from gnomon.policies.base import Policy
from gnomon.runtime import generate as module
from gnomon.tiny import byte_tokenizer, tiny_host
from tolerances import TOLERANCE, relative_rms

HALF = Budget(density=0.5)
RUNNABLE = ENGINE_POLICIES
DECIDERS = {"random": PerToken, "static": Fixed, "shadow": Fused, "dejavu": Fused}


def ids_of(rows: int = 1, length: int = 18, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def agreement(model: Any, policy: Policy | None, rows: int = 1, **how: Any) -> dict[str, Any]:
    device = next(model.parameters()).device
    with Engine(model, policy, batch=rows, context=64, **how) as engine:
        return agree(engine, model, policy, ids_of(rows).to(device), 8)


def assert_same(found: dict[str, Any], tolerance: float = TOLERANCE[torch.float32]) -> None:
    assert found["sets"] == 1 and found["top1"] == 1, found
    assert found["logits_rms"] < tolerance, found


@pytest.mark.parametrize("refresh", ["token", "prompt"])
def test_agreement_sees_other_sets(refresh: Any) -> None:
    """An engine that decides by another draw than the reference is told from one that agrees."""
    model = tiny_host("llama")[0]
    budget = Budget(density=0.5)
    ours, other = (policies.Random(budget, refresh, seed=seed) for seed in (0, 1))
    with Engine(model, ours, context=64) as engine:
        found = agree(engine, model, other, ids_of(), 8)
    assert 0.1 < found["sets"] < 0.6 and found["logits_rms"] > 0.1
    with Engine(model, None, context=64) as engine:
        assert agree(engine, model, ours, ids_of(), 8)["sets"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", RUNNABLE)
def test_every_policy_agrees_with_the_mask(name: str, rows: int) -> None:
    model, _ = tiny_host("llama")
    assert_same(agreement(model, POLICIES[name](model, HALF), rows))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [None, "random", "shadow", "dejavu", "shadow-prompt"])
def test_every_family_agrees_with_the_mask(name: str | None, family: str) -> None:
    model, _ = tiny_host(family)
    assert_same(agreement(model, POLICIES[name](model, HALF) if name else None, 2))


SPREADS = [
    ("shadow", Budget(density=0.6, spread="global")),
    ("shadow", Budget(density=0.6, spread="hybrid")),
    ("dejavu", Budget(density=0.6, spread="global")),
    ("static", Budget(density=0.6, spread="global")),
    ("random", Budget(density=0.6, spread="global")),
    ("shadow-prompt", Budget(density=0.6, spread="global")),
    ("shadow", Budget(density=0.6, head_unit="group")),
    ("dejavu", Budget(density=0.6, head_unit="group")),
    ("shadow", Budget(heads=0.6)),
    ("shadow", Budget(neurons=0.5)),
    ("shadow", Budget(density=1.0)),
    ("dejavu-lookahead", Budget(bytes=0.95)),
]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("name", "budget"), SPREADS, ids=str)
def test_every_budget_agrees_with_the_mask(name: str, budget: Budget, rows: int) -> None:
    model, _ = tiny_host("llama")
    assert_same(agreement(model, POLICIES[name](model, budget), rows))


@pytest.mark.parametrize("name", ["shadow", "random", "shadow-prompt", "static", "dejavu"])
def test_triton_agrees_with_the_mask(name: str, device: torch.device) -> None:
    model, _ = tiny_host("llama")
    model.to(device)
    with Engine(model, POLICIES[name](model, HALF), backend="triton", context=32) as engine:
        found = agree(engine, model, engine.policy, ids_of(length=6).to(device), 2)
    assert_same(found, 1e-4 if device.type == "cuda" else TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("name", "rows", "backend"),
    [
        *(("random", rows, "torch") for rows in (2, 4, 8, 24)),
        *(("shadow", rows, "torch") for rows in (1, 2, 8)),
        *((name, 8, "torch") for name in ("shadow-shared", "shadow-prompt", "dejavu", "static")),
        *((name, 4, "triton") for name in ("random", "shadow-shared")),
        ("shadow", 8, "triton"),
    ],
)
def test_what_no_sequence_keeps_is_not_read(
    name: str, rows: int, backend: str, device: torch.device
) -> None:
    """Rule 2 in batches: after the decision, weights that no sequence keeps may be anything."""
    size = 192 if backend == "torch" else 96
    model, _ = tiny_host("llama", num_hidden_layers=2, intermediate_size=size)
    density = 0.6 if "shadow" in name else 0.25  # a shadow keeps its source layer whole
    policy = POLICIES[name](model.to(device), Budget(density=density))
    ids = ids_of(rows).to(device)
    with Engine(model, policy, batch=rows, backend=backend, context=32) as engine:
        engine.prefill(ids)
        expected = engine.step(ids[:, -1]).clone()
        assert forget_unselected(engine) > 0
        engine._cache.position.sub_(1)  # type: ignore[union-attr]
        again = engine.step(ids[:, -1])
    assert bool(expected.isfinite().all()) and torch.equal(again, expected)


@pytest.mark.parametrize("name", ["shadow", "random", "shadow-prompt", "static"])
def test_debug_checks_see_nothing_in_a_right_engine(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """On a GPU the captured steps carry the checks."""
    monkeypatch.setenv("GNOMON_DEBUG", "1")
    model, _ = tiny_host("llama")
    policy = POLICIES[name](model.to(device), HALF)
    with Engine(model, policy, batch=3, context=32) as engine:
        found = agree(engine, model, policy, ids_of(3).to(device), 4)
    assert_same(found, 1e-4 if device.type == "cuda" else TOLERANCE[torch.float32])


def forget_unselected(engine: Engine) -> int:
    """Weights of units that no sequence kept in the last step become NaN; how many units."""
    forgotten = 0
    for layer, w in enumerate(engine.weights.layers):
        for kind in KINDS:
            found = engine.active(kind, layer)
            if found is None:
                continue
            left = torch.ones(engine.spec.units(kind), dtype=torch.bool, device=engine.device)
            left[found.index.flatten().long()] = False
            forgotten += int(left.sum())
            rows = left.repeat_interleave(engine.spec.d) if kind == "heads" else left
            q = w.kvq.weight[2 * engine.spec.G * engine.spec.d :]
            heads = kind == "heads"
            for weight in (q, w.out_t.weight) if heads else (w.up.weight, w.down_t.weight):
                weight[rows] = torch.nan
            if not heads and w.gate is not None:
                w.gate.weight[rows] = torch.nan
    return forgotten


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", ["static", "prompt"])
def test_dropped_kv_agrees_and_is_not_written(name: str, groups: int) -> None:
    model, _ = tiny_host("llama", num_key_value_heads=groups)
    budget = Budget(heads=0.25, neurons=0.5)
    own = predictor(model, tap=gnomon.Tap(0))
    policy: Policy = policies.Static(own, budget, kv="drop")
    if name == "prompt":
        policy = policies.Shadow(own, budget, refresh="prompt", kv="drop")
    with Engine(model, policy, context=64) as engine:
        assert_same(agree(engine, model, policy, ids_of(), 8))
        cache = engine._cache
        active = engine.active("heads", 1)
        assert cache is not None and active is not None and active.groups == 1
        kept = active.slot.view(groups, -1).ge(0).any(-1)
        written = cache.keys[1][0, :, 11:18].abs().sum((1, 2)) > 0
        assert torch.equal(written, kept)


@pytest.mark.parametrize(("name", "cls"), DECIDERS.items())
def test_each_policy_takes_its_fastest_decider(name: str, cls: type) -> None:
    model, _ = tiny_host("llama")
    with Engine(model, POLICIES[name](model, HALF), context=64) as engine:
        assert type(engine.decider) is cls
        assert engine.kind == "lean" and engine.ops.name == "torch"
    with Engine(model, policies.Dense(), context=64) as engine:
        assert type(engine.decider) is Dense


def test_a_quantised_predictor_decides_the_same() -> None:
    model, _ = tiny_host("llama")
    for kind in ("shadow", "dejavu"):
        small = predictor(model, kind).quantize()
        policy = policies.POLICIES[kind](small, HALF)
        assert_same(agreement(model, policy, 2))
        assert policy.predictor.quantized
        assert all(b.dtype == torch.int8 for n, b in small.named_buffers() if n.endswith(".q"))


def test_int8_weights_stay_near_their_policy() -> None:
    """Scales belong to units here and to outputs there: near, not equal."""
    model, _ = tiny_host("llama")
    found = agreement(model, policies.DenseInt8())
    assert 1e-6 < found["logits_rms"] < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hosts(dtype: torch.dtype) -> None:
    model, _ = tiny_host("llama")
    found = agreement(model.to(dtype), POLICIES["static"](model, HALF))
    assert found["sets"] == 1 and found["logits_rms"] < 0.03


def test_decode_of_fixed_sets_reads_compact_weights_alone() -> None:
    model, _ = tiny_host("llama")
    with Engine(model, POLICIES["shadow-prompt"](model, Budget(density=0.7)), context=64) as engine:
        engine.prefill(ids_of())
        expected = [engine.step().clone() for _ in range(4)]
        engine.prefill(ids_of())
        keep = {id(layer) for layer in engine._active_weights.layers}
        for layer in engine.weights.layers:
            if id(layer) not in keep and layer.up is not engine._active_weights.layers[0].up:
                layer.up.weight.fill_(torch.nan)
                layer.kvq.weight.fill_(torch.nan)
        found = [engine.step().clone() for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", PROMPT_POLICIES)
def test_the_next_sequence_reuses_the_buffers(name: str) -> None:
    model, _ = tiny_host("llama")
    policy = POLICIES[name](model, HALF)
    first, second = ids_of(seed=1), ids_of(seed=2)
    with Engine(model, policy, context=64) as engine:
        agree(engine, model, policy, first, 4)
        buffers = [layer.up.weight.data_ptr() for layer in engine._active_weights.layers]
        steps = dict(engine._steps)
        assert_same(agree(engine, model, policy, second, 4))
        assert buffers == [layer.up.weight.data_ptr() for layer in engine._active_weights.layers]
        assert engine._steps == steps, "sets of the same sizes need no new capture"


def test_dense_and_sparse_engines_share_weights_and_interleave() -> None:
    model, _ = tiny_host("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    policy = POLICIES["shadow"](model, HALF)
    ids = ids_of()
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
    with (
        Engine(model, context=64) as dense,
        Engine(model, policy, context=64, weights=dense.weights) as sparse,
    ):
        assert sparse.weights is dense.weights
        for engine in (dense, sparse):
            engine.prefill(ids)
        a, b = dense.step().clone(), sparse.step().clone()
        for engine in (dense, sparse):
            engine.step()
    assert relative_rms(a, expected) < TOLERANCE[torch.float32]
    assert relative_rms(b, expected) > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.parameters())


def continued(model: Any, policy: Policy, batch: Tensor, mask: Tensor, **how: Any) -> Tensor:
    with gnomon.sparsify(model, policy, backend="mask"):
        out = model.generate(batch, attention_mask=mask, do_sample=False, pad_token_id=256, **how)
    return out[:, batch.shape[1] :]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["shadow", "shadow-prompt", "shadow-shared", "dejavu"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_ragged_prompts_continue_as_the_mask_does(name: str, family: str, side: str) -> None:
    model, _ = tiny_host(family)
    batch, mask = ids_of(rows=3, length=9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :2] = 0, 0
    batch[mask == 0] = 256
    policy = POLICIES[name](model, HALF)
    expected = continued(model, policy, batch, mask, max_new_tokens=10, eos_token_id=None)
    if side == "right":
        batch = torch.stack([r.roll(-int(9 - m.sum())) for r, m in zip(batch, mask, strict=True)])
        mask = mask.flip(1)
    with Engine(model, policy, batch=3, context=64) as engine:
        engine.prefill(batch, mask, 10)
        found = torch.cat(list(engine.run(10)), dim=1)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["shadow-shared", "shadow"])
def test_rows_that_end_stop_voting_and_go_on_with_padding(name: str) -> None:
    model, _ = tiny_host("llama")
    batch, mask = ids_of(rows=2, length=9, seed=3), torch.ones(2, 9, dtype=torch.long)
    policy = POLICIES[name](model, HALF)
    with Engine(model, policy, batch=2, context=64) as engine:
        engine.prefill(batch, mask, 12)
        free = torch.cat(list(engine.run(12)), dim=1)
        stop = int(free[0, 2])
        model.generation_config.eos_token_id = stop
        expected = continued(model, policy, batch, mask, max_new_tokens=12, eos_token_id=stop)
        engine.prefill(batch, mask, 12)
        found = torch.cat(list(engine.run(12, [stop], pad=256, every=3)), dim=1)
    width = expected.shape[1]
    assert found[:, :width].tolist() == expected.tolist()
    assert bool((found[:, width:] == 256).all()) and found.shape[1] - width < 3


def test_a_prompt_of_one_token() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(length=1)
    policy = POLICIES["shadow"](model, HALF)
    expected = continued(
        model, policy, ids, torch.ones_like(ids), max_new_tokens=5, eos_token_id=None
    )
    with Engine(model, policy, context=64) as engine:
        engine.prefill(ids, None, 5)
        assert torch.cat(list(engine.run(5)), dim=1).tolist() == expected.tolist()
    with (
        Engine(model, POLICIES["shadow-prompt"](model, HALF), context=64) as engine,
        pytest.raises(ValueError, match="at least 2 tokens"),
    ):
        engine.prefill(ids)


def test_context_buckets() -> None:
    assert [bucket(n, 5000) for n in (1, 512, 513, 3000, 4097)] == [512, 512, 1024, 4096, 5000]
    assert bucket(10, 64) == 64
    model, _ = tiny_host("llama")
    with Engine(model, context=1000) as engine:
        engine.prefill(ids_of(), None, 4)
        assert engine._cache is not None and engine._cache.capacity == 512
        engine.step()
        engine.prefill(ids_of(), None, 600)
        assert engine._cache.capacity == 1000 and not engine._steps


ERRORS: list[tuple[str, dict[str, Any]]] = [
    ("backend='mask' has no decode engine", {"backend": "mask"}),
    ("batch=0: use 1 or more", {"batch": 0}),
    ("context=0: use 1 or more", {"context": 0}),
]


@pytest.mark.parametrize(("message", "how"), ERRORS, ids=[m for m, _ in ERRORS])
def test_engine_refuses(message: str, how: dict[str, Any]) -> None:
    model, _ = tiny_host("llama")
    with pytest.raises(ValueError, match=message):
        Engine(model, **how)
    assert all(p.is_contiguous() for p in model.parameters())


def test_engine_refuses_what_it_cannot_run() -> None:
    model, _ = tiny_host("llama")
    with pytest.raises(UnsupportedPolicyError, match="policy=oracle"):
        Engine(model, policies.Oracle(HALF))
    other, _ = tiny_host("llama", seed=1)
    with pytest.raises(ValueError, match="was trained for host"):
        Engine(model, POLICIES["shadow"](other, HALF))
    with Engine(model, batch=2, context=32) as engine:
        with pytest.raises(ValueError, match="call prefill first"):
            engine.step()
        with pytest.raises(ValueError, match=r"speed\.batch"):
            engine.prefill(ids_of(1))
        with pytest.raises(ValueError, match=r"speed\.context"):
            engine.prefill(ids_of(2), None, 20)
        with pytest.raises(ValueError, match="prompt is empty"):
            engine.prefill(ids_of(2), torch.zeros(2, 18))
        engine.prefill(ids_of(2, 30))
        for _ in range(3):
            engine.step()
        with pytest.raises(ValueError, match="exceed the 32 reserved"):
            engine.step()
        with pytest.raises(ValueError, match="16 at most"):
            next(engine.run(0, range(17)), None)
    with (
        Engine(model, context=32) as engine,
        gnomon.sparsify(model, POLICIES["static"](model, HALF)),
        pytest.raises(ValueError, match="sparsified"),
    ):
        engine.prefill(ids_of())


def test_out_of_memory_names_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_host("llama")

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with Engine(model, context=64) as engine:
        monkeypatch.setattr("gnomon.engine.engine.Cache", full)
        with pytest.raises(ValueError, match=r"batch=1 and context=64.*speed\.batch"):
            engine.prefill(ids_of())
    monkeypatch.setattr("gnomon.engine.weights.StepWeights.quantized", full)
    with pytest.raises(ValueError, match="out of GPU memory"):
        Engine(model, policies.DenseInt8())
    assert all(p.is_contiguous() for p in model.parameters()), "nothing is left laid out"


# -- graph, sampling, text -----------------------------------------------------------------------


def test_a_failing_capture_names_the_operator() -> None:
    failure: list[graph.CaptureError] = []

    def step() -> None:
        torch.ones(2).add(1)
        bad = torch.ones(2, 3) @ torch.ones(2, 3)
        assert bad is None

    with pytest.raises(RuntimeError):
        graph.named(step, failure)
    assert "aten.mm" in str(failure[0]) and "CUDA graph" in str(failure[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_step_is_captured_once_and_replayed() -> None:
    model, _ = tiny_host("llama")
    policy = POLICIES["shadow"](model.cuda(), HALF)
    with Engine(model, policy, context=64) as engine:
        assert agree(engine, model, policy, ids_of().cuda(), 8)["logits_rms"] < 1e-4
        assert all(replay.captured for replay, *_ in engine._steps.values())
        ids = ids_of(length=9).cuda()
        drawn = []
        for _ in range(2):
            engine.prefill(ids, None, 12)
            engine.seed(3)
            drawn.append(torch.cat(list(engine.run(12, sampling=Sampling(1.0))), dim=1))
    assert torch.equal(*drawn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_wait_for_the_host_cannot_be_captured() -> None:
    x = torch.ones(2, device="cuda")

    def waits() -> None:
        x.mul_(x.sum().item())

    with pytest.raises(graph.CaptureError, match="_local_scalar_dense"):
        graph.Replay(waits, x.device)


def test_sampling_draws_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).repeat(40_000, 1)
    for sampling, z in (
        (Sampling(1.0), logits[0]),
        (Sampling(0.5), logits[0] / 0.5),
        (Sampling(1.0, top_k=2), torch.tensor([2.0, 1.0, -torch.inf, -torch.inf])),
        (Sampling(1.0, top_p=0.7), torch.tensor([2.0, 1.0, -torch.inf, -torch.inf])),
        (Sampling(1.0, top_k=3, top_p=0.5), torch.tensor([2.0] + [-torch.inf] * 3)),
        (Sampling(), torch.tensor([2.0] + [-torch.inf] * 3)),
    ):
        drawn = next_token(logits, sampling, torch.Generator().manual_seed(0))
        share = drawn.bincount(minlength=4) / len(drawn)
        torch.testing.assert_close(share, z.softmax(-1), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "how",
    [{"temperature": -1.0}, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.0, "top_p": 1.5}]
    + [{"top_k": 5}],
    ids=str,
)
def test_sampling_refuses(how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature=|top_k=|top_p="):
        Sampling(**how)


def test_growing_text_holds_back_what_may_change() -> None:
    tokenizer = byte_tokenizer()
    text = GrowingText(tokenizer, ["STOP"], [257])
    ids = tokenizer("aä xST").input_ids
    assert text.add(ids[:2]) == "a", "half a character waits"
    assert text.add(ids[2:]) == "ä x", "what may become the stop string waits"
    assert text.add(tokenizer("ICK STO").input_ids) == "STICK "
    assert text.add(tokenizer("Prest").input_ids) == "" and text.finished
    assert text.add([65]) == "" and text.close() == "" and text.text == "aä xSTICK "
    ended = GrowingText(tokenizer, ["STOP"], [257])
    assert ended.add([*tokenizer("ST").input_ids, 257, 65]) == "ST" and ended.finished


# -- gnomon.generate ------------------------------------------------------------------------------


def write(model: Any, prompt: Any, **how: Any) -> Any:
    policy = how.pop("policy", None) or POLICIES["shadow"](model, HALF)
    return gnomon.generate(
        model, byte_tokenizer(), prompt, policy, **({"max_new_tokens": 16} | how)
    )


def test_generate_streams_stops_and_agrees_with_the_mask() -> None:
    model, _ = tiny_host("llama")
    prompts = ["the shadow", "a dial", "x"]
    whole = write(model, prompts)
    assert whole == write(model, prompts, backend="mask") == write(model, prompts, backend="torch")
    for backend in ("auto", "mask"):
        pieces: list[tuple[int, str]] = []

        def show(row: int, piece: str, pieces: list[tuple[int, str]] = pieces) -> None:
            pieces.append((row, piece))

        out = write(model, prompts, backend=backend, stream=show)
        assert out == whole and len(pieces) > 6
        joined = ["".join(s for i, s in pieces if i == row) for row in range(3)]
        assert joined == whole
        stop = whole[0][3:5]
        cut = [text[: text.find(stop)] if stop in text else text for text in whole]
        assert write(model, prompts, backend=backend, stop=stop) == cut
    token = byte_tokenizer()(whole[0]).input_ids[4]
    assert len(write(model, prompts[0], stop=[token, "never"])) < len(whole[0])


def test_generate_samples_by_seed() -> None:
    model, _ = tiny_host("llama")
    state = torch.get_rng_state()
    how = {"do_sample": True, "seed": 1, "top_k": 20, "top_p": 0.9}
    a, b = write(model, "hello", **how), write(model, "hello", **how)
    assert a == b != write(model, "hello", **(how | {"seed": 2}))
    assert torch.equal(state, torch.get_rng_state()), "the global random state is left alone"
    assert write(model, "hello", **how, backend="mask")


def test_generate_takes_the_generic_path_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module._told.clear()
    model, _ = tiny_host("llama")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert write(model, "hello", policy=policies.Oracle(HALF))
    assert sum("generic path" in r.message for r in caplog.records) == 1
    expected = write(model, ["hello", "yes"])
    final = model.model.norm
    model.model.norm = torch.nn.Sequential(final)
    with caplog.at_level(logging.WARNING):
        assert write(model, ["hello", "yes"]) == expected
    assert "has no fused decode step" in caplog.text


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"backend": "gpu"}, "backend='gpu'"),
        ({"top_k": 3}, "top_k=3"),
        ({"stop": ""}, "empty string"),
    ],
    ids=str,
)
def test_generate_refuses(how: dict[str, Any], message: str) -> None:
    model, _ = tiny_host("llama")
    with pytest.raises(ValueError, match=message):
        write(model, "hello", **how)
