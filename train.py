"""Trains a predictor: harvests what is missing, fits, reports held-out metrics, saves the folder.

    python train.py                                     # the embedded host and text
    python train.py host=hf host.name=<hub id | folder | GGUF> text=file text.path=<file>
    python train.py objective=kl init=<folder>          # end to end, from a trained predictor
    python train.py predictor=calibration               # no training: activation statistics
    python train.py predictor=sketch trainer.max_steps=0 # no training: few-bit copies

The last line of output is the predictor's folder (with harvest.mode=only: the trace folder).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import gnomon

if __name__ == "__main__":  # bare `kernels` and `evaluate` must stay the PyPI packages
    _ROOT = Path(__file__).resolve().parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _ROOT]

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from gnomon import tracking, training
from gnomon.calibration import calibrate
from gnomon.data.stage import prepare
from gnomon.data.store import TraceStore
from gnomon.endtoend import Settings, check_spread, make_module, start_from
from gnomon.errors import one_line
from gnomon.host import HostSpec
from gnomon.predictors.base import Predictor
from gnomon.predictors.calibration import Calibration
from gnomon.predictors.module import Rates
from gnomon.predictors.objectives import Objective
from gnomon.predictors.rates import RateFinder
from gnomon.predictors.sketch import Sketch
from gnomon.sketching import sketch


@hydra.main(version_base="1.3", config_path="pkg://gnomon.conf", config_name="train")
@one_line
def main(cfg: DictConfig) -> None:
    """Runs one training from its configuration."""
    training.quiet()
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision("high")
    density = training.check_density(cfg.density)
    if cfg.out is not None:
        training.require_new(Path(cfg.out))

    model, tokenizer = instantiate(cfg.host)
    spec = gnomon.describe(model)
    predictor = instantiate(cfg.predictor)(spec)
    if isinstance(predictor, Calibration):
        text = instantiate(cfg.text)
        info = calibrate(predictor, model, tokenizer, spec, text, batch=cfg.harvest.batch)
        print(training.save(predictor, new_folder(cfg, spec, predictor), info))
        return
    objective = instantiate(cfg.objective)
    criterion = instantiate(cfg.criterion)
    check_spread(cfg.student.spread, objective)
    if cfg.init is not None:
        start_from(predictor, cfg.init, spec)
    config = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    checkpoints = training.checkpoint_folder(Path(cfg.paths.checkpoints), spec, predictor, config)
    trainer = make_trainer(cfg, checkpoints, objective)
    how = Settings(**config["student"]) if objective.on_policy else None
    training.resume_from(trainer, cfg.ckpt_path)  # complains now, not after the harvest
    if isinstance(predictor, Sketch) and cfg.init is None and cfg.harvest.mode != "only":
        text = instantiate(cfg.text)
        sketch(predictor, model, tokenizer, spec, text, batch=cfg.harvest.batch)

    module = make_module(
        None if how is None else how.student(model, spec, predictor, density),
        predictor,
        objective,
        criterion,
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.scheduler),
        density=density,
        warm=cfg.init is not None,
        rates=Rates(cfg.bias_rate, cfg.student.spread_rate),
    )

    data = prepare(
        **config["harvest"],
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        text=instantiate(cfg.text),
        criterion=criterion,
        taps=predictor.taps,
        needs=(objective.needs,),
        density={str(kind): kept for kind, kept in density.items()},
        out_root=Path(cfg.paths.traces),
        blocks=None if how is None else how.block_settings,
    )
    if isinstance(data, TraceStore):
        print(data.path)
        return
    data.seed = cfg.seed  # the order of rows; the traces themselves serve every seed
    del model

    tracking.log_config(trainer.loggers, config)
    metrics = training.fit(module, data, trainer, cfg.ckpt_path)
    if not trainer.is_global_zero:
        return
    Console().print(training.metrics_table(metrics))
    if training.is_trial(trainer):
        print("fast_dev_run: nothing is saved")
        return
    metrics |= {k: v for k, v in predictor.info.metrics.items() if k == "rounding"}
    metrics |= {} if module.rate is None else {"rate": module.rate}
    label = objective.label if trainer.global_step else "none"
    info = training.describe_training(spec, label, cfg.seed, data.info, metrics)
    folder = new_folder(cfg, spec, predictor)
    training.save(predictor, folder, info)
    tracking.log_training(trainer.loggers, data, folder, info)
    print(folder)


def new_folder(cfg: DictConfig, spec: HostSpec, predictor: Predictor) -> Path:
    """Where the predictor goes."""
    return Path(cfg.out or training.new_folder(Path(cfg.paths.predictors), spec, predictor))


def make_trainer(cfg: DictConfig, checkpoints: Path, objective: Objective) -> pl.Trainer:
    """The Lightning trainer with its callbacks and loggers."""
    skipped = {"checkpoint"} if cfg.trainer.fast_dev_run else set()
    if not cfg.trainer.enable_progress_bar:
        skipped.add("progress")
    callbacks = []
    for name, node in cfg.callbacks.items():
        if node is None or name in skipped:
            continue
        extra = {"dirpath": str(checkpoints)} if name == "checkpoint" else {}
        if node.get("monitor") == "auto":
            extra |= dict(zip(("monitor", "mode"), objective.monitor, strict=True))
        callbacks.append(instantiate(node, **extra))
    if cfg.find_rate is not None:
        if cfg.trainer.max_steps == 0:
            raise ValueError(
                f"find_rate={cfg.find_rate} looks for the rate of a training, and there is none "
                "under trainer.max_steps=0: leave one of them out"
            )
        callbacks.append(RateFinder(cfg.find_rate))
    return instantiate(cfg.trainer, _partial_=True)(
        callbacks=callbacks,
        logger=instantiate(cfg.logger) if cfg.logger else False,
        default_root_dir=HydraConfig.get().runtime.output_dir,
        **training.distributed(),
    )


if __name__ == "__main__":
    main()
