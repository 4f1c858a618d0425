"""One speed row: the dense twin and a policy in two decode engines, step by step in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from gnomon.engine.agreement import agree
from gnomon.engine.engine import Engine
from gnomon.engine.weights import StepWeights
from gnomon.evaluation.stopwatch import Peak, Times, device_name, in_use, interleave, timed
from gnomon.evaluation.traffic import Kept, observe, predictor_traffic, step_traffic
from gnomon.policies import Policy

LEAST_STEPS = 50
WINDOW = 128  # tokens before the steps that density and agreement are taken over


@dataclass(frozen=True)
class Cell:
    """What is timed.

    Attributes:
        batch: rows.
        context: tokens that the middle one of the timed steps attends to.
        steps: timed steps, 50 or more.
        warmup: steps before them.
        check: teacher-forced steps of the agreement check and of the achieved density.

    Raises:
        ValueError: too few steps, or a context that they do not fit into.
    """

    batch: int = 1
    context: int = 1024
    steps: int = 64
    warmup: int = 8
    check: int = 16

    def __post_init__(self) -> None:
        for field, least in (("batch", 1), ("steps", LEAST_STEPS), ("warmup", 1), ("check", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"speed.{field}={getattr(self, field)}: use {least} or more")
        if self.prompt < 3 or self.context <= self.check + 2:
            least = max(self.context + 3 - self.prompt, self.check + 3)
            raise ValueError(
                f"speed.context={self.context} leaves no prompt before speed.steps={self.steps}: "
                f"use a context of {least} or more"
            )

    @property
    def prompt(self) -> int:
        """P: one step ends the prompt, then come those of the warm-up and the timed ones."""
        return self.context - self.warmup - 1 - (self.steps - 1) // 2

    @property
    def room(self) -> int:
        """Tokens that the last timed step attends to."""
        return self.prompt + self.warmup + self.steps


Start = Callable[[Engine, Tensor], None]


def from_prompt(engine: Engine, ids: Tensor) -> None:
    """Begins sequences with the prompts (B, P) and their first step."""
    engine.prefill(ids)
    engine.step()


class Contender:
    """An engine that has begun a batch of sequences and is warm.

    Args:
        make: opens the engine.
        ids: (B, P) prompts.
        besides: bytes in use that belong to another contender.
        int8: its weights are row-scaled int8.
        start: how sequences begin.

    Attributes:
        engine: the engine.
        ttft_ms: prompt and first token, the decisions of the prompt included; nothing is compiled
            or captured in it.
        peak: bytes while it did that.
        held: bytes that it holds beside the host.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        ids: Tensor,
        besides: int = 0,
        int8: bool = False,
        start: Start = from_prompt,
    ) -> None:
        device = ids.device
        before = in_use(device)
        self.int8, self.start = int8, start
        self.engine = make()
        peak = Peak(device, besides)
        start(self.engine, ids)
        self.ttft_ms = timed(lambda: start(self.engine, ids), device)
        self.peak = peak.bytes
        self.held = in_use(device) - before


def open_dense(
    model: PreTrainedModel,
    ids: Tensor,
    cell: Cell,
    *,
    backend: str = "auto",
    weights: StepWeights | None = None,
    int8: bool = False,
    start: Start = from_prompt,
) -> Contender:
    """The dense twin; close its engine last.

    Args:
        model: the host.
        ids: (B, P) prompts.
        cell: what will be timed.
        backend: of the engine.
        weights: laid out before; None lays them out until the engine is closed.
        int8: ``weights`` are row-scaled int8.
        start: how sequences begin, of the policy's engine too.
    """

    def make() -> Engine:
        return Engine(
            model, None, backend=backend, weights=weights, batch=cell.batch, context=cell.room
        )

    return Contender(make, ids, int8=int8, start=start)


