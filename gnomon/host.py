"""Host adapters: what any causal LM looks like to the rest of Gnomon.

This is the one place that knows architectures. Everything else is written against the frozen
:class:`HostSpec`, which is read off the module structure and config, not off class names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gnomon.layout import Layout, are_apart, find_gate_up, find_qkv, qkv_blocks
from gnomon.roles import (
    HOW_TO_ADD,
    REQUIRED,
    ROLES,
    UnsupportedHostError,
    decoder_layers,
    find_roles,
    oriented,
    shape,
)

__all__ = ["ROLES", "UnsupportedHostError"]  # theirs, and found here too

UnitKind = Literal["heads", "neurons"]
KINDS: tuple[UnitKind, UnitKind] = ("heads", "neurons")
_ACTIVATIONS = {"bloom": "gelu_new", "mpt": "gelu"}  # of families whose configs do not say

Site = Literal["layer_input", "attn_input", "attn_context", "ffn_input"]
SITES: tuple[Site, ...] = ("layer_input", "attn_input", "attn_context", "ffn_input")


@dataclass(frozen=True)
class LayerSpec:
    """Dotted module paths of one decoder layer; ``gate`` is None for a non-gated FFN.

    Roles of one fused linear share its path; :meth:`HostSpec.blocks` says which rows are whose.
    """

    path: str
    q: str
    k: str
    v: str
    out: str
    up: str
    down: str
    gate: str | None = None

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of every linear of the layer, each once."""
        paths = (self.q, self.k, self.v, self.out, self.gate, self.up, self.down)
        return tuple(dict.fromkeys(p for p in paths if p is not None))


@dataclass(frozen=True, order=True)
class Tap:
    """A hidden state that a predictor reads: one ``site`` of one ``layer``.

    ``layer_input`` is the residual stream entering the layer, ``attn_input`` what the q projection
    reads (after its norm), ``attn_context`` the out-projection's input, ``ffn_input`` what the up
    projection reads (after its norm).
    """

    layer: int
    site: Site = "layer_input"

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"site={self.site!r} is unknown; use one of {', '.join(SITES)}")


@dataclass(frozen=True)
class HostSpec:
    """Frozen description of a host: sizes in the project's letters and where each linear lives.

    Attributes:
        family: ``model_type`` of the (text) config, e.g. ``llama``, ``opt``.
        name: last component of the hub id or folder the host came from.
        revision: hub commit where known, else an empty string.
        fingerprint: identity of the weights from sign bits, the same in every dtype.
        qkv: how q, k and v lie in one linear (:mod:`gnomon.layout`); ``separate`` for three.
        gate_up: the same for gate and up.
        heads_apart: q, k, v of one head reach no other head's context; else (a norm over all heads)
            every one of them is computed, and a skipped head saves its out columns alone.
        neurons_apart: the same for gate and up of a neuron.
    """

    family: str
    name: str
    revision: str
    L: int
    H: int
    G: int
    d: int
    D: int
    F: int
    V: int
    gated: bool
    activation: str
    tied: bool
    embed: str
    head: str
    layers: tuple[LayerSpec, ...]
    fingerprint: str
    qkv: Layout = "separate"
    gate_up: Layout = "separate"
    heads_apart: bool = True
    neurons_apart: bool = True

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.H // self.G

    @property
    def hash(self) -> str:
        """16 hex digits over sizes, structure and weights; independent of name, path and dtype."""
        facts = asdict(self)
        for key in ("name", "revision", "qkv", "gate_up", "heads_apart", "neurons_apart"):
            del facts[key]  # the last four follow from the rest
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def units(self, kind: UnitKind) -> int:
        """Units of one layer: H heads or F neurons."""
        return self.H if kind == "heads" else self.F

    def blocks(self, role: str) -> Tensor:
        """Blocks of rows that a role has in its linear: d rows for a head or group, 1 for a neuron.

        Returns:
            (H,) for ``q``, (G,) for ``k`` and ``v``, (F,) for ``gate`` and ``up``, in unit order.

        Raises:
            ValueError: a fused linear whose rows are in no known order.
        """
        if role in ("q", "k", "v"):
            return qkv_blocks(self.qkv, role, self.H, self.G)
        neurons = torch.arange(self.F)
        if self.gate_up == "unknown":
            raise ValueError("the rows of the fused gate_up linear are in no known order")
        return neurons + self.F if self.gate_up == "blocks" and role == "up" else neurons

    def width(self, site: Site) -> int:
        """Width of the hidden state at a site."""
        return self.H * self.d if site == "attn_context" else self.D


