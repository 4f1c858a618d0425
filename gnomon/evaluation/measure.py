"""Measures: what ``evaluate.py`` computes, one class per member of the config group ``measure``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gnomon.evaluation.bench import Bench
from gnomon.evaluation.brackets import check_brackets, measure_brackets
from gnomon.evaluation.generation import check_context, compare_generation
from gnomon.evaluation.rows import BRACKETS
from gnomon.evaluation.subject import Subject
from gnomon.policies import Policy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuations:
    """Self-generated continuations, compared with the dense model.

    Attributes:
        tokens: generated per prompt; 0 switches the comparison off.
        prompts: how many, cut from the starts of blocks spread over the text.
        prompt: tokens of each prompt.
        batch: prompts per ``generate()`` call.
    """

    tokens: int = 256
    prompts: int = 8
    prompt: int = 128
    batch: int = 4

    def cut(self, ids: Tensor) -> Tensor:
        """Prompts (prompts, prompt) from blocks (n, block).

        Raises:
            ValueError: a prompt longer than a block.
        """
        if not 0 < self.prompt <= ids.shape[1] or self.prompts < 1:
            raise ValueError(
                f"measure.quality.generation.prompt={self.prompt} must be between 1 and "
                f"text.block={ids.shape[1]}, and prompts={self.prompts} at least 1"
            )
        count = min(self.prompts, len(ids))
        return ids[torch.linspace(0, len(ids) - 1, count).long(), : self.prompt]


@dataclass(frozen=True)
class Quality:
    """Perplexity with its interval, brackets, continuations, and the predictor's recorded metrics.

    Attributes:
        brackets: measured beside the policy, any of ``dense_int8 oracle static random``.
        resamples: of the block bootstrap.
        seed: of the bootstrap and the random bracket.
        generation: self-generated continuations.
    """

    brackets: Sequence[str] = BRACKETS
    resamples: int = 2000
    seed: int = 0
    generation: Continuations = field(default_factory=Continuations)

    def check(self, bench: Bench) -> None:
        """Raises ValueError for what cannot be measured, before anything is."""
        check_brackets(self.brackets)
        bench.protocol.targets(bench.block)
        if self.generation.tokens > 0 and bench.protocol.name == "published":
            raise ValueError(
                f"measure.quality.generation.tokens={self.generation.tokens}: protocol=published "
                "decides from the last token of a whole text and cannot generate; set it to 0"
            )
        if self.generation.tokens > 0:
            prompts = self.generation.cut(bench.blocks.ids)
            check_context(bench.model, prompts.shape[1] + self.generation.tokens)

    def run(self, bench: Bench, subject: Subject, results: dict[str, Any]) -> None:
        """Fills ``density``, ``quality``, ``brackets`` and ``backend`` of the results."""
        measured = bench.measure(subject.policy, subject.identity)
        found = bench.perplexity(measured, resamples=self.resamples, seed=self.seed)
        text = found.as_result() | {
            "blocks": len(bench.blocks.ids),
            "split": bench.blocks.split,
            "digest": bench.blocks.digest,
        }
        quality: dict[str, Any] = {"texts": {bench.blocks.name: text}}
        if self.generation.tokens > 0:
            quality["generation"] = self._generate(bench, subject.policy)
        if subject.metrics:
            quality["predictor"] = dict(subject.metrics)
        results["backend"] = measured.backend
        results["density"] = measured.as_result(layers=True)
        results["quality"] = results.get("quality", {}) | quality

        def measure(policy: Policy, identity: str) -> tuple[dict[str, Any], dict[str, Any]]:
            other = bench.measure(policy, identity)
            found = bench.perplexity(other, resamples=self.resamples, seed=self.seed)
            return other.as_result(layers=False), {"texts": {bench.blocks.name: found.as_result()}}

        measure_brackets(
            results, subject.policy, self.brackets, subject.means, measure, seed=self.seed
        )

    def _generate(self, bench: Bench, policy: Policy) -> dict[str, Any]:
        plan = self.generation
        prompts = plan.cut(bench.blocks.ids)
        log.info("Generating %d x %d tokens with the sparse model", len(prompts), plan.tokens)
        return compare_generation(
            bench.model,
            policy,
            prompts,
            tokens=plan.tokens,
            backend=bench.backend,
            protocol=bench.protocol,
            batch=plan.batch,
        ).as_result()
