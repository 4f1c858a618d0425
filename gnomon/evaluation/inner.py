"""Policies inside policies, from their configs: ``policy.params.inner``.

An inner config has the keys of a policy's own (``name refresh batch kv prefill predictor
params``), and may have a ``budget``; without one it takes the run's, and the policy around it must
say by its own parameters what it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.budget import Budget
from gnomon.evaluation.subject import Found, find, predictor_digest, with_sensitivity
from gnomon.host import HostSpec
from gnomon.policies import COMMON, Policy, build_policy

KEYS = (
    *("name", "refresh", "batch", "kv", "prefill"),
    *("predictor", "criterion", "rank", "params", "budget"),
)


@dataclass(frozen=True)
class Built:
    """A policy from its config.

    Attributes:
        policy: built, unbound.
        params: its parameters, with folders in place of the ``auto`` of predictors inside.
        identity: digests of the predictors inside.
        inside: those predictors.
    """

    policy: Policy
    params: dict[str, Any]
    identity: str = ""
    inside: tuple[Found, ...] = ()


def build(
    config: Mapping[str, Any], budget: Budget, found: Found, root: str | Path, spec: HostSpec
) -> Built:
    """Builds a policy, and those inside it first.

    Args:
        config: of the policy.
        budget: the run's.
        found: the predictor that the outer policy asks for.
        root: folder of trained predictors.
        spec: the host's.

    Raises:
        ValueError: unknown policies or keys, or predictors that are not there.
    """
    params = dict(config.get("params") or {})
    settings = {key: config.get(key) for key in COMMON}
    inner, about, digest = params.pop("inner", None), dict(params), ""
    inside: tuple[Found, ...] = ()
    own: Budget | None = budget
    if inner is not None:
        unknown = sorted(set(inner) - set(KEYS))
        if unknown or "name" not in inner:
            raise ValueError(
                f"policy.params.inner: {', '.join(unknown) or 'no name'}; its keys are "
                f"{', '.join(KEYS)}"
            )
        given = inner.get("budget")
        own = None if given is None else budget
        source = find(inner["name"], inner.get("predictor"), root, spec)
        held = budget if given is None else with_sensitivity(Budget(**given), root, spec)
        made = build(inner, held, source, root, spec)
        params["inner"], digest = made.policy, made.identity
        about["inner"] = dict(inner) | {"predictor": source.source, "params": made.params}
        if source.predictor is not None:
            digest += predictor_digest(source.predictor)
        inside = (source, *made.inside)
    policy = build_policy(config["name"], own, found.predictor, **settings, **params)
    return Built(policy, about, digest, inside)
