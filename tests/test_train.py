"""train.py from its configuration: every mode, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

import gnomon
from gnomon import train
from gnomon.host import describe
from gnomon.predictors import find_predictor
from gnomon.tiny import tiny_host
from scripts import call

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
SMALL = [
    "experiment=smoke",
    "text.tokens=2048",
    "harvest.heldout_tokens=256",
    "trainer.max_steps=10",
    "trainer.val_check_interval=5",
    "trainer.enable_progress_bar=false",
]


def configure(folder: Path, *overrides: str) -> DictConfig:
    """The configuration of a run below a folder, as Hydra would hand it to main."""
    with initialize_config_module("gnomon.conf", version_base="1.3"):
        cfg = compose(
            "train",
            [*overrides, f"paths.root={folder}", f"hydra.runtime.output_dir={folder / 'run'}"],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


@pytest.fixture
def raw_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors as they are raised, not the one line that a user sees (tests/test_errors.py)."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")


def last_line(capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder that main printed last."""
    return Path(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(["predictor=shadow", "objective=bce"], id="shadow-bce-store"),
        pytest.param(["predictor=dejavu", "predictor.rank=8", "objective=mse"], id="dejavu-mse"),
        pytest.param(["harvest.mode=online", "objective=mse"], id="shadow-mse-online"),
        pytest.param(["host.family=opt", "criterion=fisher"], id="opt-fisher"),
        pytest.param(["harvest.granularity=prompt", "harvest.batch_size=8"], id="prompt"),
        pytest.param(["density.neurons=0.25", "trainer.precision=bf16-mixed"], id="bf16"),
        pytest.param(["logger=tensorboard", "scheduler=null"], id="tensorboard"),
    ],
)
def test_every_way_to_train(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [o for o in overrides]
    smoke = [o for o in SMALL]
    if "predictor=dejavu" in overrides:
        smoke[0:1] = ["host=tiny", "text=synthetic", "text.block=64", "harvest.batch_size=64"]
    train.main(configure(tmp_path, *smoke, *overrides))
    folder = last_line(capsys)
    predictor = gnomon.load_predictor(folder)
    config = json.loads((folder / "config.json").read_text())
    assert folder.parent.parent == tmp_path / "predictors"
    assert config["metrics"]["rows"] > 0 and predictor.means["neurons"].gt(0).any()
    assert config["text"]["split"].items() >= {"seed": 0, "heldout": 0.1}.items()
    assert config["text"]["digest"] and config["versions"]["torch"] == torch.__version__
    assert (config["trace_hash"] is None) == ("harvest.mode=online" in overrides)
    assert (tmp_path / "traces").exists() == ("harvest.mode=online" not in overrides)
    spec = describe(tiny_host(config["host"]["name"].split("-")[1])[0])
    predictor.check_host(spec)
    assert find_predictor(tmp_path / "predictors", spec, config["class"]) == folder


def test_traces_serve_every_seed_and_harvest_only_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(configure(tmp_path, *SMALL, "harvest.mode=only"))
    traces = last_line(capsys)
    assert (traces / "manifest.json").exists() and not (tmp_path / "predictors").exists()
    folders = []
    for seed in (0, 1):
        train.main(configure(tmp_path, *SMALL, f"seed={seed}"))
        folders.append(last_line(capsys))
    assert folders[0] != folders[1]
    assert list((tmp_path / "traces").iterdir()) == [traces]
    weights = [gnomon.load_predictor(f).state_dict()["outputs.neurons.q"] for f in folders]
    assert not torch.equal(*weights)


@pytest.mark.usefixtures("raw_errors")
def test_ckpt_path_last_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="nothing to go on from"):
        train.main(configure(tmp_path, *SMALL, "ckpt_path=last"))
    train.main(configure(tmp_path, *SMALL))
    longer = [*SMALL, "trainer.max_steps=15", "ckpt_path=last"]
    train.main(configure(tmp_path, *longer))
    (folder,) = (tmp_path / "checkpoints").glob("*/*")
    newest = max(folder.glob("last*.ckpt"), key=os.path.getmtime)
    assert torch.load(newest, weights_only=True)["global_step"] == 15
    with pytest.raises(ValueError, match="nothing to go on from"):
        train.main(configure(tmp_path, *longer, "seed=5"))


def test_a_rate_is_found_recorded_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    search = [*SMALL, "find_rate=20"]
    train.main(configure(tmp_path, *search))
    rate = json.loads((last_line(capsys) / "config.json").read_text())["metrics"]["rate"]
    assert 1e-6 < rate < 0.1
    (line,) = (r.getMessage() for r in caplog.records if "find_rate" in r.getMessage())
    assert line == f"find_rate: training with optimizer.lr={rate:.2g}"
    caplog.clear()
    train.main(configure(tmp_path, *search, "trainer.max_steps=15", "ckpt_path=last"))
    assert "find_rate" not in caplog.text  # what goes on has its rate
    (folder,) = (tmp_path / "checkpoints").glob("*/*")
    newest = max(folder.glob("last*.ckpt"), key=os.path.getmtime)
    (schedule,) = torch.load(newest, weights_only=True)["lr_schedulers"]
    assert schedule["base_lrs"] == [rate, rate]


