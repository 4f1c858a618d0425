"""Flat rows of results, one per policy and text: what tables, CSV files and figures read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

BRACKETS = ("dense_int8", "oracle", "static", "random")
COLUMNS = (
    "host",
    "text",
    "protocol",
    "prompt",
    "policy",
    "refresh",
    "batch",
    "kv",
    "prefill",
    "predictor",
    "objective",
    "backend",
    "seed",
    "target_heads",
    "target_neurons",
    "target_bytes",
    "heads",
    "neurons",
    "byte_density",
    "predictor_byte_share",
    "bytes_dtype",
    "tokens",
    "ppl_dense",
    "ppl_sparse",
    "ppl_ratio",
    "ci_low",
    "ci_high",
    "kl",
    "agreement",
    "acc_dense",
    "acc_sparse",
    "acc_diff",
    "acc_stderr",
    "recall",
    "mass",
    "spearman",
    "bracket",
)


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    """Rows of one run, for every text: the policy itself, then its brackets."""
    return [row for base, quality in entries(results) for row in _rows(base, quality)]


def entries(results: Mapping[str, Any]) -> Iterator[tuple[Row, Mapping[str, Any]]]:
    """For the policy itself, then each bracket: a row without text, and what was measured."""
    policy = results["policy"]
    common = {
        "host": results["host"]["name"],
        "protocol": results["protocol"]["name"],
        "seed": results["seed"],
    } | _present({"prompt": results["protocol"].get("prompt")})
    own = {key: policy[key] for key in ("refresh", "batch", "kv")}
    own["policy"] = policy.get("label", policy["name"])
    own["prefill"] = policy.get("params", {}).get("prefill", "dense")
    own["backend"] = results["backend"]  # a bracket may have run on another
    predictor = policy.get("predictor")
    own |= _present({"predictor": predictor_label(predictor)})
    own |= _present({"objective": (predictor or {}).get("objective")})
    quality = results.get("quality", {})
    yield common | own | _base(results["density"], quality), quality
    for bracket in results.get("brackets", []):
        named = common | {"policy": bracket["policy"], "bracket": True}
        quality = bracket["quality"]
        yield named | _base(bracket["density"], quality), quality


def merge(runs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Rows of many runs; a bracket that several runs share, or that was run itself, stands once."""
    return in_order(without_doubles([row for run in runs for row in rows_of(run)]))


def without_doubles(every: Iterable[Row]) -> list[Row]:
    """The rows, each bracket that is there already left out."""
    rows: list[Row] = []
    for row in sorted(every, key=lambda row: bool(row.get("bracket"))):
        if not (row.get("bracket") and any(_same(row, other) for other in rows)):
            rows.append(row)
    return rows


def own_first(rows: Sequence[Row]) -> list[Row]:
    """Leaves out brackets of policies that were run themselves on a text: budgets may differ."""
    keys = ("host", "text", "protocol", "policy")
    own = {tuple(row.get(k) for k in keys) for row in rows if not row.get("bracket")}
    return [r for r in rows if not r.get("bracket") or tuple(r.get(k) for k in keys) not in own]


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By host and text, policies before brackets, dense to sparse."""
    return sorted(rows, key=_order)


def predictor_label(predictor: Mapping[str, Any] | None) -> str | None:
    """Short name of a predictor in a table: its class and the start of its hash."""
    if not predictor:
        return None
    digest = predictor.get("sha256", "")[:8]
    return f"{predictor['class']}@{digest}" if digest else str(predictor["class"])


def settings(rows: Sequence[Row]) -> dict[str, Any]:
    """What all rows share, by column, of the settings that can differ between rows."""
    keys = ("host", "text", "protocol", "prompt", "tokens", "backend")
    shared = {key: {str(row[key]) for row in rows if key in row} for key in keys}
    return {key: values.pop() for key, values in shared.items() if len(values) == 1}


def _base(density: Mapping[str, Any], quality: Mapping[str, Any]) -> Row:
    """What does not depend on a text: densities, continuations, tasks, the predictor."""
    base: Row = {
        "target_heads": density["target"]["heads"],
        "target_neurons": density["target"]["neurons"],
        **{k: density[k] for k in ("heads", "neurons", "byte_density", "predictor_byte_share")},
    }
    generation, predictor = quality.get("generation", {}), quality.get("predictor", {})
    base |= _present({key: generation.get(key) for key in ("kl", "agreement")})
    base |= _present({"target_bytes": density["target"].get("bytes")})
    base |= _present({"bytes_dtype": density.get("accounting", {}).get("dtype")})
    base |= _present({key: _mean(predictor.get(key)) for key in ("recall", "mass", "spearman")})
    return base | task_means(quality.get("tasks", {}))


def task_means(tasks: Mapping[str, Any]) -> Row:
    """Means over tasks; the standard error is that of the mean of independent tasks."""
    if not tasks:
        return {}
    found, n = list(tasks.values()), len(tasks)
    dense, sparse = (sum(t[key] for t in found) / n for key in ("acc_dense", "acc_sparse"))
    error = math.sqrt(sum(t["stderr_diff"] ** 2 for t in found)) / n
    means = {"acc_dense": dense, "acc_sparse": sparse}
    return means | {"acc_diff": sparse - dense, "acc_stderr": error}


def _rows(base: Row, quality: Mapping[str, Any]) -> Iterator[Row]:
    for name, text in quality.get("texts", {}).items():
        low, high = text.get("ppl_ratio_ci", (None, None))
        kept = {k: text[k] for k in ("tokens", "ppl_dense", "ppl_sparse", "ppl_ratio")}
        yield base | kept | {"text": name} | _present({"ci_low": low, "ci_high": high})
    if not quality.get("texts"):
        yield base


def _present(fields: Row) -> Row:
    return {key: value for key, value in fields.items() if value is not None}


def _mean(value: Any) -> float | None:
    """A measure given per unit kind as one number: the neurons', which are nearly all units."""
    if isinstance(value, Mapping):
        return value.get("neurons", next(iter(value.values()), None))
    return value


def _same(bracket: Row, other: Row) -> bool:
    keys = [key for key in bracket if key not in ("bracket", "seed")]
    return all(_close(bracket[key], other.get(key)) for key in keys)


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, int | float):
        return abs(a - b) <= 1e-6 * max(1.0, abs(a))
    return bool(a == b)


def _order(row: Row) -> tuple[Any, ...]:
    first = "" if row["policy"] not in BRACKETS else f"~{BRACKETS.index(row['policy'])}"
    return (row["host"], row.get("text", ""), first, row["policy"], -row["byte_density"])
