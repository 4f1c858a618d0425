"""What each process of a harvest hands in, and how the first one knows that it is of this launch.

A killed harvest leaves files behind, so that a part lying in the folder proves nothing. The first
process writes a new number when it starts, every other one puts the number it finds on its part,
again if it changes, and only parts with the own number count.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from gnomon.data.store import write_json

log = logging.getLogger(__name__)

LAUNCH = "launch.json"
PATIENCE_SECONDS = 7200.0  # without any change in the folder; a shard takes seconds to minutes
_POLL_SECONDS = 0.2
_SAY_SECONDS = 60.0


class Parts:
    """The parts of one launch; a process's own old part is removed at once.

    Args:
        folder: the trace folder.
        rank: this process.
        world: number of processes.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.launch = uuid.uuid4().hex
        self._file(rank).unlink(missing_ok=True)
        if rank == 0 and world > 1:
            write_json(folder / LAUNCH, {"launch": self.launch})

    def collect(self, own: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts of all processes, by rank; for the first process, which gives its own.

        Raises:
            TimeoutError: nothing changed in the folder for ``PATIENCE_SECONDS``.
            ValueError: a listed shard is not there.
        """
        parts = [own]
        for rank in range(1, self.world):
            patience = _Patience(self.folder, f"process {rank} of {self.world}")
            while (part := _read(self._file(rank))).get("launch") != self.launch:
                patience.pause()
            parts.append(part)
        for part in parts:
            for shard in part["shards"]:
                self._require(shard)
        return parts

    def hand_in(self, part: dict[str, Any], sealed: Path) -> None:
        """Gives this process's part to the first one and returns when the file ``sealed`` exists.

        Raises:
            TimeoutError: nothing changed in the folder for ``PATIENCE_SECONDS``.
        """
        handed = None
        patience = _Patience(self.folder, "the first process to seal the folder")
        while not sealed.is_file():
            launch = _read(self.folder / LAUNCH).get("launch")
            if launch not in (None, handed):
                write_json(self._file(self.rank), {"launch": launch, **part})
                handed = launch
            patience.pause()

    def clear(self) -> None:
        """Removes what :meth:`hand_in` and the constructor wrote, of every process."""
        for file in (self.folder / LAUNCH, *self.folder.glob("part-*.json")):
            file.unlink(missing_ok=True)

    def _file(self, rank: int) -> Path:
        return self.folder / f"part-{rank}.json"

    def _require(self, shard: dict[str, Any]) -> None:
        file = self.folder / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            raise ValueError(
                f"{file} is {'missing' if size is None else f'{size} bytes'}, its process wrote "
                f"{shard['bytes']}: something else changes the folder; the same command resumes"
            )


class _Patience:
    """Waits in short steps, says for what, and gives up when the folder does not change."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        self._state, self._since, self._said = 0, time.monotonic(), float("-inf")

    def pause(self) -> None:
        now, state = time.monotonic(), self.folder.stat().st_mtime_ns
        if state != self._state:
            self._state, self._since = state, now
        if now - self._since > PATIENCE_SECONDS:
            raise TimeoutError(
                f"harvest: nothing new in {self.folder} for {PATIENCE_SECONDS:g} s while waiting "
                f"for {self.what}. If a process died, end the others: the same command resumes. "
                "If one is slow, raise gnomon.data.parts.PATIENCE_SECONDS"
            )
        if now - self._said > _SAY_SECONDS:
            log.info("harvest: waiting for %s", self.what)
            self._said = now
        time.sleep(_POLL_SECONDS)


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
