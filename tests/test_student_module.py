"""Training on the sparse host: kl, on-policy rows, fixed masks, warm starts."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import cases
import gnomon
from gnomon.budget import Budget
from gnomon.data.blocks import BlockSettings
from gnomon.data.criteria import Criterion, Magnitude, PlainAct
from gnomon.data.sets import Nwot
from gnomon.data.sources import SyntheticText
from gnomon.data.stage import prepare
from gnomon.endtoend import Settings, make_module, start_from
from gnomon.host import KINDS, describe
from gnomon.policies import build_policy
from gnomon.predictors import DejaVu, Predictor, PredictorInfo, Prior, Shadow
from gnomon.predictors import Static as StaticPredictor
from gnomon.predictors.module import Rates
from gnomon.predictors.objectives import Bce, Kl, Mse, Objective, Ranking
from gnomon.predictors.schedule import cosine_warmup
from gnomon.runtime.student import Student
from gnomon.tiny import tiny_host
from gnomon.training import fit, save

DENSITY = {"heads": 1.0, "neurons": 0.25}
BOTH = {"heads": 0.75, "neurons": 0.5}


def predictor(cls: type[Any] = DejaVu) -> Predictor:
    torch.manual_seed(0)
    spec = describe(tiny_host()[0])
    made: Predictor = cls.for_host(
        spec, **({} if cls in (StaticPredictor, Prior) else {"rank": 16})
    )
    made.info = PredictorInfo(host=spec.name, spec_hash=spec.hash, criterion="magnitude")
    return made


def fitted(
    net: Predictor,
    objective: Objective,
    steps: int,
    lr: float = 3e-3,
    density: dict[Any, float] = DENSITY,
    warm: bool = False,
    criterion: Criterion | None = None,
    **student: Any,
) -> dict[str, Any]:
    """Metrics of a fit on the tiny host; ``student`` are fields of Settings."""
    model, tokenizer = tiny_host()
    settings, spec = Settings(blocks=4, **student), describe(model)
    criterion = criterion or Magnitude()
    data = prepare(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        text=SyntheticText(block=32, tokens=4096),
        criterion=criterion,
        taps=net.taps,
        needs=(objective.needs,),
        out_root="unused",
        density=dict(density),
        batch_size=64,
        mode="online",
        heldout_tokens=512,
        means_tokens=1024,
        blocks=settings.block_settings if objective.on_policy else None,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=10_000,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        gradient_clip_val=1.0,
    )
    module = make_module(
        settings.student(model, spec, net, density) if objective.on_policy else None,
        net,
        objective,
        criterion,
        functools.partial(torch.optim.AdamW, lr=lr),
        cosine_warmup,
        density,
        warm,
        Rates(spread=settings.spread_rate),
    )
    assert isinstance(data, pl.LightningDataModule)
    return fit(module, data, trainer)


@pytest.fixture(scope="module")
def start() -> Any:
    """Makes the same bce-trained DejaVu predictor, ready to be trained further."""
    net = predictor()
    fitted(net, Bce(), 60, lr=1e-2)
    state = {k: v.clone() for k, v in net.dequantize().state_dict().items()}

    def make() -> Predictor:
        fresh = predictor()
        fresh.load_state_dict(state)
        return fresh

    return make


def test_kl_beats_its_start_on_held_out_blocks(start: Any) -> None:
    net = start()
    metrics = fitted(net, Kl(balanced=True), 60, warm=True)
    found = metrics["student"]
    before = found["start"]
    assert found["kl"] < 0.9 * before["kl"] and found["ppl_ratio"] < before["ppl_ratio"]
    assert found["positions"] == 512 and found["float"]["kl"] == pytest.approx(found["kl"], rel=0.1)
    assert net.quantized and metrics["rows"] > 0 and metrics["init"]["criterion"] == "magnitude"


def test_the_recorded_divergence_is_that_of_sparsify(start: Any) -> None:
    net = start()
    found = fitted(net, Kl(), 1, lr=0.0, warm=True)["student"]
    model, tokenizer = tiny_host()
    ids = SyntheticText(block=32, tokens=4096).blocks(tokenizer, "validation", 512).ids
    policy = build_policy("dejavu", Budget(neurons=0.25), net)
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        with gnomon.sparsify(model, policy, backend="mask", protocol="all"):
            sparse = model(ids).logits.log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean()
    assert found["kl"] == pytest.approx(float(kl), rel=1e-3)


@pytest.mark.parametrize(
    ("cls", "objective", "student"),
    [
        pytest.param(Shadow, Kl(), {"refresh": "prompt", "protocol": "decode"}, id="kl-prompt"),
        pytest.param(DejaVu, Kl(layers_weight=0.1, relaxed=0.5), {}, id="kl-layers-relaxed"),
        pytest.param(Shadow, Kl(), {"spread": "global", "protocol": "decode"}, id="kl-global"),
        pytest.param(DejaVu, Kl(), {"input_gradient": True, "head_unit": "group"}, id="kl-input"),
        pytest.param(Shadow, Bce(on_policy=True), {}, id="bce-token"),
        pytest.param(Shadow, Ranking(on_policy=True), {}, id="ranking-token"),
        pytest.param(
            DejaVu,
            Mse(on_policy=True),
            {"refresh": "prompt", "protocol": "decode"},
            id="mse-prompt",
        ),
    ],
)
def test_every_objective_and_refresh_trains(
    cls: type[Any], objective: Objective, student: dict[str, Any]
) -> None:
    net = predictor(cls)
    before = {n: p.clone() for n, p in net.named_parameters()}
    metrics = fitted(net, objective, 3, density=BOTH, **student)
    assert all((net.state_dict()[n] != p).any() for n, p in before.items() if "bias" in n)
    found = metrics["student"]
    assert found["refresh"] == student.get("refresh", "token") and found["kl"] > 0
    assert (found["positions"] < 512) == (found["protocol"] == "decode")


def test_on_policy_rows_teach_the_true_units() -> None:
    cold = fitted(predictor(), Bce(on_policy=True), 1, lr=0.0, density=BOTH)
    metrics = fitted(predictor(), Bce(on_policy=True), 60, lr=1e-2, density=BOTH)
    assert metrics["neurons"]["recall"] > cold["neurons"]["recall"] + 0.02


def test_a_fixed_mask_is_learned_and_used_by_the_static_policy(tmp_path: Path) -> None:
    net = predictor(StaticPredictor)
    metrics = fitted(net, Kl(), 5, lr=1e-2, density=BOTH)
    back = gnomon.load_predictor(save(net, tmp_path / "p", net.info))
    assert torch.equal(back.means["neurons"], net.outputs["neurons"].bias.exp())  # type: ignore[union-attr]
    model, tokenizer = tiny_host()
    ids = SyntheticText(block=32, tokens=4096).blocks(tokenizer, "validation", 512).ids
    policy = build_policy("static", Budget(heads=0.75, neurons=0.5), back)
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        with gnomon.sparsify(model, policy, protocol="all"):
            sparse = model(ids).logits.log_softmax(-1)
    kl = (dense.exp() * (dense - sparse)).sum(-1).mean()
    assert metrics["student"]["kl"] == pytest.approx(float(kl), rel=1e-3)
    for spread in ("global", "hybrid"):
        with pytest.raises(ValueError, match=rf"^budget\.spread='{spread}'.*budget\.spread=layer"):
            build_policy("static", Budget(density=0.5, spread=spread), back)
    with pytest.raises(ValueError, match="use policy=static"):
        build_policy("shadow", Budget(density=0.5), back)


def test_a_prior_is_learned_beside_the_statistic_of_prompts(tmp_path: Path) -> None:
    how: dict[str, Any] = {"refresh": "prompt", "protocol": "decode", "lr": 5e-2}
    net = predictor(Prior)
    found = fitted(net, Kl(balanced=True), 40, **how)["student"]
    assert found["kl"] < 0.9 * found["start"]["kl"] == pytest.approx(0.9 * untouched(), rel=1e-3)
    assert found["kl"] == found["float"]["kl"]  # nothing of it is rounded
    assert isinstance(net, Prior) and bool((net.slope != 1).all())
    folder = save(net, tmp_path / "p", net.info)
    again = predictor(Prior)
    start_from(again, str(folder), describe(tiny_host()[0]))
    warm = fitted(again, Kl(), 1, warm=True, **(how | {"lr": 0.0}))["student"]
    assert warm["start"]["kl"] == pytest.approx(found["kl"], rel=1e-3)


def untouched() -> float:
    """The divergence of a prior that a rate of 0 leaves where it starts."""
    how: dict[str, Any] = {"refresh": "prompt", "protocol": "decode", "lr": 0.0}
    kl: float = fitted(predictor(Prior), Kl(), 1, **how)["student"]["kl"]
    return kl


def test_a_kind_that_is_kept_whole_keeps_its_harvested_means() -> None:
    static, other = predictor(StaticPredictor), predictor()
    fitted(static, Kl(), 2, lr=1e-2)  # heads stay whole
    fitted(other, Bce(), 2, density=BOTH)
    assert torch.equal(static.means["heads"], other.means["heads"])
    bias = static.outputs["neurons"].bias
    assert bias is not None and torch.equal(static.means["neurons"], bias.exp())


def test_divergence_stops_with_the_rate(start: Any) -> None:
    net = start()
    with torch.no_grad():
        net.outputs["neurons"].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"loss is nan at step 0 with a rate of .*optimizer\.lr"):
        fitted(net, Kl(), 2, warm=True)


def test_training_that_ends_worse_than_it_began_says_so(
    start: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = fitted(start(), Kl(), 3, lr=1.0, warm=True)["student"]
    assert found["float"]["kl"] > found["start"]["kl"] and "lower optimizer.lr" in caplog.text


def test_a_fixed_mask_learns_its_spread_too() -> None:
    model, _ = tiny_host()
    spec, density = describe(model), {"heads": 1.0, "neurons": 0.5}
    net = predictor(StaticPredictor)
    fitted(net, Kl(balanced=True), 12, density=density, spread="learned", spread_rate=0.1)
    policy = build_policy("static", Budget(**density, spread="learned"), net)
    policy.bind(model, spec)
    counts = policy.counts["neurons"]
    assert len(set(counts)) > 1 and sum(counts) == round(0.5 * spec.L * spec.F)


@pytest.mark.parametrize(("kind", "choose"), [("sketch", "threshold"), ("dejavu", "topk")])
def test_a_spread_is_learned_kept_and_used(
    kind: str, choose: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = tiny_host()
    spec, neurons = describe(model), {"heads": 1.0, "neurons": 0.5}
    net = cases.predictor(model, kind, **({"tune": True} if kind == "sketch" else {}))
    how = {"density": neurons, "choose": choose, "spread": "learned", "spread_rate": 0.1}
    with pytest.raises(ValueError, match="student.spread=learned with objective=bce"):
        fitted(net, Bce(on_policy=True), 1, density=neurons, spread="learned")
    results = fitted(net, Kl(balanced=True), 12, **how)
    found = results["student"]
    tilt = net.tilt_neurons.detach().clone()
    assert found["spread"] == "learned" and float(tilt.std()) > 0.05
    assert not bool(net.tilt_heads.any())
    save(net, tmp_path / "p", replace(net.info, spec_hash=spec.hash, metrics=results))
    used = gnomon.load_predictor(tmp_path / "p")
    torch.testing.assert_close(used.tilt_neurons, tilt, rtol=0, atol=0)
    policy = build_policy(kind, Budget(**neurons, spread="learned"), used, choose=choose)
    policy.bind(model, spec)
    counts = policy.counts["neurons"]
    assert sum(counts) == round(0.5 * spec.L * spec.F) and len(set(counts)) > 1
    assert counts.index(max(counts)) == int(tilt.argmax())
    assert 'spread="learned"' in (tmp_path / "p" / "README.md").read_text()
    assert "budget.spread=learned is what" not in caplog.text
    assert ('choose="threshold"' in (tmp_path / "p" / "README.md").read_text()) == (
        choose == "threshold"
    )
    again = gnomon.load_predictor(tmp_path / "p")
    again.tune = kind == "sketch"
    again.dequantize()
    fitted(again, Kl(), 1, warm=True, density=neurons, choose=choose)
    assert not again.has_tilt  # the last training had the same share in every layer
    plain = build_policy(kind, Budget(**neurons), used, choose=choose)
    assert "budget.spread=learned is what" in caplog.text
    plain.bind(model, spec)
    assert len(set(plain.counts["neurons"])) == 1


def test_gradient_criteria_are_refused_on_policy() -> None:
    with pytest.raises(ValueError, match="criterion=plainact.*criterion=magnitude"):
        fitted(predictor(), Bce(on_policy=True), 1, criterion=PlainAct())
    with pytest.raises(ValueError, match="criterion=nwot has no token scores"):
        fitted(predictor(), Bce(on_policy=True), 1, criterion=Nwot())


def test_warm_starts_round_trip(start: Any, tmp_path: Path) -> None:
    net = start()
    folder = save(net, tmp_path / "p", net.info)
    used, again = gnomon.load_predictor(folder), predictor()
    start_from(again, str(folder), describe(tiny_host()[0]))
    frozen = {n for n, p in again.named_parameters() if not p.requires_grad}
    assert frozen == {"tilt_heads", "tilt_neurons"} and not again.quantized
    inputs = torch.randn(5, len(net.taps), net.width)
    for kind in KINDS:
        torch.testing.assert_close(again(inputs)[kind], used(inputs)[kind], rtol=1e-5, atol=1e-5)
        assert torch.equal(again.means[kind], used.means[kind])
    again.quantize()
    for name, value in used.state_dict().items():
        torch.testing.assert_close(
            again.state_dict()[name], value, rtol=1e-6, atol=0, equal_nan=True
        )


def test_warm_starts_of_something_else_are_refused(start: Any, tmp_path: Path) -> None:
    net, spec = start(), describe(tiny_host()[0])
    folder = str(save(net, tmp_path / "p", net.info))
    with pytest.raises(ValueError, match=r"holds a dejavu predictor.*predictor=dejavu"):
        start_from(predictor(Shadow), folder, spec)
    with pytest.raises(ValueError, match=r"predictor\.rank=16.*rank=8"):
        start_from(DejaVu.for_host(spec, rank=8), folder, spec)
    other = describe(tiny_host("qwen2", seed=3)[0])
    with pytest.raises(ValueError, match=f"{spec.name}.*{other.name}"):
        start_from(predictor(), folder, other)
    with pytest.raises(ValueError, match=r"init=.*neither a folder nor a hub id"):
        start_from(predictor(), str(tmp_path / "nowhere"), spec)


def test_block_settings_draw_prompts_that_fit() -> None:
    ids, random = torch.zeros(200, 16, dtype=torch.long), torch.Generator().manual_seed(0)
    assert set(BlockSettings().draw(ids, random)) == {"ids"}
    drawn = BlockSettings(prompts=(0.01, 0.99)).draw(ids, random)["prompt"]
    assert (int(drawn.min()), int(drawn.max())) == (2, 15)
    for bad in ({"blocks": 0}, {"prompts": (0.5, 0.2)}, {"prompts": (0.0, 0.5)}):
        with pytest.raises(ValueError, match=f"student.{next(iter(bad))}="):
            BlockSettings(**bad)  # type: ignore[arg-type]


def test_the_trainer_must_be_where_the_host_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Student, "device", torch.device("meta"))
    with pytest.raises(ValueError, match=r"trains on cpu, but the host is on meta.*host\.device"):
        fitted(predictor(), Kl(), 1)
