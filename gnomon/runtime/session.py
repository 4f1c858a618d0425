"""The session: what one ``sparsify`` context knows about the forward that is running."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gnomon.accounting import Density
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.policies.base import Policy, Seen
from gnomon.runtime.counts import Counts
from gnomon.runtime.positions import Step, read_step

Decision = Callable[[UnitKind, int, Tensor, Step], None]


class Session:
    """What one ``sparsify`` context keeps: the current forward, decisions per sequence, counts.

    Attributes:
        on_decision: called with (kind, layer, active set (B, T', N) at the sparse columns, step)
            for every decision; for tests, recorders and agreement checks.
        step: positions of the forward that is running or ran last.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: HostSpec,
        policy: Policy,
        protocol: str,
        prompt_length: int | Tensor | None,
    ) -> None:
        self.spec, self.policy = spec, policy
        self.protocol, self.prompt_length = protocol, prompt_length
        self.on_decision: Decision | None = None
        self.step: Step | None = None
        self._counts = Counts(spec)
        self._prompts = _PromptDecisions()
        self._finished: Tensor | None = None
        self._stop = _stop_tokens(model)
        self.hooks = HostHooks(model, spec)
        self.hooks.on_forward(self._start)
        self.hooks.on_cache(self._prompts.keep)
        for tap in policy.taps():
            self.hooks.on_tap(tap, partial(self._see, tap))
        for kind in KINDS:
            for layer in range(spec.L):
                self.hooks.on_units(kind, layer, self._masker(kind, layer))

    def density(self) -> Density:
        """Achieved densities over all sparse positions so far (padding excluded)."""
        return self._counts.density()

    def _start(self, args: dict[str, Any]) -> None:
        """Before every forward of the host: where it is sparse, and whose prompt it holds."""
        step = read_step(args, self.protocol, self.prompt_length)
        self.step, self._from = step, step.start
        self._hidden: dict[Tap, Tensor] = {}
        self._memo: dict[Any, Any] = {}
        self._live = step.live & ~self._finish(args, step)[:, None]
        if self.policy.refresh == "prompt":
            self._prompts.start(args.get("past_key_values"), step)

    def _finish(self, args: dict[str, Any], step: Step) -> Tensor:
        """Rows that have ended: in single-token steps a stop token was fed back."""
        rows = step.live.shape[0]
        tokens = args.get("input_ids")
        if not step.single or self._finished is None or len(self._finished) != rows:
            self._finished = torch.zeros(rows, dtype=torch.bool, device=step.live.device)
        if step.single and tokens is not None:
            stop = torch.tensor(self._stop, device=tokens.device)
            self._finished |= torch.isin(tokens[:, 0], stop)
        return self._finished

    def _see(self, tap: Tap, hidden: Tensor) -> None:
        self._hidden[tap] = hidden.detach()

    def _masker(self, kind: UnitKind, layer: int) -> Callable[[Tensor], Tensor | None]:
        """Multiplies the skipped units of one layer by zero at the sparse positions."""

        def mask(units: Tensor) -> Tensor | None:
            step, start = self.step, self._from
            assert step is not None
            if start is None:
                return None
            sparse = step.sparse[:, start:].to(units.device)
            if self.policy.keeps_all(kind, layer):
                self._counts.add_full(kind, layer, sparse)
                return None
            keep = self._decide(kind, layer, units, start).to(units.device)
            keep = keep.expand(*sparse.shape, -1)
            if self.on_decision is not None:
                self.on_decision(kind, layer, keep, step)
            self._counts.add(kind, layer, keep, sparse)
            keep = keep | ~sparse[..., None]
            if kind == "heads":
                keep = keep[..., None]
            tail = torch.where(keep, units[:, start:], 0)
            return tail if start == 0 else torch.cat([units[:, :start], tail], dim=1)

        return mask

    def _decide(self, kind: UnitKind, layer: int, units: Tensor, start: int) -> Tensor:
        step = self.step
        assert step is not None
        if self.policy.refresh == "prompt":
            return self._prompts.decision(
                kind, layer, lambda: self._decide_prompt(kind, layer, step)
            )
        seen = Seen(
            hidden=lambda tap: self._hidden[tap][:, start:],
            positions=step.positions[:, start:],
            live=self._live[:, start:],
            memo=self._memo,
            units=units[:, start:].detach() if self.policy.needs_units else None,
        )
        return self.policy.decide(kind, layer, seen)

    def _decide_prompt(self, kind: UnitKind, layer: int, step: Step) -> Tensor:
        """Once per sequence, from its last prompt token but one: (B, 1, N)."""
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


class _PromptDecisions:
    """Active sets that hold for a whole sequence, kept beside its key/value cache."""

    def __init__(self) -> None:
        self._by_cache: WeakKeyDictionary[Any, dict[tuple[UnitKind, int], Tensor]] = (
            WeakKeyDictionary()
        )
        self._current: dict[tuple[UnitKind, int], Tensor] = {}
        self._open = False

    def start(self, cache: Any, step: Step) -> None:
        """A forward begins: with the prompt's boundary in it, or on a cache decided before."""
        self._rows = step.live.shape[0]
        self._open = step.decide_at is not None or cache is None or cache not in self._by_cache
        self._current = {} if self._open else self._by_cache[cache]
        if self._open and cache is not None:
            self._by_cache[cache] = self._current

    def keep(self, cache: Any) -> None:
        """A forward that began without a cache has made one."""
        if cache is not None and cache not in self._by_cache:
            self._by_cache[cache] = self._current

    def decision(self, kind: UnitKind, layer: int, make: Callable[[], Tensor]) -> Tensor:
        """The sequence's active set (B, 1, N), made at its prompt."""
        key = (kind, layer)
        if key not in self._current:
            self._current[key] = make()
        keep = self._current[key]
        if keep.shape[0] not in (1, self._rows):
            raise ValueError(
                f"the cache was decided for {keep.shape[0]} sequences and now holds {self._rows}: "
                "start it again inside sparsify"
            )
        return keep


def _stop_tokens(model: nn.Module) -> list[int]:
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    stop: list[int] = []
    for field in ("eos_token_id", "pad_token_id"):
        value = getattr(config, field, None)
        stop += [value] if isinstance(value, int) else list(value or [])
    return stop
