"""Prefill: the host's own forward over all prompt tokens but the last."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.hooks import HostHooks
from gnomon.host import HostSpec, Tap
from gnomon.policies.base import Policy, Seen
from gnomon.policies.statistic import PromptStatistic


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, padded on the left.

    Attributes:
        prefix: (B, T) tokens 0..P-2 of every row, and ``mask`` (B, T) which of them are real.
        last: (B,) token P-1.
        lengths: (B,) P-1, the tokens that prefill caches.
    """

    prefix: Tensor
    mask: Tensor
    last: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None) -> Prompt:
        """Takes ids (B, P) padded on either side, and their mask (B, P) or None.

        Raises:
            ValueError: a row without a token, or shapes that do not fit.
        """
        if ids.dim() != 2 or (mask is not None and mask.shape != ids.shape):
            found = None if mask is None else tuple(mask.shape)
            raise ValueError(
                f"input_ids {tuple(ids.shape)} and attention_mask {found} must both be (B, P)"
            )
        live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        lengths = live.sum(1)
        if ids.numel() == 0 or bool((lengths == 0).any()):
            raise ValueError("prompt is empty: give at least one token of text for every sequence")
        order = live.int().argsort(dim=1, stable=True)  # padding first, tokens in their order
        order = order[:, -int(lengths.max()) :]
        ids, live = ids.gather(1, order), live.gather(1, order)
        return cls(ids[:, :-1], live[:, :-1], ids[:, -1], lengths - 1)


@torch.no_grad()
def run_prefix(
    model: nn.Module,
    spec: HostSpec,
    prompt: Prompt,
    taps: tuple[Tap, ...],
    statistic: PromptStatistic | None = None,
) -> Any:
    """Runs the host over the prompt's prefix; a ``statistic`` sees the units of all of it.

    Returns:
        Its key/value cache (None where there is no token to run), and tap -> the hidden state
        (B, 1, W) of position P-2.
    """
    states: dict[Tap, Tensor] = {}
    if prompt.prefix.shape[1] == 0:
        return None, states

    def see(tap: Tap, hidden: Tensor) -> None:
        states[tap] = hidden[:, -1:].detach().clone()

    mask = prompt.mask.long()
    given: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    known = inspect.signature(model.forward).parameters
    if "position_ids" in known:  # rotations count from the row's own first token
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if "logits_to_keep" in known:
        given["logits_to_keep"] = 1
    with HostHooks(model, spec) as hooks:
        for tap in taps:
            hooks.on_tap(tap, partial(see, tap))
        if statistic is not None:
            statistic.begin(prompt.mask)
            for kind in statistic.kinds:
                for layer in range(spec.L):
                    hooks.on_units(kind, layer, partial(statistic.see, kind, layer))
        return model(prompt.prefix, **given).past_key_values, states


def seen_at_end(
    policy: Policy,
    prompt: Prompt,
    states: dict[Tap, Tensor],
    statistic: PromptStatistic | None = None,
) -> Seen:
    """What a decision for the whole sequence may look at: position P-2.

    Raises:
        ValueError: ``refresh=prompt`` and a prompt of one token.
    """
    if policy.refresh == "prompt" and bool((prompt.lengths < 1).any()):
        raise ValueError(
            "refresh='prompt' decides from the prompt's last token but one: give every row a "
            "prompt of at least 2 tokens"
        )
    live = torch.ones_like(prompt.lengths, dtype=torch.bool)[:, None]
    positions = (prompt.lengths - 1).clamp_min(0)[:, None]
    return Seen(lambda tap: states[tap], positions, live, {}, prompt=statistic)
