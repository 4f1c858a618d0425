"""The training loop on synthetic rows: it learns, resumes, and measures what it saves."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from synthetic_rows import SyntheticRows

from gnomon.host import KINDS, HostSpec, Tap
from gnomon.predictors import DejaVu, Predictor, PredictorInfo, Shadow
from gnomon.predictors.module import PredictorModule, Rates, _sampled
from gnomon.predictors.objectives import Bce, Mse, Objective, Ranking
from gnomon.predictors.rates import RateFinder
from gnomon.predictors.schedule import cosine_warmup
from gnomon.training import checkpoint_folder, fit, resume_from, save


def shadow() -> Shadow:
    torch.manual_seed(0)
    return Shadow(3, 4, 48, 32, tap=Tap(0), hidden=64, rank=32)


def dejavu() -> DejaVu:
    torch.manual_seed(0)
    return DejaVu(3, 4, 48, 32, rank=32, neurons_site="layer_input")


def module(
    predictor: Predictor, objective: Objective, lr: float = 1e-2, warm: bool = False
) -> PredictorModule:
    return PredictorModule(
        predictor,
        objective,
        optimizer=functools.partial(torch.optim.AdamW, lr=lr, fused=True),
        scheduler=cosine_warmup,
        density={"heads": 0.5, "neurons": 0.5},
        warm=warm,
    )


def trainer(folder: Path, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 60,
        "max_epochs": -1,
        "val_check_interval": 20,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "gradient_clip_val": 1.0,
    }
    return pl.Trainer(
        callbacks=[checkpoint(folder), *callbacks], default_root_dir=folder, **options | kwargs
    )


def checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=folder,
        filename="{step:06d}",
        monitor="val/recall",
        mode="max",
        save_last=True,
        save_on_exception=True,
    )


@pytest.mark.parametrize("make", [shadow, dejavu], ids=["shadow", "dejavu"])
@pytest.mark.parametrize("objective", [Bce(), Mse(), Ranking()], ids=lambda o: o.name)
def test_it_learns_more_than_the_fixed_choice(
    make: Any, objective: Objective, tmp_path: Path
) -> None:
    predictor = make()
    data = SyntheticRows(taps=len(predictor.taps))
    if (
        len(predictor.taps) > 1
    ):  # every layer of dejavu must see the state that the scores come from
        for rows in (data.train, data.held):
            rows.inputs[:] = rows.inputs[:, :1]
    metrics = fit(module(predictor, objective), data, trainer(tmp_path))
    for kind in KINDS:
        own = metrics[kind]
        assert own["recall"] > own["static"]["recall"] + 0.05
        assert own["oracle"]["mass"] >= own["mass"] > own["static"]["mass"]
        assert own["spearman"] > own["static"]["spearman"]
        quantiles = predictor.quantiles[kind]
        assert quantiles.isfinite().all() and (quantiles.diff(dim=-1) >= 0).all()
    assert predictor.quantized


def test_the_metrics_are_those_of_the_saved_folder(tmp_path: Path) -> None:
    data, net = SyntheticRows(), shadow()
    fitted = module(net, Bce())
    metrics = fit(fitted, data, trainer(tmp_path / "c"))
    folder = save(net, tmp_path / "p", net.info)
    back = Shadow.from_pretrained(folder)
    inputs = data.held.inputs
    for kind in KINDS:
        assert torch.equal(back(inputs)[kind], net(inputs)[kind])
    again = module(back, Bce())
    pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    ).test(again, dataloaders=data.val_dataloader(), verbose=False)
    assert again.results == metrics
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        save(net, folder, net.info)


def test_training_starts_as_good_as_the_fixed_choice(tmp_path: Path) -> None:
    fitted = module(shadow(), Bce(), lr=0.0)
    metrics = fit(fitted, SyntheticRows(), trainer(tmp_path, max_steps=1, val_check_interval=1))
    for kind in KINDS:
        assert metrics[kind]["recall"] == pytest.approx(metrics[kind]["static"]["recall"], abs=0.05)


@pytest.mark.parametrize("changed", [None, "criterion", "granularity", "text_digest"])
def test_a_warm_start_keeps_its_means_on_the_same_text_alone(
    changed: str | None, tmp_path: Path
) -> None:
    data, net = SyntheticRows(), shadow()
    own = {kind: torch.rand_like(means) for kind, means in net.means.items()}
    net.set_means(own)
    told = {key: data.info[key] for key in ("criterion", "granularity", "text_digest")}
    net.info = PredictorInfo(**told | ({} if changed is None else {changed: "another"}))
    fitted = module(net, Bce(), warm=True)
    fit(fitted, data, trainer(tmp_path, max_steps=1, val_check_interval=1))
    expected = own if changed is None else data.means
    assert all(torch.equal(net.means[kind], expected[kind]) for kind in KINDS)


def test_the_same_seed_gives_the_same_predictor(tmp_path: Path) -> None:
    nets = []
    for i in range(2):
        pl.seed_everything(7, verbose=False)
        nets.append(Shadow(3, 4, 48, 32, hidden=16, rank=8))
        fit(module(nets[-1], Bce()), SyntheticRows(), trainer(tmp_path / str(i), max_steps=20))
    for a, b in zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)


class Interrupt(pl.Callback):
    """Sends Ctrl-C after some steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("at", [5, 30], ids=["before-validation", "after-validation"])
