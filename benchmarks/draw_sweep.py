"""Draws the table and figure of stored results again, without running anything.

    python benchmarks/draw_sweep.py benchmarks/results/compare/decode.jsonl OUT_FOLDER

The file has one ``results.json`` on each line; several files become one sweep.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gnomon.evaluation.report import sweep_warnings, write_sweep, write_tasks
from gnomon.evaluation.results import validate
from gnomon.evaluation.rows import merge
from gnomon.evaluation.task_tables import task_rows


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """The runs of all files, each checked against the schema."""
    runs = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line]
    for run in runs:
        validate(run)
    return runs


def main() -> None:
    """Writes ``sweep.*``, and ``tasks.*`` where tasks were measured."""
    *sources, folder = map(Path, sys.argv[1:])
    if not sources:
        raise SystemExit(__doc__)
    runs = read(sources)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_sweep(merge(runs), folder, sweep_warnings(runs))
    tasks = task_rows(runs)
    for path in written + (write_tasks(tasks, folder) if tasks else []):
        print(path)


if __name__ == "__main__":
    main()
