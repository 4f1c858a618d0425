"""Host adapters: what any causal LM looks like to the rest of Gnomon.

This is the one place that knows architectures. Everything else is written against the frozen
:class:`HostSpec`, which is read off the module structure and config, not off class names.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

UnitKind = Literal["heads", "neurons"]
KINDS: tuple[UnitKind, UnitKind] = ("heads", "neurons")
Site = Literal["layer_input", "attn_input", "attn_context", "ffn_input"]
SITES: tuple[Site, ...] = ("layer_input", "attn_input", "attn_context", "ffn_input")

# Leaf names of a decoder layer's linears, by role. A new architecture usually costs a name here.
ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "out": ("o_proj", "out_proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1"),
    "down": ("down_proj", "fc2"),
}
REQUIRED = ("q", "k", "v", "out", "up", "down")


class UnsupportedHostError(ValueError):
    """The model's structure is not one that a host adapter describes."""


@dataclass(frozen=True)
class LayerSpec:
    """Dotted module paths of one decoder layer; ``gate`` is None for a non-gated FFN."""

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
        """Paths of every linear of the layer."""
        paths = (self.q, self.k, self.v, self.out, self.gate, self.up, self.down)
        return tuple(p for p in paths if p is not None)


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

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.H // self.G

    @property
    def hash(self) -> str:
        """16 hex digits over sizes, structure and weights; independent of name, path and dtype."""
        facts = asdict(self)
        del facts["name"], facts["revision"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def units(self, kind: UnitKind) -> int:
        """Units of one layer: H heads or F neurons."""
        return self.H if kind == "heads" else self.F

    def width(self, site: Site) -> int:
        """Width of the hidden state at a site."""
        return self.H * self.d if site == "attn_context" else self.D


def describe(model: nn.Module) -> HostSpec:
    """Describes a live causal LM.

    Raises:
        UnsupportedHostError: the structure is not understood; says what was found.
    """
    config = _config(model)
    path, blocks = _decoder_layers(model, config.num_hidden_layers)
    layers = tuple(_layer_spec(f"{path}.{i}", block) for i, block in enumerate(blocks))
    first = layers[0]
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = {role: _shape(model, getattr(first, role)) for role in REQUIRED}
    for layer in layers[1:]:
        _require_same_shapes(model, first, layer)
    spec = HostSpec(
        family=config.model_type,
        name=_name(model),
        revision=getattr(config, "_commit_hash", None) or "",
        L=len(layers),
        H=shapes["out"][1] // d,
        G=shapes["k"][0] // d,
        d=d,
        D=shapes["out"][0],
        F=shapes["down"][1],
        V=config.vocab_size,
        gated=first.gate is not None,
        activation=_activation(config),
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        embed=_path_of(model, "get_input_embeddings"),
        head=_path_of(model, "get_output_embeddings"),
        layers=layers,
        fingerprint=_fingerprint(model, layers),
    )
    _check(model, spec, shapes)
    return spec


def module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path."""
    return model.get_submodule(path)


def weight(model: nn.Module, path: str) -> Tensor:
    """The weight (out, in) of the linear at a dotted path."""
    return model.get_submodule(path).weight  # type: ignore[return-value]


def _decoder_layers(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    found = [
        (name, child)
        for name, child in model.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) == depth and _linears(child[0])
    ]
    if not found:
        lists = {n: len(c) for n, c in model.named_modules() if isinstance(c, nn.ModuleList)}
        raise UnsupportedHostError(
            f"{type(model).__name__}: no list of {depth} decoder layers with linears; module lists "
            f"found: {lists or 'none'}. {_HOW_TO_ADD}"
        )
    return found[0]


def _layer_spec(path: str, block: nn.Module) -> LayerSpec:
    linears = _linears(block)
    if any("experts" in name.split(".") for name, _ in block.named_modules()):
        raise UnsupportedHostError(
            f"{path} is a mixture of experts: its router already selects neurons, which Gnomon's "
            "units do not describe. Use a dense host."
        )
    roles: dict[str, str] = {}
    for role, names in ROLES.items():
        hits = [name for name in linears if name.rpartition(".")[2] in names]
        if len(hits) == 1:
            roles[role] = f"{path}.{hits[0]}"
    missing = [role for role in REQUIRED if role not in roles]
    if missing:
        shapes = {n: f"{m.in_features}->{m.out_features}" for n, m in linears.items()}
        raise UnsupportedHostError(
            f"{path} ({type(block).__name__}): no linear found for {', '.join(missing)}; linears "
            f"found: {shapes or 'none'}. {_HOW_TO_ADD}"
        )
    return LayerSpec(path=path, **roles)


_HOW_TO_ADD = (
    "To describe it, add its names to ROLES in gnomon/host.py (CONTRIBUTING.md, 'A host')."
)


def _linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    linear = model.get_submodule(path)
    return linear.out_features, linear.in_features  # type: ignore[return-value]


def _require_same_shapes(model: nn.Module, first: LayerSpec, layer: LayerSpec) -> None:
    for role in (*REQUIRED, "gate"):
        a, b = getattr(first, role), getattr(layer, role)
        if (a is None) != (b is None) or (a and _shape(model, a) != _shape(model, b)):
            raise UnsupportedHostError(
                f"{layer.path} differs from {first.path} in {role}: layers must be "
                f"alike. {_HOW_TO_ADD}"
            )


def _check(model: nn.Module, spec: HostSpec, shapes: dict[str, tuple[int, int]]) -> None:
    expected = {
        "q": (spec.H * spec.d, spec.D),
        "k": (spec.G * spec.d, spec.D),
        "v": (spec.G * spec.d, spec.D),
        "out": (spec.D, spec.H * spec.d),
        "up": (spec.F, spec.D),
        "down": (spec.D, spec.F),
    }
    wrong = {r: shapes[r] for r in REQUIRED if shapes[r] != expected[r]}
    if wrong or spec.H % spec.G:
        wanted = {r: expected[r] for r in wrong} or "H divisible by G"
        raise UnsupportedHostError(
            f"{type(model).__name__}: with {spec.H} heads of {spec.d} in {spec.G} groups expected "
            f"{wanted}, found {wrong}. {_HOW_TO_ADD}"
        )


def _activation(config: object) -> str:
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        value = getattr(config, key, None)
        if isinstance(value, str):
            return value
    return "unknown"


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
