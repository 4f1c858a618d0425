"""The dial: the least budget whose perplexity increase on validation text stays within a limit.

Perplexity falls as more is kept, so the setting of the budget is found by halving its range: the
common unit density, or under ``spread=calibrated`` the byte density of heads and neurons together.
Every trial runs over the same validation blocks, and is remembered like any measured policy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from gnomon.budget import Budget
from gnomon.data.text import Split, Text
from gnomon.evaluation.baseline import host_key
from gnomon.evaluation.bench import Bench
from gnomon.evaluation.quality import Protocol
from gnomon.host import describe
from gnomon.policies import Policy

log = logging.getLogger(__name__)

Make = Callable[[Budget], Policy]
Identified = Callable[[Budget], tuple[Policy, str | None]]


@dataclass(frozen=True)
class Trial:
    """One budget that was tried; the measured fields are None where the policy refuses it.

    Attributes:
        setting: of the dial: a unit density, or under ``spread=calibrated`` a byte density.
        ratio: perplexity ratio on the validation text.
        heads, neurons, byte_density: achieved there.
        refusal: why the policy cannot meet it.
    """

    setting: float
    ratio: float | None = None
    heads: float | None = None
    neurons: float | None = None
    byte_density: float | None = None
    refusal: str | None = None

    def as_result(self) -> dict[str, Any]:
        """The fields that are there."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class FoundBudget:
    """What a search found.

    Attributes:
        budget: the least one within the limit, ready for a policy.
        limit: largest perplexity ratio allowed.
        trials: all that were tried, in order.
        text: the validation text: ``name split tokens blocks digest``.
    """

    budget: Budget
    limit: float
    trials: tuple[Trial, ...]
    text: dict[str, Any]

    @property
    def trial(self) -> Trial:
        """The trial of the budget that was found."""
        return min((t for t in self.trials if _meets(t, self.limit)), key=lambda t: t.setting)

    def as_result(self) -> dict[str, Any]:
        """``policy.params.search`` of results.json."""
        return {
            "max_ppl_increase": round(self.limit - 1, 12),
            "found": self.trial.as_result(),
            "text": self.text,
            "trials": [trial.as_result() for trial in self.trials],
        }


def find_budget(
    model: PreTrainedModel,
    tokenizer: Any,
    make_policy: Make,
    text: Text,
    budget: Budget,
    *,
    split: Split = "validation",
    tokens: int | None = None,
    protocol: str = "decode",
    prompt: int | None = 256,
    backend: str = "auto",
    batch: int = 4,
    steps: int = 7,
) -> FoundBudget:
    """Finds the least budget whose perplexity ratio on validation text is within its limit.

    Args:
        model: the host.
        tokenizer: its tokenizer.
        make_policy: builds the policy at a budget, e.g. ``lambda b: Static(predictor, b)``.
        text: where validation documents come from.
        budget: with ``max_ppl_increase``; its other fields are kept.
        split: which documents of the text.
        tokens: at most so many; None takes those of the text.
        protocol: ``decode``, ``all`` or ``published``.
        prompt: P of each block under ``decode``.
        backend: of :func:`gnomon.sparsify`.
        batch: blocks per forward.
        steps: halvings; 7 finds the setting to 1/128.

    Returns:
        ``.budget`` for the policy, and every trial.

    Raises:
        ValueError: a budget without ``max_ppl_increase``, a text without such documents, or a limit
            that is not met with a single unit skipped.
    """
    bench = validation_bench(
        model, tokenizer, text, split, tokens, protocol, prompt, backend, batch
    )
    return search(bench, lambda tried: (make_policy(tried), None), budget, steps)


def validation_bench(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Text,
    split: Split,
    tokens: int | None,
    protocol: str,
    prompt: int | None,
    backend: str,
    batch: int,
    bytes_dtype: str | None = None,
) -> Bench:
    """Where a search measures policies; arguments as in :func:`find_budget`."""
    spec = describe(model)
    return Bench(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        key=host_key(model, spec),
        blocks=text.blocks(tokenizer, split, tokens),
        protocol=Protocol(protocol, prompt),
        backend=backend,
        batch=batch,
        bytes_dtype=bytes_dtype,
    )


def search(bench: Bench, make: Identified, budget: Budget, steps: int = 7) -> FoundBudget:
    """:func:`find_budget` on a bench whose blocks are validation text.

    Args:
        bench: host, validation blocks, protocol.
        make: builds a policy, and says what tells it from others (None: remember nothing).
        budget: with ``max_ppl_increase``.
        steps: halvings.

    Raises:
        ValueError: as :func:`find_budget`.
    """
    if budget.max_ppl_increase is None:
        raise ValueError(
            "budget.max_ppl_increase is not set: give gnomon.Budget(max_ppl_increase=0.03)"
        )
    limit = 1 + budget.max_ppl_increase
    trials: list[Trial] = []

    def within(setting: float) -> bool:
        trials.append(_try(bench, make, _at(budget, setting), setting))
        log.info("budget.max_ppl_increase=%g: %s", budget.max_ppl_increase, trials[-1].as_result())
        return _meets(trials[-1], limit)

    make(_at(budget, 0.5))  # what is wrong at any density is said before anything is measured
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    if high == 1.0:
        high = 1.0 if budget.spread == "calibrated" else 1.0 - 1.0 / bench.spec.F
        if not within(high):
            raise _unreachable(trials, budget)
    _require_turns(trials, budget)
    blocks = bench.blocks
    text = {
        **{key: getattr(blocks, key) for key in ("name", "split", "digest")},
        "tokens": bench.protocol.targets(bench.block) * len(blocks),
        "blocks": len(blocks),
    }
    return FoundBudget(_at(budget, high), limit, tuple(trials), text)


def _at(budget: Budget, setting: float) -> Budget:
    """The budget with the dial at a setting."""
    if budget.spread == "calibrated":
        return replace(budget, max_ppl_increase=None, bytes=setting)
    return replace(budget, max_ppl_increase=None, density=setting)


def _try(bench: Bench, make: Identified, budget: Budget, setting: float) -> Trial:
    try:
        policy, identity = make(budget)
        measured = bench.measure(policy, identity)
    except ValueError as error:
        if not str(error).startswith("budget"):  # by rule an error begins with the field
            raise
        return Trial(setting, refusal=str(error))
    ratio = bench.perplexity(measured, resamples=0, seed=0).ratio
    density = measured.density
    return Trial(setting, ratio, density.heads, density.neurons, measured.accounting.byte_density)


def _meets(trial: Trial, limit: float) -> bool:
    return trial.ratio is not None and trial.ratio <= limit


def _require_turns(trials: list[Trial], budget: Budget) -> None:
    """Refuses a policy that no budget changes (``dense``)."""
    read = [trial.byte_density for trial in trials if trial.byte_density is not None]
    if len(read) > 1 and len(set(read)) == 1:
        raise ValueError(
            f"budget.max_ppl_increase={budget.max_ppl_increase:g}: the policy reads "
            f"{read[0]:.3f} of the dense bytes at every density, so there is nothing to find; use "
            "another policy, or leave the budget of a policy inside it to the run"
        )


def _unreachable(trials: list[Trial], budget: Budget) -> ValueError:
    last = trials[-1]
    found = last.refusal or f"the perplexity ratio there is {last.ratio:.4f}"
    return ValueError(
        f"budget.max_ppl_increase={budget.max_ppl_increase:g} is not reached on validation text "
        f"even at {last.setting:.4f}, next to dense: {found}. Allow more, use a better policy, "
        "or set budget.heads=1 or budget.neurons=1 to keep the kind that costs most"
    )
