"""Batches of rows: cut from pieces of any size, the same number on every process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

Piece = tuple[dict[str, Tensor], Tensor]


def rebatch(pieces: Iterable[Piece], size: int, limit: int) -> Iterator[dict[str, Tensor]]:
    """Batches of ``size`` rows across pieces; at most ``limit``, the last may be short.

    Args:
        pieces: tensors (S, ...) by name, and the index (R,) of the rows to take, in their order.
        size: rows of a batch.
        limit: number of batches.
    """
    held: list[dict[str, Tensor]] = []
    count = done = 0
    if limit == 0:
        return
    for tensors, order in pieces:
        start = 0
        while start < len(order):
            part = order[start : start + size - count]
            held.append({name: tensor[part] for name, tensor in tensors.items()})
            start, count = start + len(part), count + len(part)
            if count == size:
                yield _joined(held)
                held, count, done = [], 0, done + 1
                if done == limit:
                    return
    if held:
        yield _joined(held)


class Batches(IterableDataset[dict[str, Tensor]]):
    """A re-iterable stream of batches of known length.

    Args:
        stream: epoch -> pieces of this process.
        finish: stored rows -> batch.
        rows: rows of one epoch on this process, the same on every process.
        size: rows of a batch.
        short_last: keep a last batch that is not full.
        epoch: says which epoch begins.
    """

    def __init__(
        self,
        stream: Callable[[int], Iterable[Piece]],
        finish: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        rows: int,
        size: int,
        short_last: bool,
        epoch: Callable[[], int],
    ) -> None:
        if size < 1:
            raise ValueError(f"batch_size={size} must be at least 1 row")
        self._stream, self._finish, self._epoch, self._size = stream, finish, epoch, size
        # a set smaller than one batch is one short batch, in training too
        self._length = -(-rows // size) if short_last or rows < size else rows // size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        pieces = self._stream(self._epoch())
        for rows in rebatch(pieces, self._size, self._length):
            yield self._finish(rows)


def share(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Start and stop of one process's equal share of ``rows``; the remainder is left out."""
    each = rows // world
    return rank * each, (rank + 1) * each


def _joined(held: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(held) == 1:
        return held[0]
    return {name: torch.cat([part[name] for part in held]) for name in held[0]}
