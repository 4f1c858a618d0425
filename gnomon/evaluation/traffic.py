"""Bytes that one decode step of a batch moves, dense and sparse: what its time is held against.

At batch 1, ``refresh=token`` and host weights as stored this is the reference accounting of
:mod:`gnomon.accounting` at another context. Weights are read once per step for every unit that
*any* row keeps; keys and values are read for every row's own active groups. A decision made before
the step (``refresh=prompt`` and ``static``) costs the step nothing: it is part of the time to the
first token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import gnomon
from gnomon.accounting import LINEARS, SCALE_BYTES, Density, HostBytes, Role
from gnomon.evaluation.quality import tail_logits
from gnomon.host import HostSpec, UnitKind
from gnomon.policies import Policy
from gnomon.runtime.positions import Step


@dataclass(frozen=True)
class Kept:
    """What a batch keeps at a step, as fractions.

    Attributes:
        each: densities of a row, achieved.
        union: heads, neurons and groups that at least one row keeps; ``each`` for a batch of one.
    """

    each: Density
    union: Density

    @classmethod
    def all(cls) -> Kept:
        """Everything."""
        return cls(Density(1, 1, 1), Density(1, 1, 1))


@dataclass(frozen=True)
class Traffic:
    """Bytes per step by part."""

    weights: float
    cache: float
    predictor: float

    @property
    def total(self) -> float:
        """All bytes of a step."""
        return self.weights + self.cache + self.predictor


def step_traffic(
    host: HostBytes,
    kept: Kept,
    *,
    context: float,
    batch: int = 1,
    drop: bool = False,
    predictor: float = 0,
    int8: bool = False,
    read: Mapping[Role, float] | None = None,
    saved: float = 0,
) -> Traffic:
    """Bytes of one step.

    Args:
        host: elements of the host by part.
        kept: densities; :meth:`Kept.all` for a dense step.
        context: tokens in every row's cache.
        batch: rows.
        drop: key and value projections of inactive groups are skipped (``kv=drop``).
        predictor: bytes of the predictor that a step reads.
        int8: weights are row-scaled int8; cache, norms and biases keep the host's dtype.
        read: fraction of each linear, where a policy reads other parts than its units
            (``Policy.fractions``); ``drop`` is part of it.
        saved: bytes by which compressed weights are smaller (``Policy.saved_bytes``).
    """
    size, union = host.size, kept.union
    matrices = host.q_out * union.heads + host.kv_proj * (union.groups if drop else 1.0)
    matrices += host.ffn * union.neurons + host.head
    if read is not None:
        matrices = host.weights(read) - host.other
    stored = matrices + SCALE_BYTES * host.rows if int8 else size * matrices
    cache = size * host.kv_per_token * context * batch * kept.each.groups
    return Traffic(stored + size * host.other - saved, cache, predictor)


def predictor_traffic(policy: Policy) -> float:
    """Bytes of a bound policy's predictor that every step reads."""
    return policy.predictor_bytes if policy.refresh == "token" else 0.0


@torch.no_grad()
def observe(model: nn.Module, policy: Policy, spec: HostSpec, ids: Tensor, steps: int) -> Kept:
    """What a policy keeps when it is teacher-forced under ``mask``: per row, and by any row.

    Args:
        model: the host.
        policy: the policy.
        spec: the host's.
        ids: (B, T) tokens of equally long rows.
        steps: sparse positions at the end of each row, at most T - 2.
    """
    union = _Union(spec)
    prompt = ids.shape[1] - steps + 1
    with gnomon.sparsify(model, policy, backend="mask", prompt_length=prompt) as session:
        session.on_decision = union.add
        tail_logits(model, ids, 1)
        each = session.density()
    return Kept(each, union.density() if len(ids) > 1 else each)


class _Union:
    """Units that at least one row keeps, per column; what is not decided is kept whole."""

    def __init__(self, spec: HostSpec) -> None:
        self._spec = spec
        self._kept: dict[tuple[str, int], Tensor] = {}

    def add(self, kind: UnitKind, layer: int, keep: Tensor, step: Step) -> None:
        """Takes one decision (B, T', N)."""
        some = keep.any(0)
        self._kept[kind, layer] = some.float().mean()
        if kind == "heads":
            groups = some.unflatten(-1, (self._spec.G, self._spec.group_size)).any(-1)
            self._kept["groups", layer] = groups.float().mean()

    def density(self) -> Density:
        """Means over layers and columns."""
        layers = range(self._spec.L)
        means = {
            kind: sum(float(self._kept.get((kind, i), 1.0)) for i in layers) / self._spec.L
            for kind in ("heads", "neurons", "groups")
        }
        channels = {
            str(role): sum(float(self._kept.get((role, i), 1.0)) for i in layers) / self._spec.L
            for role in LINEARS
            if any((role, i) in self._kept for i in layers)
        }
        neurons = channels.get("down", means["neurons"])
        return Density(means["heads"], neurons, means["groups"], channels=channels)