def describe(model: nn.Module) -> HostSpec:
    """Describes a live causal LM.

    Raises:
        UnsupportedHostError: the structure is not understood; says what was found.
    """
    config = _config(model)
    family = config.model_type
    path, blocks = decoder_layers(model, config.num_hidden_layers)
    layers = tuple(
        LayerSpec(path=f"{path}.{i}", **find_roles(family, f"{path}.{i}", block))
        for i, block in enumerate(blocks)
    )
    _require_tensor_parallel_off(config)
    first = layers[0]
    for layer in layers[1:]:
        _require_same_shapes(model, first, layer)
    sizes = _sizes(model, config, first)
    spec = HostSpec(
        family=family,
        name=_name(model),
        revision=getattr(config, "_commit_hash", None) or "",
        L=len(layers),
        **sizes,
        V=config.vocab_size,
        gated=first.gate is not None,
        activation=_activation(config),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        embed=_path_of(model, "get_input_embeddings"),
        head=_path_of(model, "get_output_embeddings"),
        layers=layers,
        fingerprint=_fingerprint(model, layers),
    )
    _check(model, spec)
    return _laid_out(model, spec)


def module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path."""
    return model.get_submodule(path)


def weight(model: nn.Module, path: str) -> Tensor:
    """The weight (out, in) of the linear at a dotted path; a view where it is stored turned."""
    return oriented(model.get_submodule(path))


def _sizes(model: nn.Module, config: Any, layer: LayerSpec) -> dict[str, Any]:
    """H, G, d, D and F from the shapes of a layer's linears; d alone needs the config."""
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    out, fused = _shape(model, layer.out), layer.q == layer.k
    heads = out[1] // d
    rows = _shape(model, layer.k)[0] // d
    return {
        "H": heads,
        "G": (rows - heads) // 2 if fused else rows,
        "d": d,
        "D": out[0],
        "F": _shape(model, layer.down)[1],
    }


def _laid_out(model: nn.Module, spec: HostSpec) -> HostSpec:
    """The spec with what a trial of its first layer tells."""
    spec = replace(spec, qkv=find_qkv(model, spec), gate_up=find_gate_up(model, spec))
    heads, neurons = are_apart(model, spec)
    return replace(spec, heads_apart=heads, neurons_apart=neurons)


def _require_tensor_parallel_off(config: Any) -> None:
    """BLOOM's exact mode reads slices of the projections' weights past the modules and hooks."""
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise UnsupportedHostError(
            f"slow_but_exact=True with pretraining_tp={config.pretraining_tp} computes projections "
            "outside their modules, where no unit can be masked: load it with slow_but_exact=False"
        )


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    return shape(model.get_submodule(path))


def _require_same_shapes(model: nn.Module, first: LayerSpec, layer: LayerSpec) -> None:
    for role in (*REQUIRED, "gate"):
        a, b = getattr(first, role), getattr(layer, role)
        if (a is None) != (b is None) or (a and _shape(model, a) != _shape(model, b)):
            raise UnsupportedHostError(
                f"{layer.path} differs from {first.path} in {role}: layers must be "
                f"alike. {HOW_TO_ADD}."
            )


def _check(model: nn.Module, spec: HostSpec) -> None:
    first, groups = spec.layers[0], spec.G * spec.d
    expected = {
        "q": (spec.H * spec.d, spec.D),
        "k": (groups, spec.D),
        "v": (groups, spec.D),
        "out": (spec.D, spec.H * spec.d),
        "gate": (spec.F, spec.D),
        "up": (spec.F, spec.D),
        "down": (spec.D, spec.F),
    }
    if first.q == first.k:
        expected |= dict.fromkeys("qkv", (spec.H * spec.d + 2 * groups, spec.D))
    if first.gate == first.up:
        expected |= dict.fromkeys(("gate", "up"), (2 * spec.F, spec.D))
    roles = [*REQUIRED, *(["gate"] if spec.gated else [])]
    shapes = {role: _shape(model, getattr(first, role)) for role in roles}
    wrong = {role: found for role, found in shapes.items() if found != expected[role]}
    if wrong or spec.G < 1 or spec.H % spec.G:
        wanted = {role: expected[role] for role in wrong} or "H divisible by G"
        raise UnsupportedHostError(
            f"{type(model).__name__}: with {spec.H} heads of {spec.d} in {spec.G} groups expected "
            f"{wanted}, found {wrong}. {HOW_TO_ADD}."
        )


def _activation(config: object) -> str:
    for key in ("hidden_activation", "hidden_act", "activation_function", "activation"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            return value
    return _ACTIVATIONS.get(getattr(config, "model_type", ""), "unknown")


def _name(model: nn.Module) -> str:
    origin = getattr(model.config, "_name_or_path", "") or type(model).__name__
    return str(origin).rstrip("/").rpartition("/")[2]


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _path_of(model: Any, getter: str) -> str:
    child = getattr(model, getter)()
    for name, candidate in model.named_modules():
        if candidate is child:
            return name
    raise UnsupportedHostError(f"{type(model).__name__}: embeddings or output head not found")


def _fingerprint(model: nn.Module, layers: tuple[LayerSpec, ...]) -> str:
    """Signs of weights spread over every linear and the embeddings: the same in every dtype."""
    embed = _path_of(model, "get_input_embeddings")
    paths = [embed, *(path for layer in layers for path in layer.linears)]
    samples = []
    for path in paths:
        flat = weight(model, path).detach().flatten()
        if flat.is_meta:
            return "offloaded"
        samples.append((flat[:: max(1, flat.numel() // 512)][:512] > 0).cpu())
    return hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest()[:16]
