"""On-policy targets: a row objective on what the sparse host itself computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gnomon.data.codes import top_k
from gnomon.data.criteria import Criterion, LayerWeights, layer_weights
from gnomon.host import KINDS, UnitKind
from gnomon.predictors.objectives import Objective
from gnomon.runtime.positions import Step
from gnomon.runtime.student import Student


class Imitation:
    """The loss of scores at a layer against the criterion of its units before they are masked.

    Targets are of the sparse host's own states, and so are the inputs of the scores. One decision
    for a whole continuation has the sum over its positions as target.

    Args:
        student: runs the host.
        objective: of rows.
        criterion: makes the targets; one that needs no gradient.
        density: kind -> kept fraction of the labels.

    Raises:
        ValueError: a criterion that needs gradients, or has no token scores.
    """

    def __init__(
        self,
        student: Student,
        objective: Objective,
        criterion: Criterion,
        density: Mapping[UnitKind, float],
    ) -> None:
        if criterion.needs_gradient:
            raise ValueError(
                f"objective.on_policy=true with criterion={criterion.name}: a sparse forward has "
                "no gradient of the loss; use criterion=magnitude or l2norm, or objective=kl"
            )
        criterion.require("token")
        self.student, self.objective, self.criterion = student, objective, criterion
        self.density = density
        self._losses: dict[UnitKind, list[Tensor]] = {}
        self._weights: dict[int, LayerWeights] = {}
        if criterion.needs_weights:
            spec = student.spec
            self._weights = {i: layer_weights(student.model, spec, i) for i in range(spec.L)}

    def __call__(self, ids: Tensor, step: Step) -> Tensor:
        """Sum over kinds of the mean loss of their masked layers, on ids (B, T)."""
        self._losses = {kind: [] for kind in KINDS}
        self.student.sparse(ids, step, visit=self._visit)
        means = [torch.stack(found).mean() for found in self._losses.values() if found]
        return torch.stack(means).sum()

    def _visit(
        self, kind: UnitKind, layer: int, scores: Tensor, units: Tensor, sparse: Tensor
    ) -> None:
        with torch.no_grad():
            score = self.criterion.heads if kind == "heads" else self.criterion.neurons
            truth = score(units, None, self._weights.get(layer))
            if scores.shape[1] == 1 < truth.shape[1]:  # one decision for the whole continuation
                truth = (truth * sparse[..., None]).sum(1, keepdim=True)
                sparse = sparse.any(1, keepdim=True)
            labels = self.objective.needs == "labels"
            target = top_k(truth, self.density[kind]) if labels else truth
        loss = self.objective.loss(scores[sparse][:, None], target[sparse][:, None])
        self._losses[kind].append(loss)