def test_ctrl_c_keeps_the_work_and_last_goes_on(at: int, tmp_path: Path) -> None:
    # as in a terminal: a shell starts its background jobs with SIGINT ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = trainer(tmp_path, Interrupt(at))
    with pytest.raises(SystemExit):
        fit(module(shadow(), Bce()), SyntheticRows(), stopped)
    signal.signal(signal.SIGINT, handler)
    assert (tmp_path / "last.ckpt").exists() and stopped.global_step == at

    resumed, steps = trainer(tmp_path), []
    fitted = module(shadow(), Bce())
    fitted.on_train_start = lambda: steps.append(resumed.global_step)  # type: ignore[method-assign]
    metrics = fit(fitted, SyntheticRows(), resumed, ckpt_path="last")
    assert steps == [at] and metrics["recall"] > metrics["neurons"]["static"]["recall"]


def test_last_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to go on from"):
        resume_from(trainer(tmp_path), "last")
    with pytest.raises(ValueError, match="is no file"):
        resume_from(trainer(tmp_path), str(tmp_path / "x.ckpt"))


def test_early_stopping_and_the_best_weights(tmp_path: Path) -> None:
    stop = EarlyStopping(monitor="val/recall", mode="max", patience=1, min_delta=1.0)
    run = trainer(tmp_path, stop, max_steps=1000, val_check_interval=4)
    fit(module(shadow(), Bce()), SyntheticRows(), run)
    assert run.global_step == 8
    best = run.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    assert Path(best).exists()


def test_fast_dev_run_goes_through(tmp_path: Path) -> None:
    metrics = fit(module(shadow(), Bce()), SyntheticRows(), trainer(tmp_path, fast_dev_run=True))
    assert metrics["rows"] == 64


def test_unknown_length_needs_max_steps(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=-1, max_epochs=-1)
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        fit(module(shadow(), Bce()), SyntheticRows(), run)


def test_checkpoints_are_kept_by_configuration(tmp_path: Path) -> None:
    import gnomon
    from gnomon.tiny import tiny_host

    spec: HostSpec = gnomon.describe(tiny_host()[0])
    net = shadow()
    config = {"seed": 0, "trainer": {"max_steps": 1}}
    folder = checkpoint_folder(tmp_path, spec, net, config)
    assert folder == checkpoint_folder(tmp_path, spec, net, {"seed": 0, "trainer": {}})
    assert folder != checkpoint_folder(tmp_path, spec, net, {"seed": 1})


