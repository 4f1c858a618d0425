"""Tables of results: for the terminal (Rich), as Markdown and as CSV, all from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from rich.table import Table
from rich.text import Text

from gnomon.evaluation.rows import COLUMNS, Row, settings

Column = tuple[str, Callable[[Row], str]]


def number(key: str, form: str) -> Callable[[Row], str]:
    """A cell that shows a field, or a dash where it was not measured."""
    return lambda row: form.format(row[key]) if key in row else "–"


def _interval(row: Row) -> str:
    if "ppl_ratio" not in row:
        return "–"
    ratio = short(row["ppl_ratio"])
    return (
        f"{ratio} [{short(row['ci_low'])}, {short(row['ci_high'])}]" if "ci_low" in row else ratio
    )


def short(value: float) -> str:
    """A ratio or perplexity with the digits that matter: 1.043, 12.35, 1109."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _perplexity(row: Row) -> str:
    return short(row["ppl_sparse"]) if "ppl_sparse" in row else "–"


def _policy(row: Row) -> str:
    return f"({row['policy']})" if row.get("bracket") else row["policy"]


def task_difference(row: Row) -> str:
    """Mean over tasks less the dense model's, with its standard error."""
    return f"{row['acc_diff']:+.3f} ± {row['acc_stderr']:.3f}" if "acc_diff" in row else "–"


_VIEW: tuple[Column, ...] = (
    ("policy", _policy),
    ("heads", number("heads", "{:.2f}")),
    ("neurons", number("neurons", "{:.2f}")),
    ("bytes", number("byte_density", "{:.3f}")),
    ("of it predictor", number("predictor_byte_share", "{:.3f}")),
    ("ppl", _perplexity),
    ("ratio [95 %]", _interval),
    ("KL", number("kl", "{:.3f}")),
    ("agree", number("agreement", "{:.3f}")),
    ("tasks", number("acc_sparse", "{:.3f}")),
    ("Δ tasks", task_difference),
)
_EXTRA = (
    *("host", "text", "protocol", "refresh", "batch", "kv", "prefill"),
    *("predictor", "objective", "seed"),
)
_LEFT = ("policy", *_EXTRA)
_OPTIONAL = ("ppl", "ratio [95 %]", "KL", "agree", "tasks", "Δ tasks")
NOTE = (
    "heads, neurons, bytes: kept fraction achieved (bytes include the predictor, whose share "
    "of the dense bytes stands beside); ratio: perplexity over the dense model's; tasks: mean "
    "share of right answers, Δ less the dense model's ± standard error; (…): bracket at the same "
    "budget"
)


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns worth showing: the view, and every setting in which policies' rows differ."""
    view = [c for c in _VIEW if c[0] not in _OPTIONAL or any(c[1](row) != "–" for row in rows)]
    return [*settings_columns(rows), *view[1:]]


def settings_columns(rows: Sequence[Row]) -> list[Column]:
    """The policy, and every setting in which policies' rows differ."""
    own = [row for row in rows if not row.get("bracket")]
    differing = [key for key in _EXTRA if len({str(row.get(key)) for row in own}) > 1]
    differing = [key for key in differing if not _follows_policy(own, key)]
    return [_VIEW[0], *((key, number(key, "{}")) for key in differing)]


def rich_table(rows: Sequence[Row], warnings: Sequence[str] = ()) -> Table:
    """The rows as a Rich table, with what they share in its title and warnings below."""
    caption = Text("\n".join([NOTE, *(f"Warning: {message}" for message in warnings)]))
    table = Table(title=title(rows), caption=caption, title_style="bold", caption_justify="left")
    shown = columns(rows)
    for name, _ in shown:
        table.add_column(name, justify="left" if name in _LEFT else "right")
    for row in rows:
        style = "dim" if row.get("bracket") else None
        table.add_row(*(cell(row) for _, cell in shown), style=style)
    return table


def markdown(rows: Sequence[Row], warnings: Sequence[str] = ()) -> str:
    """The rows as a Markdown table under a line that says what they share; warnings below."""
    shown = columns(rows)
    lines = [title(rows), "", *markdown_table(shown, rows)]
    notes = [part for message in warnings for part in ("", f"**Warning:** {message}.")]
    return "\n".join([*lines, "", NOTE + ".", *notes, ""])


def markdown_table(shown: Sequence[Column], rows: Sequence[Row]) -> list[str]:
    """The lines of a Markdown table."""
    head = _line([name for name, _ in shown])
    rule = _line(["---" if name in _LEFT else "---:" for name, _ in shown])
    return [head, rule, *(_line([cell(row) for _, cell in shown]) for row in rows)]


def csv_text(rows: Sequence[Row]) -> str:
    """Every field of every row as CSV; fields not measured are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*COLUMNS, "results"], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def title(rows: Sequence[Row]) -> str:
    """Host, text, protocol and dense perplexity, as far as all rows share them."""
    shared = settings(rows)
    parts = [shared[key] for key in ("host", "text") if key in shared]
    if "protocol" in shared:
        prompt = f" (prompt {shared['prompt']})" if "prompt" in shared else ""
        parts.append(f"protocol {shared['protocol']}{prompt}")
    dense = {f"{row['ppl_dense']:.2f}" for row in rows if "ppl_dense" in row}
    if len(dense) == 1:
        parts.append(f"dense perplexity {dense.pop()}")
    right = {f"{row['acc_dense']:.3f}" for row in rows if "acc_dense" in row}
    if len(right) == 1:
        parts.append(f"dense tasks {right.pop()}")
    if "tokens" in shared:
        parts.append(f"{int(shared['tokens']):,} targets")
    dtypes = {row["bytes_dtype"] for row in rows if "bytes_dtype" in row}
    if len(dtypes) == 1:
        parts.append(f"bytes in {dtypes.pop()}")
    return ", ".join(parts)


def _follows_policy(rows: Sequence[Row], key: str) -> bool:
    """Whether a setting differs only because policies differ, as refresh does for static."""
    names = {row["policy"] for row in rows}
    per_policy = [{str(row.get(key)) for row in rows if row["policy"] == name} for name in names]
    return all(len(values) == 1 for values in per_policy) and len(names) > 1


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
