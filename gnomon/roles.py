"""Which linear of a decoder layer does what: found by the names of its leaves, never by class.

A new architecture usually costs a name here. A name may carry its parent (``attn.c_proj``) where
the leaf alone does not tell attention from FFN.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear: TypeAlias = "nn.Linear | Conv1D"

ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),  # q, k and v in one linear
    "out": ("o_proj", "out_proj", "attn.c_proj", "attention.dense", "self_attention.dense")
    + ("self_attn.dense",),
    "gate": ("gate_proj",),
    "up": ("up_proj", "fc1", "c_fc", "fc_in", "dense_h_to_4h"),
    "gate_up": ("gate_up_proj",),  # gate and up in one linear
    "down": ("down_proj", "fc2", "mlp.c_proj", "fc_out", "dense_4h_to_h"),
}
REQUIRED = ("q", "k", "v", "out", "up", "down")
FUSED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
_EXPERTS = frozenset(("experts", "router", "block_sparse_moe", "moe", "shared_expert"))

HOW_TO_ADD = "To describe it, add its names to ROLES in gnomon/roles.py (CONTRIBUTING.md, 'A host')"


class UnsupportedHostError(ValueError):
    """The model's structure is not one that a host adapter describes."""


def linears(block: nn.Module) -> dict[str, Linear]:
    """Every linear below a module, by its dotted path there."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def shape(linear: Any) -> tuple[int, int]:
    """(out, in) of a linear."""
    if isinstance(linear, Conv1D):
        return linear.nf, linear.nx
    return linear.out_features, linear.in_features


def oriented(linear: Any) -> Tensor:
    """The weight (out, in) of a linear, or (V, D) of an embedding; a view where it lies turned."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def decoder_layers(model: nn.Module, depth: int) -> tuple[str, nn.ModuleList]:
    """The list of a host's decoder layers and its path.

    Raises:
        UnsupportedHostError: no list of that many modules with linears.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    for name, layers in lists.items():
        if len(layers) == depth and linears(layers[0]):
            return name, layers
    found = {name: len(layers) for name, layers in lists.items()}
    raise UnsupportedHostError(
        f"{type(model).__name__}: no list of {depth} decoder layers with linears; module lists "
        f"found: {found or 'none'}. {HOW_TO_ADD}."
    )


def find_roles(family: str, path: str, block: nn.Module) -> dict[str, str]:
    """Dotted path of each role's linear in one layer; roles that share a linear share its path.

    Args:
        family: ``model_type`` of the host, for messages.
        path: of the layer.
        block: the layer.

    Raises:
        UnsupportedHostError: a mixture of experts, or a role without a linear.
    """
    require_dense_ffn(family, path, block)
    found = linears(block)
    roles: dict[str, str] = {}
    for role, names in ROLES.items():
        hits = [n for n in found if any(n == name or n.endswith(f".{name}") for name in names)]
        if len(hits) == 1:
            for part in FUSED.get(role, (role,)):
                roles.setdefault(part, f"{path}.{hits[0]}")
    missing = [role for role in REQUIRED if role not in roles]
    if missing:
        shapes = {n: "{1}->{0}".format(*shape(m)) for n, m in found.items()}
        raise UnsupportedHostError(
            f"{path} ({type(block).__name__}): no linear found for {', '.join(missing)}; linears "
            f"found: {shapes or 'none'}. {HOW_TO_ADD}."
        )
    return roles


def require_dense_ffn(family: str, path: str, block: nn.Module) -> None:
    """Raises UnsupportedHostError for a mixture of experts."""
    for name, _ in block.named_modules():
        hit = _EXPERTS.intersection(name.split("."))
        if hit:
            raise UnsupportedHostError(
                f"host family {family!r} is a mixture of experts ({path}.{name}): its router "
                "already selects neurons, which Gnomon's units do not describe. Use a dense host."
            )
