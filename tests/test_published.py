"""protocol=published: one mask for a whole text, from its last token, at every position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gnomon
from cases import predictor
from gnomon.budget import Budget
from gnomon.host import Tap
from gnomon.kernels.topk_mask import topk_mask
from gnomon.policies import DenseFallback, Griffin, Shadow
from gnomon.tiny import tiny_host

HALF = Budget(density=0.5)


def ids_of(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def made(model, budget: Budget = HALF) -> Shadow:
    return Shadow(predictor(model, tap=Tap(0, "attn_context")), budget, refresh="prompt")


def run(model, policy, ids: Tensor, **inputs) -> tuple[Tensor, dict]:
    taken: dict = {}
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="published") as session:
        session.on_decision = lambda kind, layer, keep, _: taken.update({(kind, layer): keep})
        return model(ids, **inputs).logits, taken


def test_one_mask_from_the_last_token_at_every_position() -> None:
    model, _ = tiny_host("llama")
    policy, ids = made(model), ids_of()
    context: list[Tensor] = []
    hook = model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda m, args: context.append(args[0])
    )
    with torch.no_grad():
        model(ids)
        hook.remove()
        scores = policy.predictor(context[0][:, -1][:, None])
    _, taken = run(model, policy, ids)
    for (kind, layer), keep in taken.items():
        assert keep.shape[1] == 12 and bool((keep == keep[:, :1]).all())
        if kind == "neurons" and layer > 0:
            expected = topk_mask(scores["neurons"][:, layer], policy.counts[kind][layer])
            assert torch.equal(keep[:, 0], expected)


def test_it_is_not_causal_and_padding_does_not_matter() -> None:
    model, _ = tiny_host("llama")
    ids = ids_of(1)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 9) % 256
    first, other = run(model, made(model), ids), run(model, made(model), changed)
    assert any(not torch.equal(first[1][key], other[1][key]) for key in first[1])
    assert not torch.allclose(first[0][:, :6], other[0][:, :6], atol=1e-4)
    padded = torch.cat([torch.full((1, 3), 256), ids], dim=1)
    mask = (padded != 256).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = run(model, made(model), padded, attention_mask=mask, position_ids=positions)
    for key, keep in first[1].items():
        assert torch.equal(found[1][key][:, -1], keep[:, -1])


def test_layer_0_dense_after_the_selection() -> None:
    model, _ = tiny_host("llama")
    plain, policy = made(model), DenseFallback(made(model), above=1.0, layers=[0])
    inner, outer = run(model, plain, ids_of())[1], run(model, policy, ids_of())[1]
    assert ("neurons", 0) in inner and ("neurons", 0) not in outer
    assert all(torch.equal(outer[key], inner[key]) for key in outer)
    with torch.no_grad(), gnomon.sparsify(model, policy, protocol="published") as session:
        model(ids_of())
    assert session.density().per_layer["neurons"] == [1.0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"layers=\[4\]: host tiny-llama-0 has layers 0 to 2"):
        DenseFallback(made(model), layers=[4]).bind(model)


def test_it_cannot_decode_and_has_no_prompt() -> None:
    model, _ = tiny_host("llama")
    with (
        pytest.raises(ValueError, match="no decode steps"),
        gnomon.sparsify(model, made(model), protocol="published"),
    ):
        model.generate(ids_of(), max_new_tokens=3, do_sample=False, pad_token_id=256)
    with (
        pytest.raises(ValueError, match="has no dense prompt, which policy=griffin"),
        gnomon.sparsify(model, Griffin(Budget(neurons=0.5)), protocol="published"),
    ):
        pass
