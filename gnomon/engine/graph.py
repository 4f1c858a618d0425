"""One decode step as one CUDA graph: captured once, replayed for every token.

The step reads and writes static tensors alone and never waits for the host, so that its hundreds
of launches cost one. On a CPU the function itself is the loop's body.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WARMUP = 3  # compiles and tunes kernels, and lets lazy buffers appear, before the capture
_PACKAGE = Path(__file__).parent.parent


class CaptureError(RuntimeError):
    """A decode step could not be captured; names the operator that refused."""


class Replay:
    """A function of static tensors that can be run again and again.

    Args:
        fn: the step; reads and writes tensors that stay where they are.
        device: a CUDA device captures, any other calls ``fn``.
        reset: puts the state back that ``fn`` advances, after every warm-up.
        generators: random states that ``fn`` draws from.

    Raises:
        CaptureError: an operator of the step cannot be captured (a host sync, a data-dependent
            shape, an allocation outside the pool).
    """

    def __init__(
        self,
        fn: Callable[[], None],
        device: torch.device,
        reset: Callable[[], None] = lambda: None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._run = fn
        self.captured = device.type == "cuda"
        if self.captured:
            _warm_up(fn, device, reset)
            self._graph = _capture(fn, generators)
            self._run = self._graph.replay

    def __call__(self) -> None:
        """Runs the step once."""
        self._run()


def _warm_up(fn: Callable[[], None], device: torch.device, reset: Callable[[], None]) -> None:
    """Runs the step on a side stream, as capture demands, and takes its effects back."""
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            fn()
            reset()
    current.wait_stream(side)


def _capture(fn: Callable[[], None], generators: Sequence[torch.Generator]) -> Any:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    failure: list[CaptureError] = []
    try:
        # Another thread (a data loader, a tracker) may talk to the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            named(fn, failure)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise (failure[0] if failure else CaptureError(_reason("unknown", error))) from error
    return graph


def named(fn: Callable[[], None], failure: list[CaptureError]) -> None:
    """Runs ``fn``; where it fails, notes the operator and the line of ours that called it.

    Leaving a broken capture raises an error of its own, which would hide this one.
    """
    last = _LastOperator()
    try:
        with last:
            fn()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure.append(CaptureError(_reason(last.name, error)))
        raise


class _LastOperator(TorchDispatchMode):
    """Remembers which operator ran last."""

    name = "none yet"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.name = str(func)
        return func(*args, **(kwargs or {}))


def _reason(operator: str, error: Exception) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE) and Path(frame.filename).name != "graph.py"
    ]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside gnomon"
    first = str(error).strip().partition("\n")[0]
    return (
        f"the decode step cannot be captured as a CUDA graph: operator {operator} at {where} "
        f"failed ({type(error).__name__}: {first}). Steps may not wait for the host"
    )
