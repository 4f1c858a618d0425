"""A speed row where no decode engine runs the host or policy: ``gnomon.sparsify`` round forwards.

Dense and sparse cannot take turns step by step on one set of modules, so they take turns run by
run: dense, sparse, sparse, dense, each with a prompt of its own and half of the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_utils import PreTrainedModel

import gnomon
from gnomon.evaluation.decoding import WINDOW, Cell, achieved, rates, timing
from gnomon.evaluation.stopwatch import Peak, Times, device_name, interleave, timed
from gnomon.evaluation.traffic import Kept
from gnomon.host import UnitKind
from gnomon.policies import Policy


@torch.no_grad()
def generic_row(
    model: PreTrainedModel, policy: Policy, ids: Tensor, cell: Cell, backend: str = "auto"
) -> tuple[dict[str, Any], Kept]:
    """Times a policy under :func:`gnomon.sparsify` against the host as it is.

    Args:
        model: the host.
        policy: bound to it.
        ids: (B, P) prompts, P = ``cell.prompt``.
        cell: what is timed.
        backend: of :func:`gnomon.sparsify`.

    Returns:
        The row, without ``ms_hf``, and what was kept.
    """
    spent: dict[str, list[float]] = {"dense": [], "sparse": []}
    first: dict[str, list[float]] = {"dense": [], "sparse": []}
    peaks: dict[str, int] = {}
    used = ""
    for name in ("dense", "sparse", "sparse", "dense"):
        context: Any = nullcontext()
        if name == "sparse":
            context = gnomon.sparsify(model, policy, backend=backend)
        peak = Peak(ids.device)
        with context as session:
            step = _Decode(model, ids)
            first[name].append(timed(step, ids.device))
            half = -(-cell.steps // 2)
            times = interleave({name: step}, half, cell.warmup, ids.device)[name]
            spent[name] += times.ms
            used = used if session is None else session.backend
        peaks[name] = peak.bytes
    window = ids[:, -min(ids.shape[1], WINDOW + cell.check) :]
    kept = achieved(model, policy, window, cell.check)
    times_of = {name: Times(tuple(ms)) for name, ms in spent.items()}
    row = {
        "device": device_name(ids.device),
        "engine": "generic",
        "backend": used,
        **timing(times_of["dense"], times_of["sparse"], cell),
        **rates(policy, kept, times_of, cell),
        "ttft_ms": min(first["sparse"]),
        "ttft_ms_dense": min(first["dense"]),
        "peak_bytes": peaks["sparse"],
        "peak_bytes_dense": peaks["dense"],
        "agreement": agree_generic(model, policy, window, cell.check, backend),
    }
    return row, kept


@torch.no_grad()
def agree_generic(
    model: PreTrainedModel, policy: Policy, ids: Tensor, steps: int, backend: str
) -> dict[str, Any]:
    """Active sets and logits of teacher-forced steps under a backend against ``mask``.

    Args:
        model: the host.
        policy: the policy.
        ids: (B, T) tokens; the last ``steps`` are fed one at a time.
        steps: at most T - 2.
        backend: compared with ``mask``.

    Returns:
        As :func:`gnomon.engine.agreement.agree`.
    """
    logits, sets = zip(
        *(_forced(model, policy, ids, steps, name) for name in ("mask", backend)), strict=True
    )
    both = either = 0
    for key, keep in sets[0].items():
        both += int((keep & sets[1][key]).sum())
        either += int((keep | sets[1][key]).sum())
    gap = (logits[1] - logits[0]).double().norm() / logits[0].double().norm()
    return {
        "steps": steps,
        "logits_rms": float(gap),
        "top1": float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()),
        "sets": both / either if either else 1.0,
    }


def _forced(
    model: PreTrainedModel, policy: Policy, ids: Tensor, steps: int, backend: str
) -> tuple[Tensor, dict[tuple[UnitKind, int, int], Tensor]]:
    """Logits (B, steps, V), and every decision by kind, layer and step."""
    sets: dict[tuple[UnitKind, int, int], Tensor] = {}
    prompt, rows = ids.shape[1] - steps + 1, []
    with gnomon.sparsify(model, policy, backend=backend) as session:
        cache = DynamicCache(config=model.config)
        for i in range(steps):

            def note(kind: UnitKind, layer: int, keep: Tensor, step: Any, i: int = i) -> None:
                sets[kind, layer, i] = keep[:, -1].clone()

            session.on_decision = note
            given = ids[:, :prompt] if i == 0 else ids[:, prompt + i - 1 : prompt + i]
            out = model(given, past_key_values=cache, use_cache=True)
            rows.append(out.logits[:, -1].float())
    return torch.stack(rows, dim=1), sets


class _Decode:
    """A greedy loop: the first call runs the prompt, every other one token per row."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self._forward: Callable[..., Any] = model
        self._next, self._cache = ids, DynamicCache(config=model.config)

    def __call__(self) -> None:
        out = self._forward(self._next, past_key_values=self._cache, use_cache=True)
        self._next = out.logits[:, -1:].argmax(-1)
