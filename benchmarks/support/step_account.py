"""Where the time of one decode step goes: every kernel of a replayed CUDA graph, by part.

A kernel is credited with the time from the end of the one before it to its own end, so that parts
add up to the step, and a launch that overlaps its predecessor counts once. Parts are read off the
order of the launches: the last row kernel before an attention is the k, v, q projection, the
columns after it the out projection, the last row kernel before the next columns gate and up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gnomon.accounting import HostBytes
from gnomon.engine.engine import Engine
from gnomon.evaluation.traffic import Kept, predictor_traffic

REPLAYS = 5
DECISION = "predictor, selection"
PARTS = ("embedding", "kvq", "attention", "out", "up", "down", DECISION, "norms", "head", "next")


@dataclass(frozen=True)
class Kernel:
    """One launch of a step.

    Attributes:
        name: the kernel's.
        us: credited microseconds.
        busy: from its own start to its end.
    """

    name: str
    us: float
    busy: float


def record(step: Callable[[], object]) -> list[Kernel]:
    """Kernels of one step in order, each with its median over several replays.

    Raises:
        RuntimeError: replays did not run the same kernels.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    runs = []
    for _ in range(REPLAYS):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step()
            torch.cuda.synchronize()
        events = [e for e in trace.events() if e.device_type == DeviceType.CUDA]
        runs.append(sorted(events, key=lambda e: e.time_range.end))
    names = [[e.name for e in run] for run in runs]
    if any(found != names[-1] for found in names[1:]):
        raise RuntimeError(f"replays ran {[len(found) for found in names]} kernels, not the same")
    return [_median(runs[1:], i) for i in range(len(names[-1]))]


def by_name(kernels: Sequence[Kernel]) -> dict[str, dict[str, float]]:
    """Name of a kernel -> its launches in a step, and the microseconds credited to all of them."""
    found: dict[str, dict[str, float]] = {}
    for kernel in kernels:
        own = found.setdefault(kernel.name.partition("<")[0], {"launches": 0, "us": 0.0})
        own["launches"] += 1
        own["us"] += kernel.us
    return dict(sorted(found.items(), key=lambda item: -item[1]["us"]))


def parts_of(names: Sequence[str], embedding: int | None = None) -> list[str]:
    """The part of every kernel of a step.

    Args:
        names: in order of launch.
        embedding: launches before the first layer; None takes all before its first row kernel.

    Raises:
        ValueError: no layer is found.
    """
    anchors = [i for i, n in enumerate(names) if "_attention" in n or "_column" in n]
    if not anchors:
        raise ValueError(f"no layer is found in the kernels {sorted(set(names))}")
    parts = ["next"] * len(names)
    begin, before = 0, "down"
    for at in anchors:
        part = "attention" if "_attention" in names[at] else _columns(before)
        _fill(parts, names, begin, at, {"attention": "kvq", "down": "up"}.get(part))
        parts[at], begin, before = part, at + 1, part
    last = [i for i in range(begin, len(names)) if _is_row(names[i])]
    if last:
        _fill(parts, names, begin, last[0], None)
        parts[last[0]] = "head"
    first = next((i for i, n in enumerate(names) if _is_row(n)), anchors[0])
    for i in range(min(first, len(names)) if embedding is None else embedding):
        parts[i] = "embedding"
    return parts


def account(
    kernels: Sequence[Kernel], parts: Sequence[str], traffic: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows by part: launches, microseconds, share, bytes and GB/s."""
    by_part: dict[str, list[Kernel]] = defaultdict(list)
    for kernel, part in zip(kernels, parts, strict=True):
        by_part[part].append(kernel)
    total = sum(kernel.us for kernel in kernels)
    rows = []
    for part in PARTS:
        if part not in by_part:
            continue
        spent = sum(kernel.us for kernel in by_part[part])
        row: dict[str, Any] = {"part": part, "launches": len(by_part[part]), "us": spent}
        row |= {"share": spent / total, "busy_us": sum(k.busy for k in by_part[part])}
        if part in traffic:
            row |= {"bytes": traffic[part], "gbps": traffic[part] / spent / 1e3}
        rows.append(row)
    return rows


def part_bytes(engine: Engine, host: HostBytes, kept: Kept, context: int) -> dict[str, float]:
    """Bytes that each part of a step moves."""
    policy, weights = engine.policy, engine.weights
    union, layer = kept.union, weights.layers[0]
    L, spec = len(weights.layers), engine.spec
    drop = policy is not None and policy.kv == "drop"
    kvq = L * layer.kvq.nbytes / (2 * spec.G + spec.H)
    up = layer.up.nbytes + (0 if layer.gate is None else layer.gate.nbytes)
    size = torch.empty(0, dtype=getattr(torch, host.dtype)).element_size()
    cache = size * host.kv_per_token * context * engine.batch * kept.each.groups
    found = {
        "kvq": kvq * (spec.H * union.heads + 2 * spec.G * (union.groups if drop else 1)),
        "attention": cache,
        "out": L * layer.out_t.nbytes * union.heads,
        "up": L * up * union.neurons,
        "down": L * layer.down_t.nbytes * union.neurons,
        "head": float(weights.head.nbytes),
    }
    read = 0.0 if policy is None else predictor_traffic(policy)
    return found | ({DECISION: read} if read else {})


def _fill(
    parts: list[str], names: Sequence[str], begin: int, end: int, projection: str | None
) -> None:
    """Names launches between two anchors: the last row kernel projects, the rest decides."""
    rows = [i for i in range(begin, end) if _is_row(names[i])]
    for i in range(begin, end):
        parts[i] = "norms" if "_norm_add" in names[i] else DECISION
    if rows and projection is not None:
        parts[rows[-1]] = projection


def _columns(before: str) -> str:
    return "out" if before == "attention" else "down"


def _is_row(name: str) -> bool:
    return "_row_kernel" in name or "_row_dot" in name


def _median(runs: Sequence[Sequence[Any]], i: int) -> Kernel:
    credited, busy = [], []
    for run in runs:
        start = run[i - 1].time_range.end if i else run[i].time_range.start
        credited.append(run[i].time_range.end - start)
        busy.append(run[i].time_range.end - run[i].time_range.start)
    middle = len(runs) // 2
    return Kernel(runs[-1][i].name, sorted(credited)[middle], sorted(busy)[middle])
