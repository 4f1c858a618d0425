"""Dense int8 weight-only: what a user would do instead of skipping. A row of every table.

Every linear of the decoder layers and the output head is rounded to 8 bits with one scale per
output row (absolute maximum / 127); embeddings and norms stay. Activations are not quantised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from gnomon.budget import Budget
from gnomon.kernels.rowscaled_linear import quantize_rows
from gnomon.policies.base import Policy


class DenseInt8(Policy):
    """Keeps every unit, with row-scaled int8 weights.

    Quality is computed with the weights rounded to their int8 values and held in the host's dtype.
    """

    name = "dense_int8"
    refreshes = ("static",)
    weight_dtype = "int8"

    def __init__(self) -> None:
        super().__init__(Budget(density=1.0))

    @contextmanager
    def transform(self, model: nn.Module) -> Iterator[None]:
        """Puts rounded weights in place and the very same parameters back on exit."""
        paths = [path for layer in self.spec.layers for path in layer.linears] + [self.spec.head]
        original = {path: model.get_submodule(path).weight for path in paths}
        try:
            for path, weight in original.items():
                turned = isinstance(model.get_submodule(path), Conv1D)
                setattr(model.get_submodule(path), "weight", _rounded(weight, turned))  # noqa: B010
            yield
        finally:
            for path, weight in original.items():
                setattr(model.get_submodule(path), "weight", weight)  # noqa: B010


def _rounded(weight: Any, turned: bool) -> nn.Parameter:
    """Rounded by output: rows of the weight, columns where it lies turned (in, out)."""
    own = weight.detach().float()
    codes, scale = quantize_rows(own.t() if turned else own)
    value = (codes.float() * scale[:, None]).to(weight.dtype)
    return nn.Parameter(value.t().contiguous() if turned else value, requires_grad=False)
