"""Checks and times the cases of ``benchmarks/kernels.py``."""

from __future__ import annotations

import gc
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_cases import OPS, UNSKIPPED, Case, Make, Sizes
from shapes import SHAPES
from torch import Tensor

from gnomon.engine.graph import Replay
from gnomon.env import versions
from gnomon.evaluation.results import commit
from gnomon.evaluation.stopwatch import device_name, interleave, timed

log = logging.getLogger("benchmarks.kernels")
MOST_SETS = 64
# Relative RMS against the reference on the same tensors: rounding of the result, order of sums.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.int32: 0.0}


def ceilings(device: torch.device) -> dict[str, float]:
    """GB/s of a copy (read and write) and of a read-only sum of one large tensor."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    calls = {"copy": (lambda: target.copy_(source), 2), "read": (lambda: source.sum(), 1)}
    return {
        name: times * source.nbytes / min(timed(fn, device) for _ in range(10)) / 1e6
        for name, (fn, times) in calls.items()
    }


def measure(cfg: Any, make: Make, op: str, kept: float) -> dict[str, Any]:
    """One row: checked, then timed."""
    first = make.case(op, kept)
    y, expected = first.compared(first.run()), first.compared(first.reference())
    error = relative_rms(y, expected)
    row: dict[str, Any] = {"op": op, "kept": kept, "batch": cfg.batch, "relative_rms": error}
    if not error <= TOLERANCE[y.dtype]:
        return row | {"error": f"differs from its reference by {error:.1e}"}
    more = cfg.flush_mb * 2**20 / max(1.0, first.nbytes)
    sets = max(cfg.sets, min(MOST_SETS, math.ceil(more)))
    cases = [first, *(make.case(op, kept) for _ in range(sets - 1))]
    steps = {"op": _walk(cases, "run", make.device), "dense": _walk(cases, "dense", make.device)}
    times = interleave(steps, cfg.rounds, cfg.warmup, make.device)
    us = {name: 1000 * times[name].median / sets for name in steps}
    nbytes = sum(case.nbytes for case in cases) / sets
    return row | {
        "us": us["op"],
        "us_dense": us["dense"],
        "us_p95": 1000 * times["op"].p95 / sets,
        "speedup": us["dense"] / us["op"],
        "bytes": nbytes,
        "bytes_dense": first.nbytes_dense,
        "speedup_ideal": first.nbytes_dense / nbytes,
        "gbps": nbytes / us["op"] / 1e3,
        "gbps_dense": first.nbytes_dense / us["dense"] / 1e3,
        "sets": sets,
    }


def relative_rms(y: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the reference."""
    gap = (y.double() - expected.double()).norm()
    return float(gap / expected.double().norm().clamp_min(1e-30))


def run(cfg: Any, write: Callable[[dict[str, Any]], None]) -> list[str]:
    """Times everything that the config names; returns what there was no time for."""
    for field, known, asked in (("ops", OPS, cfg.ops), ("shapes", SHAPES, cfg.shapes)):
        wrong = [name for name in asked if name not in known]
        if wrong:
            raise ValueError(f"{field}={wrong} are unknown; use any of {', '.join(known)}")
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    device = torch.device("cuda" if cuda else "cpu")
    end, left_out = time.monotonic() + cfg.limit_s, []
    torch.manual_seed(cfg.seed)
    ceiling = {f"gbps_{name}_ceiling": value for name, value in ceilings(device).items()}
    for shape in cfg.shapes:
        make = Make(Sizes.of(*SHAPES[shape]), cfg, getattr(torch, cfg.dtype), device)
        for op in cfg.ops:
            for kept in [1.0] if op in UNSKIPPED else cfg.kept:
                if time.monotonic() > end:
                    left_out.append(f"{shape} {op} {kept}")
                    continue
                row = _measured(cfg, make, op, kept)
                about = {"device": device_name(device), "dtype": cfg.dtype, "int8": cfg.int8}
                about["early"] = cfg.early
                write({"shape": shape, **row, **ceiling, **about})
                gc.collect()
    return left_out


def _measured(cfg: Any, make: Make, op: str, kept: float) -> dict[str, Any]:
    try:
        with torch.no_grad():
            return measure(cfg, make, op, kept)
    except Exception as error:  # one operator that fails must not lose the others' rows
        log.exception("%s at %s failed", op, kept)
        return {"op": op, "kept": kept, "error": f"{type(error).__name__}: {error}"[:300]}


def _walk(cases: Sequence[Case], side: str, device: torch.device) -> Callable[[], None]:
    calls = [getattr(case, side) for case in cases]

    def walk() -> None:
        for call in calls:
            call()

    return Replay(walk, device)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['shape']:13s} {row['op']:17s} {row['kept']:5.2f}"
    if "error" in row:
        return f"{name} {row['error'][:80]}"
    part = row["gbps"] / row["gbps_read_ceiling"]
    return (
        f"{name} {row['us']:9.1f} {row['us_dense']:9.1f} {row['speedup']:6.2f} "
        f"{row['speedup_ideal']:6.2f} {row['gbps']:6.0f} {part:5.2f} {row['relative_rms']:.1e}"
    )


def report(cfg: Any, command: str) -> bool:
    """Runs, appends rows to ``out``, prints a table last; whether every operator was right."""
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"commit": commit(), "command": command, "versions": versions()}
    rows: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | about) + "\n")
        log.info(_line(row))

    left_out = run(cfg, write)
    print(
        "shape         op                 kept        us  us dense   gain  ideal   GB/s  read rms"
    )
    for row in rows:
        print(_line(row))
    for name in left_out:
        print(f"left out, limit_s={cfg.limit_s:g} was over: {name}")
    print(out)
    return not any("error" in row for row in rows)
