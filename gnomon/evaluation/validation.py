"""Validation text of an evaluation, on which its budget is found (``validation`` in its config)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from hydra.utils import instantiate

from gnomon.budget import Budget
from gnomon.data.sources import FileText
from gnomon.data.text import Blocks, Text
from gnomon.evaluation.bench import Bench
from gnomon.evaluation.dial import search
from gnomon.evaluation.subject import Subject
from gnomon.policies import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """The text and the effort of a search (``validation`` in conf/evaluate.yaml).

    Attributes:
        path: a file of validation text; None takes the validation documents of the run's text.
        tokens: None takes those of the run's text.
        steps: halvings of the range.

    Raises:
        ValueError: fewer than one halving.
    """

    path: str | None = None
    tokens: int | None = None
    steps: int = 7

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"validation.steps={self.steps}: use 1 or more, e.g. 7 for 1/128")

    def blocks(self, bench: Bench, text: Mapping[str, Any]) -> Blocks:
        """Validation blocks that share no document with what the bench evaluates.

        Args:
            bench: with the evaluated blocks.
            text: config of their text.

        Raises:
            ValueError: the text has no such documents.
        """
        source = bench.blocks.source
        if self.path is None:
            _require_apart(bench.blocks)
            return source.blocks(bench.tokenizer, "validation", self.tokens)
        sizes = {"block": source.block, "tokens": source.tokens, "bos": source.bos}
        own = {k: v for k, v in text.items() if k not in ("batch", "split")} | {"path": self.path}
        file: Text = instantiate(own) if "path" in text else FileText(self.path, **sizes)  # type: ignore[arg-type]
        found = file.blocks(bench.tokenizer, "all", self.tokens)
        if file.fingerprint == source.fingerprint:
            raise ValueError(
                f"validation.path={self.path} is the evaluated text itself: give a file apart from "
                "it, or leave validation.path out and set text.split=heldout"
            )
        return found


def solved(
    bench: Bench,
    text: Mapping[str, Any],
    plan: Validation,
    budget: Budget,
    make: Callable[[Budget], Subject],
) -> Subject:
    """The subject at its budget, which is found first where ``max_ppl_increase`` asks for it.

    Args:
        bench: of the evaluation.
        text: config of its text.
        plan: validation text and steps.
        budget: the run's.
        make: builds the subject at a budget.

    Returns:
        The subject; its ``params`` record the search.
    """
    if budget.max_ppl_increase is None:
        return make(budget)

    def identified(tried: Budget) -> tuple[Policy, str]:
        subject = make(tried)
        return subject.policy, subject.identity

    aside = replace(bench, blocks=plan.blocks(bench, text))
    found = search(aside, identified, budget, plan.steps)
    log.info("budget.max_ppl_increase=%g found %s", budget.max_ppl_increase, found.trial)
    subject = make(found.budget)
    return replace(subject, params=dict(subject.params) | {"search": found.as_result()})


def _require_apart(evaluated: Blocks) -> None:
    """Refuses to choose a budget on the documents that it is then reported on."""
    source, split = evaluated.source, evaluated.split
    parts = [source.facts(s).get("parts") for s in ("validation", split)]  # type: ignore[arg-type]
    if (all(parts) and parts[0] != parts[1]) or split in ("heldout", "train"):
        return
    raise ValueError(
        "budget.max_ppl_increase is found on validation text, and text.split="
        f"{split} evaluates on the validation documents of text {evaluated.name} too: set "
        "text.split=heldout, or give other text by validation.path=<file>"
    )
