"""Rows of the criteria study: one host and text, every use that a criterion has scores for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from given_scores import Given
from torch import Tensor

import gnomon
from gnomon import Budget, policies
from gnomon.data.capture import Probe
from gnomon.data.criteria import Criterion
from gnomon.data.static import static_scores
from gnomon.evaluation.quality import Protocol, block_nll, perplexity
from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.policies import Policy
from gnomon.predictors.metrics import UnitMetrics

USES = ("static", "prompt", "sequence", "token")
CAUSAL = {"static": True, "prompt": True, "sequence": False, "token": False, "reference": False}
Row = dict[str, Any]
Scores = dict[UnitKind, Tensor]
Correlations = dict[tuple[str, UnitKind], Row]


@dataclass(frozen=True, eq=False)
class Study:
    """What every criterion is given: the host, (n, block) tokens to score and to measure on."""

    model: Any
    spec: HostSpec
    train: Tensor
    blocks: Tensor
    batch: int
    budgets: dict[UnitKind, Budget]
    dense: dict[str, Tensor]

    @property
    def protocols(self) -> dict[str, Protocol]:
        """``all``, and ``decode`` with half a block as the prompt."""
        return {n: Protocol(n, self.blocks.shape[1] // 2) for n in ("all", "decode")}

    def density(self, kind: UnitKind) -> float:
        """Kept fraction of a kind where it is skipped."""
        return self.budgets[kind].target(kind)

    def nll(self, policy: Policy | None, protocol: str, ids: Tensor) -> Tensor:
        """Per-block sums (n,) of a policy under ``mask``; None: dense."""
        how = self.protocols[protocol]
        if policy is None:
            return block_nll(self.model, ids, how, batch=self.batch)
        length = how.prompt_length
        with gnomon.sparsify(self.model, policy, "mask", protocol, prompt_length=length):
            return block_nll(self.model, ids, how, batch=self.batch)

    def row(self, name: str, use: str, kind: UnitKind, protocol: str, nll: Tensor) -> Row:
        """One result."""
        targets = self.protocols[protocol].targets(self.blocks.shape[1])
        found = perplexity(nll, self.dense[protocol], targets)
        about = {"criterion": name, "use": use, "causal": CAUSAL[use], "protocol": protocol}
        return about | {"kind": kind, "density": self.density(kind)} | found.as_result()


def references(study: Study) -> Iterator[Row]:
    """The oracle and random, per token."""
    for kind in KINDS:
        budget = study.budgets[kind]
        for policy in (policies.Oracle(budget), policies.Random(budget)):
            for protocol in study.protocols:
                nll = study.nll(policy, protocol, study.blocks)
                yield study.row(policy.name, "reference", kind, protocol, nll)


def rows_of(study: Study, one: Criterion, uses: Sequence[str]) -> Iterator[Row]:
    """Every use that the criterion is defined for."""
    start = time.monotonic()
    static = static_scores(study.model, study.spec, one, study.train, batch=study.batch)
    seconds = time.monotonic() - start
    needed = {"prompt": "prompt", "sequence": "prompt", "token": "token"}
    wanted = [use for use in needed if use in uses and needed[use] in one.granularities]
    correlations: Correlations = {}
    if wanted:
        contextual, correlations = _contextual(study, one, wanted, static)
        yield from contextual
    for kind in one.kinds if "static" in uses else ():
        about = {"harvest_seconds": round(seconds, 3)} | correlations.get(("static", kind), {})
        for protocol in study.protocols:
            nll = study.nll(policies.Static(static, study.budgets[kind]), protocol, study.blocks)
            yield study.row(one.name, "static", kind, protocol, nll) | about


def _contextual(
    study: Study, one: Criterion, wanted: Sequence[str], static: Scores
) -> tuple[list[Row], Correlations]:
    """Rows of scores of the validation blocks themselves, and what static scores know of them."""
    probe = Probe(study.model, study.spec, (Tap(0),), one)
    meters = {k: UnitMetrics(static[k].to(probe.device), study.density(k)) for k in one.kinds}
    sums: dict[tuple[str, UnitKind], list[Tensor]] = {}
    half = study.blocks.shape[1] // 2
    for ids in study.blocks.split(study.batch):
        whole, prompt = probe(ids), probe(ids[:, :half])
        for kind in one.kinds:
            first, second = prompt.pooled(kind), whole.pooled(kind, half - 1)
            meters[kind].update(first, second)
            by_use = {"prompt": first[:, None], "sequence": second[:, None]}
            for use in wanted:
                given = whole.scores(kind) if use == "token" else by_use[use]
                nll = _given_nll(study, use, kind, given, ids)
                sums.setdefault((use, kind), []).append(nll)
    correlations = _correlations(meters)
    rows = [
        study.row(one.name, use, kind, _protocol(use), torch.cat(parts))
        | correlations.get((use, kind), {})
        for (use, kind), parts in sums.items()
    ]
    return rows, correlations


def _correlations(meters: dict[UnitKind, UnitMetrics]) -> Correlations:
    """Mean over layers of the rank correlation with the second half's scores."""
    choices = {"prompt": "predictor", "static": "static"}
    return {
        (use, kind): {"spearman": round(float(meter.compute()[name]["spearman"].mean()), 4)}
        for kind, meter in meters.items()
        for use, name in choices.items()
    }


def _protocol(use: str) -> str:
    return "all" if use == "token" else "decode"


def _given_nll(study: Study, use: str, kind: UnitKind, given: Tensor, ids: Tensor) -> Tensor:
    policy = Given(study.budgets[kind])
    policy.given = {kind: given}
    return study.nll(policy, _protocol(use), ids)
