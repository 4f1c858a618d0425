"""The arithmetic of a decode step: what a host computes beyond the linears that its spec names.

Read off the live modules: norms by trying what they compute, rotary tables by asking the host's own
rotary module, scalings and windows from the attention modules. A host whose step this cannot
express is refused by name; :func:`gnomon.engine.step.decode_step` is written against the result.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gnomon.activation import KERNEL_NAMES
from gnomon.engine.expressible import decoder_of, require_expressible, unsupported
from gnomon.engine.rotary import RotaryTables
from gnomon.host import HostSpec, module, weight

_PRE = {"input_layernorm", "post_attention_layernorm"}
_SANDWICH = {  # Gemma 2 and 3
    "attn_norm": "input_layernorm",
    "attn_post": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_post": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Norm:
    """A norm as the kernels take it; ``kind`` ``none`` does nothing."""

    kind: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6


@dataclass(frozen=True)
class LayerMath:
    """One decoder layer.

    Attributes:
        attn_norm, ffn_norm: before q, k, v and before up, gate (``none`` under post-norm).
        attn_post, ffn_post: of a sublayer's result, before the residual is added (Gemma 2, 3).
        attn_after, ffn_after: of the residual after the sublayer was added (OPT's post-norm).
        q_norm, k_norm: (d,) RMS norm of every head before the rotation, or None; ``qk_eps``.
        cos, sin: (C, rot) rotary tables, or None.
        scaling: of q·k.
        window: tokens attended, the present one included; 0 for all.
        softcap: of attention scores; 0 for none.
    """

    attn_norm: Norm
    ffn_norm: Norm
    attn_post: Norm
    ffn_post: Norm
    attn_after: Norm
    ffn_after: Norm
    q_norm: Tensor | None
    k_norm: Tensor | None
    qk_eps: float
    cos: Tensor | None
    sin: Tensor | None
    scaling: float
    window: int
    softcap: float


@dataclass(frozen=True)
class Arithmetic:
    """A whole step.

    Attributes:
        activation: the kernels' name.
        embed_scale: factor of the token embedding.
        positions: (C, D) learned positions to add, or None.
        final: the norm before the output head.
        final_softcap: of the logits; 0 for none.
        limit: tokens that the tables cover.
    """

    layers: tuple[LayerMath, ...]
    activation: str
    embed_scale: float
    positions: Tensor | None
    final: Norm
    final_softcap: float
    limit: int


def read_arithmetic(model: nn.Module, spec: HostSpec, limit: int) -> Arithmetic:
    """Reads a host's step.

    Args:
        model: the host.
        spec: its description.
        limit: tokens of context that tables must cover.

    Raises:
        UnsupportedHostError: something this module cannot express; says what.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    if spec.activation not in KERNEL_NAMES:
        raise unsupported(model, f"its activation {spec.activation!r} has no kernel")
    require_expressible(model, spec)
    parent = decoder_of(model, spec)
    with torch.no_grad():
        tables = RotaryTables(model, spec, limit)
        return Arithmetic(
            layers=tuple(_layer(model, spec, i, tables) for i in range(spec.L)),
            activation=KERNEL_NAMES[spec.activation],
            embed_scale=_embed_scale(model, spec),
            positions=_positions(model, parent, limit),
            final=_final(model, parent, spec),
            final_softcap=float(getattr(config, "final_logit_softcapping", None) or 0),
            limit=limit,
        )


def _layer(model: nn.Module, spec: HostSpec, i: int, tables: RotaryTables) -> LayerMath:
    paths = spec.layers[i]
    attention = module(model, paths.q.rpartition(".")[0])
    cos, sin = tables.of(i)
    norms = _norms(model, module(model, paths.path), spec)
    qk_norms = {
        name: _head_norm(model, getattr(attention, name), spec)
        for name in ("q_norm", "k_norm")
        if getattr(attention, name, None) is not None
    }
    none = Norm()
    return LayerMath(
        **norms,
        q_norm=qk_norms.get("q_norm", none).weight,
        k_norm=qk_norms.get("k_norm", none).weight,
        qk_eps=qk_norms.get("q_norm", none).eps,
        cos=cos,
        sin=sin,
        scaling=float(getattr(attention, "scaling", None) or spec.d**-0.5),
        window=_window(model, attention, i),
        softcap=float(getattr(attention, "attn_logit_softcapping", None) or 0),
    )


def _norms(model: nn.Module, block: nn.Module, spec: HostSpec) -> dict[str, Norm]:
    """The norms of a layer, by the role that their names have."""
    names = ("attn_norm", "ffn_norm", "attn_post", "ffn_post", "attn_after", "ffn_after")
    found = {name for name, _ in block.named_children()}
    if "self_attn_layer_norm" in found:  # OPT
        before = getattr(block, "do_layer_norm_before", True)
        roles = ("attn_norm", "ffn_norm") if before else ("attn_after", "ffn_after")
        modules = dict(zip(roles, ("self_attn_layer_norm", "final_layer_norm"), strict=True))
    elif found >= set(_SANDWICH.values()):
        modules = _SANDWICH
    elif "pre_feedforward_layernorm" not in found and found >= _PRE:
        modules = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    else:
        raise unsupported(model, f"the norms of its layers are unknown ({sorted(found)})")
    return {
        role: _norm(model, getattr(block, modules[role]), spec.D) if role in modules else Norm()
        for role in names
    }


def _head_norm(model: nn.Module, norm: nn.Module, spec: HostSpec) -> Norm:
    """The norm of every single head's queries or keys."""
    found = _norm(model, norm, spec.d)
    if found.kind != "rms" or found.bias is not None:
        raise unsupported(model, f"{type(norm).__name__} of its heads is not an RMS norm")
    return found


def _norm(model: nn.Module, norm: nn.Module, width: int) -> Norm:
    """Which norm a module is, by what a copy of it in fp32 does to random rows."""
    eps = next(
        (float(getattr(norm, key)) for key in ("variance_epsilon", "eps") if hasattr(norm, key)),
        1e-6,
    )
    own = getattr(norm, "weight", None)
    if own is None:
        raise unsupported(model, f"its norm {type(norm).__name__} has no weight")
    if own.shape != (width,):
        raise unsupported(
            model, f"its norm {type(norm).__name__} is {tuple(own.shape)}, not ({width},)"
        )
    gain, bias = own.detach().float(), getattr(norm, "bias", None)
    bias = None if bias is None else bias.detach().float()
    noise = torch.Generator("cpu").manual_seed(0)
    x = (torch.randn(4, width, generator=noise) + 0.5).to(own.device)
    seen = deepcopy(norm).float()(x)
    units = {
        "rms": x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps),
        "layer": nn.functional.layer_norm(x, (width,), None, None, eps),
    }
    shift = 0 if bias is None else bias
    for kind, unit in units.items():
        for applied in (gain, gain + 1):  # Gemma stores its gain less one
            if (unit * applied + shift - seen).norm() <= 1e-4 * seen.norm():
                return Norm(kind, applied.contiguous(), bias, eps)
    raise unsupported(model, f"its norm {type(norm).__name__} is neither an RMS nor a layer norm")


