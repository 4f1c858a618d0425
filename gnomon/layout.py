"""What a host's modules do not say by their names: how fused linears lie, and what may be skipped.

It is not looked up by class but tried: chosen numbers take the place of what linears of the first
layer give for two tokens, and what then reaches the out- and down-projections tells where it came
from.

- **Fused linears.** Which rows are the q, k or v of which head, the gate or up of which neuron:

  ==========  ==========================================  ===========================
  layout      rows, in blocks of d                        for instance
  ==========  ==========================================  ===========================
  ``blocks``  all heads' q, then all k, then all v        Phi-3, GPT-2
  ``groups``  for each group its heads' q, its k, its v   GPT-NeoX, BLOOM, Falcon
  ==========  ==========================================  ===========================

  ``gate_up`` knows ``blocks`` alone: all gates, then all ups. Any other order is ``unknown`` and
  leaves the host to ``backend=mask``, which needs the projections' inputs alone.
- **Apart or not.** Under a norm over all heads (OLMo-2) the q of one head changes the others'
  context, so that no row of it may be skipped; the same for a norm over all neurons (BitNet).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gnomon.roles import shape

if TYPE_CHECKING:
    from gnomon.host import HostSpec

T = TypeVar("T")
Layout = Literal["separate", "blocks", "groups", "unknown"]
Outputs = dict[str, Tensor]  # path of a linear -> (2, N) that it gives for two tokens
QKV_LAYOUTS: tuple[Layout, ...] = ("blocks", "groups")
_FACTOR = 20.0  # by which a head's or neuron's share is changed: a norm that spans others is moved
_CLOSE = 1e-3  # relative and absolute
_known: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()


def qkv_blocks(layout: Layout, role: str, heads: int, groups: int) -> Tensor:
    """Blocks of d rows that a role has in its linear, in the order of heads (or groups).

    Args:
        layout: of q, k and v.
        role: ``q``, ``k`` or ``v``.
        heads: H.
        groups: G.

    Returns:
        (H,) int64 for q, (G,) for k and v.

    Raises:
        ValueError: the layout is unknown.
    """
    size = heads // groups
    head, group = torch.arange(heads), torch.arange(groups)
    if layout == "separate":
        return head if role == "q" else group
    if layout == "blocks":
        return {"q": head, "k": heads + group, "v": heads + groups + group}[role]
    if layout == "groups":
        start = group * (size + 2)
        own = (start[:, None] + torch.arange(size)).flatten()
        return {"q": own, "k": start + size, "v": start + size + 1}[role]
    raise ValueError("the rows of the fused qkv linear are in no known order")


def rows_of(blocks: Tensor, size: int) -> Tensor:
    """Rows of blocks: (n,) -> (n * size,)."""
    return (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()


def find_qkv(model: nn.Module, spec: HostSpec) -> Layout:
    """The layout of q, k and v; ``unknown`` where none fits or the host cannot be tried."""
    if spec.layers[0].q != spec.layers[0].k:
        return "separate"
    return _once(model, spec, "qkv", lambda: next(_qkv_that_fit(model, spec), "unknown"))


def find_gate_up(model: nn.Module, spec: HostSpec) -> Layout:
    """``blocks`` where one linear holds gates before ups, else ``unknown``."""
    if spec.layers[0].gate != spec.layers[0].up:
        return "separate"
    fits = lambda: _neurons_stay(model, spec, "blocks") is True  # noqa: E731
    return _once(model, spec, "gate_up", lambda: "blocks" if fits() else "unknown")


def are_apart(model: nn.Module, spec: HostSpec) -> tuple[bool, bool]:
    """Whether the q, k, v of one head, and the gate and up of one neuron, reach no other unit.

    True without a trial where nothing but linears of the spec has parameters there. False where
    the trial fails.
    """
    first = spec.layers[0]
    heads, neurons = (_others(model, spec, path) for path in (first.out, first.down))
    if weight_is_meta(model):  # no trial without numbers: a vector over all units is a norm
        return (spec.H * spec.d,) not in heads.values(), (spec.F,) not in neurons.values()
    stay = lambda: _neurons_stay(model, spec, spec.gate_up)  # noqa: E731
    return (
        not heads or bool(_once(model, spec, "heads", lambda: _heads_stay(model, spec))),
        not neurons or bool(_once(model, spec, "neurons", stay)),
    )


def weight_is_meta(model: nn.Module) -> bool:
    """Whether the host's embeddings hold no numbers here (meta device, or offloaded)."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return embeddings.weight.is_meta


