"""Brackets: what stands beside every quality row, at the same budget (DESIGN rule 5)."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from gnomon.budget import Budget
from gnomon.evaluation.results import warn
from gnomon.evaluation.rows import BRACKETS
from gnomon.policies import POLICIES, Policy, build_policy

Measure = Callable[[Policy, str], tuple[dict[str, Any], dict[str, Any]]]


def measure_brackets(
    results: dict[str, Any],
    policy: Policy,
    names: Sequence[str],
    means: Mapping[Any, Tensor] | None,
    measure: Measure,
    *,
    seed: int = 0,
) -> None:
    """Measures the brackets of a policy and adds them to ``brackets`` of the results.

    What cannot meet the budget is left out; that, and a bracket that is spread otherwise, is a
    warning of the run. What another measure has found of a bracket is kept.

    Args:
        results: of the run.
        policy: whose budget and batch setting the brackets take.
        names: of the brackets, any of ``BRACKETS``; the policy itself is left out.
        means: per-unit means for ``static``; None leaves that bracket out, with a warning.
        measure: makes the ``density`` and ``quality`` of a policy, given what tells it from others.
        seed: of the random policy.

    Raises:
        ValueError: anything else that is wrong with a bracket.
    """
    rows = {row["policy"]: row for row in results.get("brackets", [])}
    for name in names:
        if name == policy.name:
            continue
        if name == "static" and means is None:
            warn("No predictor of this host holds per-unit means: bracket `static` left out")
            continue
        try:
            density, quality = measure(*_bracket(policy, name, means, seed))
        except ValueError as error:
            if not _is_about_budget(error):
                raise
            warn(f"Bracket `{name}` left out: {error}")
            continue
        row = rows.setdefault(name, {"policy": name, "density": density, "quality": {}})
        row["quality"] |= quality
        if "texts" in quality:  # the density on text stands, as in the run's own row
            row["density"] = density
    if rows:
        results["brackets"] = list(rows.values())


def check_brackets(names: Sequence[str], field: str = "measure.quality.brackets") -> None:
    """Raises ValueError for an unknown bracket, naming the field of the config."""
    unknown = [name for name in names if name not in BRACKETS]
    if unknown:
        raise ValueError(f"{field}={unknown[0]!r} is unknown; use {', '.join(BRACKETS)}")


def identity(policy: Policy, params: Mapping[str, Any], source: str = "") -> str:
    """What tells one policy from another: name, budget, settings, source of its scores."""
    settings = [str(setting) for setting in (policy.refresh, policy.batch, policy.kv)]
    settings += ["prefill"] if policy.prefill == "sparse" else []  # others are known by the three
    own = {"seed": getattr(policy, "seed", None)} | dict(params)  # a default said is a default
    facts = [policy.name, asdict(policy.budget), settings, own, source]
    return json.dumps(facts, sort_keys=True, default=str)


def means_digest(means: Mapping[Any, Tensor]) -> str:
    """16 hex digits over per-unit means."""
    digest = hashlib.sha256()
    for kind in sorted(means):
        digest.update(means[kind].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _bracket(
    policy: Policy, name: str, means: Mapping[Any, Tensor] | None, seed: int
) -> tuple[Policy, str]:
    """A bracket at the policy's budget, and what tells it from other policies."""
    params = {"seed": seed} if name == "random" else {}
    takes = inspect.signature(POLICIES[name]).parameters  # dense int8 has no budget and no batch
    batch = policy.batch if "batch" in takes else None
    budget = bracket_budget(name, policy.budget)
    if "budget" in takes and budget.spread != policy.budget.spread:
        warn(
            f"Bracket `{name}` does not offer budget.spread={policy.budget.spread}: it stands at "
            f"the same density with budget.spread={budget.spread}"
        )
    bracket = build_policy(name, budget, means, batch=batch, **params)
    about = identity(bracket, params, means_digest(means) if name == "static" and means else "")
    return bracket, about


def _is_about_budget(error: ValueError) -> bool:
    """Whether an error says that a budget cannot be met; by rule it begins with the field."""
    return str(error).startswith("budget.")


def bracket_budget(name: str, budget: Budget) -> Budget:
    """The policy's budget, spread by layer where the bracket offers no other spread."""
    return budget if budget.spread in POLICIES[name].spreads else replace(budget, spread="layer")
