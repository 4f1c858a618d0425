"""What a run or a sweep shows: tables on the terminal, and files beside the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from gnomon.evaluation.baseline import write_atomic
from gnomon.evaluation.by_bytes import markdown_by_bytes
from gnomon.evaluation.figures import layer_figure, sweep_figure
from gnomon.evaluation.results import NAME, REFUSED, read_results
from gnomon.evaluation.rows import Row, merge, rows_of
from gnomon.evaluation.speed_tables import (
    csv_speed,
    markdown_speed,
    merge_speed,
    rich_speed,
    speed_figure,
    speed_rows,
)
from gnomon.evaluation.tables import csv_text, markdown, rich_table
from gnomon.evaluation.task_tables import csv_tasks, markdown_tasks, rich_tasks, task_rows


def console() -> Console:
    """A console wide enough for the table where output is not a terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=120)


def show_run(results: Mapping[str, Any], folder: Path, warning: str | None = None) -> None:
    """Prints a run's table with its brackets, and draws the density of its layers."""
    out = console()
    rows = rows_of(results)
    if "quality" in results or "speed" not in results:
        out.print(rich_table(rows))
    tasks = task_rows([results])
    if tasks:
        out.print(rich_tasks(tasks))
    speed = speed_rows(results)
    if speed:
        out.print(rich_speed(speed))
    predictor = results.get("quality", {}).get("predictor")
    if predictor:
        out.print(f"predictor on held-out text: {_metrics(predictor)}", highlight=False)
    layers = results["density"].get("per_layer")
    if layers:
        name = f"{results['policy']['name']} on {results['host']['name']}: kept by layer"
        path = layer_figure(layers, folder / "layers.png", name)
        out.print(f"density by layer: {path}", highlight=False, soft_wrap=True)
    for message in dict.fromkeys([*results.get("warnings", []), *([warning] if warning else [])]):
        out.print(f"[bold yellow]warning:[/] {escape(message)}", soft_wrap=True)


def read_sweep(folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Results of every run below a sweep's folder, and the folders of runs that failed."""
    runs, missing = [], []
    for job in sorted(path.parent for path in folder.glob("*/.hydra")):
        if (job / NAME).exists():
            runs.append(read_results(job / NAME))
        elif not (job / REFUSED).exists():
            missing.append(job)
    return runs, missing


def read_refusals(folder: Path) -> list[str]:
    """What was refused in a sweep, each message once: ``policy: reason``."""
    paths = [p for p in folder.glob(f"*/{REFUSED}") if not (p.parent / NAME).exists()]
    found = [path.read_text(encoding="utf-8").strip() for path in paths]
    return sorted(set(found))


def sweep_warnings(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every warning of the runs once, after the policies it was given for."""
    policies: dict[str, list[str]] = {}
    for results in runs:
        for message in results.get("warnings", []):
            names = policies.setdefault(message, [])
            name = results["policy"].get("label", results["policy"]["name"])
            names += [] if name in names else [name]
    return [f"{', '.join(names)}: {message}" for message, names in policies.items()]


def show_sweep(folder: Path) -> list[Path]:
    """Writes ``sweep.*``, ``tasks.*`` and ``speed.*`` for a sweep; prints tables and paths."""
    out = console()
    runs, missing = read_sweep(folder)
    rows, warnings = merge(runs), [*sweep_warnings(runs), *read_refusals(folder)]
    for job in missing:
        out.print(f"[bold yellow]warning:[/] no {NAME} in {job}: that run failed", soft_wrap=True)
    if not rows:
        for message in warnings:
            out.print(f"[bold yellow]refused:[/] {escape(message)}", soft_wrap=True)
        return []
    speed, tasks = merge_speed(runs), task_rows(runs)
    if any("quality" in results for results in runs) or not speed:
        out.print(rich_table(rows, warnings))
    written = write_sweep(rows, folder, warnings)
    if tasks:
        out.print(rich_tasks(tasks))
        written += write_tasks(tasks, folder)
    if speed:
        out.print(rich_speed(speed))
        written += write_speed(speed, folder)
    for path in written:
        out.print(str(path), highlight=False, soft_wrap=True)
    return written


def write_sweep(rows: Sequence[Row], folder: Path, warnings: Sequence[str] = ()) -> list[Path]:
    """Writes the combined CSV, Markdown table and figure; returns their paths."""
    table, text = folder / "sweep.csv", folder / "sweep.md"
    write_atomic(table, csv_text(rows))
    by_bytes = markdown_by_bytes(rows)
    write_atomic(text, "\n".join([*([by_bytes] if by_bytes else []), markdown(rows, warnings)]))
    figure = [row for row in rows if "ppl_ratio" in row]
    return [table, text, *([sweep_figure(figure, folder / "sweep.png")] if figure else [])]


def write_tasks(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the tasks of a sweep as CSV and Markdown; returns their paths."""
    table, text = folder / "tasks.csv", folder / "tasks.md"
    write_atomic(table, csv_tasks(rows))
    write_atomic(text, markdown_tasks(rows) + "\n")
    return [table, text]


def write_speed(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the speed rows of a sweep as CSV, Markdown and a figure; returns their paths."""
    table, text = folder / "speed.csv", folder / "speed.md"
    write_atomic(table, csv_speed(rows))
    write_atomic(text, markdown_speed(rows))
    return [table, text, speed_figure(rows, folder / "speed.png")]


def _metrics(predictor: Mapping[str, Any]) -> str:
    parts = []
    for key, value in predictor.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{kind} {number:.3f}" for kind, number in value.items())
        parts.append(f"{key} {value}")
    return "; ".join(parts)
