"""Gathered execution of a session: linears that read the kept units alone, in the host's shapes.

A skipped head's q row and a skipped neuron's gate and up rows are zero without being computed, and
out- and down-projections read the kept columns alone, so that one replacement of the linears'
forward serves every architecture, cache and attention implementation. Under ``kv=drop`` the K and V
rows of groups without an active head are zero too. In a fused qkv or gate_up linear these are rows
among others (:meth:`gnomon.host.HostSpec.blocks`). Where a norm spans all heads (OLMo-2), all rows
of q, k and v are computed: a zero among them would change the rest.

- One token per row is gathered in place through index lists, weights being read where they are (for
  this the out- and down-projections are stored transposed while the session lasts).
- A decision that is one for all rows and fixed for the sequence is compacted once, into small
  contiguous weights kept beside its cache; it serves any number of tokens.
- All other sparse tokens (several per row, or rows of which only some are sparse) are computed
  densely and masked: their union would read nearly every unit. So is a forward under autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from gnomon.accounting import Role
from gnomon.host import HostSpec, LayerSpec, Tap, UnitKind, module
from gnomon.kernels.compact import compact_mask
from gnomon.runtime.backends import Gather, Index

if TYPE_CHECKING:
    from gnomon.runtime.session import Session

Forward = Callable[[Tensor], Tensor]
# What of a linear belongs to the units: its rows (their own, those of key/value groups, or of a
# fused linear those of several roles) or its columns.
Side = Literal["rows", "groups", "qkv", "gate_up", "columns"]


@dataclass
class Kept:
    """The active set of one layer in one forward.

    Attributes:
        keep: (R, N) bool, R being 1 or the number of rows.
        capacity: units that every row keeps, None where the number varies.
        fixed: small weights may be made of it.
    """

    keep: Tensor
    capacity: int | None
    fixed: bool

    def index(self, block: int) -> Index:
        """The kept units as a list for the kernels."""
        n = self.keep.shape[-1]
        if self.keep.is_cpu and len(self.keep) == 1:  # a CPU may be asked for the length
            return self.keep[0].nonzero().flatten().int(), block, None
        index, count = compact_mask(self.keep, n if self.capacity is None else self.capacity)
        return index, block, count if self.capacity is None else None

    def over(self, side: Side, spec: HostSpec, drop: bool) -> Kept:
        """The same set over the blocks of rows (or columns) that a linear has on this side.

        Args:
            side: which.
            spec: the host's.
            drop: whether a fused qkv linear skips k and v of groups without an active head.
        """
        if side == "groups":
            return Kept(self._groups(spec), None, self.fixed)
        if side == "gate_up":
            return self._placed(spec, {"gate": self.keep, "up": self.keep}, 2)
        if side == "qkv":
            used = self._groups(spec) if drop else self.keep.new_ones(1, spec.G)
            return self._placed(spec, {"q": self.keep, "k": used, "v": used}, None if drop else 1)
        return self

    def _groups(self, spec: HostSpec) -> Tensor:
        """(R, G) key/value groups that have an active head."""
        return self.keep.unflatten(-1, (spec.G, spec.group_size)).any(-1)

    def _placed(self, spec: HostSpec, roles: dict[str, Tensor], times: int | None) -> Kept:
        """Sets of several roles in one linear; each unit of this set stands ``times`` times."""
        places = {role: spec.blocks(role).to(self.keep.device) for role in roles}
        total = sum(len(place) for place in places.values())
        keep = self.keep.new_zeros(self.keep.shape[0], total)
        for role, own in roles.items():
            keep[:, places[role]] = own
        if times is None or self.capacity is None:
            return Kept(keep, None, self.fixed)
        groups = 2 * spec.G if "k" in roles else 0
        return Kept(keep, times * self.capacity + groups, self.fixed)


@dataclass
class Compact:
    """Small contiguous weights of one linear: the kept rows, or the kept columns."""

    units: Tensor  # (K,) int64 rows or columns of the linear that are kept
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, linear: nn.Linear, keep: Tensor, block: int, side: Side) -> Compact:
        """Copies what keep (1, N) names; waits for the device, once per sequence."""
        units = keep[0].repeat_interleave(block).nonzero().flatten()
        weight = linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach()
        if side == "columns":
            return cls(units, weight[:, units].contiguous(), bias)
        return cls(units, weight[units], None if bias is None else bias[units])

    def run(self, x: Tensor, side: Side, outputs: int, gather: Gather) -> Tensor:
        """x (B, T, W) -> (B, T, outputs)."""
        if len(self.units) == 0:  # a skipped sublayer: a bias at most
            nothing = x.new_zeros(*x.shape[:-1], outputs)
            return nothing + self.bias if side == "columns" and self.bias is not None else nothing
        if side == "columns":
            return gather.dense(x[..., self.units], self.weight, self.bias)
        y = gather.dense(x, self.weight, self.bias)
        return x.new_zeros(*x.shape[:-1], outputs).index_copy_(-1, self.units, y)


class Gathered:
    """Replaces the linears of a host for one session.

    Args:
        session: says what the running forward keeps.
        model: the host.
        backend: ``torch`` or ``triton``.
    """

    def __init__(self, session: Session, model: nn.Module, backend: str) -> None:
        self.session, self.model, self.spec = session, model, session.spec
        self.gather = Gather(backend)
        self._transposed: list[Tensor] = []

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """The linears' forwards are replaced inside; weights and forwards are put back on exit."""
        undo: list[Callable[[], None]] = []
        try:
            for i, layer in enumerate(self.spec.layers):
                channels: dict[str, list[Role]] = {}  # a fused linear has several roles
                for role, path in self.session.channels.thresholded(i).items():
                    channels.setdefault(path, []).append(role)
                for side, kind, tap, path in self._sides(i, layer):
                    if path in channels:
                        continue
                    linear = module(self.model, path)
                    forward = partial(self._run, side, kind, i, tap, path, linear)
                    undo.append(_replace(linear, forward))
                for path, roles in channels.items():
                    linear = module(self.model, path)
                    undo.append(_replace(linear, partial(self._read, roles, i, linear)))
            yield
        finally:
            for put_back in undo:
                put_back()
            for weight in self._transposed:
                weight.data = weight.data.contiguous()

    def _sides(self, i: int, layer: LayerSpec) -> Iterator[tuple[Side, UnitKind, Tap | None, str]]:
        """Every linear that is replaced, and the hidden state that it reads, if taps know it."""
        spec, attention, ffn = self.spec, Tap(i, "attn_input"), Tap(i, "ffn_input")
        if spec.heads_apart:
            yield "rows" if spec.qkv == "separate" else "qkv", "heads", attention, layer.q
            if self.session.policy.kv == "drop" and spec.qkv == "separate":
                yield "groups", "heads", attention, layer.k
                yield "groups", "heads", attention, layer.v
        yield "columns", "heads", None, layer.out
        if spec.neurons_apart and spec.gate_up == "separate":
            if layer.gate is not None and not self.session.policy.reads_gate:
                yield "rows", "neurons", ffn, layer.gate
            yield "rows", "neurons", ffn, layer.up
        elif spec.neurons_apart and not self.session.policy.reads_gate:
            yield "gate_up", "neurons", ffn, layer.up
        yield "columns", "neurons", None, layer.down

    def _read(
        self,
        roles: Sequence[Role],
        layer: int,
        linear: nn.Module,
        original: Forward,
        x: Tensor,
    ) -> Tensor:
        """A linear that reads chosen channels of the sparse tail's input, for all its roles."""
        session = self.session
        if not session.gathers:
            return original(x)
        assert isinstance(linear, nn.Linear)
        rows, start = session.hooks.rows(x), session.start
        tail = rows[:, start:]  # one token per row: what is read differs between tokens
        keep, *_ = [session.channels.read(role, layer, tail) for role in roles]
        kept = Kept(keep[:, 0], None, False)
        bias = None if linear.bias is None else linear.bias.detach()
        weight = self._transpose(linear)
        tail = self.gather.columns(tail[:, 0], weight, bias, kept.index(1))[:, None]
        whole = torch.cat([original(rows[:, :start]), tail], dim=1) if start else tail
        return whole.reshape(*x.shape[:-1], whole.shape[-1])

    def _run(
        self,
        side: Side,
        kind: UnitKind,
        layer: int,
        tap: Tap | None,
        path: str,
        linear: nn.Module,
        original: Forward,
        x: Tensor,
    ) -> Tensor:
        """One linear of the running forward: dense columns first, the sparse tail gathered."""
        session = self.session
        if tap is not None:
            session.meet(tap, x)
        kept = session.kept(kind, layer)
        if kept is None:
            return original(x)
        rows, start = session.hooks.rows(x), session.start
        kept = kept.over(side, self.spec, session.policy.kv == "drop")
        assert isinstance(linear, nn.Linear)
        tail = self._tail(side, kind, layer, path, linear, kept, rows[:, start:])
        whole = torch.cat([original(rows[:, :start]), tail], dim=1) if start else tail
        return whole.reshape(*x.shape[:-1], whole.shape[-1])

    def _tail(
        self,
        side: Side,
        kind: UnitKind,
        layer: int,
        path: str,
        linear: nn.Linear,
        kept: Kept,
        x: Tensor,
    ) -> Tensor:
        """The sparse columns x (B, T', W) of one linear -> (B, T', N)."""
        block = self.spec.d if kind == "heads" else 1
        if kept.fixed:
            make = partial(Compact.of, linear, kept.keep, block, side)
            small = self.session.fixed(("compact", path), make)
            return small.run(x, side, linear.out_features, self.gather)
        key = ("index", "units" if side in ("rows", "columns") else side, kind, layer)
        index = self.session.once(key, lambda: kept.index(block))
        bias = None if linear.bias is None else linear.bias.detach()
        run = self.gather.columns if side == "columns" else self.gather.rows
        weight = self._transpose(linear) if side == "columns" else linear.weight.detach()
        return run(x.flatten(0, 1), weight, bias, index).unflatten(0, x.shape[:2])

    def _transpose(self, linear: nn.Linear) -> Tensor:
        """The weight as (in, out), laid out so on first use; its values are the same."""
        weight = linear.weight
        if not weight.data.t().is_contiguous():
            weight.data = weight.data.t().contiguous().t()
            self._transposed.append(weight)
        return weight.detach().t()


def _replace(linear: nn.Module, forward: Callable[..., Tensor]) -> Callable[[], None]:
    """Sets a forward on one instance; returns what puts the old one back."""
    own = linear.__dict__.get("forward")
    linear.forward = torch.compiler.disable(partial(forward, linear.forward))

    def put_back() -> None:
        del linear.forward
        if own is not None:
            linear.forward = own

    return put_back
