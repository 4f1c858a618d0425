"""FFSplit: heavy neurons whole, the rest compressed; core and dense fallback beside it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gnomon
from cases import calibration, predictor
from gnomon.accounting import Density, account
from gnomon.budget import Budget
from gnomon.engine.agreement import agree
from gnomon.engine.engine import Engine
from gnomon.engine.support import UnsupportedPolicyError
from gnomon.engine.weights import LayerWeights, laid_out
from gnomon.evaluation.decoding import Cell, decode_row, open_dense
from gnomon.host import describe
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies import (
    Cats,
    Core,
    DejaVu,
    DenseFallback,
    DenseInt8,
    FFSplit,
    Griffin,
    Shadow,
    SkipSublayers,
    Static,
    Teal,
)
from gnomon.policies.compressed import compress, rest_bytes
from gnomon.tiny import tiny_host

ALL = Density(1.0, 1.0, 1.0)


def ids_of(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model, policy, ids: Tensor, **how) -> tuple[Tensor, Density]:
    with torch.no_grad(), gnomon.sparsify(model, policy, **({"protocol": "all"} | how)) as session:
        return model(ids).logits, session.density()


@pytest.mark.parametrize(("rows", "width"), [(7, 64), (5, 33), (1, 1), (12, 32)])
def test_rows_come_back_within_half_a_step_and_at_the_size_said(rows: int, width: int) -> None:
    matrix = torch.randn(rows, width)
    matrix[0] = 0
    eight, four = compress(matrix, "int8"), compress(matrix, "int4")
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert bool(((eight.dense() - matrix).abs() <= step / 2 + 1e-7).all())
    for start in range(0, width, 32):
        part = matrix[:, start : start + 32]
        gap = (four.dense()[:, start : start + 32] - part).abs()
        assert bool((gap <= part.abs().amax(1, keepdim=True) / 14 * 1.01 + 1e-6).all())
    assert four.dense().shape == (rows, width)
    for found, method in ((eight, "int8"), (four, "int4")):
        assert found.nbytes == rest_bytes(method, rows, rows, width, 4, 0)
    full = compress(matrix, "lowrank", min(rows, width))
    torch.testing.assert_close(full.dense(), matrix, rtol=1e-4, atol=1e-5)
    low = compress(matrix, "lowrank", 1)
    assert low.nbytes == rest_bytes("lowrank", rows, rows, width, 4, 1) == 4 * (rows + width)
    s = torch.linalg.svdvals(matrix)
    assert float((low.dense() - matrix).norm()) == pytest.approx(float(s[1:].norm()), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("rest", ["int8", "int4", "lowrank"])
def test_heavy_rows_are_the_hosts_own_and_the_rest_is_compressed(rest: str, family: str) -> None:
    model, _ = tiny_host(family)
    made, spec = calibration(model), describe(model)
    policy = FFSplit(made, heavy=0.25, rest=rest)
    before = [p for p in model.parameters()]
    dense = model(ids_of()).logits.detach()
    heavy = topk_mask(made.means["neurons"], 12)
    naive = copy.deepcopy(model)
    with torch.no_grad():
        for i, where in enumerate(spec.layers):
            for role in ("gate", "up", "down"):
                if getattr(where, role) is None:
                    continue
                linear = naive.get_submodule(getattr(where, role))
                own = linear.weight.t() if role == "down" else linear.weight
                small = compress(own[~heavy[i]], rest, 16).dense()
                own[~heavy[i]] = small
        expected = naive(ids_of()).logits
    found, density = run(model, policy, ids_of())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    error = float((found - dense).norm() / dense.norm())
    assert 1e-4 < error < (0.05 if rest == "int8" else 2.0)
    assert density.neurons == density.heads == 1.0
    assert torch.equal(model(ids_of()).logits, dense)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_bytes_are_those_of_the_stored_tensors(tmp_path: Path) -> None:
    model, _ = tiny_host("llama")
    made, spec = calibration(model), describe(model)
    ffn = 3 * spec.L * spec.F * spec.D * 4
    for rest in ("int8", "int4", "lowrank"):
        policy = FFSplit(made, heavy=0.25, rest=rest, rank=0.25)
        policy.bind(model)
        found = account(policy, ALL)
        stored = policy.split(model).nbytes
        assert found.dense_bytes - found.sparse_bytes == pytest.approx(ffn * 0.75 - stored)
        assert found.inputs["ffsplit"]["heavy"] == 0.25
        policy.save(model, tmp_path / rest)
        on_disk = (tmp_path / rest / "split.safetensors").stat().st_size
        assert 0 <= on_disk - stored - spec.L * spec.F < 4096  # the mask, and the header


def test_a_saved_split_is_the_same_and_belongs_to_one_host(tmp_path: Path) -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    policy = FFSplit(made, heavy=0.5, rest="int4")
    fresh = run(model, policy, ids_of())[0]
    policy.save(model, tmp_path / "split")
    loaded = FFSplit(made, weights=tmp_path / "split")
    assert torch.equal(run(model, loaded, ids_of())[0], fresh)
    assert loaded.rest == "int4" and loaded.share == 0.5
    assert account(loaded, ALL).sparse_bytes == account(policy, ALL).sparse_bytes
    with pytest.raises(ValueError, match="never overwritten"):
        policy.save(model, tmp_path / "split")
    other, _ = tiny_host("llama", seed=5)
    with pytest.raises(ValueError, match="tiny-llama-0.*tiny-llama-5"):
        FFSplit(calibration(other), weights=tmp_path / "split").bind(other)
    with pytest.raises(ValueError, match="no split of FFSplit"):
        FFSplit(made, weights=tmp_path / "nothing").bind(model)


@pytest.mark.parametrize(
    ("how", "bytes_"),
    [({"rest": "int8"}, 0.8), ({"rest": "int4"}, 0.7), ({"rest": "lowrank", "heavy": 0.3}, 0.8)],
)
def test_byte_budgets_solve_the_heavy_share_or_the_rank(how: dict, bytes_: float) -> None:
    model, _ = tiny_host("llama", hidden_size=64, intermediate_size=512)
    policy = FFSplit(calibration(model), Budget(bytes=bytes_), **how)
    policy.bind(model)
    assert account(policy, ALL).byte_density == pytest.approx(bytes_, abs=0.01)
    assert account(policy, ALL).byte_density <= bytes_ * 1.001
    assert int(policy.core.sum()) == 3 * round(policy.share * 512)


def test_at_equal_size_heavy_hitters_beat_a_random_heavy_part_and_uniform_compression() -> None:
    """The paper's claim, in kind, on a host whose neurons are unequal as real ones are."""
    model, _ = tiny_host("llama", hidden_size=64, intermediate_size=256)
    with torch.no_grad():
        for layer in model.model.layers:
            size = torch.randn(256).mul(1.5).exp()
            layer.mlp.up_proj.weight.mul_(size[:, None] / size.mean())
    made, ids = calibration(model), ids_of(8, 64)
    dense = model(ids).logits.detach()

    def error(policy: FFSplit) -> tuple[float, float]:
        logits, density = run(model, policy, ids)
        return float((logits - dense).norm()), account(policy, density).byte_density

    budget = Budget(bytes=0.75)
    split, size = error(FFSplit(made, budget, rest="lowrank", heavy=0.3))
    uniform, uniform_size = error(FFSplit(made, budget, rest="lowrank", heavy=0.0))
    shuffled = {k: v[:, torch.randperm(v.shape[1])] for k, v in made.means.items()}
    random, random_size = error(FFSplit(shuffled, budget, rest="lowrank", heavy=0.3))
    assert size == pytest.approx(uniform_size, abs=0.01) == pytest.approx(random_size, abs=0.01)
    assert split < 0.8 * uniform and split < 0.8 * random, (split, uniform, random)


