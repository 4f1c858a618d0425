"""The decode engine: prefill, then one sparse step per token, in a CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from types import TracebackType

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from gnomon.accounting import Role
from gnomon.engine.active import Active, Channels, Key
from gnomon.engine.arithmetic import read_arithmetic
from gnomon.engine.cache import Cache
from gnomon.engine.decide import Fixed, decider
from gnomon.engine.graph import Replay
from gnomon.engine.lists import Lists
from gnomon.engine.loop import Loop
from gnomon.engine.prompt import Prompt, run_prefix, seen_at_end
from gnomon.engine.sampling import GREEDY, Sampling
from gnomon.engine.sparse_prefix import compacted_linears
from gnomon.engine.step import decode_step
from gnomon.engine.support import (
    bucket,
    choose_ops,
    named_memory,
    one_device,
    require_bound,
    require_fast,
    require_fit,
    require_plain_weights,
    require_policy,
    require_sizes,
)
from gnomon.engine.turned import weights_for
from gnomon.engine.weights import StepWeights, compacted, restore
from gnomon.host import UnitKind, describe, weight
from gnomon.policies.base import Policy, Seen
from gnomon.policies.statistic import PromptStatistic
from gnomon.runtime.sparsify import _active as sparsified

Sets = dict[Key, Active]
Inputs = dict[tuple[Role, int], Channels]


class Engine:
    """Decodes a batch of sequences through a policy.

    Position P-1 is the first sparse one: :meth:`prefill` runs all prompt tokens but the last
    through the host itself (on the compacted weights of a policy with ``prefill=sparse``). While
    the engine is open the host's parameters are laid out for the kernels, with the very same
    values; :meth:`close` (or leaving the context) puts its own layout back.

    Args:
        model: the host.
        policy: decides the active units; None keeps everything (the dense twin).
        backend: ``triton``, ``torch``, or ``auto``: Triton on a CUDA device, else PyTorch.
        batch: sequences decoded together.
        context: most tokens of a sequence, prompt included. Buffers have 512, 1024, 2048, …
            places, this many at most, as the prompt and what it asks for need.
        weights: of another engine of the same host (``engine.weights``), so that nothing is laid
            out or held twice but linears whose input channels are skipped, and FFSplit's heavy
            rows and rest; that engine must outlive this one.

    Raises:
        UnsupportedHostError: the host's step cannot be expressed.
        UnsupportedPolicyError: only the generic path can run the policy.
        ValueError: a policy that does not fit the host, an unknown backend, sizes below 1, out of
            memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | None = None,
        *,
        backend: str = "auto",
        batch: int = 1,
        context: int = 2048,
        weights: StepWeights | None = None,
    ) -> None:
        require_sizes(batch, context)
        self.model, self.policy, self.batch, self.context = model, policy, batch, context
        self.spec, self.device = describe(model), one_device(model)
        self.ops = choose_ops(backend, self.device)
        require_plain_weights(model, self.spec)
        if policy is not None:
            require_policy(policy)
            policy.bind(model, self.spec)
            require_bound(policy, None if weights is None else weights.int8)
            if backend == "auto" and self.ops.name == "torch":
                require_fast(policy)
        lists = Lists(self.spec, self.device, self.ops.name)
        self._cache: Cache | None = None
        self._steps: dict[Sampling, tuple[Replay, Sets, Inputs]] = {}
        self._latest: Sets = {}
        self._inputs: Inputs = {}
        self._owner = weights is None
        with named_memory(batch, context), torch.no_grad():
            self.math = read_arithmetic(model, self.spec, context)
            self.decider = decider(policy, self.spec, lists)
            self._loop = Loop(batch, self.spec.V, context, self.device)
            turn = self.decider.channels
            self.weights = weights_for(model, self.spec, policy, turn, weights)
        self._active_weights = self.weights

    @property
    def kind(self) -> str:
        """``cuda-graph``, or ``lean`` where steps are a plain loop."""
        return "cuda-graph" if self.device.type == "cuda" else "lean"

    @property
    def logits(self) -> Tensor:
        """(B, V) fp32 of the last step; the next one writes over it."""
        return self._loop.logits

    @property
    def token(self) -> Tensor:
        """(B,) int64, fed to the next step."""
        return self._loop.token

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        """Starts a batch of sequences: prefill, and the decisions that hold for all of it.

        Args:
            input_ids: (B, P) prompts, padded on either side.
            attention_mask: (B, P), or None without padding.
            max_new_tokens: steps to make room for; None takes what ``context`` leaves.

        Raises:
            ValueError: another batch, more tokens than ``context``, out of memory.
        """
        if self.model in sparsified:
            raise ValueError("the model is sparsified: leave that context before an engine runs it")
        mask = None if attention_mask is None else attention_mask.to(self.device)
        prompt = Prompt.of(input_ids.to(self.device), mask)
        rows, cached = len(prompt.last), int(prompt.lengths.max())
        require_fit(rows, self.batch, cached + 1, max_new_tokens, self.context)
        need = self.context if max_new_tokens is None else cached + max_new_tokens
        fixed = self.decider if isinstance(self.decider, Fixed) else None
        taps = () if fixed is None else fixed.policy.taps()
        policy = None if fixed is None else fixed.policy
        observes = policy is not None and policy.observes
        statistic = PromptStatistic(observes, policy.observe) if policy and observes else None
        transformed = nullcontext() if self.policy is None else self.policy.transform(self.model)
        with named_memory(self.batch, self.context), torch.no_grad(), transformed:
            cache = self._reserve(need)
            sparse = fixed is not None and fixed.policy.prefill == "sparse"
            if fixed is not None and sparse:
                self._decide(fixed, seen_at_end(fixed.policy, prompt, {}))
            small = (self.model, self.spec, self._active_weights, self.decider.sets)
            with compacted_linears(*small) if sparse else nullcontext():
                past, states = run_prefix(self.model, self.spec, prompt, taps, statistic)
            cache.fill(past, prompt.lengths.int())
            if fixed is not None and not sparse:
                self._decide(fixed, seen_at_end(fixed.policy, prompt, states, statistic))
        self._loop.start(prompt.last)
        self._used, self._written = cached, 0

    def step(self, tokens: Tensor | None = None, sampling: Sampling = GREEDY) -> Tensor:
        """One decode step; the token that it draws is fed to the next.

        Args:
            tokens: (B,) to feed instead of the ones drawn before.
            sampling: how the next token is drawn.

        Returns:
            :attr:`logits`.

        Raises:
            ValueError: no prompt, or the context is full.
        """
        self._require_room(1)
        if tokens is not None:
            self._loop.token.copy_(tokens)
        self._run(sampling)
        return self.logits

    def run(
        self,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        *,
        sampling: Sampling = GREEDY,
        pad: int = 0,
        every: int = 8,
    ) -> Iterator[Tensor]:
        """Decodes, and hands tokens over in chunks: the host waits once per chunk.

        Args:
            max_new_tokens: per sequence at most.
            stop_ids: tokens that end a sequence, 16 at most; they are handed over too.
            sampling: how tokens are drawn.
            pad: what sequences that have ended go on with.
            every: steps between two looks at the tokens; the first chunk is one step.

        Yields:
            (B, n) int64 on the CPU, until all sequences have ended.

        Raises:
            ValueError: no prompt, or no room for so many tokens.
        """
        self._require_room(max_new_tokens)
        self._loop.set_stops(stop_ids, pad)
        left, size = max_new_tokens, 1
        while left > 0:
            start, size = self._written, min(size, left)
            for _ in range(size):
                self._run(sampling)
            chunk = self._loop.history[:, start : self._written]
            seen = torch.cat([chunk, self._loop.done[:, None].long()], dim=1).cpu()
            yield seen[:, :-1]
            if bool(seen[:, -1].all()):
                return
            left, size = left - size, every

    def seed(self, seed: int) -> None:
        """Seeds sampling; the global random state is never touched."""
        self._loop.generator.manual_seed(seed)

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        """The active set of the last step; None keeps every unit."""
        return self._latest.get((kind, layer))

    def channels(self, role: Role, layer: int) -> Tensor | None:
        """Input channels (B, W) that a linear read in the last step; None for all."""
        found = self._inputs.get((role, layer))
        return None if found is None else found.keep

    def close(self) -> None:
        """Gives buffers back and the host its own layout; again does nothing."""
        self._steps.clear()
        self._cache, self._inputs, self._latest = None, {}, {}
        if self._owner:
            self._owner = False
            restore(self.model, self.spec)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _reserve(self, need: int) -> Cache:
        """A cache of the bucket that holds ``need`` tokens; a larger one is kept."""
        if self._cache is None or self._cache.capacity < need:
            self._steps.clear()
            self._cache = None  # given back before the larger one is taken
            dtype = weight(self.model, self.spec.layers[0].k).dtype
            size = bucket(need, self.context)
            self._cache = Cache(self.spec, self.batch, size, dtype, self.device)
        return self._cache

    def _decide(self, fixed: Fixed, seen: Seen) -> None:
        """Compacts the weights; into the buffers of the sequence before if the sizes agree."""
        changed = fixed.decide(seen)
        if changed:
            self._steps.clear()
            self._active_weights = self.weights
        into = None if changed else self._active_weights
        self._active_weights = compacted(self.weights, self.spec, fixed.rows, into)

    def _run(self, sampling: Sampling) -> None:
        if sampling not in self._steps:
            with named_memory(self.batch, self.context):
                self._steps[sampling] = self._capture(sampling)
        replay, self._latest, self._inputs = self._steps[sampling]
        replay()
        self._used += 1
        self._written += 1

    def _capture(self, sampling: Sampling) -> tuple[Replay, Sets, Inputs]:
        assert self._cache is not None
        generator = self._loop.generator
        state = (self._cache.position, *self._loop.state())
        kept, random = [t.clone() for t in state], generator.get_state()

        def reset() -> None:
            generator.set_state(random)
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)

        replay = Replay(lambda: self._body(sampling), self.device, reset, (generator,))
        sets, inputs = self.decider.sets, self.decider.inputs
        return (replay, dict(sets), dict(inputs)) if replay.captured else (replay, sets, inputs)

    @torch.no_grad()
    def _body(self, sampling: Sampling) -> None:
        """What a step does, on static tensors alone."""
        cache, weights, decide = self._cache, self._active_weights, self.decider
        assert cache is not None
        decide.begin(cache.position, ~self._loop.done)
        token = self._loop.token
        logits = decode_step(token, cache, weights, self.math, self.spec, decide, self.ops)
        self._loop.feed_back(logits, sampling)

    def _require_room(self, steps: int) -> None:
        if self._cache is None:
            raise ValueError("no prompt yet, or the engine is closed: call prefill first")
        if self._used + steps > self._cache.capacity:
            raise ValueError(
                f"{steps} more steps after {self._used} tokens exceed the {self._cache.capacity} "
                "reserved: raise max_new_tokens in prefill, or context (speed.context)"
            )
