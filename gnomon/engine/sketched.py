"""A sketch's thresholds in a decode step: neurons scored, decided and computed in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.engine.active import Active, LayerSketch, StepDecider
from gnomon.host import HostSpec
from gnomon.policies.base import Policy
from gnomon.policies.sketch import Sketch
from gnomon.predictors.sketch import Sketch as SketchPredictor


class Sketched(StepDecider):
    """Neurons whose score reaches their layer's threshold; every head.

    Args:
        policy: bound; see :meth:`fits`.
        spec: the host's.
        device: of its weights.
    """

    def __init__(self, policy: Sketch, spec: HostSpec, device: torch.device) -> None:
        super().__init__()
        predictor = policy.predictor
        assert isinstance(predictor, SketchPredictor)
        nothing = torch.zeros(1, device=device)
        self._layers: dict[int, LayerSketch] = {}
        for layer in range(spec.L):
            cut = policy.unit_cut("neurons", layer)
            if cut is not None and not policy.keeps_all("neurons", layer):
                copies = predictor.operands(layer)
                self._layers[layer] = LayerSketch(copies, cut.to(device), nothing)

    @staticmethod
    def fits(policy: Policy) -> bool:
        """Whether a bound policy is a sketch's thresholds for neurons and nothing else."""
        if not isinstance(policy, Sketch) or policy.refresh != "token":
            return False
        whole = all(policy.keeps_all("heads", layer) for layer in range(policy.spec.L))
        own = ("scores", "select", "decide", "unit_cut", "combine")
        plain = all(getattr(type(policy), name) is getattr(Sketch, name) for name in own)
        ready = policy.choose == "threshold" and policy.predictor.quantized
        return plain and ready and whole

    def begin(self, position: Tensor, live: Tensor) -> None:
        """Forgets the step before."""
        self.sets.clear()

    def sketch(self, layer: int) -> LayerSketch | None:
        """The copies that decide a layer."""
        return self._layers.get(layer)

    def took(self, layer: int, index: Tensor) -> None:
        """Notes what a layer kept."""
        self.sets["neurons", layer] = Active(index, None, index[:, :0])
