"""Input channels of linears that a policy skips: which linears, what they read, and masking it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gnomon.accounting import Role
from gnomon.hooks import HostHooks
from gnomon.host import UnitKind

if TYPE_CHECKING:
    from gnomon.runtime.session import Session


class Channels:
    """The thresholded linears of one session.

    Args:
        session: says where the running forward is sparse, and keeps count.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.policy = session, session.policy

    def hook(self, hooks: HostHooks) -> None:
        """Masks what no gathered linear reads by itself."""
        for layer in range(self.session.spec.L):
            for role, path in self.thresholded(layer).items():
                hooks.on_input(path, partial(self._mask, role, layer))

    def thresholded(self, layer: int) -> dict[Role, str]:
        """Linears of a layer whose input channels are skipped: role -> path."""
        policy, where, found = self.policy, self.session.spec.layers[layer], {}
        for role in policy.channels:
            kind: UnitKind = "neurons" if role in ("gate", "up", "down") else "heads"
            path = getattr(where, role)
            sparse = policy.channel_density(role, policy.resolved) < 1
            if sparse and path is not None and not policy.skips(kind, layer):
                found[role] = path
        return found

    def read(self, role: Role, layer: int, x: Tensor) -> Tensor:
        """Channels of the sparse columns x (B, T', W) that a linear reads, bool (B, T', W)."""
        keep = self.policy.keep_channels(role, layer, x.detach())
        self.session.note_channels(role, layer, keep)
        return keep

    def _mask(self, role: Role, layer: int, x: Tensor) -> Tensor | None:
        """Zeroes the input channels of one linear that are skipped at the sparse positions."""
        step, start = self.session.step, self.session.start
        if start is None or self.session.gathers:
            return None
        assert step is not None
        dense = ~step.sparse[:, start:, None].to(x.device)
        tail = x[:, start:]
        tail = torch.where(self.read(role, layer, tail) | dense, tail, 0)
        return tail if start == 0 else torch.cat([x[:, :start], tail], dim=1)
