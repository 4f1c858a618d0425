"""Dense: everything is kept. The baseline of every table."""

from __future__ import annotations

from gnomon.budget import Budget
from gnomon.policies.base import Policy


class Dense(Policy):
    """Skips nothing."""

    name = "dense"
    refreshes = ("static",)

    def __init__(self) -> None:
        super().__init__(Budget(density=1.0))