def decode_row(
    model: PreTrainedModel,
    policy: Policy,
    dense: Contender,
    ids: Tensor,
    cell: Cell,
    look: Callable[[Engine, Kept], object] = lambda engine, kept: None,
) -> tuple[dict[str, Any], Kept]:
    """Times a policy against the dense twin.

    Args:
        model: the host.
        policy: the policy.
        dense: opened for the same ``cell`` and ``ids``.
        ids: (B, P) prompts, P = ``cell.prompt``.
        cell: what is timed.
        look: called with the sparse engine after all is measured, while it is open.

    Returns:
        The row, without ``ms_hf``, and what was kept.

    Raises:
        UnsupportedPolicyError: the engine does not run the policy.
    """
    twin = dense.engine
    int8 = dense.int8 or policy.weight_dtype == "int8"
    weights = twin.weights.quantized() if int8 and not dense.int8 else twin.weights
    sizes = {"batch": cell.batch, "context": cell.room}

    def make() -> Engine:
        return Engine(model, policy, backend=twin.ops.name, weights=weights, **sizes)

    sparse = Contender(make, ids, besides=dense.held, int8=int8, start=dense.start)
    try:
        dense.start(twin, ids)
        steps = {"dense": twin.step, "sparse": sparse.engine.step}
        times = interleave(steps, cell.steps, cell.warmup, ids.device)
        window = ids[:, -min(ids.shape[1], WINDOW + cell.check) :]
        kept = achieved(model, policy, window, cell.check)
        agreement = agree(sparse.engine, model, policy, window, cell.check)
        look(sparse.engine, kept)
    finally:
        sparse.engine.close()
    row = {
        "device": device_name(ids.device),
        "engine": sparse.engine.kind,
        "backend": twin.ops.name,
        **timing(times["dense"], times["sparse"], cell),
        **rates(policy, kept, times, cell, dense_int8=dense.int8, sparse_int8=int8),
        "ttft_ms": sparse.ttft_ms,
        "ttft_ms_dense": dense.ttft_ms,
        "peak_bytes": sparse.peak,
        "peak_bytes_dense": dense.peak,
        "agreement": agreement,
    }
    return row, kept


def achieved(model: PreTrainedModel, policy: Policy, ids: Tensor, steps: int) -> Kept:
    """What a bound policy keeps, observed where it skips anything."""
    if policy.skips_nothing:
        return Kept.all()
    return observe(model, policy, policy.spec, ids, min(steps, ids.shape[1] - 2))


def timing(dense: Times, sparse: Times, cell: Cell) -> dict[str, Any]:
    """Times of the row; ``speedup`` is over the dense twin."""
    return {
        "batch": cell.batch,
        "context": cell.context,
        "steps": cell.steps,
        "ms_dense": dense.median,
        "ms_sparse": sparse.median,
        "ms_dense_p95": dense.p95,
        "ms_sparse_p95": sparse.p95,
        "speedup": dense.median / sparse.median,
    }


def rates(
    policy: Policy,
    kept: Kept,
    times: Mapping[str, Times],
    cell: Cell,
    *,
    dense_int8: bool = False,
    sparse_int8: bool = False,
) -> dict[str, Any]:
    """Bytes of the row: the ideal speed-up, and what each side achieved of the bandwidth."""
    every = step_traffic(
        policy.bytes, Kept.all(), context=cell.context, batch=cell.batch, int8=dense_int8
    )
    some = step_traffic(
        policy.bytes,
        kept,
        context=cell.context,
        batch=cell.batch,
        drop=policy.kv == "drop",
        predictor=predictor_traffic(policy),
        int8=sparse_int8,
        read=policy.fractions(kept.union),
        saved=0 if sparse_int8 else policy.saved_bytes(kept.union, policy.bytes.size),
    )
    ms_dense, ms_sparse = times["dense"].median, times["sparse"].median
    ideal = every.total / some.total
    return {
        "speedup_ideal": ideal,
        "of_ideal": ms_dense / ms_sparse / ideal,
        "gbps_dense": every.total / ms_dense / 1e6,
        "gbps_sparse": some.total / ms_sparse / 1e6,
        "bytes_dense": every.total,
        "bytes_sparse": some.total,
        "bytes_predictor": some.predictor,
    }
