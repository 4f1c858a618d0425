"""Blocks of token ids, for objectives that run the host themselves, beside held-out rows.

A training batch is a dict: ``ids`` (B, T) int64, and ``prompt`` (B,) int64, random prompt lengths,
where they are asked for. Held-out batches are the rows of :class:`OnlineDataModule`, then blocks of
validation documents whose prompt lengths are the same each time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from gnomon.data.batches import share
from gnomon.data.datamodule import Batch, OnlineDataModule
from gnomon.data.plan import generator


@dataclass(frozen=True)
class BlockSettings:
    """What a step is made of.

    Attributes:
        blocks: blocks of a step and process.
        prompts: least and greatest prompt length as shares of a block; None: no prompt lengths.
        heldout_tokens: tokens of the held-out blocks; None: as many as make the held-out rows.

    Raises:
        ValueError: a field out of its range.
    """

    blocks: int = 8
    prompts: tuple[float, float] | None = None
    heldout_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise ValueError(f"student.blocks={self.blocks} must be at least 1 block")
        if self.prompts is not None and not 0 < self.prompts[0] <= self.prompts[1] < 1:
            raise ValueError(
                f"student.prompts={list(self.prompts)}: use the least and the greatest prompt as "
                "shares of a block, between 0 and 1"
            )

    def draw(self, ids: Tensor, random: torch.Generator) -> Batch:
        """A batch of ids (B, T), with prompts of at least 2 tokens and fewer than T."""
        batch = {"ids": ids}
        if self.prompts is not None:
            low, high = (
                min(max(2, round(s * ids.shape[1])), ids.shape[1] - 1) for s in self.prompts
            )
            batch["prompt"] = torch.randint(low, high + 1, (len(ids),), generator=random)
        return batch


class BlockDataModule(OnlineDataModule):
    """Training blocks in a new order every epoch; the order and prompts follow ``seed``.

    Args:
        settings: what a step is made of.
        *args, **kwargs: as of :class:`OnlineDataModule`, which gives means and held-out rows.
    """

    def __init__(self, settings: BlockSettings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings

    def train_dataloader(self) -> Any:
        """Blocks of training documents, ``settings.blocks`` in a batch."""
        blocks = self._train_blocks()
        count, size = self._common(len(blocks)), self.settings.blocks
        if count < size:
            raise ValueError(
                f"student.blocks={size}: the training text has only {count} blocks of "
                f"{self.text.block} tokens for this process; raise text.tokens or lower it"
            )

        def batches() -> Iterator[Batch]:
            epoch = self._epoch()
            random = generator(self.seed, "blocks", epoch)
            order = torch.randperm(len(blocks), generator=random)[: count // size * size]
            for index in order.split(size):
                yield self.settings.draw(blocks.ids[index], random)

        return _loader(batches, count // size)

    def val_dataloader(self) -> Any:
        """Held-out rows, then held-out blocks."""
        rows, size = super().val_dataloader(), self.settings.blocks
        wanted = self.settings.heldout_tokens
        tokens = self.heldout_tokens if wanted is None else wanted
        ids = self.text.blocks(self.tokenizer, "validation", tokens).ids
        start, stop = share(len(ids), *self._processes())
        if start == stop:
            raise ValueError(
                f"{tokens} tokens make {len(ids)} held-out blocks, fewer than the processes: raise "
                "student.heldout_tokens"
            )

        def batches() -> Iterator[Batch]:
            random = generator("held-out prompts", start)
            blocks = (self.settings.draw(x, random) for x in ids[start:stop].split(size))
            return itertools.chain(rows, blocks)

        return _loader(batches, len(rows) + -(-(stop - start) // size))


class _Stream(IterableDataset[Batch]):
    """A re-iterable stream of a known length."""

    def __init__(self, make: Callable[[], Iterator[Batch]], length: int) -> None:
        self._make, self._length = make, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        return self._make()


def _loader(make: Callable[[], Iterator[Batch]], length: int) -> DataLoader[Batch]:
    return DataLoader(_Stream(make, length), batch_size=None, num_workers=0)
