"""Rows with learnable structure and no host: for tests of predictors and training."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from gnomon.host import KINDS, UnitKind


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Scores are a softplus of a fixed low-rank map of the inputs, plus a per-unit offset."""

    def __init__(self, n: int, taps: int, L: int, H: int, F: int, width: int, seed: int) -> None:
        world = torch.Generator().manual_seed(0)
        rows = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(n, taps, width, generator=rows)
        self.scores: dict[UnitKind, torch.Tensor] = {}
        for kind, units in (("heads", H), ("neurons", F)):
            to_units = torch.randn(width, L * units, generator=world) * 2 / width**0.5
            offset = torch.randn(L * units, generator=world)
            scores = torch.nn.functional.softplus(self.inputs[:, 0] @ to_units + offset)
            self.scores[kind] = scores.unflatten(1, (L, units))  # type: ignore[index]

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = {"inputs": self.inputs[i]}
        for kind in KINDS:
            s = self.scores[kind][i]
            row[kind] = s
            k = max(1, round(0.5 * s.shape[-1]))
            row[f"{kind}_labels"] = torch.zeros_like(s, dtype=torch.bool).scatter(
                -1, s.topk(k, -1).indices, True
            )
        return row


class SyntheticRows(pl.LightningDataModule):
    """The data module contract over :class:`Rows`."""

    def __init__(
        self,
        L: int = 3,
        H: int = 4,
        F: int = 48,
        width: int = 32,
        taps: int = 1,
        rows: int = 512,
        batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train = Rows(rows, taps, L, H, F, width, seed=1)
        self.held = Rows(128, taps, L, H, F, width, seed=2)
        self.means = {kind: self.train.scores[kind].mean(0) for kind in KINDS}
        self.info: dict[str, Any] = {
            "criterion": "plainact",
            "granularity": "token",
            "text": "synthetic",
            "text_digest": "0" * 64,
            "source": "online",
            "trace_hash": None,
            "tokens": rows,
        }

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Shuffled rows."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Held-out rows."""
        return DataLoader(self.held, self.batch_size)
