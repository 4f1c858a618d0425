"""FFNs in two parts: neurons as the host holds them, and compressed ones beside them (FFSplit).

    FFN(x) = FFN_heavy(x) + FFN_rest(x)

The heavy rows are contiguous copies, the rest row-scaled int8 or int4 of 32 weights to a scale, as
:mod:`gnomon.policies.compressed` stores them. The host's own weights stay for the prompt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from gnomon.engine.weights import LayerWeights, Matrix, Rest, StepWeights
from gnomon.host import KINDS
from gnomon.policies.base import Policy
from gnomon.policies.compressed import Compressed
from gnomon.policies.ffsplit import FFSplit
from gnomon.policies.split_weights import SplitWeights
from gnomon.policies.wrap import Wrapper

READ = ("int8", "int4")  # what the kernels read of the rest


def readable(policy: Policy) -> bool:
    """Whether the step reads a policy's change of weights."""
    if isinstance(policy, FFSplit):
        return policy.alone and policy.rest in READ
    if isinstance(policy, Wrapper) and not readable(policy.inner):
        return False
    return policy.weight_dtype == "int8" or not policy.transforms


@torch.no_grad()
def split_apart(weights: StepWeights, model: nn.Module, policy: Policy | None) -> StepWeights:
    """The FFNs of a bound FFSplit in their two parts; what others decide leaves them as they are.

    Args:
        weights: of the whole host, in floating point.
        model: the host.
        policy: an engine's.
    """
    if not isinstance(policy, FFSplit):
        return weights
    assert all(policy.keeps_all(kind, i) for kind in KINDS for i in range(policy.spec.L))
    split = policy.split(model)
    if not split.parts:
        return weights
    layers = [_split(layer, i, split) for i, layer in enumerate(weights.layers)]
    return replace(weights, layers=tuple(layers))


def _split(layer: LayerWeights, index: int, split: SplitWeights) -> LayerWeights:
    device = layer.up.weight.device
    mask = split.heavy[index].to(device)
    heavy, others = (m.nonzero().flatten() for m in (mask, ~mask))

    def stored(role: str) -> Matrix:
        return _matrix(split.parts[index, role], device)

    gate = None if layer.gate is None else stored("gate")
    rest = Rest(
        up=stored("up"),
        up_bias=None if layer.up_bias is None else layer.up_bias[others],
        gate=gate,
        gate_bias=None if layer.gate_bias is None else layer.gate_bias[others],
        down_t=stored("down"),
    )
    return replace(
        layer,
        up=layer.up.rows(heavy),
        up_bias=None if layer.up_bias is None else layer.up_bias[heavy],
        gate=None if layer.gate is None else layer.gate.rows(heavy),
        gate_bias=None if layer.gate_bias is None else layer.gate_bias[heavy],
        down_t=layer.down_t.rows(heavy),
        rest=rest,
    )


def _matrix(part: Compressed, device: torch.device) -> Matrix:
    return Matrix(part.tensors["codes"].to(device), part.tensors["scale"].to(device))
