"""The student: a frozen host run through a predictor in training, by the masks of inference.

Positions are read, units chosen and counts kept by the very code that ``sparsify`` uses: the policy
that will run the predictor selects them from its detached scores. Scores come from the hidden
states of the sparse host itself, or from the dense units of each row's own prompt where the policy
observes those. With hard set m (0 or 1), scores s, their threshold c (the lowest
score kept, detached) and temperature t, a unit tensor is multiplied by

    w · (m + soft − detach(soft)) + (1 − w) · soft,     soft = sigmoid((s − c) / t)

What w and the gradient of the threshold are: :mod:`gnomon.runtime.softness`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from math import gcd
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gnomon.budget import Budget, choices
from gnomon.data.capture import frozen
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.policies import POLICIES
from gnomon.policies.base import Refresh, Seen
from gnomon.policies.learned import Choose, Learned
from gnomon.policies.statistic import PromptStatistic
from gnomon.predictors.base import Predictor
from gnomon.runtime.positions import Step, read_step
from gnomon.runtime.softness import HARD, Softness, shares_of

# kind, layer, scores (B, T' or 1, N), unit tensor (B, T', …) before its mask, sparse (B, T')
Visit = Callable[[UnitKind, int, Tensor, Tensor, Tensor], None]
Watch = Callable[[int, Tensor], None]  # layer, its input (B, T, D)
SAMPLE = 1 << 20  # scores of a layer that a step's threshold is placed on, at most


@dataclass
class _Run:
    """One sparse forward: where it is sparse, and what it has seen so far."""

    step: Step
    start: int
    learns: bool
    softness: Softness
    visit: Visit | None
    prompt: PromptStatistic | None
    hidden: dict[Tap, Tensor] = field(default_factory=dict)
    codes: dict[Tap, Tensor] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def sparse(self) -> Tensor:
        """(B, T') bool, the sparse positions of the columns that are masked."""
        return self.step.sparse[:, self.start :]


class Student:
    """Runs a frozen host dense, or sparse with gradients that reach the predictor alone.

    Args:
        model: the host, in eval mode; its parameters and flags stay as they are.
        spec: its description.
        predictor: in training; what scores a kind that is kept whole gets no gradient.
        budget: what is kept.
        refresh: ``token`` or ``prompt``.
        protocol: ``all`` (every position is sparse) or ``decode`` (needs prompt lengths).
        input_gradient: let gradients flow through the hidden states that scores are made from.
        choose: ``topk`` keeps as many at every position; ``threshold`` all units of a layer that
            reach the quantile of the step's own scores at which the mean meets the budget.

    Raises:
        ValueError: nothing to train, or settings that exclude each other.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: HostSpec,
        predictor: Predictor,
        budget: Budget,
        refresh: Refresh = "token",
        protocol: str = "all",
        input_gradient: bool = False,
        choose: Choose = "topk",
    ) -> None:
        chosen = POLICIES.get(predictor.name, Learned)
        kind = chosen if issubclass(chosen, Learned) else Learned
        _check(predictor, budget, refresh, protocol)
        _check_offered(kind, budget, refresh)
        _check_choice(kind, choose, refresh, budget)
        self.choose = choose
        self.model, self.spec, self.predictor = model, spec, predictor
        self.protocol, self.input_gradient = protocol, input_gradient
        if budget.spread == "learned":
            predictor.learn_spread()
        self.policy = kind(predictor, budget, refresh)
        self.policy.bind(model, spec)
        self._shares: dict[UnitKind, Tensor] = {}
        predictor.train()
        self.masked: list[tuple[UnitKind, int]] = [
            (kind, layer)
            for layer in range(spec.L)
            for kind in KINDS
            if not self.policy.keeps_all(kind, layer)
        ]
        for unit_kind in KINDS:
            if budget.target(unit_kind) == 1:
                predictor.freeze(unit_kind)
                predictor.tilts[unit_kind].requires_grad_(False)
        _require_trainable(predictor)
        self._run: _Run | None = None

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.model.parameters()).device

    def step(self, ids: Tensor, prompt_length: Tensor | None = None) -> Step:
        """Where a forward of ids (B, T) is sparse, with prompts of (B,) tokens under ``decode``."""
        ends = prompt_length if self.protocol == "decode" else None
        return read_step({"input_ids": ids}, self.protocol, ends)

    @torch.no_grad()
    def dense(self, ids: Tensor, watch: Watch | None = None) -> Tensor:
        """Logits (B, T, V) of the dense host on ids (B, T)."""
        with HostHooks(self.model, self.spec) as hooks:
            self._watch(hooks, watch)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def sparse(
        self,
        ids: Tensor,
        step: Step,
        softness: Softness = HARD,
        watch: Watch | None = None,
        visit: Visit | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the sparse host on ids (B, T).

        Args:
            step: of :meth:`step`.
            softness: of the mask.
            watch: called with every layer's input but the first's.
            visit: called for every masked unit tensor; only its scores then have a gradient.
        """
        start, learns = step.start, torch.is_grad_enabled()
        self._spread()
        assert start is not None, "no position is sparse"
        self._run = _Run(step, start, learns, softness, visit, self._prompt_of(step))
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(torch.set_grad_enabled(learns and visit is None))
            hooks = stack.enter_context(HostHooks(self.model, self.spec))
            for kind, layer in self.masked:
                hooks.on_units(kind, layer, partial(self._mask, kind, layer))
            for tap in self.policy.taps():  # after the masks, as in a session
                hooks.on_tap(tap, partial(self._see, tap))
            self._watch(hooks, watch)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        self._run = None
        return logits

    def _spread(self) -> None:
        """Counts and shares of every layer, by the tilts as they are now."""
        policy, tilts = self.policy, self.predictor.tilts
        if policy.resolved.spread != "learned":
            return
        policy.settle(replace(policy.resolved, tilt=self.predictor.tilt()))
        for kind in {kind for kind, _ in self.masked}:
            own = [layer for masked, layer in self.masked if masked == kind]
            kept = sum(policy.counts[kind][layer] for layer in own)
            share = kept / (len(own) * choices(policy.resolved, self.spec, kind))
            self._shares[kind] = torch.zeros_like(tilts[kind]).index_copy(
                0, torch.tensor(own, device=self.device), shares_of(tilts[kind][own], share)
            )

    def _watch(self, hooks: HostHooks, watch: Watch | None) -> None:
        for layer in range(1, self.spec.L if watch is not None else 0):
            assert watch is not None
            hooks.on_tap(Tap(layer, "layer_input"), partial(watch, layer))

    def _prompt_of(self, step: Step) -> PromptStatistic | None:
        """An empty statistic of the dense positions, for a policy that observes them."""
        if not self.policy.observes:
            return None
        assert step.decide_at is not None, "prompts have at least 2 tokens"
        found = PromptStatistic(self.policy.observes, self.policy.observe)
        found.begin(step.prompt)
        return found

    def _see(self, tap: Tap, hidden: Tensor) -> None:
        assert self._run is not None
        self._run.hidden[tap] = hidden if self.input_gradient else hidden.detach()

    def _mask(self, kind: UnitKind, layer: int, units: Tensor) -> Tensor:
        """Multiplies the units of one layer by their mask at the sparse positions."""
        run, start = self._run, self._run.start if self._run is not None else 0
        assert run is not None
        own = units[:, start:]
        with (
            torch.autocast(units.device.type, enabled=False),  # decisions are fp32 at inference too
            torch.set_grad_enabled(run.learns),
        ):
            scores = self._scores(kind, layer, units, run)
            if run.visit is not None:
                run.visit(kind, layer, scores, own, run.sparse)
            mask = self._soft_mask(kind, layer, scores, run).expand(*run.sparse.shape, -1)
            mask = mask.where(run.sparse[..., None], 1.0).to(units.dtype)
        tail = own * (mask[..., None] if kind == "heads" else mask)
        return tail if start == 0 else torch.cat([units[:, :start], tail], dim=1)

    def _seen(self, run: _Run) -> Seen:
        """What the policy may look at, without gradients."""
        return Seen(
            lambda tap: self._rows(tap, run).detach(),
            run.step.positions[:, run.start :],
            run.step.live[:, run.start :],
            run.memo,
            prompt=run.prompt,
        )

    def _scores(self, kind: UnitKind, layer: int, units: Tensor, run: _Run) -> Tensor:
        """Scores (B, T', N), or (B, 1, N) where one decision serves the sequence."""
        if run.prompt is not None:  # of the whole tensor: prompts are longer than run.start
            run.prompt.see(kind, layer, units)
            return self.policy.scores(kind, layer, self._seen(run))
        tap = self.predictor.decided_from(kind, layer)
        assert tap is not None
        if tap not in run.codes:
            run.codes[tap] = self.predictor.encode(tap, self._rows(tap, run).float())
        return self.predictor.score(kind, layer, run.codes[tap])

    def _rows(self, tap: Tap, run: _Run) -> Tensor:
        """Hidden states that decide: (B, T', W), or (B, 1, W) of position P-2."""
        hidden = run.hidden[tap]
        if self.policy.refresh == "token":
            return hidden[:, run.start :]
        assert run.step.decide_at is not None, "prompts have at least 2 tokens"
        return hidden[torch.arange(len(hidden), device=hidden.device), run.step.decide_at][:, None]

    def _soft_mask(self, kind: UnitKind, layer: int, scores: Tensor, run: _Run) -> Tensor:
        """The mask (B, T' or 1, N) of the module's equation, fp32."""
        seen = self._seen(run)
        scores = self.policy.combine(kind, scores, seen)
        with torch.no_grad():
            if self.choose == "threshold":
                cut = self._quantile(kind, layer, scores[run.sparse])
                keep = scores >= cut
            else:
                keep = self.policy.select(kind, layer, scores.detach(), seen)
                cut = scores.detach().masked_fill(~keep, torch.inf).amin(-1, keepdim=True)
        mask = keep.float()
        if torch.is_grad_enabled() and run.visit is None:
            share = self._shares[kind][layer] if kind in self._shares else None
            soft = run.softness.of(scores, cut, share, run.sparse)
            w = run.softness.hardness
            through = mask + (soft - soft.detach())
            mask = through if w == 1 else w * through + (1 - w) * soft
        grouped = kind == "heads" and self.policy.resolved.head_unit == "group"
        return mask.repeat_interleave(self.spec.group_size, -1) if grouped else mask

    def _quantile(self, kind: UnitKind, layer: int, scores: Tensor) -> Tensor:
        """The score (1,) that a layer's share of these (M, N) reaches, from a sample of them."""
        share = self.policy.counts[kind][layer] / scores.shape[-1]
        if share == 1:
            return scores.new_full((1,), -torch.inf)
        stride = -(-scores.numel() // SAMPLE)
        while gcd(stride, scores.shape[-1]) > 1:  # every unit has its turn
            stride += 1
        sample = scores.detach().flatten()[::stride]
        return sample.sort().values[min(round((1 - share) * len(sample)), len(sample) - 1)][None]


def _check(predictor: Predictor, budget: Budget, refresh: str, protocol: str) -> None:
    if protocol not in ("all", "decode"):
        raise ValueError(f"student.protocol={protocol!r}: use all or decode")
    if refresh == "prompt" and protocol == "all":
        raise ValueError(
            "student.refresh=prompt decides from a prompt, and student.protocol=all has none: use "
            "student.protocol=decode"
        )
    if all(budget.target(kind) == 1 for kind in KINDS):
        raise ValueError(
            "density.heads=1 and density.neurons=1 keep every unit: there is nothing to learn; "
            "lower at least one of them"
        )
    if budget.spread not in ("layer", "learned") and predictor.name != "shadow":
        raise ValueError(
            f"student.spread={budget.spread!r}: a {predictor.name} predictor scores in layer order "
            "and ranks all layers by calibrated thresholds only: use student.spread=layer or "
            "learned"
        )


def _check_offered(policy: type[Learned], budget: Budget, refresh: Refresh) -> None:
    """What the policy that will run the predictor does not do."""
    if refresh not in policy.refreshes:
        raise ValueError(
            f"student.refresh={refresh}: a {policy.name} predictor decides once per sequence, from "
            "its prompt: use student.refresh=prompt student.protocol=decode"
        )
    for kind in KINDS:
        if kind not in policy.kinds and budget.target(kind) < 1:
            raise ValueError(
                f"density.{kind}={budget.target(kind):g}: a {policy.name} predictor decides "
                f"{', '.join(policy.kinds)} alone: use density.{kind}=1.0"
            )


def _check_choice(policy: type[Learned], choose: str, refresh: str, budget: Budget) -> None:
    if choose not in get_args(Choose):
        raise ValueError(f"student.choose={choose!r}: use {' or '.join(get_args(Choose))}")
    if choose == "topk":
        return
    if choose not in policy.chooses:
        raise ValueError(
            f"student.choose={choose}: a {policy.name} predictor is used with the K best units "
            "alone: use student.choose=topk, or predictor=sketch, dejavu or shadow"
        )
    if refresh != "token" or budget.head_unit != "head" or not budget.fixed_counts:
        raise ValueError(
            f"student.choose={choose} decides single units of a layer at every token: use "
            "student.refresh=token student.head_unit=head student.spread=layer or learned, or "
            "student.choose=topk"
        )


def _require_trainable(predictor: Predictor) -> None:
    if not any(p.requires_grad for p in predictor.parameters()):
        raise ValueError(
            f"nothing of this {predictor.name} predictor would be trained: a sketch trains its "
            "copies under predictor.tune=true, its heads' networks under density.heads below 1"
        )
