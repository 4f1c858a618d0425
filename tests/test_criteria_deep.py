"""Criteria that need more than one gradient: weight form, Hessian product, half precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_criteria import Toy
from torch import Tensor, nn
from torch.nn import functional as nnf

from gnomon.data.backward import FP16_SCALES
from gnomon.data.capture import Probe, capture
from gnomon.data.criteria import criterion
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind, describe, weight
from gnomon.tiny import tiny_host

Additions = dict[tuple[UnitKind, int], Tensor]


def ids_of(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


def weight_gradient(model: nn.Module, path: str, ids: Tensor, row: int, position: int) -> Tensor:
    """Gradient (R, D) of a linear's weight through one token alone, by a copy used there alone."""
    linear = model.get_submodule(path)
    copy = weight(model, path).detach().clone().requires_grad_()

    def swap(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        y = y.clone()
        flat = y.view(*ids.shape, -1)
        x = args[0].view(*ids.shape, -1)[row, position]
        flat[row, position] = nnf.linear(x, copy, getattr(linear, "bias", None))
        return y

    handle = linear.register_forward_hook(swap)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    handle.remove()
    loss = nnf.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    return torch.autograd.grad(loss, copy)[0]


# gated, ReLU and flattened, fused gate and up, parallel sublayers, Conv1D
@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("layer", [0, 2])
def test_weight_form_equals_the_materialised_weight_gradient(family: str, layer: int) -> None:
    model, _ = tiny_host(family)
    spec, ids = describe(model), ids_of()
    found = capture(model, spec, [Tap(1)], criterion("plainact_weight"), ids)
    where, position = spec.layers[layer], 4
    expected = torch.zeros(spec.F)
    for role in ("gate", "up") if spec.gated else ("up",):
        path = getattr(where, role)
        g = weight_gradient(model, path, ids, 1, position)
        rows = (weight(model, path) * g).abs().sum(1)
        expected += rows[spec.blocks(role)].detach()
    assert expected.max() > 1e-3
    torch.testing.assert_close(found.neurons[1, position, layer], expected, rtol=1e-3, atol=1e-6)
    plain = capture(model, spec, [Tap(1)], criterion("plainact"), ids)
    assert torch.equal(found.heads, plain.heads)


def test_weight_form_needs_rows_in_a_known_order() -> None:
    model, _ = tiny_host("phi3")
    with pytest.raises(ValueError, match="fused gate_up linear are in no known order"):
        Probe(
            model,
            replace(describe(model), gate_up="unknown"),
            [Tap(1)],
            criterion("plainact_weight"),
        )


def gradients(toy: Toy, at: Mapping[tuple[UnitKind, int], Tensor]) -> Additions:
    """First-order gradients of the padded batch's loss in additions to all unit tensors."""
    leaves = {key: value.clone().requires_grad_() for key, value in at.items()}
    with HostHooks(toy.model, toy.spec) as hooks:
        for (kind, layer), leaf in leaves.items():
            hooks.on_units(kind, layer, lambda units, leaf=leaf: units + leaf)
        logits = toy.model(
            input_ids=toy.ids,
            attention_mask=toy.mask,
            position_ids=(toy.mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        ).logits
    valid = (toy.mask[:, 1:] == 1) & (toy.mask[:, :-1] == 1)
    targets = toy.ids[:, 1:].masked_fill(~valid, -100)
    loss = nnf.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_grasp_is_a_real_hessian_gradient_product(family: str) -> None:
    """(g(a + e g) - g(a - e g)) / 2e, in all unit tensors together, in float64."""
    toy = Toy(family)
    spec: HostSpec = toy.spec
    sizes: dict[UnitKind, tuple[int, ...]] = {"heads": (spec.H, spec.d), "neurons": (spec.F,)}
    zeros = {
        (kind, layer): torch.zeros(*toy.ids.shape, *sizes[kind], dtype=torch.float64)
        for kind in KINDS
        for layer in range(spec.L)
    }
    g = gradients(toy, zeros)
    step = 1e-6
    up = gradients(toy, {k: step * v for k, v in g.items()})
    down = gradients(toy, {k: -step * v for k, v in g.items()})
    found = toy.capture("grasp")
    for kind, layer in zeros:
        product = (up[kind, layer] - down[kind, layer]) / (2 * step)
        expected = toy.activation(kind, layer) * product
        expected = expected.sum(-1) if kind == "heads" else expected
        assert expected[toy.mask == 1].abs().max() > 1e-3
        torch.testing.assert_close(
            found.scores(kind)[:, :, layer].double(),
            expected.abs() * toy.mask[..., None],
            rtol=1e-4,
            atol=1e-5,
        )


def faint_host(dtype: torch.dtype, head: int, units: int) -> tuple[nn.Module, HostSpec]:
    """A host whose units' gradients lie about and below the least number of float16, 6e-8."""
    model, _ = tiny_host("llama")
    spec = describe(model)
    with torch.no_grad():
        weight(model, spec.head).mul_(2.0**-head)
        for layer in spec.layers:
            for path in (layer.out, layer.down):
                weight(model, path).mul_(2.0**-units)
    return model.half().to(dtype), spec  # the same numbers in every dtype


@pytest.mark.parametrize(
    ("name", "faint"),
    [
        ("plainact", (16, 9)),
        ("fisher", (16, 9)),
        ("plainact_weight", (16, 9)),
        ("grasp", (6, 6)),
    ],
)
def test_half_precision_does_not_underflow(
    name: str, faint: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = capture(*faint_host(torch.float32, *faint), [Tap(1)], criterion(name), ids_of())
    half = capture(*faint_host(torch.float16, *faint), [Tap(1)], criterion(name), ids_of())
    monkeypatch.setattr("gnomon.data.backward.FP16_SCALES", (1.0,))
    bare = capture(*faint_host(torch.float16, *faint), [Tap(1)], criterion(name), ids_of())
    for kind in KINDS:
        wanted, found, without = (c.scores(kind)[:, :-1] for c in (exact, half, bare))
        assert (found > 0).float().mean() > 0.99
        assert (found - wanted).norm() < 0.02 * wanted.norm()
        assert (without - wanted).norm() > 0.05 * wanted.norm(), "this host must underflow"
        assert (without > 0).float().mean() < 0.98


@pytest.mark.parametrize(("name", "faint"), [("fisher", (16, 9)), ("grasp", (6, 6))])
def test_bfloat16_needs_no_scale(name: str, faint: tuple[int, int]) -> None:
    """It has the range of float32; what differs is the rounding of 8 bits."""
    exact = capture(*faint_host(torch.float32, *faint), [Tap(1)], criterion(name), ids_of())
    found = capture(*faint_host(torch.bfloat16, *faint), [Tap(1)], criterion(name), ids_of())
    for kind in KINDS:
        wanted, got = exact.scores(kind)[:, :-1], found.scores(kind)[:, :-1]
        assert (got > 0).float().mean() > 0.99
        assert (got - wanted).norm() < 0.1 * wanted.norm()


def test_the_scale_is_exact_and_falls_where_it_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_host("llama")
    model, spec, ids = model.half(), describe(model), ids_of()
    expected = capture(model, spec, [Tap(1)], criterion("plainact"), ids)
    monkeypatch.setattr("gnomon.data.backward.FP16_SCALES", (2.0**30, *FP16_SCALES))
    found = capture(model, spec, [Tap(1)], criterion("plainact"), ids)
    for kind in KINDS:
        assert torch.equal(found.scores(kind), expected.scores(kind))


def test_hosts_with_the_range_of_float32_are_not_scaled(tiny_llama: tuple) -> None:
    model, _ = tiny_llama
    probe = Probe(model.bfloat16(), describe(model), [Tap(1)], criterion("fisher"))
    assert probe._scales == (1.0,)