@pytest.mark.parametrize("backend", ["mask", "torch"])
def test_heavy_neurons_are_always_on_and_the_inner_policy_fills_the_budget(backend: str) -> None:
    model, _ = tiny_host("llama")
    made, net = calibration(model), predictor(model)
    inner = Shadow(net, Budget(neurons=0.7))
    policy = FFSplit(made, inner=inner, heavy=0.25, rest="int8")
    plain, taken = Shadow(net, Budget(neurons=0.7)), {}
    ids = ids_of(1, 1)
    with torch.no_grad(), gnomon.sparsify(model, policy, backend, protocol="all") as session:
        session.on_decision = lambda kind, layer, keep, _: taken.update({layer: keep})
        model(ids)
        density = session.density()
    plain.bind(model)
    for layer in (1, 2):
        keep = taken[layer][0, 0]
        assert int(keep.sum()) == plain.counts["neurons"][layer]
        assert bool(keep[policy.core[layer]].all())
    found = account(policy, density)
    spec = describe(model)
    rest = spec.L * spec.F * (density.neurons - 0.25)  # rows of each matrix that are compressed
    skipped = 3 * 4 * spec.D * spec.L * spec.F * (1 - density.neurons)
    saved = skipped + 3 * rest * (4 * spec.D - (spec.D + 4))
    assert found.dense_bytes - found.sparse_bytes + found.predictor_bytes == pytest.approx(saved)


