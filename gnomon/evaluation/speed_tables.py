"""Speed in reports: flat rows, a table, the speed-up at a quality, and a figure.

A row's speed-up is over the fastest dense that was timed: the dense twin, or Hugging Face decode
where that is faster.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from gnomon.evaluation.figure_lines import style
from gnomon.evaluation.figures import save
from gnomon.evaluation.rows import Row

LIMITS = (1.03, 1.05, 1.10)  # perplexity ratios at which a speed-up is quoted
COLUMNS = (
    *("host", "policy", "refresh", "policy_batch", "kv", "prefill", "heads", "neurons"),
    *("byte_density", "ppl_ratio", "device", "engine", "backend", "batch", "context", "steps"),
    *("ms_dense", "ms_sparse", "ms_dense_p95", "ms_sparse_p95", "ms_hf", "hf"),
    *("speedup", "speedup_fastest", "speedup_ideal", "of_ideal", "gbps_dense", "gbps_sparse"),
    *("ttft_ms", "ttft_ms_dense", "peak_bytes", "peak_bytes_dense", "bytes_dense", "bytes_sparse"),
    *("bytes_predictor", "logits_rms", "top1", "sets", "seed", "results"),
)
_VARIANT = ("refresh", "policy_batch", "kv", "prefill")
_PLACE = ("host", "device", "batch", "context")
NOTE = (
    "ms: median per step, dense and sparse in turn in one run; speed-up over the faster of dense "
    "and HF; ideal: dense over sparse bytes; GB/s: those bytes over the time; sets: active sets "
    "shared with the mask reference"
)


def speed_rows(results: Mapping[str, Any]) -> list[Row]:
    """A row for each batch and context of a run, with densities and worst perplexity ratio."""
    policy, density = results["policy"], results["density"]
    texts = results.get("quality", {}).get("texts", {}).values()
    common: Row = {
        "host": results["host"]["name"],
        "policy": policy["name"],
        **{key: policy[key] for key in ("refresh", "kv")},
        "policy_batch": policy["batch"],
        "prefill": policy.get("params", {}).get("prefill", "dense"),
        **{key: density[key] for key in ("heads", "neurons", "byte_density")},
        "seed": results["seed"],
    }
    common |= {"ppl_ratio": max(text["ppl_ratio"] for text in texts)} if texts else {}
    common |= {"results": results["results"]} if "results" in results else {}
    return [_flat(common, row) for row in results.get("speed", [])]


def merge_speed(runs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of many runs, by host, place and policy."""
    rows = [row for run in runs for row in speed_rows(run)]
    return sorted(rows, key=lambda row: (*map(str, _place(row)), line(row, rows), -row["neurons"]))


def gain(row: Row) -> float:
    """Speed-up over the fastest dense."""
    return float(row["speedup_fastest"] if "speedup_fastest" in row else row["speedup"])


def at_quality(rows: Sequence[Row]) -> list[Row]:
    """The fastest run of every policy within each perplexity ratio of :data:`LIMITS`.

    Returns:
        A row per place and policy whose quality was measured: its ``line``, and limit -> speed-up
        (absent where no run is that good).
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if "ppl_ratio" not in row:
            continue
        name = line(row, rows)
        entry = found.setdefault((*_place(row), name), {"line": name, **_named(row)})
        for limit in LIMITS:
            if row["ppl_ratio"] <= limit:
                entry[str(limit)] = max(entry.get(str(limit), 0.0), gain(row))
    return list(found.values())


def line(row: Row, rows: Sequence[Row]) -> str:
    """The policy's name, and the settings in which runs of that policy differ."""
    same = [other for other in rows if other["policy"] == row["policy"]]
    differing = [key for key in _VARIANT if len({str(other.get(key)) for other in same}) > 1]
    return ", ".join([row["policy"], *(str(row[key]) for key in differing)])


def rich_speed(rows: Sequence[Row]) -> Table:
    """The rows as a Rich table."""
    table = Table(title=_title(rows), caption=NOTE, title_style="bold", caption_justify="left")
    shown = _columns(rows)
    for name, _ in shown:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in shown))
    return table


