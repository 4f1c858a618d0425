"""The Hydra callback that ends an ``evaluate.py -m`` sweep with one table and figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from gnomon.errors import STATUS
from gnomon.evaluation.report import read_refusals, show_sweep


class SweepReport(Callback):
    """Combines the results of all runs of a sweep; does nothing for single runs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Writes ``sweep.csv``, ``sweep.md`` and ``sweep.png`` in the sweep's folder.

        Raises:
            SystemExit: every policy of the sweep was refused.
        """
        folder = Path(config.hydra.sweep.dir).absolute()
        if not show_sweep(folder) and read_refusals(folder):
            raise SystemExit(STATUS)
