"""Tables of tasks: a line for each policy, a column for each task; CSV: a line for each pair.

They stand beside the tables of perplexity, whose rows hold the mean over tasks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from gnomon.evaluation.rows import Row, entries, in_order, without_doubles
from gnomon.evaluation.tables import (
    Column,
    markdown_table,
    number,
    settings_columns,
    task_difference,
)

FIELDS = ("task", "n", "metric", "fewshot", "acc_dense", "acc_sparse", "stderr_diff", "kl")
KEYS = (
    *("host", "protocol", "policy", "refresh", "batch", "kv", "prefill", "predictor", "seed"),
    *("backend", "heads", "neurons", "byte_density", "bracket"),
)
MEANS = ("acc_dense", "acc_sparse", "acc_diff", "acc_stderr")
NOTE = (
    "share of right answers (the metric `acc` of the harness) of the sparse model on all examples; "
    "Δ: mean over tasks less the dense model's ± standard error of the paired differences"
)


def task_rows(runs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row per policy: its row of the main table, and ``tasks`` with what each task gave.

    A bracket that several runs share, or that was run itself, stands once, and so does a policy
    that was run on several texts.
    """
    found: list[Row] = []
    for run in runs:
        for base, quality in entries(run):
            kept = {key: base[key] for key in (*KEYS, *MEANS) if key in base}
            row = kept | {"tasks": dict(quality.get("tasks", {}))}
            if row["tasks"] and row not in found:
                found.append(row)
    return in_order(without_doubles(found))


def rich_tasks(rows: Sequence[Row]) -> Table:
    """The rows as a Rich table; its first line is the dense model."""
    table = Table(title="tasks", caption=NOTE, title_style="bold", caption_justify="left")
    shown = _columns(rows)
    for name, _ in shown:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in [_dense(rows), *rows]:
        table.add_row(*(cell(row) for _, cell in shown), style="dim" if row.get("bracket") else "")
    return table


def markdown_tasks(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    sizes = {f"{name} {found['n']:,}" for row in rows for name, found in row["tasks"].items()}
    about = f"Tasks (examples: {', '.join(sorted(sizes))})"
    return "\n".join([about, "", *markdown_table(_columns(rows), [_dense(rows), *rows]), "", NOTE])


def csv_tasks(rows: Sequence[Row]) -> str:
    """A line for each policy and task."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*KEYS, *FIELDS], restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        about = {key: row[key] for key in KEYS if key in row}
        for name, found in row["tasks"].items():
            kept = {key: found[key] for key in FIELDS if key in found}
            writer.writerow(about | kept | {"task": name})
    return out.getvalue()


def _columns(rows: Sequence[Row]) -> list[Column]:
    names = list(dict.fromkeys(name for row in rows for name in row["tasks"]))
    return [
        *settings_columns(rows),
        ("bytes", number("byte_density", "{:.3f}")),
        *((name, _score(name)) for name in names),
        ("mean", number("acc_sparse", "{:.3f}")),
        ("Δ ± se", task_difference),
    ]


def _score(name: str) -> Any:
    return lambda row: f"{row['tasks'][name]['acc_sparse']:.3f}" if name in row["tasks"] else "–"


def _dense(rows: Sequence[Row]) -> Row:
    """The dense model as a row: it is the same in all of them."""
    tasks: dict[str, Any] = {}
    for row in rows:
        for name, found in row["tasks"].items():
            tasks.setdefault(name, {"acc_sparse": found["acc_dense"]})
    mean = sum(found["acc_sparse"] for found in tasks.values()) / len(tasks)
    return {"policy": "dense model", "byte_density": 1.0, "tasks": tasks, "acc_sparse": mean}