def test_fast_dev_run_saves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(configure(tmp_path, *SMALL, "trainer.fast_dev_run=true"))
    assert "nothing is saved" in capsys.readouterr().out
    assert not (tmp_path / "predictors").exists() and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["density.heads=0"], r"density\.heads=0"),
        (["density.neurons=1.5"], r"density\.neurons=1\.5"),
        (["out=."], "exists; nothing is overwritten"),
        (["ckpt_path=nowhere.ckpt"], "is no file"),
        (["find_rate=5"], "find_rate=5"),
        (["find_rate=30", "trainer.max_steps=0"], r"find_rate=30.*trainer\.max_steps=0"),
    ],
)
@pytest.mark.usefixtures("raw_errors")
def test_bad_input_is_refused_before_the_harvest(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train.main(configure(tmp_path, *SMALL, *overrides))
    assert not (tmp_path / "traces").exists()


@pytest.mark.usefixtures("raw_errors")
def test_impossible_predictors_are_named_by_their_field(tmp_path: Path) -> None:
    with pytest.raises((ValueError, InstantiationException), match="leaves no layer"):
        train.main(configure(tmp_path, *SMALL, "predictor.tap.layer=7"))
    with pytest.raises(ConfigCompositionException, match=r"(?s)objective/rank.*bce.*mse"):
        configure(tmp_path, *SMALL, "objective=rank")


KL = ["objective=kl", "student.blocks=2", "trainer.max_steps=4", "trainer.val_check_interval=2"]


def test_train_py_goes_from_bce_to_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main(configure(tmp_path, *SMALL))
    first = last_line(capsys)
    train.main(configure(tmp_path, *SMALL, *KL, f"init={first}", "harvest.means_tokens=128"))
    out = capsys.readouterr().out
    folder = Path(out.strip().splitlines()[-1])
    config = json.loads((folder / "config.json").read_text())
    assert "sparse host: KL" in out and "perplexity ratio" in (folder / "README.md").read_text()
    assert config["objective"] == "kl" and config["metrics"]["init"]["objective"] == "bce"
    assert config["metrics"]["student"]["float"].keys() > {"kl", "ppl_ratio"}
    means = [gnomon.load_predictor(f).means["neurons"] for f in (first, folder)]
    assert torch.equal(*means)


@pytest.mark.parametrize(
    ("overrides", "monitor"),
    [
        ([], ("val/recall", "max")),
        (["objective=kl"], ("val/kl", "min")),
        (["objective.on_policy=true"], ("val/kl", "min")),
        (["objective=kl", "callbacks.checkpoint.monitor=val/recall"], ("val/recall", "max")),
    ],
    ids=["bce", "kl", "on-policy", "chosen"],
)
def test_the_checkpoint_follows_the_objective(
    overrides: list[str], monitor: tuple[str, str], tmp_path: Path
) -> None:
    cfg = configure(tmp_path, *SMALL, *overrides)
    trainer = train.make_trainer(cfg, tmp_path, instantiate(cfg.objective))
    (saved,) = trainer.checkpoint_callbacks
    assert (saved.monitor, saved.mode) == monitor  # type: ignore[attr-defined]


@pytest.mark.usefixtures("raw_errors")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*KL, "harvest.mode=store"], r"harvest\.mode=store.*harvest\.mode=online"),
        (["objective.on_policy=true", "criterion=magnitude"], r"harvest\.mode=store.*=online"),
        (["objective.on_policy=true"], "criterion=plainact.*criterion=magnitude"),
        ([*KL, "density.heads=1", "density.neurons=1"], "nothing to learn"),
        ([*KL, "student.blocks=100"], "student.blocks=100"),
        ([*KL, "student.refresh=prompt"], "student.protocol=decode"),
    ],
    ids=["store", "on-policy-store", "criterion", "whole", "blocks", "prompt-all"],
)
def test_train_py_names_what_does_not_fit(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train.main(configure(tmp_path, *SMALL, *overrides))


GROUPS = ("predictor", "objective", "trainer", "logger")


@pytest.mark.parametrize(
    ("group", "name"),
    [(g, f.stem) for g in GROUPS for f in sorted((CONF / g).glob("*.yaml"))],
    ids=lambda x: str(x),
)
def test_every_yaml_instantiates(group: str, name: str, tmp_path: Path) -> None:
    cfg = configure(tmp_path, f"{group}={name}")
    made: Any = instantiate(cfg[group])
    if group == "predictor":
        made = made(describe(tiny_host()[0]))
        assert made.name == name
    assert made is not None
    for node in (cfg.optimizer, cfg.scheduler, *cfg.callbacks.values()):
        assert instantiate(node) is not None


def test_experiments_compose_and_start_with_their_command(tmp_path: Path) -> None:
    for file in (CONF / "experiment" / "smoke.yaml", CONF / "experiment" / "demo.yaml"):
        assert f"# python train.py experiment={file.stem}" in file.read_text()
        assert OmegaConf.is_config(configure(tmp_path, f"experiment={file.stem}"))


def test_smoke_from_another_folder(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "experiment=smoke"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "GNOMON_ROOT"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    folder = tmp_path / done.stdout.strip().splitlines()[-1]
    metrics = json.loads((folder / "config.json").read_text())["metrics"]
    assert metrics["neurons"]["recall"] > metrics["neurons"]["static"]["recall"]
    assert (tmp_path / "outputs" / "runs").is_dir()
    assert "Traceback" not in done.stderr and "static" in done.stdout


def test_unknown_override_fails_cleanly(tmp_path: Path) -> None:
    done = call("train.py", "experiment=smoke", "density.heads=2", cwd=tmp_path)
    assert done.returncode == 2 and "density.heads=2" in done.stderr
