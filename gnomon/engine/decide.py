"""Deciders: a policy's active sets, as lists on the device, where a decode step asks for them.

All of them give the very sets of :meth:`Policy.decide`; they differ in when, and in how many
launches.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gnomon.engine.active import Active, Key, StepDecider
from gnomon.engine.lists import Lists
from gnomon.engine.passing import InputChannels, Passing
from gnomon.engine.sketched import Sketched
from gnomon.host import KINDS, HostSpec, Tap, UnitKind
from gnomon.kernels.cpu_library import library
from gnomon.policies.base import Policy, Seen
from gnomon.policies.learned import Learned
from gnomon.policies.sketch import Sketch
from gnomon.policies.teal_attention import TealAttention
from gnomon.policies.threshold import Threshold
from gnomon.predictors.linear import LinearStack


class Dense(StepDecider):
    """Keeps everything: the dense twin."""


class Fixed(StepDecider):
    """Sets that hold for a sequence (``static``, ``prompt``), decided before its first step.

    One set for the whole batch is compacted: the step then runs on small contiguous weights.
    """

    def __init__(self, policy: Policy, spec: HostSpec, lists: Lists) -> None:
        super().__init__()
        self.policy, self.spec = policy, spec
        self.rows: dict[Key, Tensor] = {}
        """(kind, layer) -> rows to compact, as :func:`gnomon.engine.weights.compacted` takes."""
        self._lists = lists

    def decide(self, seen: Seen) -> bool:
        """Decides every layer from the prompt; may wait for the device.

        Args:
            seen: the prompt's last token but one, of every sequence.

        Returns:
            Whether the sets have other sizes than before, so that a captured step is void. Sets of
            the same sizes are written where the old ones are.
        """
        found, rows = {}, {}
        for kind in KINDS:
            for layer in range(self.spec.L):
                if self.policy.keeps_all(kind, layer):
                    continue
                keep = self.policy.decide(kind, layer, seen)
                keep = keep.reshape(-1, keep.shape[-1])
                if bool((keep == keep[:1]).all()):
                    keep = keep[:1]
                found[kind, layer] = self._set(kind, keep)
                if found[kind, layer].compacted:
                    rows[kind, layer] = _rows(kind, found[kind, layer])
        self.rows = rows
        same = _sizes(found) == _sizes(self.sets)
        if same:
            for key, active in found.items():
                _copy(self.sets[key], active)
        else:
            self.sets = found
        return not same

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """The sequence's set."""
        return self.sets.get((kind, layer))

    def _set(self, kind: UnitKind, keep: Tensor) -> Active:
        sizes = keep.sum(-1)
        longest = int(sizes.max())
        found = self._lists.of_mask(kind, keep, longest)
        if keep.shape[0] > 1:
            uneven = bool((sizes != longest).any())
            return replace(found, count=sizes.int() if uneven else None, early=True)
        found = replace(found, early=True, compacted=True)
        if kind == "neurons" or self.policy.kv == "keep":
            return found
        return _without_idle_groups(found, keep, self.spec)


class PerToken(StepDecider):
    """Any policy that decides at every token, layer by layer, with its own torch operators."""

    def __init__(self, policy: Policy, spec: HostSpec, lists: Lists) -> None:
        super().__init__()
        self.policy = policy
        self.taps: Sequence[Tap] = policy.taps()
        self._lists = lists

    def begin(self, position: Tensor, live: Tensor) -> None:
        """Forgets the step before."""
        self.sets.clear()
        self._hidden: dict[Tap, Tensor] = {}
        self._gates: dict[int, Tensor] = {}
        self._seen = _seen(self._hidden, position, live, self._gates)

    def see(self, tap: Tap, hidden: Tensor) -> None:
        """Keeps it for the decisions that read it."""
        self._hidden[tap] = hidden

    def reads_gate(self, layer: int) -> bool:
        """Whether the policy looks at it here."""
        idle = self.policy.keeps_all("neurons", layer) or self.policy.skips("neurons", layer)
        return self.policy.reads_gate and not idle

    def see_gate(self, layer: int, gate: Tensor) -> None:
        """Keeps it for the decision that reads it."""
        self._gates[layer] = gate

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """Asks the policy."""
        if self.policy.keeps_all(kind, layer):
            return None
        keep = self.policy.decide(kind, layer, self._seen)
        keep = keep.reshape(-1, keep.shape[-1])
        found = self._lists.of_mask(kind, keep, self.policy.kept(kind, layer))
        self.sets[kind, layer] = found
        return found


