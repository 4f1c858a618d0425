"""Byte accounting: what one decoded token reads, dense and sparse.

At batch 1 decode is bound by memory, so bytes are the currency in which every policy is compared.
Reference point: batch 1, context 1024; weights in the host's dtype or a stated one; the output
head, one embedding row and the norms are read; keys and values are read for key/value groups with
at least one active head; a ``prompt`` decision is spread over 128 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from gnomon.budget import Budget
from gnomon.host import KINDS, HostSpec, weight

if TYPE_CHECKING:
    from gnomon.policies.base import Policy

CONTEXT = 1024
PROMPT_TOKENS = 128  # decoded tokens over which one prompt decision is spread
SCALE_BYTES = 4  # one fp32 scale per int8 row
Role = Literal["q", "k", "v", "out", "gate", "up", "down"]
LINEARS: tuple[Role, ...] = ("q", "k", "v", "out", "gate", "up", "down")
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Density:
    """Achieved kept fractions over sparse positions.

    Attributes:
        heads, neurons: means over layers.
        groups: fraction of key/value groups with at least one active head.
        per_layer: L values for ``heads`` and ``neurons``.
        channels: of each linear whose input channels are skipped: those that are read.
    """

    heads: float
    neurons: float
    groups: float
    per_layer: dict[str, list[float]] = field(default_factory=dict)
    channels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class HostBytes:
    """Elements that a decoded token reads, by part, over all layers.

    ``whole`` are linears of which no unit's part can be skipped: q, k and v under a norm over all
    heads (``HostSpec.heads_apart``), up and gate under one over all neurons.
    """

    q_out: int
    kv_proj: int
    ffn: int
    head: int
    other: int
    kv_per_token: int
    rows: int
    dtype: str
    whole: int = 0
    gated: bool = True
    heads_apart: bool = True
    neurons_apart: bool = True

    @property
    def size(self) -> int:
        """Bytes of an element in the live host's dtype."""
        return _size(self.dtype)

    def weights(self, read: Mapping[Role, float]) -> float:
        """Elements read of all weights when these fractions of each linear are.

        Args:
            read: of the linears of every layer; ``whole``, the output head and the rest are read in
                full.
        """
        by_neuron = [read["down"]]
        if self.neurons_apart:
            by_neuron += [read["up"], read["gate"]] if self.gated else [read["up"]]
        q_out = (read["q"] + read["out"]) / 2 if self.heads_apart else read["out"]
        return (
            self.q_out * q_out
            + self.kv_proj * (read["k"] + read["v"]) / 2
            + self.ffn * sum(by_neuron) / len(by_neuron)
            + self.whole
            + self.head
            + self.other
        )

    @classmethod
    def of(cls, model: nn.Module, spec: HostSpec) -> HostBytes:
        """Counts a live host."""
        hidden, kv = spec.H * spec.d, spec.G * spec.d
        mats = 3 if spec.gated else 2
        linear = spec.L * (2 * hidden * spec.D + 2 * kv * spec.D + mats * spec.F * spec.D)
        q_out = spec.L * (2 if spec.heads_apart else 1) * hidden * spec.D
        kv_proj = spec.L * (2 if spec.heads_apart else 0) * kv * spec.D
        ffn = spec.L * (mats if spec.neurons_apart else 1) * spec.F * spec.D
        tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
        head_weight = weight(model, spec.head)
        head = head_weight.numel()
        unique = sum(p.numel() for p in model.parameters())
        shared = head_weight is weight(model, spec.embed)
        rows = sum(m.weight.shape[1] for m in model.modules() if isinstance(m, nn.Embedding))
        return cls(
            q_out=q_out,
            kv_proj=kv_proj,
            ffn=ffn,
            head=head,
            other=unique - linear - tables - (0 if shared else head) + rows,
            kv_per_token=spec.L * 2 * kv,
            rows=spec.L * (hidden + 2 * kv + 2 * spec.D + (mats - 1) * spec.F) + spec.V,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            whole=linear - q_out - kv_proj - ffn,
            gated=spec.gated,
            heads_apart=spec.heads_apart,
            neurons_apart=spec.neurons_apart,
        )


@dataclass(frozen=True)
class Accounting:
    """Bytes per decoded token and their ratio; ``inputs`` holds everything they were made from."""

    dense_bytes: float
    sparse_bytes: float
    predictor_bytes: float
    byte_density: float
    predictor_byte_share: float
    inputs: dict[str, Any]


def account(
    policy: Policy, density: Density, *, context: int = CONTEXT, dtype: str | None = None
) -> Accounting:
    """Accounts a bound policy at an achieved density.

    Args:
        policy: bound to its host (``policy.bind``).
        density: achieved densities.
        context: tokens in the key/value cache.
        dtype: stored dtype of host weights and cache; None takes the live host's.

    Raises:
        ValueError: unknown dtype or a context below one token.
    """
    host = policy.bytes
    size = _size(dtype or host.dtype)
    if context < 1:
        raise ValueError(f"bytes.context={context}: give at least 1 token")
    whole: dict[Role, float] = dict.fromkeys(LINEARS, 1.0)
    dense = size * (host.weights(whole) + host.kv_per_token * context)
    read = policy.fractions(density)
    weights = host.weights(read)
    if policy.weight_dtype == "int8":
        body = weights - host.other + SCALE_BYTES * host.rows + size * host.other
    else:
        body = size * weights
    saved = policy.saved_bytes(density, size)
    body -= saved
    predictor = policy.predictor_bytes * _spread(policy.refresh)
    sparse = body + size * host.kv_per_token * context * density.groups + predictor
    inputs = {
        **asdict(host),
        "dtype": dtype or host.dtype,
        "context": context,
        "batch": 1,
        "kv": policy.kv,
        "weight_dtype": policy.weight_dtype or dtype or host.dtype,
        "predictor_bytes": policy.predictor_bytes,
        "decision_per_token": _spread(policy.refresh),
        "group_density": density.groups,
        "read": read,
        "saved_bytes": saved,
        **policy.facts,
        "dense_bytes": dense,
        "sparse_bytes": sparse,
    }
    return Accounting(dense, sparse, predictor, sparse / dense, predictor / dense, inputs)


def expected_density(policy: Policy, budget: Budget) -> Density:
    """Densities a budget aims at; active groups as if heads were drawn at random."""
    rows = {kind: policy.expected(kind, budget) for kind in KINDS}
    groups = [active_groups(policy.spec, budget, heads) for heads in rows["heads"]]
    heads, neurons, active = (sum(x) / len(x) for x in (*rows.values(), groups))
    channels = {str(role): policy.channel_density(role, budget) for role in policy.channels}
    return Density(heads, neurons * channels.get("down", 1.0), active, channels=channels)


def active_groups(spec: HostSpec, budget: Budget, heads: float) -> float:
    """Expected share of groups with an active head where a share of the heads is."""
    if budget.head_unit == "group" or heads in (0, 1):
        return heads
    kept = max(1, round(heads * spec.H))
    return 1 - math.comb(spec.H - spec.group_size, kept) / math.comb(spec.H, kept)


def _spread(refresh: str) -> float:
    return {"token": 1.0, "prompt": 1.0 / PROMPT_TOKENS, "static": 0.0}[refresh]


def _size(dtype: str) -> int:
    name = dtype.removeprefix("torch.")
    if name not in _SIZES:
        try:
            return torch.empty(0, dtype=getattr(torch, name)).element_size()
        except (AttributeError, TypeError) as error:
            raise ValueError(f"bytes.dtype={dtype!r}: use {', '.join(_SIZES)}") from error
    return _SIZES[name]