def test_a_rate_finder_sets_the_rate_and_puts_everything_back(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        """The weights and the rate that training begins with."""

        def on_train_batch_start(self, trainer: Any, module: Any, *rest: Any) -> None:
            if trainer.global_step == 0 and not module.finding_rate:
                self.weights = [p.detach().clone() for p in module.predictor.parameters()]
                self.rates = [g["lr"] for g in trainer.optimizers[0].param_groups]

    plain, found = Watch(), Watch()
    first = module(shadow(), Bce(), lr=1e-9)
    fit(first, SyntheticRows(), trainer(tmp_path / "a", plain))
    second = module(shadow(), Bce(), lr=1e-9)
    fit(second, SyntheticRows(), trainer(tmp_path / "b", RateFinder(40), found))
    assert second.rate is not None
    assert 1e-5 < second.rate < 0.2
    first_step = plain.rates[0] / 1e-9  # of the schedule
    assert found.rates == [pytest.approx(second.rate * first_step)] * 2
    for a, b in zip(plain.weights, found.weights, strict=True):
        assert torch.equal(a, b)
    assert second.results["neurons"]["recall"] > first.results["neurons"]["recall"] + 0.02
    assert not list(tmp_path.rglob(".lr_find*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"steps": 10}, "find_rate=10"), ({"least": 1.0}, "least=1.0, greatest=0.1")],
    ids=["steps", "rates"],
)
def test_a_rate_finder_needs_steps_and_rising_rates(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RateFinder(**settings)


@pytest.mark.parametrize("scheduled", [True, False])
def test_biases_and_tilts_have_rates_of_their_own(scheduled: bool, tmp_path: Path) -> None:
    net = shadow()
    net.learn_spread()
    made = PredictorModule(
        net,
        Bce(),
        functools.partial(torch.optim.AdamW, lr=1e-9),
        cosine_warmup if scheduled else None,
        {"heads": 0.5, "neurons": 0.5},
        rates=Rates(3.0, 0.05),
    )

    class Watch(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.groups = [dict(g) for g in trainer.optimizers[0].param_groups]

    def rates(*callbacks: pl.Callback) -> list[float]:
        watch = Watch()
        fit(made, SyntheticRows(), trainer(tmp_path / str(len(callbacks)), *callbacks, watch))
        own = {id(p) for p in net.tilts.values()}
        assert {id(p) for p in watch.groups[-1]["params"]} == own
        assert all(p.dim() == 1 or p.shape[-1] > 0 for p in watch.groups[1]["params"])
        first = watch.groups[0]["lr"] / (watch.groups[0].get("initial_lr") or 1e-9)
        return [g["lr"] / (first if scheduled else 1.0) for g in watch.groups]

    assert rates() == pytest.approx([1e-9, 3e-9, 0.05])
    made.predictor.dequantize()
    net.learn_spread()
    found = rates(RateFinder(40))
    assert found == pytest.approx([made.rate, 3 * (made.rate or 0.0), 0.05])


def test_checkpoints_from_before_tilts_are_taken() -> None:
    made = module(shadow(), Bce())
    held = {"state_dict": {k: v for k, v in made.state_dict().items() if "tilt" not in k}}
    made.on_load_checkpoint(held)
    made.load_state_dict(held["state_dict"])
    for field, bad in (("bias_rate", Rates), ("student.spread_rate", lambda x: Rates(spread=x))):
        with pytest.raises(ValueError, match=f"{field}=0"):
            bad(0)


def test_quantiles_are_those_of_many_rows_and_every_unit() -> None:
    scores = torch.rand(600, 2, 200) + torch.arange(600)[:, None, None]  # rows differ most
    found = torch.cat([_sampled(part, 150 * i) for i, part in enumerate(scores.split(150))])
    assert found.shape == (600, 2, 6)  # of 200 units, every 32nd
    places = torch.linspace(0.01, 0.99, 50)
    wanted, have = (torch.quantile(x[:, 0].flatten()[:120_000], places) for x in (scores, found))
    torch.testing.assert_close(have, wanted, rtol=0, atol=2.0)
    marked = torch.arange(200.0).expand(600, 2, 200)
    counts = _sampled(marked, 0)[:, 0].flatten().int().bincount(minlength=200)
    assert counts.min() >= 12 and counts.max() <= 24  # 18 each in the mean
    few = torch.rand(5, 2, 9)
    assert torch.equal(_sampled(few, 3), few)