def test_three_systems_in_one() -> None:
    """SkipSublayers(FFSplit(Shadow)): every part counts once."""
    model, _ = tiny_host("llama", num_hidden_layers=4)
    made = calibration(model)
    inner = FFSplit(made, inner=Shadow(predictor(model), Budget(neurons=0.6)), heavy=0.25)
    policy = SkipSublayers(layers=[3], what="layer", inner=inner)
    outs = []
    for backend in ("mask", "torch"):
        with torch.no_grad(), gnomon.sparsify(model, policy, backend=backend) as session:
            cache = model(ids_of(1, 7), use_cache=True).past_key_values
            outs.append(model(ids_of(1, 1, 3), past_key_values=cache).logits)
            density = session.density()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    assert density.per_layer["heads"] == [1, 1, 1, 0] and density.per_layer["neurons"][3] == 0
    found = account(policy, density, context=64)
    spec = describe(model)
    attention = 2 * (spec.H + spec.G) * spec.d * spec.D + 2 * spec.G * spec.d * 64
    skipped = 3 * spec.D * spec.F * spec.L * (1 - density.neurons)
    rest = spec.F * (density.neurons * 4 - 3 * 0.25)
    saved = 4 * (attention + skipped) + 3 * rest * (4 * spec.D - spec.D - 4)
    assert found.dense_bytes - found.sparse_bytes + found.predictor_bytes == pytest.approx(saved)
    assert found.inputs["skipped layer"] == [3] and found.inputs["ffsplit"]["rest"] == "int8"
    solved = SkipSublayers(
        layers=[3],
        what="attention",
        inner=FFSplit(made, inner=Static(made, Budget(bytes=0.7, heads=1.0)), heavy=0.1),
    )
    density = run(model, solved, ids_of())[1]
    assert account(solved, density).byte_density == pytest.approx(0.7, abs=0.02)


def test_core_is_kept_and_the_budget_is_met() -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    core = topk_mask(made.means["neurons"], 12)
    budget = Budget(neurons=0.5)
    for inner, how in (
        (Griffin(budget), {"protocol": "decode", "prompt_length": 6}),
        (DejaVu(predictor(model, "dejavu"), budget), {}),
        (Cats(made, budget), {}),
    ):
        taken: dict = {}
        policy = Core(made, inner, share=0.25)
        with torch.no_grad(), gnomon.sparsify(model, policy, **({"protocol": "all"} | how)) as s:
            s.on_decision = lambda kind, layer, keep, _, t=taken: t.update({layer: keep})
            model(ids_of())
        for layer, keep in taken.items():
            assert bool(keep[..., core[layer]].all())
            if not isinstance(inner, Cats):
                assert bool((keep.sum(-1) == 24).all())
    nothing = Core(made, Static(made, budget), share=0.0)
    assert torch.equal(
        run(model, nothing, ids_of())[0], run(model, Static(made, budget), ids_of())[0]
    )


