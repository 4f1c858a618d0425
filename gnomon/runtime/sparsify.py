"""sparsify: run a live host through a policy, and leave it bit-identical afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args
from weakref import WeakSet

from torch import Tensor, nn

from gnomon.host import describe
from gnomon.policies.base import Policy
from gnomon.runtime.positions import check_protocol
from gnomon.runtime.session import Session

Backend = Literal["auto", "mask"]
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
        backend: ``mask`` multiplies skipped units by zero and is the reference; ``auto`` takes the
            fastest that is available, at present ``mask``.
        protocol: ``decode`` (positions from P-1 on are sparse) or ``all`` (every position is).
        prompt_length: P for forwards without a cache, one for all rows or (B,).

    Yields:
        The session: achieved densities, and a hook for every decision.

    Raises:
        ValueError: unknown backend or protocol; a policy that does not fit the host or protocol; a
            model that is sparsified already.
    """
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend={backend!r} is not available: use {', '.join(get_args(Backend))}"
        )
    check_protocol(protocol)
    if protocol == "all" and policy.refresh == "prompt":
        raise ValueError(
            "protocol='all' has no prompt to decide from: use policy.refresh=token, or "
            "protocol='decode' with policy.refresh=prompt"
        )
    if model in _active:
        raise ValueError(
            "the model is sparsified already: leave that context first, or nest policies"
        )
    spec = describe(model)
    policy.bind(model, spec)
    session = Session(model, spec, policy, protocol, prompt_length)
    with ExitStack() as stack:
        _active.add(model)
        stack.callback(_active.discard, model)
        stack.enter_context(policy.transform(model))
        stack.enter_context(session.hooks)
        yield session
