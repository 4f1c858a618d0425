"""What train.py calls: fit a predictor, measure its weights as used at inference, save it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar
from rich.table import Table

from gnomon.host import KINDS, HostSpec, UnitKind
from gnomon.predictors.base import Predictor, PredictorInfo
from gnomon.predictors.module import PredictorModule

log = logging.getLogger(__name__)

PACKAGES = ("gnomon", "torch", "transformers", "pytorch-lightning")
# What a training may change and still be the same one for ckpt_path=last.
NOT_IDENTITY = ("trainer", "logger", "paths", "callbacks", "ckpt_path", "out", "experiment")


def fit(
    module: PredictorModule,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    ckpt_path: str | None = None,
) -> dict[str, Any]:
    """Trains, takes the best weights back, quantises them and measures what is left.

    Args:
        module: its predictor is trained and quantised in place.
        data: rows; needs ``means`` and ``info``.
        ckpt_path: ``last``, a checkpoint file, or None.

    Returns:
        The held-out metrics of the quantised predictor (docs/predictors.md).

    Raises:
        SystemExit: Ctrl-C; the state is saved first.
    """
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from(trainer, ckpt_path))
    except SystemExit:
        log.warning("training stopped; the same command with ckpt_path=last goes on from here")
        raise
    if not is_trial(trainer):
        _load_best(module, trainer)
    module.take_means(data)  # of all rows seen; online they have grown
    module.before_quantized(data.val_dataloader())
    module.predictor.quantize()
    trainer.test(module, dataloaders=data.val_dataloader(), verbose=False)
    return module.results


def resume_from(trainer: pl.Trainer, ckpt_path: str | None) -> str | None:
    """The checkpoint file to go on from.

    Raises:
        ValueError: no such file, or nothing to go on from.
    """
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        if not Path(ckpt_path).is_file():
            raise ValueError(f"ckpt_path={ckpt_path!r} is no file; use a checkpoint file or last")
        return ckpt_path
    callback = trainer.checkpoint_callback
    folder = Path(callback.dirpath or "") if isinstance(callback, ModelCheckpoint) else None
    found = sorted(folder.glob("last*.ckpt"), key=os.path.getmtime) if folder else []
    if not found:
        raise ValueError(
            f"ckpt_path=last: nothing to go on from in {folder}; the host, text, criterion, "
            "harvest, predictor, objective, student, optimizer, bias_rate and seed must be those "
            "of the stopped run"
        )
    return str(found[-1])


def save(predictor: Predictor, folder: Path, info: PredictorInfo) -> Path:
    """Writes the predictor folder under a temporary name, then renames it.

    Raises:
        ValueError: the folder exists.
    """
    require_new(folder)
    predictor.info = info
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        predictor.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def require_new(folder: Path) -> None:
    """Refuses a folder that exists and is not empty.

    Raises:
        ValueError: it does.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise ValueError(
            f"out={folder} exists; nothing is overwritten: choose another or remove it"
        )


class Progress(RichProgressBar):
    """Lightning's Rich progress bar without a last epoch, which training by steps has not."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch}"


def is_trial(trainer: pl.Trainer) -> bool:
    """Whether ``trainer.fast_dev_run`` is set: everything runs once, nothing is kept."""
    return bool(getattr(trainer, "fast_dev_run", False))


def new_folder(root: Path, spec: HostSpec, predictor: Predictor) -> Path:
    """``root/<host>/<class>-<UTC time>``, with a number behind it where that is taken."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    base = root / host_folder(spec) / f"{predictor.name}-{stamp}"
    folder, n = base, 1
    while folder.exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    return folder


def host_folder(spec: HostSpec) -> str:
    """Folder name of a host: readable, and different for different weights."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in spec.name)
    return f"{safe}-{spec.hash[:8]}"


def checkpoint_folder(
    root: Path, spec: HostSpec, predictor: Predictor, config: Mapping[str, Any]
) -> Path:
    """``root/<host>/<class>-<hash of the configuration>``: where the same training resumes."""
    identity = {k: v for k, v in config.items() if k not in NOT_IDENTITY}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
    return root / host_folder(spec) / f"{predictor.name}-{digest.hexdigest()[:8]}"


def describe_training(
    spec: HostSpec, objective: str, seed: int, source: Mapping[str, Any], metrics: dict[str, Any]
) -> PredictorInfo:
    """The record that goes into the folder.

    Args:
        source: ``.info`` of the data module.
    """
    return PredictorInfo(
        host=spec.name,
        revision=spec.revision,
        spec_hash=spec.hash,
        criterion=source["criterion"],
        objective=objective,
        granularity=source["granularity"],
        text=source["text"],
        text_digest=source["text_digest"],
        text_split=dict(source.get("text_split", {})),
        trace_hash=source.get("trace_hash"),
        tokens=source.get("tokens", 0),
        seed=seed,
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
        versions=versions(),
        metrics=metrics,
    )


def versions() -> dict[str, str]:
    """Versions of Python and the packages that matter to a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def distributed() -> dict[str, Any]:
    """Trainer arguments under torchrun: every process it started; empty otherwise."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or world == 1:
        return {}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return {"devices": local, "num_nodes": world // local, "strategy": "ddp"}


def quiet() -> None:
    """Silences Lightning's advice about workers and lengths, which our data modules choose."""
    for message in (
        "does not have many workers",
        "LeafSpec",
        "not resumable",
        "`__len__` defined",
        "is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def check_density(density: Mapping[UnitKind, float]) -> dict[UnitKind, float]:
    """Both densities as plain numbers.

    Raises:
        ValueError: outside (0, 1].
    """
    for kind in KINDS:
        if not 0 < density[kind] <= 1:
            raise ValueError(f"density.{kind}={density[kind]} is outside (0, 1]: a kept fraction")
    return {kind: float(density[kind]) for kind in KINDS}


def metrics_table(metrics: Mapping[str, Any]) -> Table:
    """Held-out metrics of the predictor beside the static choice, as a Rich table."""
    table = Table(title=f"Held-out metrics over {metrics['rows']} rows, mean of decided layers")
    for column in ("units", "density", "choice", "recall", "mass", "spearman"):
        table.add_column(column, justify="left" if column in ("units", "choice") else "right")
    for kind in KINDS:
        own, density = metrics[kind], f"{metrics['density'][kind]:g}"
        for choice, values in (("predictor", own), ("static", own["static"])):
            numbers = [f"{values[m]:.3f}" for m in ("recall", "mass", "spearman")]
            table.add_row(kind, density, choice, *numbers)
        table.add_row(kind, density, "oracle", "1.000", f"{own['oracle']['mass']:.3f}", "1.000")
    if metrics.get("student", {}).get("positions"):  # a trial sees none
        found = metrics["student"]
        table.caption = (
            f"sparse host: KL {found['kl']:.4f}, perplexity ratio {found['ppl_ratio']:.3f} over "
            f"{found['positions']} held-out positions"
        )
    return table


def _load_best(module: PredictorModule, trainer: pl.Trainer) -> None:
    callback = trainer.checkpoint_callback
    best = callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
    if best:
        state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
        module.load_state_dict(state)
