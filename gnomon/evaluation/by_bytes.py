"""The short table of a sweep over ``budget.bytes``: a line per policy, a column per byte density.

It stands above the full table in ``sweep.md``: perplexity ratios of every text, then the mean over
tasks less the dense model's. A policy that misses its byte density, because it keeps whole heads or
layers, shows the density that it reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gnomon.evaluation.rows import Row, own_first
from gnomon.evaluation.tables import Column, markdown_table, short

TOLERANCE = 0.01  # byte density beyond which the reached one is shown
NOTE = (
    "Perplexity ratio to the dense model, by byte density (predictor included); in brackets the "
    "density reached where it is more than 0.01 off; a / b: several runs. –: refused (see below) "
    "or not run"
)


def markdown_by_bytes(rows: Sequence[Row]) -> str | None:
    """The table as Markdown, best policies first; None unless two byte densities were swept."""
    asked = sorted({row["target_bytes"] for row in rows if "target_bytes" in row}, reverse=True)
    if len(asked) < 2:
        return None
    rows = own_first(rows)
    columns: list[Column] = [("policy", lambda row: row["policy"])]
    for text in sorted({row["text"] for row in rows if "ppl_ratio" in row}):
        columns += [(f"{text} {at:g}", _cell("ppl_ratio", text, at, short)) for at in asked]
    if any("acc_diff" in row for row in rows):
        columns += [
            (f"tasks {at:g}", _cell("acc_diff", None, at, "{:+.3f}".format)) for at in asked
        ]
    lines = sorted((_line(name, rows) for name in {_name(row, rows) for row in rows}), key=_rank)
    return "\n".join([*markdown_table(columns, lines), "", NOTE + ".", ""])


def _line(name: str, rows: Sequence[Row]) -> Row:
    return {"policy": name, "rows": [row for row in rows if _name(row, rows) == name]}


def _name(row: Row, rows: Sequence[Row]) -> str:
    """The policy, with its predictor's objective where predictors of several were swept."""
    objectives = {r.get("objective") for r in rows if r["policy"] == row["policy"]} - {None}
    said = len(objectives) > 1 and "objective" in row
    return f"{row['policy']} ({row['objective']})" if said and row["objective"] else row["policy"]


def _cell(
    key: str, text: str | None, at: float, show: Callable[[float], str]
) -> Callable[[Row], str]:
    """What a policy reached at one byte density; a policy without a budget stands in all."""

    def cell(line: Row) -> str:
        shown = []
        for row in line["rows"]:
            fits = row.get("target_bytes", at) == at and text in (None, row.get("text"))
            if fits and key in row:
                near = abs(row["byte_density"] - at) <= TOLERANCE
                shown.append(show(row[key]) + ("" if near else f" ({row['byte_density']:.2f})"))
        return " / ".join(dict.fromkeys(shown)) or "–"

    return cell


def _rank(line: Row) -> tuple[int, float, str]:
    """Policies measured at more densities first, then by their worst ratio."""
    ratios = [row["ppl_ratio"] for row in line["rows"] if "ppl_ratio" in row]
    worst = max(ratios, default=float("inf"))
    return -len({row.get("target_bytes") for row in line["rows"]}), worst, line["policy"]
