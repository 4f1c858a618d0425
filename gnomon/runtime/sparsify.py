"""sparsify: run a live host through a policy, and leave it bit-identical afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

from torch import Tensor, nn

from gnomon.host import describe
from gnomon.policies.base import Policy
from gnomon.runtime.backends import check_backend, choose_backend
from gnomon.runtime.positions import check_protocol
from gnomon.runtime.session import Session

_active: WeakSet[nn.Module] = WeakSet()


@contextmanager
def sparsify(
    model: nn.Module,
    policy: Policy,
    backend: str = "auto",
    protocol: str = "decode",
    prompt_length: int | Tensor | None = None,
) -> Iterator[Session]:
    """Runs ``model`` through ``policy`` inside the context, in ``generate()`` and plain forwards.

    Args:
        model: a causal LM that :func:`gnomon.describe` understands; restored on exit.
        policy: decides the active units.
        backend: ``mask`` multiplies skipped units by zero and is the reference; ``torch`` and
            ``triton`` read the weights of kept units alone, where every row has one sparse token
            or the decision is fixed (:mod:`gnomon.runtime.gathered`); ``auto`` takes the fastest
            that can run the policy here (:func:`gnomon.runtime.backends.choose_backend`).
        protocol: ``decode`` (positions from P-1 on are sparse), ``all`` (every position is), or
            ``published`` (every position is, and ``refresh=prompt`` decides from the last token of
            the whole text: ShadowLLM's set-up, which is not causal).
        prompt_length: P, one for all rows or (B,), for forwards without a cache, and for a prompt
            that comes in chunks: without it the first forward on an empty cache is the prompt.

    Yields:
        The session: achieved densities, and a hook for every decision.

    Raises:
        ValueError: unknown backend or protocol; a backend that cannot run the policy; a policy that
            does not fit the host or protocol; a model that is sparsified already.
    """
    check_backend(backend)
    check_protocol(protocol)
    if protocol == "all" and policy.refresh == "prompt":
        raise ValueError(
            "protocol='all' has no prompt to decide from: use policy.refresh=token, or "
            "protocol='decode' with policy.refresh=prompt"
        )
    if protocol == "published" and policy.observes:
        raise ValueError(
            f"protocol='published' has no dense prompt, which policy={policy.name} decides from: "
            "use protocol='decode'"
        )
    if model in _active:
        raise ValueError(
            "the model is sparsified already: leave that context first, or nest policies"
        )
    spec = describe(model)
    policy.bind(model, spec)
    chosen = choose_backend(backend, model, policy)
    session = Session(model, spec, policy, protocol, prompt_length, chosen)
    with ExitStack() as stack:
        _active.add(model)
        stack.callback(_active.discard, model)
        stack.enter_context(policy.transform(model))
        stack.enter_context(session.replaced())
        stack.enter_context(session.hooks)
        yield session
