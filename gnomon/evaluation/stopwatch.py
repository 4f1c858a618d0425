"""Times of decode steps: several contenders in one run, step by step in turn.

A GPU that warms up, a neighbour on the machine or a clock that drops then falls on all of them
alike. On CUDA every step stands between two events and the host waits only at the end, as in
generation; elsewhere the host's clock is read round each step.
"""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender's steps, in the order they ran."""

    ms: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle step."""
        return float(np.median(self.ms))

    @property
    def p95(self) -> float:
        """The step that 95 of 100 do not exceed."""
        return float(np.percentile(self.ms, 95))


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, warmup: int, device: torch.device
) -> dict[str, Times]:
    """Runs every contender once per round and times each call.

    Args:
        steps: contender -> one step of it; the order turns round in every second round.
        rounds: timed rounds.
        warmup: rounds before them.
        device: that the steps run on.

    Returns:
        Times of ``rounds`` steps per contender.
    """
    names = list(steps)
    spans: dict[str, list[Any]] = {name: [] for name in names}
    clock = _events if device.type == "cuda" else _clock
    for turn in range(warmup + rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            span = clock(steps[name])
            if turn >= warmup:
                spans[name].append(span)
    _wait(device)
    return {name: Times(tuple(_ms(span) for span in spans[name])) for name in names}


def timed(fn: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call by the host's clock, device work included."""
    _wait(device)
    start = time.perf_counter()
    fn()
    _wait(device)
    return 1000 * (time.perf_counter() - start)


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


class Peak:
    """Highest bytes in use: of the allocator on CUDA, of the process (resident) elsewhere.

    Args:
        device: watched.
        besides: bytes in use now that belong to another contender.
    """

    def __init__(self, device: torch.device, besides: int = 0) -> None:
        self._device, self._besides = device, besides
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def bytes(self) -> int:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._besides
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_use(device: torch.device) -> int:
    """Bytes that tensors hold on a CUDA device; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _events(step: Callable[[], object]) -> Any:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    step()
    end.record()
    return start, end


def _clock(step: Callable[[], object]) -> Any:
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def _ms(span: Any) -> float:
    return float(span) if isinstance(span, float) else float(span[0].elapsed_time(span[1]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
