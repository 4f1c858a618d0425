"""Figures: quality against bytes and against units for a sweep, and density by layer for a run."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from gnomon.evaluation.figure_lines import legend, lines_of, panels, style, variant
from gnomon.evaluation.rows import Row
from gnomon.evaluation.tables import short, title

_HEADROOM = 6.0  # how far above every other policy `random` may stretch the ratio's axis
_TICKS = (1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 3000, 10000)


def sweep_figure(rows: Sequence[Row], path: Path) -> Path:
    """Draws perplexity ratio (log) against byte density and unit density, one line per policy.

    Every protocol (host, text) has its own pair of panels. Brackets are dashed; points above the
    axis stand at its top with their value. Several seeds of one setting are drawn as their
    geometric mean with the range of all seeds; single runs carry their bootstrap interval.

    Args:
        rows: from :func:`gnomon.evaluation.rows.merge`; those without a ratio are left out.
        path: PNG to write.

    Raises:
        ValueError: no row has a perplexity ratio.
    """
    rows = [row for row in rows if "ppl_ratio" in row]
    if not rows:
        raise ValueError("no result has a perplexity ratio to draw: add measure=[quality]")
    parts = panels(rows)
    figure = Figure(figsize=(11, 0.9 + 3.9 * len(parts)), layout="constrained")
    grid = figure.subplots(len(parts), 2, sharey="row", squeeze=False)
    for pair, (name, part) in zip(grid, parts.items(), strict=True):
        _pair(pair[0], pair[1], part, name)
    _legends(figure, list(lines_of(rows)))
    figure.suptitle(title(rows), fontsize=11)
    return save(figure, path)


def _pair(left: Axes, right: Axes, rows: Sequence[Row], name: str) -> None:
    """One protocol: against bytes on the left, against units on the right."""
    unit, unit_label = unit_axis(rows)
    lines = lines_of(rows)
    low, high = _range(rows)
    for axes, key in ((left, "byte_density"), (right, unit)):
        for line, points in lines.items():
            _draw(axes, line, points, key, high, list(lines))
        _dress(axes, low, high)
        axes.set_xlim(*_span([row[key] for row in rows]))
    left.set_xlabel("byte density (bytes read per token, predictor included)")
    left.set_ylabel("\n".join(part for part in (name, "perplexity ratio to dense (log)") if part))
    right.set_xlabel(unit_label)
    right.tick_params(labelleft=True)


def _legends(figure: Figure, names: list[str]) -> None:
    """One legend below all panels."""
    columns = min(5, len(names))
    figure.legend(
        [Line2D([], [], **style(name, names)) for name in names],
        [legend(name) for name in names],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )


def layer_figure(per_layer: Mapping[str, Sequence[float]], path: Path, name: str) -> Path:
    """Draws the achieved density of every layer as a heat map, heads above neurons.

    Args:
        per_layer: L densities per unit kind.
        path: PNG to write.
        name: title.
    """
    kinds = [kind for kind in ("heads", "neurons") if kind in per_layer]
    grid = np.array([per_layer[kind] for kind in kinds])
    layers = grid.shape[1]
    figure = Figure(figsize=(max(5.0, 1.6 + 0.3 * layers), 2.1), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        colour = "white" if value < 0.55 else "black"
        text = "1" if value > 0.995 else f"{value:.2f}".lstrip("0")
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(kinds)), kinds)
    step = max(1, math.ceil(layers / 40))
    axes.set_xticks(range(0, layers, step), [str(i) for i in range(0, layers, step)], fontsize=8)
    axes.set_xlabel("layer")
    axes.set_title(name, fontsize=10)
    figure.colorbar(image, ax=axes, label="kept", ticks=[0, 0.5, 1], pad=0.01)
    return save(figure, path)


def unit_axis(rows: Sequence[Row]) -> tuple[str, str]:
    """Which achieved unit density the right panel shows, and its label."""
    heads = {round(row["target_heads"], 6) for row in rows}
    neurons = {round(row["target_neurons"], 6) for row in rows}
    if neurons == {1.0} and heads != {1.0}:
        return "heads", "head density (neurons dense)"
    if heads == {1.0}:
        return "neurons", "neuron density (heads dense)"
    sparse = [row for row in rows if row["policy"] != "dense_int8"]
    kept = {round(row["target_heads"], 6) for row in sparse}
    if all(abs(row["target_heads"] - row["target_neurons"]) < 1e-6 for row in sparse):
        return "neurons", "unit density (heads and neurons alike)"
    return "neurons", f"neuron density (heads {kept.pop():g})" if len(
        kept
    ) == 1 else "neuron density"


def _draw(
    axes: Axes, name: str, points: list[list[Row]], key: str, high: float, names: list[str]
) -> None:
    places = []
    for rows in points:
        ratio = float(np.exp(np.mean([math.log(row["ppl_ratio"]) for row in rows])))
        places.append((float(np.mean([row[key] for row in rows])), ratio, _whisker(rows)))
    places.sort()
    x, y = [place[0] for place in places], [place[1] for place in places]
    look = style(name, names)
    colour = look["color"]
    axes.plot(x, y, label=name, zorder=3, **look)
    for at, value, (low, top) in places:
        if value > high:
            axes.plot([at], [high], color=colour, marker=look["marker"], clip_on=False)
            lift = 7 + 10 * variant(name, names)
            _note(axes, f"↑ {short(value)}", (at, high), (0, lift), colour, ha="center")
        elif top > low:
            edges = {"color": colour, "linewidth": 1.3, "alpha": 0.8}
            axes.plot([at, at], [low, min(top, high)], marker="_", markersize=6, **edges)


def _note(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    colour: str,
    *,
    ha: Literal["left", "center"],
    coords: Any = "data",
) -> None:
    axes.annotate(
        text,
        at,
        xycoords=coords,
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va="center" if ha == "left" else "bottom",
        fontsize=8,
        color=colour,
        annotation_clip=False,
    )


def _whisker(rows: list[Row]) -> tuple[float, float]:
    if len(rows) > 1:
        values = [row["ppl_ratio"] for row in rows]
        return min(values), max(values)
    return rows[0].get("ci_low", 1.0), rows[0].get("ci_high", 1.0)


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """Limits of the ratio's axis: all policies but ``random``, which may stretch it only so far."""
    every = max(row["ci_high"] if "ci_high" in row else row["ppl_ratio"] for row in rows)
    others = [row["ppl_ratio"] for row in rows if row["policy"] != "random"] or [every]
    high = min(max(every, 1.02) * 1.04, max(1.3, max(others)) * _HEADROOM)
    least = min(row["ci_low"] if "ci_low" in row else row["ppl_ratio"] for row in rows)
    low = min(1.0, max(0.9, least), *(row["ppl_ratio"] for row in rows))
    return low / (high / low) ** 0.05, high


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a density axis: room around the values, and density 1 always in sight."""
    low, high = min(values), max(1.0, *values, min(values))
    edge = 0.04 * max(high - low, 0.25)
    return min(low - edge, 0.75), high + edge


def _dress(axes: Axes, low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    ticks = _ticks(low, high)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axhline(1, color="#444444", linewidth=1, zorder=1)
    _note(axes, "dense", (1, 1), (4, 0), "#444444", ha="left", coords=("axes fraction", "data"))
    axes.grid(True, color="#DDDDDD", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(low: float, high: float) -> list[float]:
    """Round ratios inside the limits, never closer than a label is high."""
    gap = math.log(high / low) / 14
    kept: list[float] = []
    for tick in _TICKS:
        if low <= tick <= high and (not kept or math.log(tick / kept[-1]) >= gap):
            kept.append(tick)
    return kept


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    FigureCanvasAgg(figure)
    figure.savefig(temporary, dpi=150)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)
    return path
