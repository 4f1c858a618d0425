"""What is decided once per sequence, and lives as long as its key/value cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from gnomon.host import UnitKind
from gnomon.policies.statistic import PromptStatistic
from gnomon.runtime.positions import Step

T = TypeVar("T")
STATISTIC = "statistic"


class PromptDecisions:
    """Active sets that hold for a whole sequence, kept beside its key/value cache."""

    def __init__(self) -> None:
        self._by_cache: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
        self._current: dict[Any, Any] = {}
        self._open = False

    def start(self, cache: Any, step: Step) -> None:
        """A forward begins: with the prompt's boundary in it, or on a cache decided before."""
        self._rows = step.live.shape[0]
        self._open = step.decide_at is not None or cache is None or cache not in self._by_cache
        held = {} if cache is None or step.begins else self._by_cache.get(cache, {})
        if self._open:  # earlier chunks of a prompt leave their statistic, not a decision
            held = {key: value for key, value in held.items() if key == STATISTIC}
        self._current = held
        if self._open and cache is not None:
            self._by_cache[cache] = self._current

    def keep(self, cache: Any) -> None:
        """A forward that began without a cache has made one."""
        if cache is not None and cache not in self._by_cache:
            self._by_cache[cache] = self._current

    @property
    def made(self) -> bool:
        """Whether anything has been decided for the running sequence."""
        return any(key != STATISTIC for key in self._current)

    def statistic(self, make: Callable[[], PromptStatistic]) -> PromptStatistic:
        """What is summed up over the running sequence's prompt."""
        return self.once(STATISTIC, make)

    def decision(self, kind: UnitKind, layer: int, make: Callable[[], Tensor]) -> Tensor:
        """The sequence's active set (B, 1, N), made at its prompt."""
        keep = self.once((kind, layer), make)
        if keep.shape[0] not in (1, self._rows):
            raise ValueError(
                f"the cache was decided for {keep.shape[0]} sequences and now holds {self._rows}: "
                "start it again inside sparsify"
            )
        return keep

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """``make()`` the first time in this sequence, the same value afterwards."""
        if key not in self._current:
            self._current[key] = make()
        return self._current[key]
