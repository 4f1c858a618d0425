"""The lines of figures: which rows each one joins, in which order, and how it looks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gnomon.evaluation.rows import BRACKETS, Row, own_first

# Okabe and Ito, then Tol: told apart with every common colour blindness; markers do without colour.
_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#332288", "#882255", "#44AA99")
_MARKERS = ("o", "s", "D", "v", "P", "X", "<")
_BRACKETS = {
    "oracle": ("#009E73", "^"),
    "static": ("#B8860B", "d"),
    "random": ("#777777", "x"),
    "dense_int8": ("#000000", "*"),
}


Lines = dict[str, list[list[Row]]]  # name -> points; a point is the rows of all its seeds


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by what a line must not join: host, text and protocol, named where they differ."""
    keys = [k for k in ("host", "text", "protocol") if len({str(r.get(k)) for r in rows}) > 1]
    found: dict[str, list[Row]] = {}
    for row in rows:
        name = ", ".join(f"{key} {row.get(key)}" for key in keys)
        found.setdefault(name, []).append(row)
    return found


def within(lines: Lines, part: Sequence[Row]) -> Lines:
    """The lines of one panel, named as in all."""
    kept = {
        name: [[row for row in point if row in part] for point in points]
        for name, points in lines.items()
    }
    kept = {name: [point for point in points if point] for name, points in kept.items()}
    return {name: points for name, points in kept.items() if points}


def lines_of(rows: Sequence[Row]) -> Lines:
    """Line name -> points in order of density; a point is the rows of all its seeds."""
    keys = ("refresh", "batch", "kv", "prefill", "objective")
    rows = own_first(rows)
    grid = _is_grid(rows)
    names = {row["policy"] for row in rows}
    varying = {
        name: [
            k for k in keys if len({str(r[k]) for r in rows if r["policy"] == name and k in r}) > 1
        ]
        for name in names
    }
    lines: dict[str, dict[tuple[float, ...], list[Row]]] = {}
    for row in rows:
        extra = [str(row[key]) for key in varying[row["policy"]] if row.get(key)]
        if grid and row["policy"] != "dense_int8":
            heads = row["target_heads"]
            extra.append("heads dense" if heads == 1 else f"heads {heads:g}")
        name = ", ".join([row["policy"], *extra])
        target = (row.get("target_bytes", 0.0), row["target_heads"], row["target_neurons"])
        lines.setdefault(name, {}).setdefault(target, []).append(row)
    order = sorted(lines, key=_place)
    return {name: [lines[name][t] for t in sorted(lines[name])] for name in order}


def _is_grid(rows: Sequence[Row]) -> bool:
    """Whether heads and neurons were swept against each other: then a line has one head density."""
    if any("target_bytes" in row for row in rows):
        return False
    targets = {
        (row["target_heads"], row["target_neurons"])
        for row in rows
        if row["policy"] not in ("dense", "dense_int8")
    }
    heads, neurons = {h for h, _ in targets}, {n for _, n in targets}
    return len(heads) > 1 and len(neurons) > 1 and len(targets) > max(len(heads), len(neurons))


def _place(line: str) -> tuple[int, str, str]:
    """Policies first, `shadow` and `dejavu` leading so that their colours stay; then brackets."""
    policy = line.split(",")[0]
    known = ("shadow", "dejavu")
    if policy in BRACKETS:
        return 10 + (*BRACKETS[1:], BRACKETS[0]).index(policy), policy, line
    return known.index(policy) if policy in known else len(known), policy, line


def style(name: str, names: list[str]) -> dict[str, Any]:
    """Colour and marker tell the policy, an open marker and thinner line its second variant."""
    policy = name.split(",")[0]
    if policy in _BRACKETS:
        colour, marker = _BRACKETS[policy]
        line = "none" if policy == "dense_int8" else "--"
    else:
        solid = list(
            dict.fromkeys(n.split(",")[0] for n in names if n.split(",")[0] not in _BRACKETS)
        )
        index = solid.index(policy)
        turn, place = divmod(index, len(_COLOURS))
        colour, marker = _COLOURS[place], _MARKERS[(place + turn) % len(_MARKERS)]
        line = "-"
    which = variant(name, names)
    return {
        "color": colour,
        "marker": marker,
        "linestyle": line,
        "markersize": 13 if marker == "*" else 6.5,
        "markerfacecolor": colour if which == 0 else "white",
        "linewidth": (1.6 if line == "--" else 2.2) / (1 + 0.5 * which),
        "alpha": 1.0 if which < 2 else 0.6,
    }


def variant(name: str, names: list[str]) -> int:
    """Place of a line among those of its policy."""
    return [n for n in names if n.split(",")[0] == name.split(",")[0]].index(name)


def legend(name: str) -> str:
    return name.replace("dense_int8", "dense int8 (nothing skipped)")