def _others(model: nn.Module, spec: HostSpec, path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters beside the spec's linears in the sublayer of a projection."""
    layer = spec.layers[0].path
    child, _, inside = path.removeprefix(f"{layer}.").partition(".")
    sublayer = f"{layer}.{child}" if inside else layer
    found = {f"{sublayer}.{n}": p for n, p in model.get_submodule(sublayer).named_parameters()}
    ours = set(spec.layers[0].linears)
    return {n: tuple(p.shape) for n, p in found.items() if n.rpartition(".")[0] not in ours}


def _qkv_that_fit(model: nn.Module, spec: HostSpec) -> Iterator[Layout]:
    """Layouts under which a first token's context is its v, and its q matters to no later token."""
    fused, out = spec.layers[0].q, spec.layers[0].out
    noise = _noise(model, fused)
    context = _reaching(model, {fused: noise}, out)
    if context is None:
        return
    for layout in QKV_LAYOUTS:
        v, q = (rows_of(qkv_blocks(layout, role, spec.H, spec.G), spec.d) for role in "vq")
        own = noise[0, v].unflatten(0, (spec.G, spec.d)).repeat_interleave(spec.group_size, 0)
        other = noise.clone()
        other[0, q] *= -_FACTOR
        again = _reaching(model, {fused: other}, out)
        fits = torch.allclose(context[0], own.flatten(), rtol=0.02, atol=0.02)  # in bf16 too
        if fits and again is not None and torch.allclose(again, context, rtol=_CLOSE, atol=_CLOSE):
            yield layout


def _heads_stay(model: nn.Module, spec: HostSpec) -> bool | None:
    """Whether other heads' contexts stay when one head's q, or one group's k and v, are changed."""
    first = spec.layers[0]
    if spec.qkv == "unknown" or spec.H == 1:
        return spec.H == 1
    outputs = {path: _noise(model, path) for path in dict.fromkeys((first.q, first.k, first.v))}
    before = _reaching(model, outputs, first.out)
    for roles, moved in (("q", 1), ("kv", spec.group_size)):
        other = {path: noise.clone() for path, noise in outputs.items()}
        for role in roles:
            rows = rows_of(qkv_blocks(spec.qkv, role, spec.H, spec.G)[:1], spec.d)
            other[getattr(first, role)][:, rows] *= _FACTOR
        after = _reaching(model, other, first.out)
        if before is None or after is None:
            return None
        rest = slice(moved * spec.d, None)
        if not torch.allclose(before[:, rest], after[:, rest], rtol=_CLOSE, atol=_CLOSE):
            return False
    return True


def _neurons_stay(model: nn.Module, spec: HostSpec, layout: Layout) -> bool | None:
    """Whether every second neuron stays as it is when the up (and gate) of the others move."""
    first = spec.layers[0]
    if layout == "unknown":
        return None
    some = torch.arange(0, spec.F, 2)
    paths = dict.fromkeys(p for p in (first.gate, first.up) if p is not None)
    outputs = {path: _noise(model, path).abs() for path in paths}  # a ReLU hides what is below 0
    other = {path: noise.clone() for path, noise in outputs.items()}
    for noise in other.values():
        for start in (0, spec.F) if layout == "blocks" else (0,):
            noise[:, start + some] *= _FACTOR
    before, after = (_reaching(model, given, first.down) for given in (outputs, other))
    if before is None or after is None or before.shape[-1] != spec.F:
        return None
    stays = torch.ones(spec.F, dtype=torch.bool)
    stays[some] = False
    same = torch.isclose(before, after, rtol=_CLOSE, atol=_CLOSE).all(0)
    return torch.equal(same, stays)


class _Reached(Exception):
    """Ends a trial forward: the rest of the host need not run."""


@torch.no_grad()
def _reaching(model: nn.Module, outputs: Outputs, path: str) -> Tensor | None:
    """What (2, W) reaches a module when linears give fixed outputs; None where nothing does."""
    seen: list[Tensor] = []

    def fixed(noise: Tensor) -> Callable[..., Tensor]:
        return lambda _, args, y: noise.to(y).reshape(y.shape)

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().float().cpu().reshape(2, -1))
        raise _Reached

    handles: list[Any] = [
        model.get_submodule(name).register_forward_hook(fixed(noise))
        for name, noise in outputs.items()
    ]
    handles.append(model.get_submodule(path).register_forward_pre_hook(stop))
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.tensor([[1, 2]], device=embeddings.weight.device)
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached:
        return seen[0]
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    finally:
        for handle in handles:
            handle.remove()
    return None


def _once(model: nn.Module, spec: HostSpec, key: str, find: Callable[[], T]) -> T:
    """Found once per host; what could not be told is tried again (it may have been training)."""
    known = _known.setdefault(model.get_submodule(spec.layers[0].out), {})
    if key not in known:
        found = find()
        if found is None or found == "unknown":
            return found
        known[key] = found
    return known[key]


def _noise(model: nn.Module, path: str) -> Tensor:
    """(2, N) numbers for a linear's outputs, small enough for hosts that clip q, k and v."""
    generator = torch.Generator().manual_seed(len(path))
    return torch.rand(2, shape(model.get_submodule(path))[0], generator=generator) - 0.5
