"""The shards of one process: which are missing, a forecast, then one after the other."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from gnomon.data import files
from gnomon.data.capture import Probe
from gnomon.data.codes import Raw, encode_rows
from gnomon.data.plan import INPUT_DTYPES, Plan, generator, sha
from gnomon.data.store import Part, Shard, read_note, save
from gnomon.data.text import Blocks
from gnomon.host import KINDS

log = logging.getLogger(__name__)

_SAMPLE = 64  # tokens timed for the forecast on a CPU, where a whole batch is the expensive part


@dataclass(frozen=True, eq=False)
class Task:
    """One shard to be: ``ids`` (blocks, block) from block ``first`` of its split."""

    file: str
    split: Part
    first: int
    ids: Tensor
    note: str


class Writer:
    """Harvests the shards of one process into a folder.

    Args:
        plan: what to harvest.
        probe: captures the host.
        folder: the trace folder.
        batch: blocks in one forward and backward.
        rank: this process; names its shards if there are several.
    """

    def __init__(self, plan: Plan, probe: Probe, folder: Path, batch: int, rank: int) -> None:
        self.plan, self.probe, self.folder, self.batch = plan, probe, folder, batch
        self.prefix = f"r{rank}-" if plan.world > 1 else ""
        self.tokens, self.capture_seconds, self.write_seconds = 0, 0.0, 0.0
        self._entries: dict[str, Shard] = {}

    def run(self, texts: dict[Part, Blocks], progress: bool) -> list[Shard]:
        """Harvests what is missing and returns every shard of this process.

        Raises:
            ValueError: NaN or inf in scores; a shard of another text or settings in the folder.
            OSError: a shard cannot be written; the complete ones stay.
        """
        tasks = [task for split, blocks in texts.items() for task in self._tasks(split, blocks)]
        missing = [t for t in tasks if not self._complete(t)]
        self._forecast(missing, len(tasks))
        columns = (TextColumn("harvest"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
        with Progress(
            *columns,
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress or not missing,
        ) as bar:
            shown = bar.add_task("", total=sum(t.ids.numel() for t in missing), speed="")

            def advance(tokens: int) -> None:
                self.tokens += tokens
                rate = self.tokens / max(1e-9, self.capture_seconds + self.write_seconds)
                bar.update(shown, advance=tokens, speed=f"{rate:,.0f} tokens/s")

            try:
                for task in missing:
                    self._write(task, advance)
            except KeyboardInterrupt:
                log.warning("harvest interrupted: %s", self._kept(tasks))
                raise
            except OSError as error:
                raise OSError(
                    error.errno or errno.EIO, f"harvest stopped ({error}): {self._kept(tasks)}"
                ) from error
        return [self._entry(t) for t in tasks]

    def _tasks(self, split: Part, blocks: Blocks) -> list[Task]:
        note = sha([self.plan.identity, blocks.digest])
        size = self.plan.shard_blocks
        return [
            Task(f"{split}-{self.prefix}{i:05d}.safetensors", split, i * size, ids, note)
            for i, ids in enumerate(blocks.ids.split(size))
        ]

    def _complete(self, task: Task) -> bool:
        path = self.folder / task.file
        if not path.is_file():
            return False
        note = read_note(path)
        if note is None:
            log.warning("%s is damaged: harvested again", task.file)
        elif note != task.note:
            raise ValueError(
                f"{path} was harvested from another text or tokenizer: use another folder, or "
                "delete this one"
            )
        return note is not None

    def _forecast(self, missing: list[Task], total: int) -> None:
        if not missing:
            return
        ids = missing[0].ids[: self.batch]
        if self.probe.device.type == "cpu":
            ids = ids[:1, :_SAMPLE]
        began = time.monotonic()
        found = self.probe(ids)
        self._settle(found.neurons)
        tokens = sum(t.ids.numel() for t in missing)
        seconds = (time.monotonic() - began) / ids.numel() * tokens
        log.info(
            "harvest: %d of %d shards, %d tokens; folder about %.3f GB in all; about %s",
            *(len(missing), total, tokens, self.plan.total_bytes / 1e9, _duration(seconds)),
        )

    def _write(self, task: Task, advance: Callable[[int], None]) -> None:
        began = time.monotonic()
        tensors = self._capture(task, advance)
        captured = time.monotonic()
        save(tensors, self.folder / task.file, task.note)
        self._entry(task)
        self.write_seconds += time.monotonic() - captured
        log.debug("%s in %.1f s", task.file, captured - began)

    def _capture(self, task: Task, advance: Callable[[int], None]) -> Raw:
        """Rows of a shard, each put at its shuffled place at once, and the sums for the means."""
        plan, heldout = self.plan, task.split == "heldout"
        count = self._rows(task)
        place = torch.randperm(count, generator=generator(plan.rows.seed, "shuffle", task.file))
        shard: Raw = {
            f"{k}_sum": torch.zeros(plan.spec.L, plan.spec.units(k), dtype=torch.float64)
            for k in KINDS
        }
        filled = 0
        for first, ids in zip(
            range(task.first, task.first + len(task.ids), self.batch),
            task.ids.split(self.batch),
            strict=True,
        ):
            began = time.monotonic()
            found = self.probe(ids)
            for kind in KINDS:
                shard[f"{kind}_sum"] += found.total(kind).cpu()
            raw = encode_rows(
                *plan.rows.take(found, f"{task.split}-{self.prefix}", first, full=heldout),
                "int8" if heldout else plan.format,
                plan.label_density or 1.0,
                INPUT_DTYPES[plan.input_dtype],
            )
            rows = len(raw["inputs"])
            for name, tensor in raw.items():
                buffer = shard.get(name)
                if buffer is None:
                    buffer = shard[name] = tensor.new_empty(
                        (count, *tensor.shape[1:]), device="cpu"
                    )
                buffer[place[filled : filled + rows]] = tensor.cpu()
            filled += rows
            self.capture_seconds += time.monotonic() - began
            advance(ids.numel())
        assert filled == count, "rows per block are known beforehand"
        return shard

    def _rows(self, task: Task) -> int:
        rows = self.plan.rows
        full = task.split == "heldout" and rows.granularity == "token"
        return len(task.ids) * (self.plan.block - 1 if full else rows.per_block)

    def _entry(self, task: Task) -> Shard:
        if task.file not in self._entries:
            path = self.folder / task.file
            self._entries[task.file] = Shard(
                file=task.file,
                split=task.split,
                rows=self._rows(task),
                tokens=len(task.ids) * (self.plan.block - 1),
                bytes=path.stat().st_size,
                sha256=files.digest(path),
            )
        return self._entries[task.file]

    def _kept(self, tasks: list[Task]) -> str:
        kept = sum((self.folder / t.file).is_file() for t in tasks)
        return (
            f"{kept} of {len(tasks)} shards are complete in {self.folder}; the same command resumes"
        )

    def _settle(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
