"""Fills a sketch: second moments of every FFN's input on calibration text, then the rounding."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.data.text import Text
from gnomon.hooks import HostHooks
from gnomon.host import HostSpec, Tap, module, weight
from gnomon.predictors.sketch import Sketch


@torch.no_grad()
def sketch(
    into: Sketch,
    model: nn.Module,
    tokenizer: Any,
    spec: HostSpec,
    text: Text,
    *,
    batch: int = 4,
) -> None:
    """Copies the FFNs of a host into a sketch, whose record names the host and the text.

    Args:
        into: an empty sketch of this host.
        model: the host.
        tokenizer: its tokenizer.
        spec: its description.
        text: where documents come from; its training part is read.
        batch: blocks in one forward.

    Raises:
        ValueError: the text is shorter than a block, inputs are not finite, or a fused gate_up
            linear whose rows are in no known order.
    """
    ffn_weights(model, spec, 0)  # complains now, not after the forwards
    blocks = text.blocks(tokenizer, "train", max(into.tokens, text.block))
    for layer, moments in enumerate(ffn_moments(model, spec, blocks.ids, batch)):
        into.adopt(layer, *ffn_weights(model, spec, layer), moments)
    facts = {"text": text.name, "text_digest": blocks.digest, "tokens": blocks.ids.numel()}
    into.info = replace(
        into.info,
        host=spec.name,
        revision=spec.revision,
        spec_hash=spec.hash,
        metrics=into.info.metrics | {"rounding": facts},
    )


def ffn_moments(model: nn.Module, spec: HostSpec, ids: Tensor, batch: int) -> list[Tensor]:
    """Mean of x xᵀ over tokens of each FFN's input x, on that layer's device.

    Args:
        ids: (n, block).
        batch: blocks in one forward.

    Returns:
        (D, D) fp64 of every layer.
    """
    device = next(model.parameters()).device
    sums: dict[int, Tensor] = {}

    def add(layer: int, x: Tensor) -> None:
        rows = x.flatten(0, -2).double()
        if layer not in sums:
            sums[layer] = rows.new_zeros(spec.D, spec.D)
        sums[layer].addmm_(rows.T, rows)

    with torch.no_grad(), HostHooks(model, spec) as hooks:
        for layer in range(spec.L):
            hooks.on_tap(Tap(layer, "ffn_input"), partial(add, layer))
        for part in ids.split(batch):
            model(input_ids=part.to(device), use_cache=False)
    return [sums[layer] / ids.numel() for layer in range(spec.L)]


def ffn_weights(
    model: nn.Module, spec: HostSpec, layer: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """What a layer's neurons are made from.

    Returns:
        role (``gate``, ``up``) -> rows (F, D); role -> biases (F,), empty without; ‖w_down‖ (F,).
    """
    paths = spec.layers[layer]
    weights, biases = {}, {}
    for role, path in (("gate", paths.gate), ("up", paths.up)):
        if path is None:
            continue
        rows = spec.blocks(role) if paths.gate == paths.up else slice(None)
        weights[role] = weight(model, path).detach()[rows]
        bias = getattr(module(model, path), "bias", None)
        if bias is not None:
            biases[role] = bias.detach()[rows].float()
    return weights, biases, weight(model, paths.down).detach().float().norm(dim=0)
