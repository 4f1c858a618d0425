"""Thresholds on activations: calibration, and CATS, CHESS and TEAL on top of it."""

from __future__ import annotations

import copy
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, silu

import gnomon
import gnomon.evaluation.results
from cases import calibration, predictor
from gnomon.accounting import LINEARS, Density, account
from gnomon.budget import Budget
from gnomon.calibration import Histogram
from gnomon.evaluation.decoding import Cell
from gnomon.evaluation.generic import generic_row
from gnomon.evaluation.traffic import Kept, step_traffic
from gnomon.hooks import HostHooks
from gnomon.host import describe
from gnomon.policies import Cats, Chess, Teal
from gnomon.policies.threshold import SITE
from gnomon.predictors.calibration import POINTS, Calibration
from gnomon.predictors.folder import find_predictor, load_predictor
from gnomon.runtime.backends import choose_backend
from gnomon.tiny import tiny_host
from scripts import call

HALF = Budget(density=0.5)
NEURONS = Budget(neurons=0.5)


def ids_of(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def seen(model, ids: Tensor, layer: int) -> dict[str, Tensor]:
    """Inputs of a layer's linears by role, and the outputs of gate and up, on the dense host."""
    found: dict[str, Tensor] = {}
    where = describe(model).layers[layer]
    with torch.no_grad(), HostHooks(model, describe(model)) as hooks:
        for role in LINEARS:
            path = getattr(where, role)
            if path is not None:
                hooks.on_input(path, lambda x, r=role: found.update({r: x.clone()}))
        for role in ("gate", "up"):
            if getattr(where, role) is not None:
                hooks.on_output(
                    getattr(where, role), lambda x, r=role: found.update({f"{r} out": x.clone()})
                )
        model(ids, use_cache=False)
    return found


def run(model, policy, ids: Tensor, **how) -> Tensor:
    how = {"protocol": "all"} | how
    with torch.no_grad(), gnomon.sparsify(model, policy, **how):
        return model(ids).logits


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_calibration_holds_what_the_dense_host_shows(family: str) -> None:
    model, _ = tiny_host(family)
    ids = ids_of(8, 64)
    made = calibration(model, ids)
    spec, layer = describe(model), 1
    own = seen(model, ids, layer)
    tables = {SITE[r]: own[r] for r in LINEARS if r in own}
    if spec.gated:
        act = silu(own["gate out"]) if family == "llama" else None
        up = own["up out"].abs().flatten(0, 1).mean(0)
        torch.testing.assert_close(made.up_mean[layer], up, rtol=1e-5, atol=1e-7)
        if act is not None:
            tables |= {"gate": act, "gate_up": act * up}
    for table, values in tables.items():
        for density in (0.2, 0.5, 0.8):
            cut = float(made.cut(table, density)[layer])
            kept = float((values.abs() > cut).float().mean())
            nonzero = float((values != 0).float().mean())
            assert kept == pytest.approx(min(density, nonzero), abs=0.003), (table, density)
    down = model.get_submodule(spec.layers[layer].down).weight.norm(dim=0)
    expected = (own["down"].abs() * down).flatten(0, 1).mean(0)
    torch.testing.assert_close(made.means["neurons"][layer], expected, rtol=1e-4, atol=1e-6)


def test_similarity_is_the_cosine_of_the_residual_stream() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(4, 16)
    made = calibration(model, ids)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        attention: list[Tensor] = []
        hook = model.model.layers[1].self_attn.register_forward_hook(
            lambda m, args, out: attention.append(out[0])
        )
        model(ids, use_cache=False)
        hook.remove()
    before, after = states[1], states[2]
    middle = before + attention[0]
    expected = [
        cosine_similarity(a, b, dim=-1).mean()
        for a, b in ((before, middle), (middle, after), (before, after))
    ]
    torch.testing.assert_close(made.similarity[1], torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_quantiles_of_a_histogram_are_those_of_the_values() -> None:
    values = torch.randn(50_000).exp() * torch.randn(50_000)
    values[:5000] = 0
    histogram = Histogram(2)
    for part in values.split(7_000):
        histogram.add(1, part)
    found = histogram.quantiles(1)
    assert found.shape == (POINTS,) and bool((found[1:] >= found[:-1]).all())
    for q in (0.05, 0.3, 0.5, 0.9, 0.99):
        exact = torch.quantile(values.abs(), q)
        assert float(found[round(q * (POINTS - 1))]) == pytest.approx(float(exact), rel=0.01)
    histogram.add(0, torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        histogram.quantiles(0)


def naive_ffn(model, layer: int, cut: Tensor) -> None:
    """Replaces one FFN by its formula, with neurons kept where |act(gate)| exceeds ``cut``."""
    mlp = model.model.layers[layer].mlp

    def forward(x: Tensor) -> Tensor:
        g = silu(mlp.gate_proj(x))
        return mlp.down_proj(torch.where(g.abs() > cut, g * mlp.up_proj(x), 0.0))

    mlp.forward = forward


def naive_input(model, path: str, cut: Tensor) -> None:
    """Zeroes a linear's inputs that do not exceed ``cut``."""
    linear = model.get_submodule(path)
    plain = linear.forward
    linear.forward = lambda x: plain(torch.where(x.abs() > cut, x, 0.0))


@pytest.mark.parametrize("backend", ["mask", "torch"])
@pytest.mark.parametrize("name", ["cats", "chess", "chess-ffn", "teal", "teal-opt"])
def test_every_system_is_its_formula(name: str, backend: str) -> None:
    name, _, family = name.partition("-opt") if "opt" in name else (name, "", "llama")
    model, _ = tiny_host(family or "opt")
    made, budget = calibration(model), Budget(heads=0.6, neurons=0.4)
    alone = Budget(neurons=0.4)
    policy = {
        "cats": lambda: Cats(made, alone),
        "chess": lambda: Chess(made, budget),
        "chess-ffn": lambda: Chess(made, alone, attention=False),
        "teal": lambda: Teal(made, budget),
    }[name]()
    ids = ids_of(1, 9)
    naive = copy.deepcopy(model)
    for i, where in enumerate(describe(model).layers):
        if name == "cats":
            naive_ffn(naive, i, made.cut("gate", 0.4)[i])
        if "chess" in name:
            each = made.cut("gate_up", 0.4)[i] / made.up_mean[i]
            naive_ffn(naive, i, each)
        roles = {"chess": ("q", "out"), "teal": LINEARS}.get(name, ())
        for role in (r for r in roles if getattr(where, r)):
            density = 0.4 if role in ("gate", "up", "down") else 0.6
            naive_input(naive, getattr(where, role), made.cut(SITE[role], density)[i])
    with torch.no_grad():
        expected = naive(ids, use_cache=False).logits
        if backend == "mask":
            found = run(model, policy, ids)
        else:  # one token at a time, so that weights are really gathered
            with gnomon.sparsify(model, policy, backend=backend, protocol="all"):
                cache, steps = None, []
                for t in range(ids.shape[1]):
                    out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                    cache = out.past_key_values
                    steps.append(out.logits)
                found = torch.cat(steps, dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, model(ids).logits, atol=1e-2)


def test_budgets_are_met_in_the_mean_over_the_calibration_tokens() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(8, 64)
    made = calibration(model, ids)
    for budget in (Budget(neurons=0.3), Budget(neurons=0.9)):
        cats, chess = Cats(made, budget), Chess(made, budget, attention=False)
        for policy in (cats, chess):
            policy.bind(model)
            for layer in range(3):
                g = silu(seen(model, ids, layer)["gate out"]).abs()
                scores = g if policy is cats else g * made.up_mean[layer]
                kept = float((scores > policy._cuts["units"][layer]).float().mean())
                assert kept == pytest.approx(budget.neurons, abs=0.002)
    teal = Teal(made, Budget(heads=0.7, neurons=0.2))
    teal.bind(model)
    for role, values in seen(model, ids, 2).items():
        if role in LINEARS:
            kept = float(teal.keep_channels(role, 2, values).float().mean())
            wanted = 0.2 if role in ("gate", "up", "down") else 0.7
            assert kept == pytest.approx(wanted, abs=0.002), role


@pytest.mark.parametrize("name", ["cats", "chess", "teal"])
def test_what_is_skipped_is_not_read(name: str) -> None:
    """Rule 2: weights that a decision skips, and no others, may become NaN after it."""
    model, _ = tiny_host("llama")
    made = calibration(model)
    policy = {"cats": Cats(made, NEURONS), "chess": Chess(made, HALF), "teal": Teal(made, HALF)}
    prompt, token = ids_of(1, 6), ids_of(1, 1, seed=3)
    taken: dict = defaultdict(list)
    with torch.no_grad(), gnomon.sparsify(model, policy[name], backend="torch") as session:
        session.on_decision = lambda what, layer, keep, _: taken[what, layer].append(keep.clone())
        cache = model(prompt, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        clean = model(token, past_key_values=cache).logits
        for (what, layer), keeps in taken.items():
            where, keep = describe(model).layers[layer], keeps[-1][0, -1]
            if what == "neurons":
                model.get_submodule(where.up).weight[~keep] = torch.nan
            linear = model.get_submodule(where.down if what == "neurons" else getattr(where, what))
            linear.weight[:, ~keep] = torch.nan
        poisoned = model(token, past_key_values=again).logits
    assert bool(clean.isfinite().all()) and torch.equal(clean, poisoned)
    assert not bool(model(token).logits.isfinite().any()), "much was poisoned"


def test_zeros_are_never_kept() -> None:
    """Half of a ReLU's outputs are zero: a density above that reads what is not zero."""
    model, _ = tiny_host("opt")
    made = calibration(model)
    policy = Teal(made, Budget(neurons=0.9))
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="all") as session:
        model(ids_of(4, 32))
    density = session.density()
    zeros = float((seen(model, ids_of(4, 32), 1)["down"] == 0).float().mean())
    assert zeros > 0.3
    assert density.neurons == density.channels["down"] == pytest.approx(1 - zeros, abs=0.1)
    assert density.channels["up"] == pytest.approx(0.9, abs=0.03)


def test_bytes_count_the_gate_and_every_linear_by_what_it_reads() -> None:
    model, _ = tiny_host("llama")
    spec, made = describe(model), calibration(model)
    D, F, L, hidden, kv = spec.D, spec.F, spec.L, spec.H * spec.d, spec.G * spec.d
    at = Density(1.0, 0.25, 1.0)

    def saved(policy, density: Density) -> float:
        policy.bind(model)
        found = account(policy, density)
        return found.dense_bytes - (found.sparse_bytes - found.predictor_bytes)

    assert saved(Cats(made, NEURONS), at) == pytest.approx(4 * L * 2 * D * F * 0.75)
    assert saved(Chess(made, NEURONS, attention=False), at) == pytest.approx(
        4 * L * 2 * D * F * 0.75
    )
    wide = Density(1.0, 0.25, 1.0, channels={"q": 0.5, "out": 0.75})
    assert saved(Chess(made, HALF), wide) == pytest.approx(
        4 * L * (2 * D * F * 0.75 + hidden * D * (0.5 + 0.25))
    )
    reads = {"q": 0.9, "k": 0.8, "v": 0.7, "out": 0.6, "gate": 0.5, "up": 0.4, "down": 0.3}
    lost = hidden * D * (0.1 + 0.4) + kv * D * (0.2 + 0.3) + F * D * (0.5 + 0.6 + 0.7)
    found = saved(Teal(made, HALF), Density(1.0, 0.3, 1.0, channels=reads))
    assert found == pytest.approx(4 * L * lost)
    for policy, expected in (
        (Cats(made, NEURONS), L),
        (Chess(made, HALF), L * (F + 3)),
        (Teal(made, HALF), L * 7),
    ):
        policy.bind(model)
        assert policy.predictor_bytes == 4 * expected


def test_speed_rows_count_the_same_bytes() -> None:
    model, _ = tiny_host("llama")
    at = Density(1.0, 0.25, 1.0, channels={"q": 0.5, "out": 0.75})
    for policy in (Cats(calibration(model), NEURONS), Chess(calibration(model), HALF)):
        policy.bind(model)
        expected = account(policy, at, context=100)
        kept = Kept(at, at)
        found = step_traffic(policy.bytes, kept, context=100, read=policy.fractions(at))
        assert found.total == pytest.approx(expected.sparse_bytes - expected.predictor_bytes)


@pytest.mark.parametrize("rows", [1, 2])
def test_speed_of_the_generic_path_agrees_with_the_mask(rows: int) -> None:
    model, _ = tiny_host("llama")
    policy = Teal(calibration(model), HALF)
    policy.bind(model)
    cell = Cell(batch=rows, context=80, steps=50, warmup=1, check=4)
    row, kept = generic_row(model, policy, ids_of(rows, cell.prompt), cell, backend="torch")
    assert row["agreement"]["sets"] == 1.0 and row["agreement"]["logits_rms"] < 1e-5
    assert row["bytes_sparse"] < row["bytes_dense"]
    assert kept.each.channels["up"] == pytest.approx(0.5, abs=0.1)
    assert kept.union.channels["up"] >= kept.each.channels["up"]


@pytest.mark.parametrize("name", ["cats", "chess", "teal"])
def test_byte_budgets_are_met(name: str) -> None:
    model, _ = tiny_host("llama", hidden_size=64, intermediate_size=256, num_hidden_layers=4)
    policy = {"cats": Cats, "chess": Chess, "teal": Teal}[name](
        calibration(model), Budget(bytes=0.9)
    )
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="all") as session:
        model(ids_of(4, 32))
    assert account(policy, session.density()).byte_density == pytest.approx(0.9, abs=0.02)


def test_what_cannot_be_done_is_refused_by_name() -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    opt, _ = tiny_host("opt")
    other, _ = tiny_host("llama", seed=5)
    for policy, host, message in (
        (Cats(calibration(opt), NEURONS), opt, r"cats .* \(opt\) has no gate: use policy=teal"),
        (Chess(calibration(opt), HALF), opt, r"chess .* has no gate"),
        (Teal(made, HALF), other, r"tiny-llama-0.*tiny-llama-5"),
        (Cats(made, Budget(neurons=0.0004)), model, r"quantile 0\.99960 of gate.*text\.tokens"),
        (Cats(calibration(model, ids_of(1, 2)), NEURONS), model, "gives 96 values"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.bind(host)
    for make, message in (
        (lambda: Cats(made, HALF.__class__(heads=0.5)), r"budget\.heads=0\.5: policy=cats"),
        (lambda: Cats(predictor(model), NEURONS), "needs a calibration, got Shadow"),
        (lambda: Teal(made, Budget(density=0.5, head_unit="group")), "head_unit='group'"),
        (lambda: Teal(made, Budget(density=0.5, spread="global")), "budget.spread='global'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    for policy, chosen in ((Teal(made, HALF), "torch"), (Teal(made, Budget(density=1.0)), "mask")):
        policy.bind(model)
        assert choose_backend("auto", model, policy) == chosen


def test_a_folder_gives_the_same_thresholds_and_refuses_other_hosts(tmp_path: Path) -> None:
    model, _ = tiny_host("llama")
    made = calibration(model)
    made.save_pretrained(tmp_path / "one")
    loaded = load_predictor(tmp_path / "one")
    assert isinstance(loaded, Calibration) and loaded.info.criterion == "magnitude"
    for key, value in made.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)
    assert find_predictor(tmp_path, describe(model), Calibration) == tmp_path / "one"
    assert "policies.Cats" in (tmp_path / "one" / "README.md").read_text()
    ids = ids_of()
    assert torch.equal(run(model, Cats(loaded, NEURONS), ids), run(model, Cats(made, NEURONS), ids))
    with pytest.raises(ValueError, match="python train.py predictor=calibration"):
        find_predictor(tmp_path, describe(tiny_host("llama", seed=5)[0]), Calibration)


def test_train_measures_and_evaluate_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_ROOT", str(tmp_path))
    small = ("host=tiny", "text=synthetic", "text.block=64", "text.tokens=1024")
    folder = call("train.py", "predictor=calibration", *small, cwd=tmp_path).last
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    asked = ("policy=chess", "budget.density=0.5", "protocol.prompt=32")
    quick = ("measure.quality.generation.tokens=0", "measure.quality.brackets=[static,random]")
    results = call("evaluate.py", *small, *asked, *quick, cwd=tmp_path).last
    found = gnomon.evaluation.results.read_results(results)
    assert found["policy"]["predictor"]["class"] == "calibration"
    assert found["density"]["heads"] == 1.0
    assert found["density"]["neurons"] == pytest.approx(0.5, abs=0.1)
    assert found["density"]["channels"]["q"] == pytest.approx(0.5, abs=0.1)
    assert found["density"]["accounting"]["read"]["gate"] == 1.0
    assert [b["policy"] for b in found["brackets"]] == ["static", "random"]
