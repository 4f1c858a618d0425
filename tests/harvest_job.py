"""A harvest in processes of its own, for tests that kill one.

They are forked from a server that has imported everything once: importing takes longer than all
that they do.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from gnomon.data import writer
from gnomon.data.criteria import criterion
from gnomon.data.harvest import harvest
from gnomon.data.sources import SyntheticText
from gnomon.host import Tap, describe
from gnomon.tiny import tiny_host

_IMPORTS = [
    *("gnomon.data.harvest", "gnomon.data.criteria", "gnomon.data.sources", "gnomon.tiny"),
    "transformers.models.llama.modeling_llama",
]


def start(out: Path, *slow: float, late: float = 0.0) -> list[ForkServerProcess]:
    """Starts a process for each of ``slow``, the seconds that each shard takes it longer.

    Args:
        out: the trace folder.
        *slow: of the processes by rank; they share the work as those of torchrun do.
        late: seconds after which the second starts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTS)  # not this file, which the server does not find
    world = len(slow)
    waits = [late if rank == 1 else 0.0 for rank in range(world)]
    jobs = [
        context.Process(target=_harvest, args=(out, r, world, slow[r], waits[r]), daemon=True)
        for r in range(world)
    ]
    for job in jobs:
        job.start()
    return jobs


def finish(jobs: list[ForkServerProcess]) -> None:
    """Waits until all are done; one that fails leaves the others waiting for it."""
    deadline = time.monotonic() + 200
    while any(job.exitcode is None for job in jobs) and time.monotonic() < deadline:
        if any(job.exitcode for job in jobs):
            break
        time.sleep(0.05)
    assert [job.exitcode for job in jobs] == [0] * len(jobs)


def _harvest(out: Path, rank: int, world: int, slow: float, late: float) -> None:
    if world > 1:  # as torchrun sets them
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    real = writer.Writer._capture

    def patient(self: Any, task: Any, advance: Any) -> Any:
        time.sleep(slow)
        return real(self, task, advance)

    writer.Writer._capture = patient  # type: ignore[method-assign]
    time.sleep(late)
    model, tokenizer = tiny_host()
    text = SyntheticText(block=32, tokens=1024)
    settings: dict[str, Any] = {"heldout_tokens": 256, "shard_blocks": 2}
    harvest(
        model, tokenizer, describe(model), text, criterion("plainact"), [Tap(1)], out, **settings
    )
