"""What a decision may look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from gnomon.host import Tap
from gnomon.policies.statistic import PromptStatistic

T = TypeVar("T")


class Seen:
    """What one decision may look at: nothing later than its token, nothing of another sequence.

    Attributes:
        positions: (B, T') index of each token in its own sequence.
        live: (B, T') real tokens of unfinished rows.
        units: the true unit tensor, for the oracle alone.
    """

    def __init__(
        self,
        hidden: Callable[[Tap], Tensor],
        positions: Tensor,
        live: Tensor,
        memo: dict[Any, Any],
        units: Tensor | None = None,
        prompt: PromptStatistic | None = None,
        gate: Callable[[int], Tensor] | None = None,
    ) -> None:
        self._hidden, self._memo, self._prompt, self._gate = hidden, memo, prompt, gate
        self.positions, self.live, self.units = positions, live, units

    @property
    def prompt(self) -> PromptStatistic:
        """The prompt's sums, of a policy that observes it."""
        assert self._prompt is not None
        return self._prompt

    def hidden(self, tap: Tap) -> Tensor:
        """Hidden state (B, T', W) at a tap that this forward has already passed."""
        return self._hidden(tap)

    def gate(self, layer: int) -> Tensor:
        """act(gate) of a layer's FFN, (B, T', F), for a policy that reads it."""
        assert self._gate is not None
        return self._gate(layer)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` the first time in this forward, the same value afterwards."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]
