"""Weights laid out by input channel, for linears that skip the channels below a threshold.

Out and down projections are stored so in any case. The others are turned: k, v and q as one
(D, (2G + H)·d) matrix, or q alone, which then stands apart from the rows of k and v; gate and up
one by one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from gnomon.accounting import Role
from gnomon.engine.split import split_apart
from gnomon.engine.weights import LayerWeights, Matrix, StepWeights, lay_out, parameter_of, restore
from gnomon.host import HostSpec, LayerSpec
from gnomon.policies.base import Policy

ROLES: frozenset[Role] = frozenset({"q", "k", "v", "gate", "up"})


def weights_for(
    model: nn.Module,
    spec: HostSpec,
    policy: Policy | None,
    roles: frozenset[Role],
    shared: StepWeights | None,
) -> StepWeights:
    """What an engine reads: the weights that it shares, or a host's own, laid out for it.

    Args:
        model: the host; its layout is put back where this fails.
        spec: its description.
        policy: bound; it may want int8 weights, or FFNs in two parts.
        roles: linears whose input channels it skips.
        shared: another engine's, or None.
    """
    if shared is not None:
        if any(layer.rest is not None for layer in shared.layers):
            raise ValueError(
                "weights hold an FFSplit's FFNs in two parts, which no other policy reads: share "
                "those of an engine without a policy"
            )
        return split_apart(turned(shared, spec, roles), model, policy)
    try:
        weights = lay_out_turned(model, spec, roles)
        int8 = policy is not None and policy.weight_dtype == "int8"
        return weights.quantized() if int8 else split_apart(weights, model, policy)
    except BaseException:
        restore(model, spec)
        raise


@torch.no_grad()
def turned(weights: StepWeights, spec: HostSpec, roles: frozenset[Role]) -> StepWeights:
    """Copies of the matrices of ``roles`` by input channel; all others are shared.

    Raises:
        ValueError: the weights are turned already, for other linears.
    """
    roles &= ROLES
    if weights.turned == roles:
        return weights
    if weights.turned:
        raise ValueError(
            "weights are laid out by input channel for a policy that skips channels: share those "
            "of an engine without a policy"
        )
    layers = tuple(_turned(layer, spec, roles) for layer in weights.layers)
    return replace(weights, layers=layers, turned=roles)


def lay_out_turned(model: nn.Module, spec: HostSpec, roles: frozenset[Role]) -> StepWeights:
    """As :func:`gnomon.engine.weights.lay_out`, ``roles`` by input channel, none held twice."""
    roles &= ROLES
    if not roles:
        return lay_out(model, spec)

    def turn(paths: LayerSpec, layer: LayerWeights) -> LayerWeights:
        own = _turned(layer, spec, roles)
        if own.q_t is not None:  # a view would keep the rows of q
            own = replace(own, kvq=Matrix(own.kvq.weight.clone()))
        for path, rows in _rows(paths, own, spec, roles).items():
            parameter_of(model, path).data = rows
        return own

    return replace(lay_out(model, spec, turn), turned=roles)


def _turned(layer: LayerWeights, spec: HostSpec, roles: frozenset[Role]) -> LayerWeights:
    q = 2 * spec.G * spec.d  # its first row
    if "k" in roles:
        layer = replace(layer, kvq=_turn(layer.kvq.weight))
    elif "q" in roles:
        layer = replace(layer, kvq=Matrix(layer.kvq.weight[:q]), q_t=_turn(layer.kvq.weight[q:]))
        if layer.kvq_bias is not None:
            layer = replace(layer, kvq_bias=layer.kvq_bias[:q], q_bias=layer.kvq_bias[q:])
    if "up" in roles:
        gate = None if layer.gate is None else _turn(layer.gate.weight)
        layer = replace(layer, up=_turn(layer.up.weight), gate=gate)
    return layer


def _turn(weight: Tensor) -> Matrix:
    return Matrix(weight.t().contiguous())


def _rows(
    paths: LayerSpec, layer: LayerWeights, spec: HostSpec, roles: frozenset[Role]
) -> dict[str, Tensor]:
    """What the host's linears read: views of turned matrices in the linears' own shapes."""
    wide, found = spec.G * spec.d, dict[str, Tensor]()
    if "q" in roles:
        kvq = layer.kvq.weight.t() if "k" in roles else layer.kvq.weight
        found |= {paths.k: kvq[:wide], paths.v: kvq[wide : 2 * wide]}
        found[paths.q] = kvq[2 * wide :] if layer.q_t is None else layer.q_t.weight.t()
    if "up" in roles:
        found[paths.up] = layer.up.weight.t()
        if paths.gate is not None and layer.gate is not None:
            found[paths.gate] = layer.gate.weight.t()
    return found
