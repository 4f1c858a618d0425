"""Decisions of one session: what its running forward has shown, and the active sets made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from gnomon.activation import activation
from gnomon.host import HostSpec, Tap, UnitKind
from gnomon.policies.base import Policy, Seen
from gnomon.policies.statistic import PromptStatistic
from gnomon.runtime.positions import Step
from gnomon.runtime.prompts import PromptDecisions

T = TypeVar("T")


class Decisions:
    """Asks a policy for active sets, of what the running forward has shown so far.

    Args:
        spec: the host's.
        policy: bound to it.

    Attributes:
        prompts: decisions that live as long as a sequence's cache.
    """

    def __init__(self, spec: HostSpec, policy: Policy) -> None:
        self.policy, self.prompts = policy, PromptDecisions()
        self._for_all: dict[Any, Any] = {}
        self._act = activation(spec) if policy.reads_gate else None

    def start(self, step: Step, first: int | None, live: Tensor, cache: Any) -> None:
        """A forward begins.

        Args:
            step: its positions.
            first: its first sparse column; None where it is dense.
            live: (B, T) real tokens of unfinished rows.
            cache: of its sequences, if any.
        """
        self._step, self._first, self._live = step, first, live
        self._hidden: dict[Tap, Tensor] = {}
        self._gates: dict[int, Tensor] = {}
        self._memo: dict[Any, Any] = {}
        if self.policy.refresh == "prompt":
            self.prompts.start(cache, step)
        self._open_statistic(step)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` the first time in the running forward, the same value afterwards."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def fixed(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` the first time that this fixed decision is used, the same value afterwards."""
        if self.policy.refresh == "prompt":
            return self.prompts.once(key, make)
        if key not in self._for_all:
            self._for_all[key] = make()
        return self._for_all[key]

    def see(self, tap: Tap, hidden: Tensor) -> None:
        """Takes a hidden state of the running forward."""
        self._hidden[tap] = hidden.detach()

    def has_seen(self, tap: Tap) -> bool:
        """Whether the running forward has passed a tap."""
        return tap in self._hidden

    def see_gate(self, layer: int, gate: Tensor) -> None:
        """Takes the gate projection of one layer, (B, T, F), of which sparse columns are kept."""
        if self._first is not None:
            self._gates[layer] = gate[:, self._first :].detach()

    def observe(self, kind: UnitKind, layer: int, units: Tensor) -> None:
        """Adds the prompt's units of one layer to the policy's statistic, if it has one."""
        if self._statistic is not None and kind in self._statistic.kinds:
            self._statistic.see(kind, layer, units)

    @property
    def awaits_statistic(self) -> bool:
        """Whether the running forward decides from sums that are known only layer by layer."""
        return self._statistic is not None and not self.prompts.made

    def decide(self, kind: UnitKind, layer: int, units: Tensor | None, start: int) -> Tensor:
        """The active set of one layer from column ``start`` on, broadcastable to (B, T', N)."""
        step = self._step
        if self.policy.refresh == "prompt":
            return self.prompts.decision(
                kind, layer, lambda: self._decide_prompt(kind, layer, step)
            )
        own = None if units is None or not self.policy.needs_units else units[:, start:].detach()
        seen = Seen(
            hidden=lambda tap: self._hidden[tap][:, start:],
            positions=step.positions[:, start:],
            live=self._live[:, start:],
            memo=self._memo,
            units=own,
            gate=self._gate,
        )
        return self.policy.decide(kind, layer, seen)

    def _gate(self, layer: int) -> Tensor:
        assert self._act is not None
        return self._act(self._gates[layer])

    def _decide_prompt(self, kind: UnitKind, layer: int, step: Step) -> Tensor:
        """Once per sequence, from its last prompt token but one: (B, 1, N)."""
        if self._statistic is not None:
            return self._decide_observed(kind, layer, step, self._statistic)
        if step.decide_at is None:
            raise ValueError(
                "refresh='prompt' decides from the prompt's last token but one: give every row a "
                "prompt of at least 2 tokens, and start the sequence inside sparsify"
            )
        rows = torch.arange(len(step.decide_at), device=step.decide_at.device)
        at = step.decide_at

        def hidden(tap: Tap) -> Tensor:
            state = self._hidden[tap]
            return state[rows.to(state.device), at.to(state.device)][:, None]

        positions = step.positions[rows, at][:, None]
        return self.policy.decide(
            kind, layer, Seen(hidden, positions, self._live[rows, at][:, None], self._memo)
        )

    def _decide_observed(
        self, kind: UnitKind, layer: int, step: Step, statistic: PromptStatistic
    ) -> Tensor:
        """Once per sequence, from what was summed up over its prompt: (B, 1, N)."""
        if not bool(step.sparse.any(1).all()):
            raise ValueError(
                "refresh='prompt' decides for all sequences of a batch at once, and not every "
                "prompt ends in this forward: give prompts of one length to a chunked prefill"
            )
        beyond = step.positions.new_tensor(torch.iinfo(step.positions.dtype).max)
        lengths = torch.where(step.sparse, step.positions, beyond).amin(1)  # P-1
        self.once("whole prompt", lambda: statistic.require(lengths))
        seen = Seen(
            hidden=lambda tap: self._hidden[tap],
            positions=(lengths - 1)[:, None],
            live=torch.ones_like(lengths, dtype=torch.bool)[:, None],
            memo=self._memo,
            prompt=statistic,
        )
        return self.policy.decide(kind, layer, seen)

    def _open_statistic(self, step: Step) -> None:
        """Opens the prompt's statistic for what this forward holds of the prompt."""
        self._statistic: PromptStatistic | None = None
        if not self.policy.observes:
            return
        policy = self.policy
        self._statistic = self.prompts.statistic(
            lambda: PromptStatistic(policy.observes, policy.observe)
        )
        if step.single or self.prompts.made:
            self._statistic.rest()
        else:
            self._statistic.begin(step.prompt)
