"""Tracking: the real W&B library, offline, read back from its file; and what stays at home."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from wandb_file import records

from gnomon import tracking
from gnomon.host import KINDS
from gnomon.predictors.metrics import UnitMetrics, summary

ROOT = Path(__file__).resolve().parent.parent


def metrics() -> dict[str, Any]:
    """Metrics of a host of two layers, the first dense."""
    results, decided = {}, {}
    for kind, n in (("heads", 4), ("neurons", 8)):
        units = UnitMetrics(torch.rand(2, n), 0.5)
        units.update(torch.rand(3, 2, n), torch.rand(3, 2, n))
        results[kind], decided[kind] = units.compute(), torch.tensor([False, True])
    return summary(results, {"heads": 0.5, "neurons": 0.5}, decided, rows=3)


def test_rows_and_heat_map_leave_dense_layers_out() -> None:
    rows = tracking.layer_rows(metrics())
    assert len(rows) == 2 * 2 * 2 and all(len(r) == len(tracking.LAYER_COLUMNS) for r in rows)
    assert {r[3] for r in rows if r[1] == 0} == {None}
    figure = tracking.layer_heatmap(metrics())
    assert figure.axes[0].images[0].get_array().shape == (8, 2)  # type: ignore[union-attr]


def test_folder_hash_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    first = tracking.folder_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert tracking.folder_sha256(tmp_path) != first
    (tmp_path / "b").rename(tmp_path / "a")
    assert tracking.folder_sha256(tmp_path) == first
    assert (
        tracking.artifact_name("traces", "org/host x", "f" * 64) == "traces-org-host-x-ffffffffffff"
    )


class OnlineRun:
    """What the link functions need of a W&B run that is online."""

    offline = False

    def __init__(self) -> None:
        self.used: list[Any] = []
        self.config = Config()

    def use_artifact(self, artifact: Any) -> None:
        self.used.append(artifact)


class Config(dict[str, Any]):
    """run.config: update takes allow_val_change."""

    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


def test_online_runs_use_what_they_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    run = OnlineRun()
    name = tracking.use_predictor(run, tmp_path, "tiny")
    tracking.log_traces(run, tmp_path, "tiny", "a" * 64, {"criterion": "plainact"})
    assert [a.type for a in run.used] == ["predictor", "traces"]
    assert run.used[0].name == name == run.config["artifacts"]["predictor"]["name"]
    (entry,) = run.used[1].manifest.entries.values()
    assert entry.ref.startswith("file://"), "traces are held by reference"
    assert run.config["artifacts"]["traces"]["sha256"] == "a" * 64


def test_an_offline_training_can_be_read_back(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            "experiment=smoke",
            "logger=wandb",
            "logger.offline=true",
            f"paths.root={tmp_path}",
            "trainer.max_steps=20",
            "trainer.val_check_interval=10",
            "text.tokens=1024",
        ],
        cwd=tmp_path,
        env=os.environ | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    folder = Path(done.stdout.strip().splitlines()[-1])
    found = records(tmp_path)

    config: dict[str, Any] = {}
    for record in found:
        changes = list(record.run.config.update) + list(record.config.update)
        config |= {c.key or "/".join(c.nested_key): json.loads(c.value_json) for c in changes}
    assert config["optimizer"]["lr"] == 0.01 and config["trainer"]["max_steps"] == 20
    assert config["artifacts"]["predictor"]["sha256"] == tracking.folder_sha256(folder)
    trace_hash = json.loads((folder / "config.json").read_text())["trace_hash"]
    assert config["artifacts"]["traces"]["sha256"] == trace_hash

    kinds = {r.artifact.type for r in found if r.WhichOneof("record_type") == "artifact"}
    requests = {
        r.request.log_artifact.artifact.type
        for r in found
        if r.WhichOneof("record_type") == "request" and r.request.HasField("log_artifact")
    }
    assert {"traces", "predictor"} <= kinds | requests

    logged: set[str] = set()
    for record in found:
        if record.WhichOneof("record_type") == "history":
            logged |= {i.key or "/".join(i.nested_key) for i in record.history.item}
    assert {"train/loss", "val/recall", "layers/table/ncols", "layers/heatmap/width"} <= logged
    for kind in KINDS:
        assert f"test/recall_{kind}" in logged


@pytest.mark.parametrize("choice", ["csv", "tensorboard"])
def test_the_other_loggers_take_metrics_by_layer(choice: str, tmp_path: Path) -> None:
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    cls = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}[choice]
    logger = cls(str(tmp_path), name="", version="x")  # type: ignore[abstract]
    tracking.log_config([logger], {"seed": 0, "host": {"name": "tiny"}})
    tracking.log_layers([logger], metrics())
    logger.save()
    logger.finalize("success")
    assert any(tmp_path.rglob("*"))
    assert tracking.wandb_run([logger]) is None