class Fused(StepDecider):
    """A predictor's top units: one GEMV for all layers that a tap decides, one selection for those
    that keep equally many (all, under ``spread=layer``)."""

    def __init__(self, policy: Learned, spec: HostSpec, lists: Lists) -> None:
        super().__init__()
        self.policy, self._lists = policy, lists
        self.plan = _plan(policy, spec)
        self.taps: Sequence[Tap] = tuple(self.plan)
        self._predictor = _widened(policy)

    @staticmethod
    def fits(policy: Policy) -> bool:
        """Whether a policy is its predictor's top units and nothing else."""
        return (
            isinstance(policy, Learned)
            and policy.refresh == "token"
            and policy.ranks
            and type(policy).scores is Learned.scores
            and type(policy).decide is Policy.decide
        )

    def begin(self, position: Tensor, live: Tensor) -> None:
        """Forgets the step before."""
        self.sets.clear()
        self._seen = _seen({}, position, live)

    def see(self, tap: Tap, hidden: Tensor) -> None:
        """Decides every layer that reads this state."""
        code = self._predictor.encode(tap, hidden.float())
        for kind, layers in self.plan[tap].items():
            scores = self._predictor.scores_of(kind, layers, code)  # (B, layers, N)
            scores = self.policy.combine(kind, scores, self._seen).transpose(0, 1)
            for keep, places in _by_count(self.policy.counts[kind], layers).items():
                whole = len(places) == len(layers)  # stacked: a list of places would wait
                some = scores if whole else torch.stack([scores[place] for place in places])
                sets = self._lists.of_scores(kind, some, keep)
                for place, active in zip(places, sets, strict=True):
                    early = _is_early(kind, layers[place], tap)
                    self.sets[kind, layers[place]] = replace(active, early=early)

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """Decided when its tap was seen."""
        return self.sets.get((kind, layer))


def decider(policy: Policy | None, spec: HostSpec, lists: Lists) -> StepDecider:
    """The decider of a bound policy; None keeps everything."""
    if policy is None or policy.skips_nothing:
        return Dense()
    if policy.refresh != "token":
        return Fixed(policy, spec, lists)
    if type(policy) is TealAttention:
        return InputChannels(policy.thresholds, spec, decider(policy.inner, spec, lists))
    if Sketched.fits(policy):
        assert isinstance(policy, Sketch)
        return Sketched(policy, spec, lists.device)
    if Fused.fits(policy):
        assert isinstance(policy, Learned)
        return Fused(policy, spec, lists)
    if Passing.fits(policy):
        assert isinstance(policy, Threshold)
        return Passing(policy, spec, lists)
    return PerToken(policy, spec, lists)


def _seen(
    hidden: dict[Tap, Tensor],
    position: Tensor,
    live: Tensor,
    gates: dict[int, Tensor] | None = None,
) -> Seen:
    look: Callable[[Tap], Tensor] = lambda tap: hidden[tap][:, None]  # noqa: E731
    gate = None if gates is None else lambda layer: gates[layer][:, None]
    return Seen(look, position.long()[:, None], live[:, None], {}, gate=gate)


def _plan(policy: Learned, spec: HostSpec) -> dict[Tap, dict[UnitKind, list[int]]]:
    """Which layers each tap decides."""
    plan: dict[Tap, dict[UnitKind, list[int]]] = {}
    for kind in KINDS:
        for layer in range(spec.L):
            tap = policy.predictor.decided_from(kind, layer)
            if tap is None or policy.kept(kind, layer) == spec.units(kind):
                continue
            plan.setdefault(tap, defaultdict(list))[kind].append(layer)
    return dict(sorted(plan.items()))


def _by_count(counts: Sequence[int], layers: Sequence[int]) -> dict[int, list[int]]:
    """Units kept -> places in ``layers`` of those that keep so many."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, layer in enumerate(layers):
        found[counts[layer]].append(place)
    return found


def _widened(policy: Learned) -> Any:
    """On a CPU without kernels for int8, a copy that holds the same numbers as fp32."""
    predictor = policy.predictor
    if next(predictor.buffers()).device.type != "cpu" or not predictor.quantized:
        return predictor
    if library() is not None:
        return predictor
    predictor = copy.deepcopy(predictor)
    for stack in predictor.modules():
        if isinstance(stack, LinearStack):
            stack.q = stack.q.float()
    return predictor


def _is_early(kind: UnitKind, layer: int, tap: Tap) -> bool:
    """Whether at least one launch lies between the selection and the first that follows it."""
    inside = kind == "neurons" and tap.site in ("layer_input", "attn_input")
    return layer > tap.layer or inside


def _without_idle_groups(active: Active, keep: Tensor, spec: HostSpec) -> Active:
    """K and V of groups without an active head are neither computed nor written."""
    used = keep.view(1, spec.G, spec.group_size).any(-1)
    groups = used[0].nonzero().flatten().int()
    kvq = torch.cat([groups, groups + spec.G, active.index[0] + 2 * spec.G])[None]
    place = used.cumsum(-1, dtype=torch.int32) - 1
    kv_slot = torch.where(used, place, -1)
    return replace(active, kvq=kvq, groups=len(groups), kv_slot=kv_slot)


def _rows(kind: UnitKind, active: Active) -> Tensor:
    index = active.kvq if kind == "heads" else active.index
    assert index is not None
    return index[0].long()


_TENSORS = ("index", "count", "slot", "kvq", "kvq_count", "kv_slot", "wanted")


def _sizes(sets: dict[Key, Active]) -> Any:
    def size(active: Active) -> Any:
        tensors = (getattr(active, name) for name in _TENSORS)
        shapes = tuple(None if t is None else tuple(t.shape) for t in tensors)
        return shapes, active.groups, active.compacted

    return {key: size(active) for key, active in sets.items()}


def _copy(target: Active, source: Active) -> None:
    for name in _TENSORS:
        old = getattr(target, name)
        if old is not None:
            old.copy_(getattr(source, name))
