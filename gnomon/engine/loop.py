"""The static tensors around a decode step: the token fed back, stops, and what was written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.engine.sampling import Sampling, next_token

STOPS = 16  # stop ids that a step compares with


class Loop:
    """State of B sequences between steps; every tensor stays where it is, as graphs demand.

    Attributes:
        token: (B,) int64, fed to the next step.
        logits: (B, V) fp32 of the last step.
        done: (B,) bool, sequences that have ended.
        history: (B, C) int64 tokens written so far.
        generator: random state of sampling.
    """

    def __init__(self, batch: int, vocabulary: int, context: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.long, device=device)

        self.token, self.history = zeros(batch), zeros(batch, context)
        self.logits = torch.zeros(batch, vocabulary, device=device)
        self.done = torch.zeros(batch, dtype=torch.bool, device=device)
        self._made, self._pad, self._stops = zeros(1), zeros(1), zeros(STOPS) - 1
        self.generator = torch.Generator(device)
        self.generator.seed()

    def start(self, token: Tensor) -> None:
        """New sequences begin with tokens (B,); nothing ends them but :meth:`set_stops`."""
        self._stops.fill_(-1)
        self.token.copy_(token)
        self.done.zero_()
        self._made.zero_()

    def set_stops(self, stop_ids: Sequence[int], pad: int) -> None:
        """Sets the tokens that end a sequence, and what it goes on with.

        Raises:
            ValueError: more than 16.
        """
        ids = sorted(set(stop_ids))
        if len(ids) > STOPS:
            raise ValueError(f"stop_ids holds {len(ids)} tokens: use {STOPS} at most")
        self._stops.copy_(torch.tensor(ids + [-1] * (STOPS - len(ids))))
        self._pad.fill_(pad)

    def feed_back(self, logits: Tensor, sampling: Sampling) -> None:
        """Draws the next tokens from logits (B, V) and feeds them back; waits for nothing."""
        self.logits.copy_(logits)
        drawn = next_token(self.logits, sampling, self.generator)
        drawn = torch.where(self.done, self._pad, drawn)
        self.token.copy_(drawn)
        self.done.logical_or_((drawn[:, None] == self._stops).any(1))
        self.history.index_copy_(1, self._made, drawn[:, None])
        self._made.add_(1)

    def state(self) -> tuple[Tensor, ...]:
        """The tensors that a step advances."""
        return self.token, self.logits, self.done, self._made
