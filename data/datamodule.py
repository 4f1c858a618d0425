"""Lightning data modules: training rows from a trace store, or straight from the host.

A batch is a dict: ``inputs`` (R, n_taps, W) fp32; ``heads`` (R, L, H) and ``neurons`` (R, L, F),
fp32 token or prompt scores, higher = keep; ``heads_labels`` and ``neurons_labels`` of the same
shapes, bool, the top-k at ``density``. Training batches have scores and/or labels as ``needs``
says, held-out batches always have both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gnomon.data.batches import Batches, Piece, share
from gnomon.data.capture import Capture, Probe
from gnomon.data.codes import (
    Density,
    Need,
    Raw,
    add_targets,
    check_needs,
    decode_rows,
    density_of,
    encode_rows,
)
from gnomon.data.criteria import Criterion
from gnomon.data.harvest import rank_world
from gnomon.data.plan import Granularity, generator, make_rows, sha
from gnomon.data.store import TraceStore
from gnomon.data.text import Blocks, Text
from gnomon.host import KINDS, HostSpec, Tap, UnitKind

BOTH: tuple[Need, Need] = ("labels", "scores")
Batch = dict[str, Tensor]


class _RowsModule(pl.LightningDataModule):
    """What both data modules share: needs, density, processes and loaders."""

    def __init__(self, needs: Iterable[Need], density: Density, batch_size: int, seed: int) -> None:
        super().__init__()
        self.needs, self.density = check_needs(needs), density
        for kind in KINDS:
            density_of(density, kind)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1 row")
        self.batch_size, self.seed = batch_size, seed
        self._epochs = -1

    def test_dataloader(self) -> Any:
        """The held-out rows: there is one held-out set, for validation and the final metrics."""
        return self.val_dataloader()

    def _processes(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return rank_world()

    def _epoch(self) -> int:
        self._epochs += 1
        return self._epochs if self.trainer is None else self.trainer.current_epoch


class TraceDataModule(_RowsModule):
    """Rows of a trace store; memory holds about one shard.

    Every process reads its own part of every shard, all the same number of batches.

    Args:
        store: an open store.
        needs: ``labels``, ``scores`` or both.
        density: kept fraction of the labels, one value or per kind.
        batch_size: rows of a batch.
        seed: of the order of shards and rows, together with the epoch.

    Raises:
        ValueError: the store does not hold what is asked for.
    """

    def __init__(
        self,
        store: TraceStore,
        needs: Iterable[Need],
        density: Density = 0.5,
        batch_size: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__(needs, density, batch_size, seed)
        self.store = store
        if store.format == "bits":
            self._check_bits(store)

    @property
    def means(self) -> dict[UnitKind, Tensor]:
        """Mean token score (L, N) fp32 per kind, over all harvested training tokens."""
        return self.store.means

    @property
    def info(self) -> dict[str, Any]:
        """Where the rows come from, JSON-able."""
        manifest = self.store.manifest
        digests = manifest["text"]["digests"]["train"]
        return {
            "criterion": manifest["settings"]["criterion"],
            "granularity": manifest["settings"]["granularity"],
            "text": manifest["text"]["name"],
            "text_digest": digests[0] if len(digests) == 1 else sha(digests),
            "text_split": manifest["text"]["split"],
            "source": "store",
            "trace_hash": self.store.hash,
            "tokens": sum(s.tokens for s in self.store.shards("train")),
        }

    def train_dataloader(self) -> Any:
        return self._loader("train", self.needs)

    def val_dataloader(self) -> Any:
        return self._loader("heldout", frozenset(BOTH))

    def _loader(self, split: Any, needs: Iterable[Need]) -> Any:
        rank, world = self._processes()
        train = split == "train"
        shards = self.store.shards(split)

        def pieces(epoch: int) -> Iterator[Piece]:
            shuffle = generator(self.seed, "order", epoch)
            order = torch.randperm(len(shards), generator=shuffle).tolist() if train else None
            for index in order or range(len(shards)):
                start, stop = share(shards[index].rows, (rank + epoch) % world, world)
                raw = self.store.read(shards[index], start, stop)
                rows = torch.arange(stop - start)
                yield raw, rows[torch.randperm(len(rows), generator=shuffle)] if train else rows

        def finish(raw: Raw) -> Batch:
            return decode_rows(raw, self.store.units, needs, self.density)

        rows = sum(s.rows // world for s in shards)
        epoch = self._epoch if train else int
        batches = Batches(pieces, finish, rows, self.batch_size, not train, epoch)
        return DataLoader(batches, batch_size=None, num_workers=0)

    def _check_bits(self, store: TraceStore) -> None:
        if "scores" in self.needs:
            raise ValueError(
                f"trace folder {store.path} holds labels only (format bits), and this objective "
                "needs scores: harvest with harvest.format=int8"
            )
        held = store.label_density or {}
        for kind in KINDS:
            if density_of(self.density, kind) != held.get(kind):
                raise ValueError(
                    f"trace folder {store.path} holds labels of {kind} at density "
                    f"{held.get(kind)}, asked for {density_of(self.density, kind)}: harvest with "
                    "harvest.label_density, or with harvest.format=int8"
                )


class OnlineDataModule(_RowsModule):
    """Rows straight from the host, captured as training asks for them, on the host's device.

    Held-out rows are captured once in ``setup`` and kept as 8-bit codes.

    Args:
        model: the host, in eval mode.
        tokenizer: its tokenizer.
        spec: its description.
        text: where documents come from; an epoch is ``text.tokens`` tokens.
        criterion: what makes a score.
        taps: hidden states that become inputs.
        needs: ``labels``, ``scores`` or both.
        density: kept fraction of the labels, one value or per kind.
        granularity: ``token`` or ``prompt``.
        prompts: prompt lengths for ``prompt``; default half a block.
        batch_size: rows of a batch.
        host_batch: blocks in one forward and backward of the host.
        token_rate: share of the positions that become rows.
        heldout_tokens: tokens of validation documents.
        means_tokens: training tokens of the first pass that makes ``means`` before training.
        seed: of order and subsample.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        spec: HostSpec,
        text: Text,
        criterion: Criterion,
        taps: Sequence[Tap],
        needs: Iterable[Need] = ("labels",),
        density: Density = 0.5,
        granularity: Granularity = "token",
        prompts: Sequence[int] | None = None,
        batch_size: int = 1024,
        host_batch: int = 4,
        token_rate: float = 1.0,
        heldout_tokens: int = 2048,
        means_tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(needs, density, batch_size, seed)
        if host_batch < 1:
            raise ValueError(f"host_batch={host_batch} must be at least 1 block")
        self.tokenizer, self.spec, self.text, self.criterion = tokenizer, spec, text, criterion
        self.host_batch, self.heldout_tokens = host_batch, heldout_tokens
        self.means_tokens = max(means_tokens, text.block)
        self.rows = make_rows(text.block, granularity, prompts, token_rate, seed)
        criterion.require(granularity)
        self._probe = Probe(model, spec, taps, criterion)
        self._heldout: Raw | None = None
        self._first = _Sums(spec, self._probe.device)
        self._running = _Sums(spec, self._probe.device)
        self._train: tuple[tuple[int, int], Blocks] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Captures the held-out rows, and the first means; does nothing the second time."""
        if self._heldout is not None:
            return
        parts: list[Raw] = []
        heldout = self.text.blocks(self.tokenizer, "validation", self.heldout_tokens)
        for ids in heldout.ids.split(self.host_batch):
            inputs, scores = self.rows.take(self._probe(ids), "heldout", 0, full=True)
            parts.append(encode_rows(inputs, scores, "int8", 1.0, torch.float32))
        first = self.text.blocks(self.tokenizer, "train", self.means_tokens)
        for ids in first.ids.split(self.host_batch):
            self._first.add(self._probe(ids))
        self._heldout = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    @property
    def means(self) -> dict[UnitKind, Tensor]:
        """Mean token score (L, N) fp32 per kind so far (on the CPU): of the first pass, then of all
        tokens that training has seen on this process."""
        return max(self._first, self._running, key=lambda s: s.tokens).means()

    @property
    def info(self) -> dict[str, Any]:
        """Where the rows come from, JSON-able."""
        blocks = self._train_blocks()
        return {
            "criterion": self.criterion.name,
            "granularity": self.rows.granularity,
            "text": self.text.name,
            "text_digest": blocks.digest,
            "text_split": self.text.facts("train", "validation"),
            "source": "online",
            "trace_hash": None,
            "tokens": blocks.ids.numel(),
        }

    def train_dataloader(self) -> Any:
        blocks = self._train_blocks()
        count = self._common(len(blocks))

        def pieces(epoch: int) -> Iterator[Piece]:
            shuffle = generator(self.seed, "order", epoch)
            order = torch.randperm(len(blocks), generator=shuffle)[:count]
            for first in range(0, count, self.host_batch):
                found = self._probe(blocks.ids[order[first : first + self.host_batch]])
                self._running.add(found)
                inputs, scores, index = self.rows.view(found, f"epoch-{epoch}", first)
                mixed = torch.randperm(len(index), generator=shuffle).to(index.device)
                yield {"inputs": inputs, **scores}, index[mixed]

        rows = count * self.rows.per_block
        batches = Batches(pieces, self._finish, rows, self.batch_size, False, self._epoch)
        return DataLoader(batches, batch_size=None, num_workers=0)

    def val_dataloader(self) -> Any:
        self.setup()
        assert self._heldout is not None
        raw = self._heldout
        start, stop = share(len(raw["inputs"]), *self._processes())

        def pieces(_: int) -> Iterator[Piece]:
            yield raw, torch.arange(start, stop, device=self._probe.device)

        def finish(rows: Raw) -> Batch:
            units = {kind: self.spec.units(kind) for kind in KINDS}
            return decode_rows(rows, units, BOTH, self.density)

        batches = Batches(pieces, finish, stop - start, self.batch_size, True, int)
        return DataLoader(batches, batch_size=None, num_workers=0)

    def _finish(self, rows: Raw) -> Batch:
        batch: Batch = {"inputs": rows["inputs"].float()}
        for kind in KINDS:
            add_targets(batch, kind, rows[kind], self.needs, self.density)
        return batch

    def _train_blocks(self) -> Blocks:
        processes = self._processes()
        if self._train is None or self._train[0] != processes:
            self._train = processes, self.text.blocks(self.tokenizer, "train", None, *processes)
        return self._train[1]

    def _common(self, blocks: int) -> int:
        """The least number of blocks of any process, so that all have as many batches."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return blocks
        least = torch.tensor([blocks], device=self._probe.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        return int(least)


class _Sums:
    """Running sums of token scores on the host's device; adding never waits for it."""

    def __init__(self, spec: HostSpec, device: torch.device) -> None:
        self.tokens = 0
        self._sums = {
            kind: torch.zeros(spec.L, spec.units(kind), dtype=torch.float64, device=device)
            for kind in KINDS
        }

    def add(self, found: Capture) -> None:
        """Adds every position of whole blocks but the last of each."""
        self.tokens += found.valid.shape[0] * (found.valid.shape[1] - 1)
        for kind in KINDS:
            self._sums[kind] += found.total(kind)

    def means(self) -> dict[UnitKind, Tensor]:
        """Mean token score (L, N) fp32 per kind."""
        if self.tokens == 0:
            raise ValueError("means of an OnlineDataModule exist after setup(): call it first")
        return {kind: (self._sums[kind] / self.tokens).float().cpu() for kind in KINDS}
