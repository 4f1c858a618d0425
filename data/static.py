"""Static scores: what a text says of every unit once and for all, by any criterion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnomon.data.capture import Capture, Probe
from gnomon.data.criterion import Criterion
from gnomon.host import KINDS, HostSpec, Tap, UnitKind


def static_scores(
    model: nn.Module,
    spec: HostSpec,
    criterion: Criterion,
    ids: Tensor,
    *,
    batch: int = 4,
    sample: int = 4096,
) -> dict[UnitKind, Tensor]:
    """Scores for :class:`gnomon.policies.Static`, also of criteria that no trace can hold.

    The mean of token scores; of a criterion of sets of tokens, the mean over blocks of the score of
    a block, or, where it is defined for a whole text alone, the score of ``sample`` tokens.

    Args:
        model: the host, in eval mode.
        spec: its description.
        criterion: what makes a score.
        ids: (n, T) blocks of tokens.
        batch: blocks in one forward and backward.
        sample: tokens, evenly spread, that a criterion of a whole text keeps in memory.

    Returns:
        kind -> (L, N) fp32 on the CPU, higher = keep; zeros of a kind that the criterion does not
        score, which the budget must leave whole.

    Raises:
        ValueError: NaN or inf in a score; a text too short for the criterion.
    """
    probe = Probe(model, spec, (Tap(0),), criterion)
    sums = {k: torch.zeros(spec.L, spec.units(k), dtype=torch.float64) for k in KINDS}
    if criterion.granularities != ("static",):
        for rows in ids.split(batch):
            found = probe(rows)
            for kind in criterion.kinds:
                sums[kind] += found.total(kind).cpu()
        return {k: (v / (ids.shape[0] * (ids.shape[1] - 1))).float() for k, v in sums.items()}
    kept = _Sample(criterion, step=max(1, ids[:, 1:].numel() // sample))
    for rows in ids.split(batch):
        kept.add(probe(rows))
    return {k: kept.pool(k) if k in criterion.kinds else sums[k].float() for k in KINDS}


class _Sample:
    """Every ``step``-th predicting token of a text, on the CPU."""

    def __init__(self, criterion: Criterion, step: int) -> None:
        self.criterion, self.step, self._seen = criterion, step, 0
        self._targets: list[Tensor] = []
        self._values: dict[UnitKind, list[Tensor]] = {k: [] for k in criterion.kinds}

    def add(self, found: Capture) -> None:
        targets = found.ids[:, 1:].flatten()
        first = -self._seen % self.step
        self._seen += len(targets)
        self._targets.append(targets[first :: self.step].cpu())
        for kind, parts in self._values.items():
            values = found.values(kind)[:, :-1].flatten(0, 1)
            parts.append(values[first :: self.step].cpu())

    def pool(self, kind: UnitKind) -> Tensor:
        return self.criterion.pool(kind, torch.cat(self._values[kind]), torch.cat(self._targets))
