"""Capture: nothing of the host changes, padding does not matter, bad numbers are named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gnomon.data.capture import Probe, capture
from gnomon.data.criteria import CRITERIA, criterion
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, Tap, describe
from gnomon.tiny import FAMILIES, tiny_host


def ids_of(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", ["plainact", "magnitude", "plainact_weight", "grasp"])
def test_every_family(family: str, name: str) -> None:
    model, _ = tiny_host(family)
    spec = describe(model)
    taps = [Tap(1), Tap(2, "attn_input"), Tap(0, "ffn_input")]
    found = capture(model, spec, taps, criterion(name), ids_of())
    assert found.inputs.shape == (2, 12, 3, spec.D)
    assert found.heads.shape == (2, 12, spec.L, spec.H)
    assert found.neurons.shape == (2, 12, spec.L, spec.F)
    assert found.valid.sum() == 2 * 11
    for kind in KINDS:
        scored = (found.scores(kind)[:, :-1].sum((0, 1)) > 0).float().mean(-1)
        assert (scored >= (0.75 if family == "opt" else 1.0)).all(), "dead ReLUs score nothing"


def test_last_token_has_no_gradient(tiny_llama: tuple) -> None:
    model, _ = tiny_llama
    found = capture(model, describe(model), [Tap(1)], criterion("plainact"), ids_of())
    assert found.heads[:, -1].eq(0).all() and found.neurons[:, -1].eq(0).all()
    assert not found.valid[:, -1].any()


def test_inputs_are_the_hidden_states(tiny_llama: tuple) -> None:
    model, _ = tiny_llama
    spec, ids = describe(model), ids_of()
    found = capture(model, spec, [Tap(0), Tap(2)], criterion("fisher"), ids)
    states = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.inputs[:, :, 0], states[0])
    torch.testing.assert_close(found.inputs[:, :, 1], states[2])


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_the_host_is_left_as_it_was(tiny_llama: tuple, name: str) -> None:
    model, _ = tiny_llama
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, describe(model), [Tap(1)], criterion(name), ids_of())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_host_is_left_as_it_was_after_an_error(tiny_llama: tuple) -> None:
    model, _ = tiny_llama
    with pytest.raises(IndexError):
        capture(model, describe(model), [Tap(1)], criterion("plainact"), ids_of() + 1000)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_scores(family: str, side: str) -> None:
    model, _ = tiny_host(family)
    spec, ids = describe(model), ids_of(1, 9)
    pad = torch.full((1, 4), 256)
    padded = torch.cat([pad, ids] if side == "left" else [ids, pad], dim=1)
    mask = (padded != 256).long()
    alone = capture(model, spec, [Tap(1)], criterion("plainact"), ids)
    found = capture(model, spec, [Tap(1)], criterion("plainact"), padded, mask)
    real = mask[0].bool()
    assert torch.equal(found.valid[0][real], alone.valid[0])
    assert not found.valid[0][~real].any()
    for kind in KINDS:
        torch.testing.assert_close(
            found.scores(kind)[0][real], alone.scores(kind)[0], rtol=1e-3, atol=1e-6
        )


def test_rows_of_a_batch_do_not_mix(tiny_llama: tuple) -> None:
    """The loss is a sum: a row's scores are the same alone and in a batch."""
    model, _ = tiny_llama
    probe = Probe(model, describe(model), [Tap(1)], criterion("plainact"))
    ids = ids_of(3)
    together, alone = probe(ids), probe(ids[1:2])
    torch.testing.assert_close(together.neurons[1], alone.neurons[0], rtol=1e-3, atol=1e-6)


def test_works_where_gradients_are_off(tiny_llama: tuple) -> None:
    model, _ = tiny_llama
    probe = Probe(model, describe(model), [Tap(1)], criterion("plainact"))
    expected = probe(ids_of())
    with torch.inference_mode():
        found = probe(ids_of())
    assert torch.equal(found.neurons, expected.neurons)


@pytest.mark.parametrize(("kind", "layer"), [("heads", 1), ("neurons", 2)])
def test_nan_is_named(tiny_llama: tuple, kind: str, layer: int) -> None:
    model, _ = tiny_llama
    spec = describe(model)

    def poison(units: Tensor) -> Tensor:
        units = units.clone()
        units[0, 3] = float("nan")
        return units

    with HostHooks(model, spec) as hooks:
        hooks.on_units(kind, layer, poison)  # type: ignore[arg-type]
        with pytest.raises(
            ValueError, match=f"NaN or inf in the scores of {kind} in layer {layer}"
        ):
            capture(model, spec, [Tap(1)], criterion("l2norm"), ids_of())


def test_inf_in_gradients_is_an_error(tiny_llama: tuple) -> None:
    model, _ = tiny_llama
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e38)
    with pytest.raises(ValueError, match="NaN or inf in the scores of .* in layer 0"):
        capture(model, describe(model), [Tap(1)], criterion("plainact"), ids_of())


def test_bad_taps(tiny_llama: tuple) -> None:
    model, _ = tiny_host("qwen3", head_dim=16)
    spec = describe(model)
    with pytest.raises(ValueError, match="outside the 3 layers"):
        Probe(model, spec, [Tap(3)], criterion("l2norm"))
    with pytest.raises(ValueError, match="different widths"):
        Probe(model, spec, [Tap(1), Tap(1, "attn_context")], criterion("l2norm"))
    with pytest.raises(ValueError, match="taps is empty"):
        Probe(model, spec, [], criterion("l2norm"))


def test_bfloat16_host(tiny_llama: tuple) -> None:
    model, _ = tiny_llama
    spec = describe(model)
    exact = capture(model, spec, [Tap(1)], criterion("plainact"), ids_of())
    found = capture(model.bfloat16(), spec, [Tap(1)], criterion("plainact"), ids_of())
    assert found.inputs.dtype == torch.bfloat16
    assert found.neurons.dtype == torch.float32
    a, b = exact.neurons.flatten(), found.neurons.flatten()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.98
