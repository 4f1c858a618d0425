"""Tracking of evaluation runs: config, figures of merit, link to the predictor's artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from gnomon.evaluation.rows import rows_of
from gnomon.tracking import log_config, use_predictor, wandb_run

_LOGGED = (
    "heads",
    "neurons",
    "byte_density",
    "predictor_byte_share",
    "ppl_dense",
    "ppl_sparse",
    "ppl_ratio",
    "kl",
    "agreement",
    "acc_dense",
    "acc_sparse",
    "acc_diff",
)
_TIMED = ("ms_dense", "ms_sparse", "ms_hf", "speedup", "speedup_ideal", "ttft_ms", "peak_bytes")


def log_run(logger: Logger, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Records one evaluation with a Lightning logger and closes it.

    Args:
        logger: CSV, TensorBoard or W&B.
        settings: the resolved config.
        results: as in results.json.
    """
    log_config([logger], settings)
    logger.log_metrics(metrics(results), step=0)
    run = wandb_run([logger])
    source = results["policy"].get("predictor", {}).get("source")
    if run is not None and source and Path(source).is_dir():
        use_predictor(run, Path(source), results["host"]["name"])
    logger.finalize("success")
    if run is not None:
        run.finish()


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """``eval/<what>`` of the policy, ``bracket/<policy>/<what>`` and ``speed/<place>/<what>``."""
    found: dict[str, float] = {}
    for row in reversed(rows_of(results)):
        prefix = f"bracket/{row['policy']}" if row.get("bracket") else "eval"
        found |= {f"{prefix}/{key}": row[key] for key in _LOGGED if key in row}
    for row in results.get("speed", []):
        prefix = f"speed/batch{row['batch']}-context{row['context']}"
        found |= {f"{prefix}/{key}": row[key] for key in _TIMED if key in row}
    return found
