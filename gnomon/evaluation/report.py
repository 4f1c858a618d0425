"""What a run or a sweep shows: tables on the terminal, and files beside the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gnomon.evaluation.baseline import write_atomic
from gnomon.evaluation.figures import layer_figure, sweep_figure
from gnomon.evaluation.results import NAME, read_results
from gnomon.evaluation.rows import Row, merge, rows_of
from gnomon.evaluation.tables import csv_text, markdown, rich_table


def console() -> Console:
    """A console wide enough for the table where output is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def show_run(results: Mapping[str, Any], folder: Path, warning: str | None = None) -> None:
    """Prints a run's table with its brackets, and draws the density of its layers."""
    out = console()
    rows = rows_of(results)
    out.print(rich_table(rows))
    predictor = results.get("quality", {}).get("predictor")
    if predictor:
        out.print(f"predictor on held-out text: {_metrics(predictor)}", highlight=False)
    layers = results["density"].get("per_layer")
    if layers:
        name = f"{results['policy']['name']} on {results['host']['name']}: kept by layer"
        path = layer_figure(layers, folder / "layers.png", name)
        out.print(f"density by layer: {path}", highlight=False, soft_wrap=True)
    if warning:
        out.print(f"[bold yellow]warning:[/] {warning}", soft_wrap=True)


def sweep_rows(folder: Path) -> tuple[list[Row], list[Path]]:
    """Rows of every run below a sweep's folder, and the folders of runs without results."""
    runs, missing = [], []
    for job in sorted(path.parent for path in folder.glob("*/.hydra")):
        if (job / NAME).exists():
            runs.append(read_results(job / NAME))
        else:
            missing.append(job)
    return merge(runs), missing


def show_sweep(folder: Path) -> list[Path]:
    """Writes ``sweep.csv``, ``sweep.md`` and ``sweep.png`` for a sweep; prints table and paths."""
    out = console()
    rows, missing = sweep_rows(folder)
    for job in missing:
        out.print(f"[bold yellow]warning:[/] no {NAME} in {job}: that run failed", soft_wrap=True)
    if not rows:
        return []
    out.print(rich_table(rows))
    written = write_sweep(rows, folder)
    for path in written:
        out.print(str(path), highlight=False, soft_wrap=True)
    return written


def write_sweep(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the combined CSV, Markdown table and figure; returns their paths."""
    table, text = folder / "sweep.csv", folder / "sweep.md"
    write_atomic(table, csv_text(rows))
    write_atomic(text, markdown(rows))
    figure = [row for row in rows if "ppl_ratio" in row]
    return [table, text, *([sweep_figure(figure, folder / "sweep.png")] if figure else [])]


def _metrics(predictor: Mapping[str, Any]) -> str:
    parts = []
    for key, value in predictor.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{kind} {number:.3f}" for kind, number in value.items())
        parts.append(f"{key} {value}")
    return "; ".join(parts)
