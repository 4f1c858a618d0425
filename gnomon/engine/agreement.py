"""Agreement: the engine's active sets and logits against the ``mask`` reference, step by step.

Both run the same tokens: the reference in one teacher-forced pass, the engine one step at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from gnomon.accounting import LINEARS, Role
from gnomon.engine.active import Active
from gnomon.engine.engine import Engine
from gnomon.host import KINDS, UnitKind
from gnomon.policies.base import Policy
from gnomon.runtime.sparsify import sparsify

Kept = dict[tuple[UnitKind | Role, int], Tensor]


def agree(
    engine: Engine, model: PreTrainedModel, policy: Policy | None, ids: Tensor, steps: int
) -> dict[str, Any]:
    """Compares ``steps`` decode steps of an engine with the ``mask`` backend.

    Args:
        engine: opened for ``policy``, with batch B.
        model: the host.
        policy: the engine's; None for the dense twin.
        ids: (B, T) tokens without padding; the last ``steps`` of them are fed to decode steps.
        steps: decode steps, 1 to T; one less for ``refresh=prompt``.

    Returns:
        ``steps``; ``logits_rms``, the difference of the logits over the norm of the reference's;
        ``top1``, the share of steps whose likeliest token is the same; ``sets``, units and input
        channels kept by both over those kept by either, where either skips some; 1 where the
        active sets are the same.

    Raises:
        ValueError: more steps than tokens.
    """
    if not 1 <= steps <= ids.shape[1]:
        raise ValueError(f"steps={steps} of {ids.shape[1]} tokens: use 1 to {ids.shape[1]}")
    ids = ids.to(engine.device)
    expected, kept = _reference(model, policy, ids, steps)
    logits, both, either = _steps(engine, ids, steps, kept)
    return {
        "steps": steps,
        "logits_rms": float((logits - expected).double().norm() / expected.double().norm()),
        "top1": float((logits.argmax(-1) == expected.argmax(-1)).double().mean()),
        "sets": float(both / either) if either else 1.0,
    }


@torch.no_grad()
def _reference(
    model: PreTrainedModel, policy: Policy | None, ids: Tensor, steps: int
) -> tuple[Tensor, Kept]:
    """Logits (B, steps, V), and (kind or role, layer) -> active sets (B or 1, steps or 1, N)."""
    prompt = ids.shape[1] - steps + 1
    kept: Kept = {}
    if policy is None:
        return model(ids).logits[:, -steps:].float(), kept
    with sparsify(model, policy, backend="mask", prompt_length=prompt) as session:

        def note(kind: UnitKind | Role, layer: int, keep: Tensor, step: Any) -> None:
            kept[kind, layer] = keep.clone()

        session.on_decision = note
        return model(ids).logits[:, -steps:].float(), kept


def _steps(engine: Engine, ids: Tensor, steps: int, kept: Kept) -> tuple[Tensor, int, int]:
    """The engine's logits (B, steps, V), and how many units both and either of them kept."""
    engine.prefill(ids[:, : ids.shape[1] - steps + 1])
    rows, both, either = [], 0, 0
    for i in range(steps):
        rows.append(engine.step(ids[:, ids.shape[1] - steps + i]).clone())
        layers = range(engine.spec.L)
        for key in ((what, layer) for what in (*KINDS, *LINEARS) for layer in layers):
            a, wanted = _found(engine, *key), kept.get(key)
            b = None if wanted is None else _at(wanted, i, len(ids))
            if a is None and b is None:
                continue
            every = torch.ones(1, dtype=torch.bool, device=engine.device)
            a, b = (every if keep is None else keep for keep in (a, b))
            both += int((a & b).sum())
            either += int((a | b).sum())
    return torch.stack(rows, dim=1), both, either


def _found(engine: Engine, what: UnitKind | Role, layer: int) -> Tensor | None:
    """What the engine's last step kept, (B, N) bool; None for everything."""
    if what != "heads" and what != "neurons":
        return engine.channels(what, layer)
    active = engine.active(what, layer)
    return None if active is None else _mask(active, engine.spec.units(what), engine)


def _mask(active: Active, units: int, engine: Engine) -> Tensor:
    """(B, N) bool."""
    index = active.index.long()
    holds = torch.ones_like(index, dtype=torch.bool)
    if active.count is not None:
        places = torch.arange(index.shape[1], device=index.device)
        holds = places < active.count[:, None]
    keep = torch.zeros(index.shape[0], units + 1, dtype=torch.bool, device=engine.device)
    keep.scatter_(1, torch.where(holds, index, units), True)
    return keep[:, :units].expand(engine.batch, units)


def _at(kept: Tensor, step: int, rows: int) -> Tensor:
    column = kept[:, min(step, kept.shape[1] - 1)]
    return column.expand(rows, -1)
