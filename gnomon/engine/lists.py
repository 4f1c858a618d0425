"""Active sets as lists: from masks and scores, for one layer or for many at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gnomon.engine.active import Active
from gnomon.host import HostSpec, UnitKind
from gnomon.kernels import compact, select

Select = tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]
# Called directly: an operator's dispatch costs a CPU step more than the selection itself.
_SELECT: dict[str, Select] = {
    "torch": (select.select_topk_reference, compact.compact_mask_reference)
}
_PASSING: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "torch": compact.select_passing_reference
}
_SLOTS: dict[str, Callable[..., Tensor]] = {"torch": compact.slots_reference}
if select.triton is not None:
    _SELECT["triton"] = (select.select_topk_triton, compact.compact_mask_triton)
    _PASSING["triton"] = compact.select_passing_triton
    _SLOTS["triton"] = compact.slots_triton


class Lists:
    """Builds :class:`Active` sets of a host with the kernels of one backend.

    Args:
        spec: the host.
        device: of its weights.
        backend: ``torch`` or ``triton``.
    """

    def __init__(self, spec: HostSpec, device: torch.device, backend: str) -> None:
        self.spec, self.device = spec, device
        self._topk, self._compact = _SELECT[backend]
        self._slots, self._passing = _SLOTS[backend], _PASSING[backend]
        self._kv = torch.arange(2 * spec.G, dtype=torch.int32, device=device)
        self._within = torch.arange(spec.group_size, dtype=torch.int32, device=device)

    def of_mask(self, kind: UnitKind, keep: Tensor, kept: int | None) -> Active:
        """The lists of one layer's active sets.

        Args:
            kind: heads or neurons.
            keep: (R, N) bool.
            kept: units in every row where that is known; otherwise a count on the device says.
        """
        index, count = self._compact(keep, self.spec.units(kind) if kept is None else kept)
        return self._sets(kind, index[None], count[None], kept is None)[0]

    def of_passing(self, kind: UnitKind, x: Tensor, cut: Tensor) -> Active:
        """The units of one layer whose magnitude exceeds a threshold.

        Args:
            kind: heads or neurons.
            x: (R, N) fp32.
            cut: (1, 1), or (1, N) with one for every unit.
        """
        index, count = self._passing(x, cut, x.shape[1])
        return self._sets(kind, index[None], count[None], True)[0]

    def of_scores(self, kind: UnitKind, scores: Tensor, keep: int) -> list[Active]:
        """The best units of many layers, in one selection.

        Args:
            kind: heads or neurons.
            scores: (layers, R, n) of units, or of key/value groups where n = G < H heads.
            keep: how many of the n every row keeps.

        Returns:
            One set per layer.
        """
        layers, rows, n = scores.shape
        index, count = self._topk(scores.reshape(-1, n).contiguous(), None, keep, keep)
        if n != self.spec.units(kind):
            index = (index[..., None] * self.spec.group_size + self._within).flatten(-2)
            count = count * self.spec.group_size
        shape = (layers, rows)
        return self._sets(kind, index.unflatten(0, shape), count.unflatten(0, shape), False)

    def _sets(self, kind: UnitKind, index: Tensor, count: Tensor, counted: bool) -> list[Active]:
        """index (layers, R, S), count (layers, R) -> one set per layer, built in few launches."""
        layers, rows, places = index.shape
        slots = kvq = wanted = None
        if kind == "heads" or rows > 1:
            flat = self._slots(index.flatten(0, 1), count.flatten(), self.spec.units(kind))
            slots = flat.unflatten(0, (layers, rows))
        if slots is not None and rows > 1 and (kind == "heads" or rows * places > self.spec.F):
            wanted = (slots >= 0).any(1)
        if kind == "heads" and rows == 1:
            kvq = self._with_kv(index)
        wide = count + 2 * self.spec.G if kvq is not None and counted else None
        return [
            Active(
                index[i],
                count[i] if counted else None,
                index[i, :, :0] if slots is None else slots[i],  # no step reads it
                None if kvq is None else kvq[i],
                None if wide is None else wide[i],
                wanted=None if wanted is None else wanted[i],
            )
            for i in range(layers)
        ]

    def _with_kv(self, heads: Tensor) -> Tensor:
        """Heads (..., S) -> (..., 2G + S) blocks of the fused k, v and q rows."""
        kv = self._kv.expand(*heads.shape[:-1], -1)
        return torch.cat([kv, heads + 2 * self.spec.G], dim=-1)
