"""Achieved densities: kept units counted at the sparse positions of every forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gnomon.accounting import Density
from gnomon.host import KINDS, HostSpec, UnitKind


class Counts:
    """Kept units at sparse positions, accumulated on the device that holds them."""

    def __init__(self, spec: HostSpec) -> None:
        self.spec = spec
        self._kept: dict[tuple[UnitKind, int], Tensor] = {}
        self._groups: dict[int, Tensor] = {}
        self._seen: dict[tuple[UnitKind, int], Tensor] = {}
        self._read: dict[tuple[str, int], Tensor] = {}
        self._of: dict[tuple[str, int], Tensor] = {}

    def add(self, kind: UnitKind, layer: int, keep: Tensor, sparse: Tensor) -> None:
        kept = keep & sparse[..., None]
        self._bump(self._kept, (kind, layer), kept.sum())
        self._bump(self._seen, (kind, layer), sparse.sum())
        if kind == "heads":
            groups = kept.unflatten(-1, (self.spec.G, self.spec.group_size)).any(-1)
            self._bump(self._groups, layer, groups.sum())

    def add_full(self, kind: UnitKind, layer: int, sparse: Tensor) -> None:
        count = sparse.sum()
        self._bump(self._kept, (kind, layer), count * self.spec.units(kind))
        self._bump(self._seen, (kind, layer), count)
        if kind == "heads":
            self._bump(self._groups, layer, count * self.spec.G)

    def add_channels(self, role: str, layer: int, keep: Tensor, sparse: Tensor) -> None:
        """Channels (B, T', W) of a linear's input that are read."""
        self._bump(self._read, (role, layer), (keep & sparse[..., None]).sum())
        self._bump(self._of, (role, layer), sparse.sum() * keep.shape[-1])

    def density(self) -> Density:
        if not self._seen:
            raise ValueError("no sparse position has been run yet: run the host inside the context")
        per_layer: dict[str, list[float]] = {
            kind: [
                float(self._kept[kind, i])
                / max(1.0, float(self._seen[kind, i]))
                / self.spec.units(kind)
                for i in range(self.spec.L)
            ]
            for kind in KINDS
        }
        groups = [
            float(self._groups[i]) / max(1.0, float(self._seen["heads", i])) / self.spec.G
            for i in range(self.spec.L)
        ]
        channels = self._channels()
        for layer, share in channels.get("down", {}).items():
            per_layer["neurons"][layer] = share  # an entry of the projection's input is a neuron
        mean = {kind: sum(rows) / self.spec.L for kind, rows in per_layer.items()}
        read = {role: sum(rows.values()) / len(rows) for role, rows in channels.items()}
        return Density(mean["heads"], mean["neurons"], sum(groups) / self.spec.L, per_layer, read)

    def _channels(self) -> dict[str, dict[int, float]]:
        """Role -> layer -> what is read of that linear's input channels, where it runs."""
        found: dict[str, dict[int, float]] = {}
        for (role, layer), read in self._read.items():
            share = float(read) / max(1.0, float(self._of[role, layer]))
            found.setdefault(role, {})[layer] = share
        return found

    @staticmethod
    def _bump(table: dict[Any, Tensor], key: Any, amount: Tensor) -> None:
        table[key] = amount if key not in table else table[key] + amount
