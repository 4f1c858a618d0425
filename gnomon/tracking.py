"""Experiment tracking: what goes to Weights & Biases beside the metrics that Lightning logs.

Trace sets are artifacts of type ``traces`` that hold references, predictors of type ``predictor``
that hold the folder. Online, runs use the artifacts they read (lineage). Offline, where
``use_artifact`` raises, name and sha256 stand in the run's config under ``artifacts``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from gnomon.host import KINDS
from gnomon.predictors.base import PredictorInfo

Run = Any  # wandb.Run; wandb is imported only where a run exists

LAYER_COLUMNS = ("kind", "layer", "choice", "recall", "mass", "spearman")


def wandb_run(loggers: Iterable[Logger]) -> Run | None:
    """The W&B run behind the first W&B logger, if any."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            return logger.experiment
    return None


def log_config(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """Records the resolved configuration with every logger."""
    for logger in loggers:
        logger.log_hyperparams(dict(config))


def log_layers(loggers: Iterable[Logger], metrics: Mapping[str, Any]) -> None:
    """Logs held-out metrics by layer: a table (W&B) and a heat map (W&B, TensorBoard).

    Args:
        metrics: ``PredictorInfo.metrics``.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            rows = [list(row) for row in layer_rows(metrics)]
            table = wandb.Table(columns=list(LAYER_COLUMNS), data=rows)
            image = wandb.Image(layer_heatmap(metrics))
            logger.experiment.log({"layers/table": table, "layers/heatmap": image})
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("layers/heatmap", layer_heatmap(metrics))


def layer_rows(metrics: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """One row (``LAYER_COLUMNS``) per kind, choice and layer; dense layers are None."""
    rows: list[tuple[Any, ...]] = []
    for kind in KINDS:
        for choice, layers in metrics[kind]["layers"].items():
            columns = zip(layers["recall"], layers["mass"], layers["spearman"], strict=True)
            rows += [(kind, layer, choice, *values) for layer, values in enumerate(columns)]
    return rows


def layer_heatmap(metrics: Mapping[str, Any]) -> Figure:
    """Recall and captured mass of predictor and static, by layer, as a heat map."""
    labels, data = [], []
    for kind in KINDS:
        for choice, layers in metrics[kind]["layers"].items():
            for name in ("recall", "mass"):
                labels.append(f"{kind} {name}, {choice}")
                data.append([float("nan") if v is None else v for v in layers[name]])
    figure = Figure(figsize=(max(6.0, 0.3 * len(data[0]) + 3), 3.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(data, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("layer (blank: stays dense)")
    figure.colorbar(image)
    return figure


def log_training(loggers: Sequence[Logger], data: Any, folder: Path, info: PredictorInfo) -> None:
    """What a training leaves: metrics by layer, its traces, its predictor; ends the W&B run.

    Args:
        data: the data module; with a ``store`` its traces are recorded.
        folder: the predictor's.
    """
    log_layers(loggers, info.metrics)
    run = wandb_run(loggers)
    if run is None:
        return
    facts = {"criterion": info.criterion, "granularity": info.granularity, "text": info.text}
    store = getattr(data, "store", None)
    if store is not None:
        log_traces(run, Path(store.path), info.host, store.hash, facts)
    log_predictor(run, folder, info.host, {**facts, "objective": info.objective})
    run.finish()


def log_traces(run: Run, folder: Path, host: str, sha256: str, facts: Mapping[str, Any]) -> str:
    """Records the trace store a run reads, by reference; returns the artifact's name.

    Args:
        sha256: the store's hash.
        facts: what to show beside it (criterion, text, …).
    """
    import wandb

    name = artifact_name("traces", host, sha256)
    artifact = wandb.Artifact(name, type="traces", metadata={"sha256": sha256, **facts})
    artifact.add_reference(f"file://{folder.resolve()}", checksum=False)
    _record(run, "traces", name, sha256)
    if run.offline:
        run.log_artifact(artifact)
    else:
        run.use_artifact(artifact)
    return name


def log_predictor(run: Run, folder: Path, host: str, facts: Mapping[str, Any]) -> str:
    """Logs a predictor folder as the run's output; returns the artifact's name."""
    artifact, name, sha256 = _predictor(folder, host, facts)
    _record(run, "predictor", name, sha256)
    run.log_artifact(artifact)
    return name


def use_predictor(run: Run, folder: Path, host: str) -> str:
    """Links a run to the predictor it evaluates; returns the artifact's name.

    The same folder gives the same name and content as when its training logged it. Offline, only
    name and sha256 are recorded.
    """
    artifact, name, sha256 = _predictor(folder, host, {})
    _record(run, "predictor", name, sha256)
    if not run.offline:
        run.use_artifact(artifact)
    return name


def folder_sha256(folder: Path) -> str:
    """sha256 over the names and contents of the files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def artifact_name(kind: str, host: str, sha256: str) -> str:
    """``<kind>-<host>-<12 hex digits>`` in the characters that W&B allows."""
    return re.sub(r"[^\w.-]+", "-", f"{kind}-{host}-{sha256[:12]}")


def _predictor(folder: Path, host: str, facts: Mapping[str, Any]) -> tuple[Any, str, str]:
    import wandb

    sha256 = folder_sha256(folder)
    name = artifact_name("predictor", host, sha256)
    artifact = wandb.Artifact(name, type="predictor", metadata={"sha256": sha256, **facts})
    artifact.add_dir(str(folder))
    return artifact, name, sha256


def _record(run: Run, role: str, name: str, sha256: str) -> None:
    artifacts = dict(run.config.get("artifacts", {}))
    artifacts[role] = {"name": name, "sha256": sha256}
    run.config.update({"artifacts": artifacts}, allow_val_change=True)
