"""Evaluates a sparse model: ``python evaluate.py policy=shadow budget.density=0.5``.

Writes results.json, tables and figures in the run's folder; the last line of output is the path of
results.json. ``-m`` sweeps add one CSV, Markdown table and figure. See docs/evaluation.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import gnomon

if __name__ == "__main__":  # Hugging Face `evaluate` and PyPI `kernels` must not find this folder
    here = Path(gnomon.__file__).resolve().parent.parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]

from gnomon.errors import Refused, one_line
from gnomon.evaluation import report, run
from gnomon.evaluation.results import write_refusal


@hydra.main(version_base="1.3", config_path="pkg://gnomon.conf", config_name="evaluate")
@one_line
def main(cfg: DictConfig) -> float | None:
    """Runs one evaluation; returns the perplexity ratio where it was measured, for sweepers."""
    hydra_config = HydraConfig.get()
    command = " ".join(["python evaluate.py", *hydra_config.overrides.task])
    settings = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    folder = Path(hydra_config.runtime.output_dir)
    try:
        outcome = run.evaluate(settings, folder, command)  # type: ignore[arg-type]
    except Refused as error:
        if hydra_config.mode != RunMode.MULTIRUN:
            raise
        write_refusal(folder, cfg.policy.get("label") or cfg.policy.name, error)
        return None
    if cfg.get("logger") is not None:
        from gnomon.evaluation import log  # slow to import

        log.log_run(instantiate(cfg.logger), settings, outcome.results)  # type: ignore[arg-type]
    report.show_run(outcome.results, outcome.path.parent, outcome.warning)
    print(outcome.path)
    return outcome.ratio


if __name__ == "__main__":
    main()
