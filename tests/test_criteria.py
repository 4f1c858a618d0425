"""Criteria against finite differences of the summed loss, and against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from gnomon.data.capture import Capture, capture
from gnomon.data.criteria import (
    CRITERIA,
    criterion,
    head_magnitude,
    layer_weights,
    neuron_magnitude,
)
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind, describe, weight
from gnomon.tiny import tiny_host

STEP = 1e-5
FAMILIES = ["llama", "opt"]  # GQA and gated; MHA, biases, ReLU and a flattened FFN


def _exact_norms(model: nn.Module) -> None:
    """RMS norms without the library's fp32 inside, which a difference of 1e-5 would drown in."""
    for parent in list(model.modules()):
        for name, norm in parent.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)


class Toy:
    """A two-layer float64 host, a left- and a right-padded row beside a full one."""

    def __init__(self, family: str) -> None:
        self.model, _ = tiny_host(family, num_hidden_layers=2)
        _exact_norms(self.model)
        self.model.double()
        self.spec: HostSpec = describe(self.model)
        draw = torch.Generator().manual_seed(3)
        self.ids = torch.randint(0, 256, (3, 7), generator=draw)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :3] = 0
        self.mask[2, 5:] = 0
        self.ids[self.mask == 0] = 256

    def capture(self, name: str) -> Capture:
        return capture(self.model, self.spec, [Tap(1)], criterion(name), self.ids, self.mask)

    def losses(self, row: int, kind: UnitKind, layer: int, position: int, change: Tensor) -> Tensor:
        """Summed loss (n,) of one row, its unit tensor moved at one position by each change."""
        n = len(change)
        ids, mask = self.ids[row].expand(n, -1), self.mask[row].expand(n, -1)

        def alter(units: Tensor) -> Tensor:
            units = units.clone()
            units[:, position] += change
            return units

        with torch.no_grad(), HostHooks(self.model, self.spec) as hooks:
            hooks.on_units(kind, layer, alter)
            places = (mask.cumsum(-1) - 1).clamp_min(0)
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False
            ).logits
        targets = ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
        loss = nnf.cross_entropy(
            logits[:, :-1].transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        return loss.sum(-1)

    def gradient(self, row: int, kind: UnitKind, layer: int, position: int) -> Tensor:
        """Central differences of the loss in every entry of the unit tensor at one position."""
        shape = (self.spec.H, self.spec.d) if kind == "heads" else (self.spec.F,)
        size = int(torch.tensor(shape).prod())
        steps = torch.eye(size, dtype=torch.float64).view(size, *shape) * STEP
        up = self.losses(row, kind, layer, position, steps)
        down = self.losses(row, kind, layer, position, -steps)
        return ((up - down) / (2 * STEP)).view(shape)

    def activation(self, kind: UnitKind, layer: int) -> Tensor:
        """The unit tensor of the padded batch."""
        seen: list[Tensor] = []
        with torch.no_grad(), HostHooks(self.model, self.spec) as hooks:
            hooks.on_units(kind, layer, lambda units: seen.append(units.clone()))
            self.model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=(self.mask.cumsum(-1) - 1).clamp_min(0),
                use_cache=False,
            )
        return seen[0]


@pytest.fixture(scope="module", params=FAMILIES)
def toy(request: Any) -> Toy:
    return Toy(request.param)


POINTS = [  # row, layer, position: full row, first token, left-padded, right-padded
    pytest.param(0, 0, 3, id="full-layer0"),
    pytest.param(0, 1, 0, id="full-layer1-first-token"),
    pytest.param(1, 0, 4, id="left-padded"),
    pytest.param(1, 1, 3, id="left-padded-first-token"),
    pytest.param(2, 0, 2, id="right-padded"),
    pytest.param(2, 1, 3, id="right-padded-layer1"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("row", "layer", "position"), POINTS)
def test_gradient_criteria_equal_finite_differences(
    toy: Toy, kind: UnitKind, row: int, layer: int, position: int
) -> None:
    g = toy.gradient(row, kind, layer, position)
    a = toy.activation(kind, layer)[row, position]
    product = (a * g).sum(-1) if kind == "heads" else a * g
    expected = {
        "plainact": product.abs(),
        "fisher": product.square(),
        "grad_norm": g.norm(dim=-1) if kind == "heads" else g.abs(),
        "snip": g.abs().sum(-1) if kind == "heads" else g.abs(),
    }
    assert g.abs().max() > 1e-3, "the point must matter to the loss"
    for name, value in expected.items():
        found = toy.capture(name).scores(kind)[row, position, layer].double()
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_plainact_predicts_the_loss_of_removing_a_unit(toy: Toy, kind: UnitKind) -> None:
    """Scaling a unit by 1 - e changes the loss by e times the score."""
    a = toy.activation(kind, 1)[0, 3]
    change = torch.zeros(1, *a.shape, dtype=torch.float64)
    change[0, 1] = -STEP * a[1]
    drop = (toy.losses(0, kind, 1, 3, -change) - toy.losses(0, kind, 1, 3, change)) / (2 * STEP)
    score = toy.capture("plainact").scores(kind)[0, 3, 1, 1].double()
    torch.testing.assert_close(drop.abs()[0], score, rtol=1e-4, atol=1e-8)


def test_activation_criteria_are_their_formulas(toy: Toy) -> None:
    spec = toy.spec
    for layer in range(spec.L):
        a, h = toy.activation("heads", layer), toy.activation("neurons", layer)
        real = toy.mask[..., None]
        out = weight(toy.model, spec.layers[layer].out).unflatten(1, (spec.H, spec.d))
        down = weight(toy.model, spec.layers[layer].down)
        contributions = torch.einsum("ohd,bthd->btho", out, a).norm(dim=-1)
        expected = {
            ("magnitude", "heads"): contributions,
            ("magnitude", "neurons"): (h[..., None, :] * down).norm(dim=-2),
            ("l2norm", "heads"): a.norm(dim=-1),
            ("l2norm", "neurons"): h.abs(),
        }
        for (name, kind), value in expected.items():
            found = toy.capture(name).scores(kind)[:, :, layer].double()  # type: ignore[arg-type]
            torch.testing.assert_close(found, value * real, rtol=1e-4, atol=1e-6)


def test_magnitude_functions_take_any_leading_shape(toy: Toy) -> None:
    weights = layer_weights(toy.model, toy.spec, 0)
    assert weights.down_norm.shape == (toy.spec.F,)
    assert weights.out_gram.shape == (toy.spec.H, toy.spec.d, toy.spec.d)
    a, h = torch.randn(toy.spec.H, toy.spec.d), torch.randn(2, 5, toy.spec.F)
    assert head_magnitude(a, weights).shape == (toy.spec.H,)
    assert neuron_magnitude(h, weights).shape == (2, 5, toy.spec.F)
    assert head_magnitude(torch.zeros_like(a), weights).eq(0).all()


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_scores_are_fp32_non_negative_and_zero_at_padding(toy: Toy, name: str) -> None:
    found = toy.capture(name)
    for kind in found.criterion.kinds:
        scores = found.values(kind)
        assert scores.dtype == torch.float32
        assert scores.min() >= 0 or "token" not in found.criterion.granularities
        assert scores[toy.mask == 0].eq(0).all()
        assert scores[toy.mask == 1].ne(0).any()


def test_unknown_criterion_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="criterion='wanda'.*fisher.*grad_norm.*plainact"):
        criterion("wanda")
