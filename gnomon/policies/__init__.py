"""Policies: one file per system. ``build_policy`` makes one from plain config values."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gnomon.budget import Budget
from gnomon.policies.base import Policy, Seen
from gnomon.policies.cats import Cats
from gnomon.policies.chess import Chess
from gnomon.policies.core import Core
from gnomon.policies.dejavu import DejaVu
from gnomon.policies.dense import Dense
from gnomon.policies.dense_fallback import DenseFallback
from gnomon.policies.dense_int8 import DenseInt8
from gnomon.policies.ffsplit import FFSplit
from gnomon.policies.glass import Glass
from gnomon.policies.griffin import Griffin
from gnomon.policies.oracle import Oracle
from gnomon.policies.prior import Prior
from gnomon.policies.random import Random
from gnomon.policies.shadow import Shadow
from gnomon.policies.sketch import Sketch
from gnomon.policies.skip_sublayers import SkipSublayers
from gnomon.policies.static import Static
from gnomon.policies.teal import Teal
from gnomon.policies.teal_attention import TealAttention
from gnomon.policies.wrap import Wrapper

POLICIES: dict[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        *(Dense, DenseInt8, Random, Oracle, Static, Shadow, DejaVu, Sketch),
        *(Griffin, Glass, Prior, Cats, Chess, Teal, SkipSublayers, FFSplit),
        *(Core, DenseFallback, TealAttention),
    )
}

COMMON = ("refresh", "batch", "kv", "prefill")


def build_policy(name: str, budget: Budget | None, predictor: Any = None, **params: Any) -> Policy:
    """Builds a policy by its config name.

    Args:
        name: a key of ``POLICIES``.
        budget: ignored by the dense baselines; None for a wrapper whose parameters say it all.
        predictor: a loaded predictor; ``static`` takes its means.
        **params: the policy's own arguments; those that are None keep their default.

    Raises:
        ValueError: unknown policy, an argument it does not have, or a predictor that it lacks.
    """
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is unknown; use one of {', '.join(POLICIES)}")
    cls = POLICIES[name]
    takes = inspect.signature(cls).parameters
    given = {k: v for k, v in params.items() if v is not None}
    extra = {"budget": budget, "predictor": predictor, "source": predictor}
    unknown = [k for k in given if k not in takes and k not in COMMON]
    if unknown:
        raise ValueError(f"policy={name} has no {', '.join(unknown)}; it takes {', '.join(takes)}")
    needs_inner = "inner" in takes and takes["inner"].default is inspect.Parameter.empty
    if needs_inner and "inner" not in given:
        raise ValueError(
            f"policy={name} is put round another policy: give it one, e.g. "
            "'policy.params.inner={name: shadow, predictor: auto}'"
        )
    needed = {k: v for k, v in extra.items() if k in takes}
    _require_predictor(name, needed, takes)
    policy = cls(**needed, **{k: v for k, v in given.items() if k in takes})
    if "prefill" in given and "prefill" not in takes:
        policy.set_prefill(given["prefill"])
    for key in COMMON:
        if key in given and getattr(policy, key) != given[key]:
            raise ValueError(
                f"policy={name} does not offer policy.{key}={given[key]!r}: it is always "
                f"{getattr(policy, key)!r}"
            )
    return policy


def _require_predictor(
    name: str, needed: Mapping[str, Any], takes: Mapping[str, inspect.Parameter]
) -> None:
    for key in ("predictor", "source"):
        required = key in takes and takes[key].default is inspect.Parameter.empty
        if required and needed[key] is None:
            raise ValueError(
                f"policy.predictor=null: policy={name} needs one; use policy.predictor=auto (it "
                "says what to train where there is none), a folder or a hub id"
            )


__all__ = [
    "POLICIES",
    "Cats",
    "Chess",
    "Core",
    "DejaVu",
    "Dense",
    "DenseFallback",
    "DenseInt8",
    "FFSplit",
    "Glass",
    "Griffin",
    "Oracle",
    "Policy",
    "Prior",
    "Random",
    "Seen",
    "Shadow",
    "Sketch",
    "SkipSublayers",
    "Static",
    "Teal",
    "TealAttention",
    "Wrapper",
    "build_policy",
]