def markdown_speed(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, and below it the speed-up at a quality where it is known."""
    shown = _columns(rows)
    lines = [_title(rows), "", *_table([name for name, _ in shown])]
    lines += [_bar([cell(row) for _, cell in shown]) for row in rows]
    lines += ["", NOTE + ".", ""]
    best = at_quality(rows)
    if best:
        heads = ["policy", *_differing(rows), *(f"≤ {limit:.2f}" for limit in LIMITS)]
        lines += ["Speed-up at a perplexity ratio:", "", *_table(heads)]
        lines += [_bar([row["line"], *_cells(row, rows)]) for row in best]
        lines += [""]
    return "\n".join(lines)


def csv_speed(rows: Sequence[Row]) -> str:
    """Every field as CSV; what was not measured is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def speed_figure(rows: Sequence[Row], path: Path) -> Path:
    """Draws speed-up against byte density with the byte-ideal, and against the perplexity ratio.

    Args:
        rows: from :func:`merge_speed`; the second panel is there if quality was measured.
        path: PNG to write.
    """
    rated = [row for row in rows if "ppl_ratio" in row]
    panels = [("byte_density", "byte density (reference accounting)", list(rows))]
    panels += [("ppl_ratio", "perplexity ratio to dense (log)", rated)] if rated else []
    figure = Figure(figsize=(5.5 * len(panels), 4.4), layout="constrained")
    names = list(dict.fromkeys(_label(row, rows) for row in rows))
    for axes, (key, label, part) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        _panel(axes, key, part, rows, names)
        axes.set_xlabel(label)
    handles = [Line2D([], [], **style(name, names)) for name in names]
    handles.append(Line2D([], [], color="#444444", linestyle=":", label="ideal by bytes"))
    figure.legend(handles, [*names, "ideal by bytes"], loc="outside lower center", ncols=4)
    figure.suptitle(_title(rows), fontsize=10)
    return save(figure, path)


def _panel(
    axes: Axes, key: str, part: Sequence[Row], rows: Sequence[Row], names: list[str]
) -> None:
    for name in names:
        own = sorted((r for r in part if _label(r, rows) == name), key=lambda r: r[key])
        x, look = [row[key] for row in own], style(name, names)
        axes.plot(x, [gain(row) for row in own], zorder=3, **look)
        if key == "byte_density":
            axes.plot(x, [row["speedup_ideal"] for row in own], ":", color=look["color"])
    axes.axhline(1, color="#444444", linewidth=1, zorder=1)
    axes.set_ylabel("speed-up over the fastest dense")
    if key == "ppl_ratio":
        axes.set_xscale("log")
        for limit in LIMITS:
            axes.axvline(limit, color="#BBBBBB", linewidth=0.8, zorder=0)
    axes.grid(True, color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _flat(common: Row, row: Mapping[str, Any]) -> Row:
    agreement = row["agreement"] if isinstance(row["agreement"], Mapping) else {}
    kept = {key: agreement[key] for key in ("logits_rms", "top1", "sets") if key in agreement}
    return common | {key: value for key, value in row.items() if key != "agreement"} | kept


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    places = [(key, _number(key, "{}")) for key in _differing(rows)]
    view: list[tuple[str, Callable[[Row], str]]] = [
        ("policy", lambda row: line(row, rows)),
        *places,
        ("heads", _number("heads", "{:.2f}")),
        ("neurons", _number("neurons", "{:.2f}")),
        ("ratio", _number("ppl_ratio", "{:.3f}")),
        ("ms dense", _number("ms_dense", "{:.3f}")),
        ("HF", _number("ms_hf", "{:.3f}")),
        ("ms", _number("ms_sparse", "{:.3f}")),
        ("speed-up", lambda row: f"{gain(row):.2f}"),
        ("ideal", _number("speedup_ideal", "{:.2f}")),
        ("GB/s dense", _number("gbps_dense", "{:.0f}")),
        ("GB/s", _number("gbps_sparse", "{:.0f}")),
        ("sets", _number("sets", "{:.4f}")),
    ]
    optional = ("ratio", "HF", "sets")
    return [c for c in view if c[0] not in optional or any(c[1](row) != "–" for row in rows)]


def _number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: form.format(row[key]) if key in row else "–"


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    gains = [f"{row[str(limit)]:.2f}×" if str(limit) in row else "–" for limit in LIMITS]
    return [*(str(row[key]) for key in _differing(rows)), *gains]


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in _PLACE)


def _named(row: Row) -> Row:
    return {key: row[key] for key in _PLACE}


def _differing(rows: Sequence[Row]) -> list[str]:
    return [key for key in _PLACE if len({row[key] for row in rows}) > 1]


def _label(row: Row, rows: Sequence[Row]) -> str:
    return ", ".join([line(row, rows), *(f"{key} {row[key]}" for key in _differing(rows))])


def _title(rows: Sequence[Row]) -> str:
    first, differing = rows[0], _differing(rows)
    parts = [str(first["host"])] if "host" not in differing else []
    parts += [f"{key} {first[key]}" for key in ("batch", "context") if key not in differing]
    parts += [first["device"]] if "device" not in differing else []
    engines = {row["engine"] for row in rows}
    return ", ".join([*parts, *(engines if len(engines) == 1 else [])])


def _table(heads: Sequence[str]) -> list[str]:
    return [_bar(heads), _bar(["---", *["---:"] * (len(heads) - 1)])]


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
