"""A new criterion in one file: first-order sensitivity without cancellation inside a head.

    python examples/add_criterion.py

``plainact`` sums a·g over a head's dimensions before it takes the absolute value, so that opposite
contributions cancel. This one takes the absolute values first: sum_d |a·g|. From a configuration
folder of your own it is used with ``criterion`` = ``{_target_: your_module.AbsAct}``.
"""

from __future__ import annotations

import torch
from torch import Tensor

import gnomon
from gnomon.data.capture import capture
from gnomon.data.criteria import Criterion, LayerWeights, PlainAct
from gnomon.host import Tap
from gnomon.policies import Static


class AbsAct(Criterion):
    """sum_d |a g| for a head, |h g| for a neuron."""

    name = "absact"

    def heads(self, a: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        """a, g (..., H, d) -> (..., H)."""
        assert g is not None
        return (a.float() * g.float()).abs().sum(-1)

    def neurons(self, h: Tensor, g: Tensor | None, weights: LayerWeights | None) -> Tensor:
        """h, g (..., F) -> (..., F)."""
        assert g is not None
        return (h.float() * g.float()).abs()


def static_error(criterion: Criterion) -> float:
    """Change of the logits when the criterion's fixed choice keeps half of the heads."""
    model, tokenizer = gnomon.load_host("tiny:llama")
    spec = gnomon.describe(model)
    ids = tokenizer("A sundial tells the hour by a shadow. " * 8, return_tensors="pt").input_ids
    found = capture(model, spec, [Tap(1)], criterion, ids)
    means = {"heads": found.heads.mean((0, 1)), "neurons": found.neurons.mean((0, 1))}
    with torch.no_grad():
        dense = model(ids).logits
        with gnomon.sparsify(model, Static(means, gnomon.Budget(heads=0.5)), protocol="all"):
            sparse = model(ids).logits
    return float((sparse - dense).norm() / dense.norm())


if __name__ == "__main__":
    for criterion in (PlainAct(), AbsAct()):
        print(f"{criterion.name:9s} relative error of the logits {static_error(criterion):.3f}")
