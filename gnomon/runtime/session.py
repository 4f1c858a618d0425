"""The session: what one ``sparsify`` context knows about the forward that is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gnomon.accounting import Density, Role
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.policies.base import Policy
from gnomon.runtime.channels import Channels
from gnomon.runtime.counts import Counts
from gnomon.runtime.decisions import Decisions
from gnomon.runtime.gathered import Gathered, Kept
from gnomon.runtime.positions import Step, read_step
from gnomon.runtime.skipped import SkippedAttention

T = TypeVar("T")
Decision = Callable[[Any, int, Tensor, Step], None]  # a unit kind, or the role of a linear


class Session:
    """What one ``sparsify`` context keeps: the current forward, decisions per sequence, counts.

    Attributes:
        on_decision: called with (kind, layer, active set (B, T', N) at the sparse columns, step)
            for every decision; for tests, recorders and agreement checks. Where channels are
            skipped, with the linear's role and the channels (B, T', W) that it reads.
        step: positions of the forward that is running or ran last.
        start: its first sparse column; None while it is dense.
        gathers: whether its sparse columns are gathered; else they are masked.
        backend: ``mask``, ``torch`` or ``triton``.
        channels: the linears whose input channels are skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: HostSpec,
        policy: Policy,
        protocol: str,
        prompt_length: int | Tensor | None,
        backend: str = "mask",
    ) -> None:
        self.spec, self.policy = spec, policy
        self.protocol, self.prompt_length = protocol, prompt_length
        whole = protocol == "decode" and policy.prefill == "sparse"
        self._protocol = "all" if whole else protocol
        self.on_decision: Decision | None = None
        self.step: Step | None = None
        self.start: int | None = None
        self.backend, self.gathers = backend, False
        self._gathered = None if backend == "mask" else Gathered(self, model, backend)
        self._skipped = None if backend == "mask" else SkippedAttention(self, model)
        self._taps = frozenset(policy.taps())
        self._counts = Counts(spec)
        self._decisions = Decisions(spec, policy)
        self._finished: Tensor | None = None
        self._stop = _stop_tokens(model)
        self.hooks = HostHooks(model, spec)
        self.hooks.on_forward(self._start)
        self.hooks.on_cache(self._decisions.prompts.keep)
        if self._skipped is not None and self._skipped.layers:
            self.hooks.on_cache(self._skipped.forget)
        for kind in KINDS:
            for layer in range(spec.L):
                self.hooks.on_units(kind, layer, self._masker(kind, layer))
        self.channels = Channels(self)
        if policy.reads_gate:
            for layer in range(spec.L):
                self.hooks.on_branch(layer, "gate", partial(self._decisions.see_gate, layer))
        for tap in policy.taps():  # after the masks: a context is read without its skipped heads
            self.hooks.on_tap(tap, partial(self._decisions.see, tap))
        self.channels.hook(self.hooks)  # after the taps, which read the whole input

    def density(self) -> Density:
        """Achieved densities over all sparse positions so far (padding excluded)."""
        return self._counts.density()

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside, the host's linears gather; nothing is replaced under ``mask``."""
        with ExitStack() as stack:
            for part in (self._gathered, self._skipped):
                if part is not None:
                    stack.enter_context(part.replaced())
            yield

    @property
    def all_sparse(self) -> bool:
        """Whether the running forward has no dense token, in any row."""
        step = self.step
        if step is None or self.start != 0:
            return False
        return self.once("all sparse", lambda: step.single or not bool(step.prompt.any()))

    def note_skipped(self, kind: UnitKind, layer: int) -> None:
        """Counts and reports a sublayer that did not run."""
        assert self.step is not None
        self._noted(kind, layer, None, self.step.sparse)

    def kept(self, kind: UnitKind, layer: int) -> Kept | None:
        """What one layer keeps of the running forward's sparse columns; None where it is dense."""
        if not self.gathers or self.policy.keeps_all(kind, layer):
            return None
        return self.once(("kept", kind, layer), lambda: self._kept(kind, layer))

    def meet(self, tap: Tap, hidden: Tensor) -> None:
        """A hidden state that a policy may ask for before the tap's own module runs."""
        if tap in self._taps and not self._decisions.has_seen(tap):
            self._decisions.see(tap, self.hooks.rows(hidden))

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` the first time in the running forward, the same value afterwards."""
        return self._decisions.once(key, make)

    def fixed(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` the first time that this fixed decision is used, the same value afterwards."""
        return self._decisions.fixed(key, make)

    def _start(self, args: dict[str, Any]) -> None:
        """Before every forward of the host: where it is sparse, and whose prompt it holds."""
        step = read_step(args, self._protocol, self.prompt_length)
        self.step, self.start = step, step.start
        self._cached = args.get("past_key_values") is not None or bool(args.get("use_cache"))
        live = step.live & ~self._finish(args, step)[:, None]
        self._decisions.start(step, self.start, live, args.get("past_key_values"))
        self.gathers = self._gathered is not None and self._can_gather(step)

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

    def note_channels(self, role: Role, layer: int, keep: Tensor) -> None:
        """Counts and reports the input channels (B, T', W) that a linear reads."""
        step, start = self.step, self.start
        assert step is not None and start is not None
        if self.on_decision is not None:
            self.on_decision(role, layer, keep, step)
        self._counts.add_channels(role, layer, keep, step.sparse[:, start:].to(keep.device))

    def _masker(self, kind: UnitKind, layer: int) -> Callable[[Tensor], Tensor | None]:
        """Multiplies the skipped units of one layer by zero at the sparse positions."""

        def mask(units: Tensor) -> Tensor | None:
            step, start = self.step, self.start
            assert step is not None
            self._decisions.observe(kind, layer, units)
            if start is None:
                return None
            sparse = step.sparse[:, start:].to(units.device)
            if self.policy.keeps_all(kind, layer):
                self._counts.add_full(kind, layer, sparse)
                return None
            if self.gathers:
                if kind == "neurons" or Tap(layer, "attn_context") not in self._taps:
                    return None
                kept = self.kept(kind, layer)
                assert kept is not None
                keep = kept.keep[:, None]
            else:
                keep = self._noted(kind, layer, units, sparse)
            keep = keep | ~sparse[..., None]
            if kind == "heads":
                keep = keep[..., None]
            tail = torch.where(keep, units[:, start:], 0)
            return tail if start == 0 else torch.cat([units[:, :start], tail], dim=1)

        return mask

    def _noted(self, kind: UnitKind, layer: int, units: Tensor | None, sparse: Tensor) -> Tensor:
        """The active set of the sparse columns, (B, T', N); counted and reported."""
        step, start = self.step, self.start
        assert step is not None and start is not None
        keep = self._decisions.decide(kind, layer, units, start).to(sparse.device)
        keep = keep.expand(*sparse.shape, -1)
        if self.on_decision is not None:
            self.on_decision(kind, layer, keep, step)
        self._counts.add(kind, layer, keep, sparse)
        return keep

    def _can_gather(self, step: Step) -> bool:
        """One sparse token per row, or a decision for all rows that small weights are made of.

        A layer's statistic is known only after its gate and up rows have run, so that the forward
        that decides from one is masked.
        """
        if self.start is None or torch.is_grad_enabled():
            return False
        if self._decisions.awaits_statistic:
            return False
        rows, columns = step.sparse.shape
        one_set = self.policy.refresh == "static" or rows == 1
        if columns - self.start > 1 and not (self._is_fixed and one_set):
            return False
        return step.single or bool((step.sparse | ~step.live)[:, self.start :].all())

    @property
    def _is_fixed(self) -> bool:
        return self.policy.refresh == "static" or (self.policy.refresh == "prompt" and self._cached)

    def _kept(self, kind: UnitKind, layer: int) -> Kept:
        step, start = self.step, self.start
        assert step is not None and start is not None
        keep = self._noted(kind, layer, None, step.sparse[:, start:])
        shared = self.policy.refresh == "static" or keep.shape[0] == 1 or keep.stride(0) == 0
        keep = keep[: 1 if shared else None, 0]
        return Kept(keep, self.policy.kept(kind, layer), self._is_fixed and shared)


def _stop_tokens(model: nn.Module) -> list[int]:
    config = getattr(model, "generation_config", None) or getattr(model, "config", None)
    stop: list[int] = []
    for field in ("eos_token_id", "pad_token_id"):
        value = getattr(config, field, None)
        stop += [value] if isinstance(value, int) else list(value or [])
    return stop
