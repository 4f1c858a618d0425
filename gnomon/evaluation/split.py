"""The split of a byte budget: which predictor, and how many heads, beside how many neurons.

At a fixed byte density every choice is paid for by the rest: a larger predictor and more heads
leave fewer bytes for neurons. For each predictor, heads are given up step by step while the loss on
validation text falls, which is while the bytes are worth more elsewhere; neurons take what is left.
The best of all points is the split. With ``spread=calibrated`` in the budget its layers have counts
of their own at every point.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.modeling_utils import PreTrainedModel

from gnomon.budget import Budget, choices
from gnomon.data.text import Split, Text
from gnomon.errors import Refused
from gnomon.evaluation.bench import Bench
from gnomon.evaluation.dial import Trial, validation_bench
from gnomon.host import HostSpec
from gnomon.policies import Policy

log = logging.getLogger(__name__)

HEADS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Point(Trial):
    """One split that was tried; ``setting`` is the density of heads that was asked for.

    Attributes:
        name: of the policy or predictor.
        predictor_byte_share: achieved there.
    """

    name: str = ""
    predictor_byte_share: float | None = None


@dataclass(frozen=True)
class FoundSplit:
    """What a search found.

    Attributes:
        name: of the best policy or predictor.
        budget: for it: the bytes asked for, with the density of heads.
        points: all that were tried, in order.
    """

    name: str
    budget: Budget
    points: tuple[Point, ...]

    @property
    def point(self) -> Point:
        """The best one."""
        return _best(self.points)


def find_split(
    model: PreTrainedModel,
    tokenizer: Any,
    make_policies: Mapping[str, Callable[[Budget], Policy]],
    text: Text,
    budget: Budget,
    *,
    heads: Sequence[float] = HEADS,
    split: Split = "validation",
    tokens: int | None = None,
    protocol: str = "decode",
    prompt: int | None = 256,
    backend: str = "auto",
    batch: int = 4,
    bytes_dtype: str | None = None,
) -> FoundSplit:
    """Finds how heads, neurons and predictor share a byte budget at the least loss.

    Args:
        model: the host.
        tokenizer: its tokenizer.
        make_policies: name -> builds the policy at a budget, e.g. one for each size of predictor.
        text: where validation documents come from.
        budget: with ``bytes``; its other fields are kept, and ``heads`` given beside it is not
            searched.
        heads: densities of heads that are tried, in this order, until the loss rises.
        split: which documents of the text.
        tokens: at most so many; None takes those of the text.
        protocol: ``decode``, ``all`` or ``published``.
        prompt: P of each block under ``decode``.
        backend: of :func:`gnomon.sparsify`.
        batch: blocks per forward.
        bytes_dtype: dtype that bytes are counted in; None takes the host's.

    Returns:
        ``.name`` and ``.budget`` of the best split, and every point.

    Raises:
        ValueError: a budget without ``bytes``, nothing to choose from, a text without such
            documents, or a budget that no policy can meet.
    """
    _check(make_policies, budget, heads)
    bench = validation_bench(
        *(model, tokenizer, text, split, tokens, protocol, prompt, backend, batch, bytes_dtype)
    )
    points: list[Point] = []
    for name, make in make_policies.items():
        best: float | None = None
        for target in _targets(make, budget, bench.spec, heads):
            point = _measured(bench, name, make, replace(budget, heads=target))
            points.append(point)
            log.info("budget.bytes=%g: %s", budget.bytes, point.as_result())
            if point.ratio is None:
                continue  # fewer heads may come down to it
            if best is not None and point.ratio >= best:
                break
            best = point.ratio
    if all(point.ratio is None for point in points):
        raise ValueError(points[-1].refusal)
    found = _best(points)
    return FoundSplit(found.name, replace(budget, heads=found.setting), tuple(points))


def _check(make_policies: Mapping[str, Any], budget: Budget, heads: Sequence[float]) -> None:
    if budget.bytes is None:
        raise ValueError("budget.bytes is not set: give gnomon.Budget(bytes=0.7), what is split")
    if budget.neurons is not None:
        raise ValueError(
            f"budget.neurons={budget.neurons:g} beside budget.bytes leaves nothing to split: "
            "leave it out, neurons take what predictor and heads leave"
        )
    if not make_policies or not heads:
        raise ValueError("make_policies and heads must each hold something to choose from")


def _targets(
    make: Callable[[Budget], Policy], budget: Budget, spec: HostSpec, heads: Sequence[float]
) -> Sequence[float]:
    """Densities of heads to try, one for each whole number of them: the one given, or 1 alone
    where the policy keeps them all anyway."""
    if budget.heads is not None:
        return [budget.heads]
    if "heads" not in make(replace(budget, heads=1.0)).kinds:
        return [1.0]
    n, found = choices(budget, spec, "heads"), dict[int, float]()
    for target in heads:
        found.setdefault(max(1, round(target * n)), target)
    return list(found.values())


def _measured(bench: Bench, name: str, make: Callable[[Budget], Policy], budget: Budget) -> Point:
    setting = budget.heads or 1.0
    try:
        measured = bench.measure(make(budget), None)
    except Refused as error:
        return Point(setting, refusal=str(error), name=name)
    density, account = measured.density, measured.accounting
    return Point(
        setting,
        bench.perplexity(measured, resamples=0, seed=0).ratio,
        density.heads,
        density.neurons,
        account.byte_density,
        name=name,
        predictor_byte_share=account.predictor_byte_share,
    )


def _best(points: Sequence[Point]) -> Point:
    return min((p for p in points if p.ratio is not None), key=lambda p: p.ratio or 0.0)