def test_nearly_whole_layers_fall_back_to_dense() -> None:
    model, _ = tiny_host("llama", intermediate_size=96)
    means = {"heads": torch.rand(3, 4), "neurons": torch.rand(3, 96)}
    means["neurons"][1] += 0.5  # a global ranking keeps nearly all of layer 1
    budget = Budget(neurons=0.6, spread="global")
    inner = Static(means, budget)
    policy = DenseFallback(inner, above=0.8)
    assert run(model, policy, ids_of())[1] == run(model, inner, ids_of())[1], "counts may vary"
    layers = DenseFallback(Shadow(predictor(model), Budget(neurons=0.9)), above=0.8)
    _, density = run(model, layers, ids_of())
    assert density.neurons == 1.0 and layers.skips_nothing
    kept = DenseFallback(Shadow(predictor(model), Budget(neurons=0.8)), above=0.8)
    assert run(model, kept, ids_of())[1].neurons == pytest.approx(0.8, abs=0.01)


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    half = Budget(neurons=0.5)
    for make, message in (
        (lambda: FFSplit(made, heavy=0.5, rest="int3"), r"params\.rest='int3': use int8, int4"),
        (lambda: FFSplit(made, heavy=1.5), r"params\.heavy=1\.5"),
        (lambda: FFSplit(made), "needs policy.params.heavy"),
        (lambda: FFSplit(made, inner=Teal(made, half), heavy=0.5), "teal skips input channels"),
        (lambda: FFSplit(made, Budget(bytes=0.1)), "budget.bytes=0.1 cannot be reached"),
        (lambda: FFSplit(made, Budget(bytes=0.9), heavy=0.5), "finds the heavy share"),
        (
            lambda: Core(made, Griffin(Budget(neurons=0.2)), share=0.4),
            "fewer than the 19 of the core",
        ),
        (lambda: Core(made, SkipSublayers(layers=[1])), "put skip_sublayers round core"),
        (lambda: Core(made, Griffin(half), share=-1), r"params\.share=-1"),
        (lambda: DenseFallback(Griffin(half), above=0), r"params\.above=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make().bind(model)


ENGINE = {
    "int8": {"rest": "int8", "heavy": 0.3},
    "int4": {"rest": "int4", "heavy": 0.3},
    "no-heavy": {"rest": "int4", "heavy": 0.0},
    "all-heavy": {"rest": "int8", "heavy": 1.0},
}


def replayed(engine: Engine, ids: Tensor, steps: int) -> Tensor:
    """Logits of the last of so many steps, as ``agree`` runs them."""
    start = ids.shape[1] - steps
    engine.prefill(ids[:, : start + 1])
    for i in range(start, ids.shape[1]):
        engine.step(ids[:, i])
    return engine.logits.clone()


@pytest.mark.parametrize(
    ("name", "family", "backend"),
    [
        ("int8", "llama", "torch"),
        ("int8", "opt", "torch"),
        ("int4", "llama", "triton"),
        ("int4", "gemma2", "torch"),
        ("no-heavy", "opt", "torch"),
        ("all-heavy", "llama", "torch"),
    ],
)
def test_the_engine_reads_the_compressed_rest(
    name: str, family: str, backend: str, device: torch.device
) -> None:
    how = ENGINE[name]
    model = copy.deepcopy(tiny_host(family)[0]).to(device)
    policy = FFSplit(calibration(model), **how)
    before = {n: p.clone() for n, p in model.named_parameters()}
    steps = 2 if backend == "triton" else 6  # the interpreter takes seconds for each
    ids = ids_of(2, 14).to(device)
    with Engine(model, policy, batch=2, context=32, backend=backend) as engine:
        found = agree(engine, model, policy, ids, steps)
        layer = engine.weights.layers[0]
        rest, logits = layer.rest, engine.logits.clone()
        assert (rest is None) == (how["heavy"] == 1.0)
        if rest is not None:
            kind = torch.uint8 if how["rest"] == "int4" else torch.int8
            assert rest.up.weight.dtype == rest.down_t.weight.dtype == kind
            assert len(rest.up.weight) + len(layer.up.weight) == describe(model).F
            assert torch.equal(replayed(engine, ids, steps), logits)
            rest.down_t.scale.zero_()  # the step reads these, and nothing in their place
            assert not torch.allclose(replayed(engine, ids, steps), logits, atol=1e-2)
    assert found["logits_rms"] < 1e-5 and found["top1"] == 1.0
    for path, value in model.named_parameters():
        assert torch.equal(value, before[path])
    policy = FFSplit(calibration(model), **how)
    with Engine(model, context=32, batch=2) as dense:
        apart = agree(dense, model, policy, ids, steps)["logits_rms"]
    assert apart < 1e-5 if how["heavy"] == 1.0 else apart > 1e-4


def test_a_split_that_the_engine_does_not_read_is_refused() -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    inner = Shadow(predictor(model), Budget(neurons=0.6))
    for policy in (
        FFSplit(made, heavy=0.5, rest="lowrank"),
        FFSplit(made, heavy=0.5, inner=inner),
        FFSplit(made, heavy=0.5, inner=DenseInt8()),
        SkipSublayers(layers=[1], what="attention", inner=FFSplit(made, heavy=0.5)),
    ):
        with pytest.raises(UnsupportedPolicyError, match="without a policy inside or round it"):
            Engine(model, policy, context=32)
    with (
        laid_out(model, describe(model)) as weights,
        pytest.raises(UnsupportedPolicyError, match="keeps neurons whole"),
    ):
        Engine(model, FFSplit(made, heavy=0.5), context=32, weights=weights.quantized())
    with pytest.raises(UnsupportedPolicyError, match="rest=int4 has kernels in Triton alone"):
        Engine(copy.deepcopy(model).cpu(), FFSplit(made, heavy=0.5, rest="int4"), context=32)
    with (
        Engine(model, FFSplit(made, heavy=0.5), context=32) as engine,
        pytest.raises(ValueError, match="FFNs in two parts, which no other policy reads"),
    ):
        Engine(model, context=32, weights=engine.weights)


def test_a_policy_inside_that_changes_weights_too_is_undone_after_it() -> None:
    model, _ = tiny_host("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    policy = FFSplit(calibration(model), heavy=0.3, inner=DenseInt8())
    with gnomon.sparsify(model, policy, backend="mask", protocol="all"):
        assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])


def _ffn_bytes(layer: LayerWeights) -> int:
    parts = [layer] if layer.rest is None else [layer, layer.rest]
    held = [m for part in parts for m in (part.up, part.gate, part.down_t) if m is not None]
    return sum(m.nbytes for m in held)


def test_speed_counts_the_bytes_of_the_compressed_rest() -> None:
    model, _ = tiny_host("llama")
    policy, ids, cell = FFSplit(calibration(model), heavy=0.0), ids_of(1, 64), Cell(1, 64, 50, 1, 4)
    dense = open_dense(model, ids[:, : cell.prompt], cell)
    try:
        row, _ = decode_row(model, policy, dense, ids[:, : cell.prompt], cell)
    finally:
        dense.engine.close()
    saved = policy.saved_bytes(ALL, 4)
    for heavy in (0.0, 0.3):  # against the bytes of what a step reads
        split = FFSplit(calibration(model), heavy=heavy)
        with (
            Engine(model, context=32) as plain,
            Engine(model, split, context=32, weights=plain.weights) as engine,
        ):
            sizes = [sum(map(_ffn_bytes, e.weights.layers)) for e in (plain, engine)]
        assert sizes[0] - sizes[1] == pytest.approx(split.saved_bytes(ALL, 4))
    assert row["bytes_dense"] - row["bytes_sparse"] == pytest.approx(saved) and saved > 0
    assert row["speedup_ideal"] == pytest.approx(row["bytes_dense"] / row["bytes_sparse"])
    assert row["agreement"]["logits_rms"] < 1e-5
