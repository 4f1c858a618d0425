"""Random arguments of decode attention, and its maths in double precision, for its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

# batch, groups, heads of a group, head size, cache, rotated columns (0: no rotation)
SHAPES = [
    pytest.param((1, 1, 1, 4, 1, 4), id="one"),
    pytest.param((2, 3, 1, 20, 70, 8), id="mha-partial-rotation"),
    pytest.param((1, 5, 1, 64, 301, 64), id="mha-64"),
    pytest.param((2, 2, 1, 80, 33, 0), id="mha-80"),
    pytest.param((1, 2, 1, 256, 40, 256), id="mha-256"),
    pytest.param((2, 3, 2, 20, 70, 20), id="pairs"),
    pytest.param((2, 2, 3, 96, 150, 96), id="threes-96"),
    pytest.param((1, 2, 7, 128, 45, 128), id="sevens-128"),
    pytest.param((2, 1, 5, 112, 37, 112), id="mqa-112"),
    pytest.param((1, 1, 20, 16, 90, 16), id="mqa-beyond-16"),
]
SLOTS = ["all", "shuffled", "some", "shared", "one", "none"]
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 9},
    "softcap": {"softcap": 2.0, "scaling": 0.4},
    "first": {"first": [3, 0]},
    "norms": {"q_norm": True, "k_norm": True, "eps": 1e-3},
    "alibi": {"alibi": True},
    "everything": {"window": 40, "softcap": 5.0, "first": [1, 5], "alibi": True, "k_norm": True},
}


def slots(kind: str, batch: int, heads: int) -> tuple[Tensor | None, int]:
    """Places (B or 1, H) of the heads, and how many places there are; ``some`` differ by row."""
    if kind == "all":
        return None, heads
    kept = {"shuffled": heads, "one": 1, "none": 0}.get(kind, max(1, heads // 2))
    slot = torch.full((1 if kind == "shared" else batch, heads), -1, dtype=torch.int32)
    for b, row in enumerate(slot):
        held = max(0, kept - b) if kind == "some" else kept  # the last places may be empty
        row[torch.randperm(heads)[:held]] = torch.arange(held, dtype=torch.int32)
    return slot, kept


def arguments(
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype,
    extra: str,
    device: torch.device,
    ends: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    batch, groups, group, d, tokens, rot = shape
    slot, places = slots(kind, batch, groups * group)
    ends = ends or (tokens - 1, tokens // 2)
    given: dict[str, Any] = {
        "q": torch.randn(batch, places * d),
        "k_new": torch.randn(batch, groups * d),
        # Exact in the cache's dtype, to which Triton's interpreter rounds towards zero.
        "v_new": torch.randn(batch, groups * d).to(dtype).float(),
        "k_cache": torch.randn(batch, groups, tokens, d).to(dtype),
        "v_cache": torch.randn(batch, groups, tokens, d).to(dtype),
        "position": torch.tensor(ends[:batch], dtype=torch.int32),
        "slot": slot,
    }
    if rot:
        angle = torch.arange(tokens)[:, None] * 0.7 ** torch.arange(rot // 2)
        given |= {"cos": angle.cos().repeat(1, 2), "sin": angle.sin().repeat(1, 2)}
    given |= EXTRAS[extra]
    for field, size in (("q_norm", d), ("k_norm", d), ("alibi", groups * group)):
        if given.get(field) is True:
            given[field] = torch.rand(size) + 0.5 if field != "alibi" else torch.rand(size) / 20
    if "first" in given:
        first = torch.tensor(given["first"][:batch], dtype=torch.int32)
        given["first"] = torch.minimum(first, given["position"])
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def run(op: Any, given: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The context (places without a head zeroed) and both caches, from caches of its own."""
    own = given | more
    own["k_cache"], own["v_cache"] = given["k_cache"].clone(), given["v_cache"].clone()
    y = op(**own)
    d = own["k_cache"].shape[-1]
    if own["slot"] is not None:
        held = (own["slot"] >= 0).sum(1, keepdim=True).expand(y.shape[0], -1)
        y = torch.where(torch.arange(y.shape[1], device=y.device) < held * d, y, 0)
    return y, own["k_cache"], own["v_cache"]


def one_rounding(cache: Tensor, right: Tensor) -> bool:
    """Whether numbers differ by one unit of the last place at most (1e-5 in fp32)."""
    rtol = max(1e-5, torch.finfo(cache.dtype).eps)
    return torch.allclose(cache.float(), right.float(), rtol=rtol, atol=1e-5)


def in_double(given: dict[str, Any]) -> Tensor:
    """The maths of the module's docstring, a head at a time."""
    batch, groups, tokens, d = given["k_cache"].shape
    cache = given["k_cache"].dtype
    at = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in given.items()}
    q = at["q"].double().view(batch, -1, d)
    heads = q.shape[1] if at["slot"] is None else at["slot"].shape[1]
    slot = torch.arange(heads).expand(1, -1) if at["slot"] is None else at["slot"]

    def prepared(x: Tensor, norm: Tensor | None, n: int) -> Tensor:
        if norm is not None:
            x = x / (x.square().mean() + at.get("eps", 1e-6)).sqrt() * norm.double()
        if "cos" not in at:
            return x
        rot = at["cos"].shape[1]
        low, high = x[:rot].chunk(2)
        y = x[:rot] * at["cos"][n].double() + torch.cat([-high, low]) * at["sin"][n].double()
        return torch.cat([y, x[rot:]])

    ctx = torch.zeros_like(q)
    for b in range(batch):
        n = int(at["position"][b])
        low = max(int(at["first"][b]) if "first" in at else 0, 0)
        if at.get("window"):
            low = max(low, n - at["window"] + 1)
        for h in range(heads):
            g, place = h * groups // heads, int(slot[b % len(slot), h])
            if place < 0:
                continue
            key = prepared(at["k_new"][b].view(-1, d)[g].double(), at.get("k_norm"), n)
            value = at["v_new"][b].view(-1, d)[g].double()
            k = torch.cat([at["k_cache"][b, g, low:n], key.to(cache)[None]]).double()
            v = torch.cat([at["v_cache"][b, g, low:n], value.to(cache)[None]]).double()
            s = k @ prepared(q[b, place], at.get("q_norm"), n) * at.get("scaling", d**-0.5)
            if at.get("softcap"):
                s = at["softcap"] * torch.tanh(s / at["softcap"])
            if "alibi" in at:
                s = s + at["alibi"][h].double() * torch.arange(low - n, 1)
            ctx[b, place] = s.softmax(0) @ v
    return ctx.flatten(1)