def _window(model: nn.Module, attention: nn.Module, i: int) -> int:
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[i] == "full_attention":
        return 0
    window = getattr(attention, "sliding_window", None)
    if window is None and not hasattr(attention, "sliding_window"):
        window = getattr(config, "sliding_window", None)
    return int(window or 0)


def _embed_scale(model: nn.Module, spec: HostSpec) -> float:
    """What the embedding module multiplies its rows by (Gemma)."""
    table = weight(model, spec.embed)
    token = torch.arange(min(len(table), 64), device=table.device)  # a padding row is zero
    plain, scaled = table[token].float(), module(model, spec.embed)(token).float()
    return float((scaled * plain).sum() / plain.square().sum().clamp_min(1e-30))


def _positions(model: nn.Module, parent: nn.Module, limit: int) -> Tensor | None:
    learned = getattr(parent, "embed_positions", None)
    if learned is None:
        return None
    offset = int(getattr(learned, "offset", 0))
    table = learned.weight.detach()[offset:]
    if len(table) < limit:
        raise ValueError(
            f"context={limit} exceeds the {len(table)} positions that {type(model).__name__} has "
            "learned: lower it"
        )
    return table


def _final(model: nn.Module, parent: nn.Module, spec: HostSpec) -> Norm:
    for name in ("norm", "final_layer_norm"):
        if name in dict(parent.named_children()):
            norm = getattr(parent, name)
            return Norm() if norm is None else _norm(model, norm, spec.D)
    if hasattr(parent, "final_layer_norm"):  # OPT's post-norm variants have none
        return Norm()
    raise unsupported(model, "the norm before its output head was not found")
