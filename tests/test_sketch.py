"""Sketch: few-bit copies of a host's FFN, rounded by output error, and what they choose."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_student_module import fitted
from test_train import SMALL, configure, last_line
from transformers import PreTrainedModel

import gnomon
from cases import predictor
from gnomon import train
from gnomon.activation import activation
from gnomon.budget import Budget
from gnomon.data.criteria import Magnitude
from gnomon.data.sources import SyntheticText
from gnomon.endtoend import make_module, start_from
from gnomon.hooks import HostHooks
from gnomon.host import Tap, describe
from gnomon.policies import Oracle, Random, Sketch, Static
from gnomon.policies.base import Policy, Seen
from gnomon.predictors.fewbit import FewBitStack
from gnomon.predictors.objectives import Bce, Kl
from gnomon.predictors.rounding import levels_of, nearest, round_rows
from gnomon.predictors.sketch import Sketch as SketchPredictor
from gnomon.runtime.student import Student
from gnomon.sketching import ffn_moments, ffn_weights, sketch
from gnomon.tiny import tiny_host

GATED = ["llama", "gemma2", "phi3"]
PLAIN = ["opt", "gpt2"]


def correlated(rows: int, width: int) -> torch.Tensor:
    """Inputs whose columns depend on each other, as hidden states do."""
    torch.manual_seed(0)
    mixed: torch.Tensor = torch.randn(rows, width // 4) @ torch.randn(width // 4, width)
    return mixed + 0.3 * torch.randn(rows, width)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounding_loses_less_of_the_output_than_the_nearest_levels(bits: int) -> None:
    x, weight = correlated(512, 37), torch.randn(11, 37)
    rounded = levels_of(*round_rows(weight, x.T @ x, bits), bits)
    plain = levels_of(*round_rows(weight, torch.eye(37), bits), bits)
    assert all(len(row.unique()) <= 2**bits for row in rounded)

    def error(w: torch.Tensor) -> float:
        return float(((weight - w) @ x.T).norm())

    assert error(rounded) < 0.9 * error(plain)
    if bits == 4:
        assert error(rounded) < 0.15 * float((weight @ x.T).norm())


def test_rounding_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="not finite"):
        round_rows(torch.randn(3, 8), torch.full((8, 8), torch.nan), 2)
    assert round_rows(torch.zeros(3, 8), torch.eye(8), 2)[0].isfinite().all()
    assert round_rows(torch.randn(3, 8), torch.zeros(8, 8), 2)[0].isfinite().all()


def test_a_stack_scores_alike_before_and_after_it_is_packed() -> None:
    stack = FewBitStack(2, 5, 19, bits=3, bias=True)
    for i in range(2):
        stack.adopt(i, torch.randn(5, 19), torch.rand(5) + 0.1, torch.randn(5))
    x = torch.randn(2, 7, 19)

    def outputs() -> torch.Tensor:
        return torch.stack([stack.one(i, x[i]) for i in range(2)])

    before, size = outputs(), stack.nbytes
    stack.quantize()
    torch.testing.assert_close(outputs(), before)
    assert stack.nbytes == 2 * 5 * (24 * 3 // 8 + 4 + 4) < size
    stack.dequantize()
    torch.testing.assert_close(outputs(), before)
    assert all(p.requires_grad for p in stack.parameters())


def test_the_gradient_goes_straight_through_to_weights_and_scales() -> None:
    stack = FewBitStack(1, 3, 4, bits=2)
    weight, scale = torch.randn(3, 4), torch.rand(3) + 0.2
    stack.adopt(0, weight, scale)
    x = torch.randn(6, 4)
    stack.one(0, x).sum().backward()
    assert stack.weight is not None and stack.weight.grad is not None
    torch.testing.assert_close(stack.weight.grad[0], x.sum(0).expand(3, 4))
    level = nearest(weight / scale[:, None], 2)
    assert isinstance(stack.scale, torch.nn.Parameter) and stack.scale.grad is not None
    torch.testing.assert_close(stack.scale.grad[0], level @ x.sum(0))


@pytest.mark.parametrize("family", [*GATED, *PLAIN])
def test_at_four_bits_its_choice_is_nearly_the_oracles(family: str) -> None:
    model, tokenizer = tiny_host(family)
    spec = describe(model)
    made = SketchPredictor.for_host(spec, bits=4, tokens=2048)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    sketch(made, model, tokenizer, spec, SyntheticText(block=64, tokens=4096))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(ValueError, match="was trained for host"):
        made.check_host(describe(tiny_host(family, seed=1)[0]))  # of the same sizes
    ids = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        dense = model(ids).logits
    own = kl_of(model, Sketch(made.quantize(), Budget(neurons=0.5)), ids, dense)
    best = kl_of(model, Oracle(Budget(neurons=0.5)), ids, dense)
    drawn = kl_of(model, Random(Budget(neurons=0.5)), ids, dense)
    fixed = kl_of(model, Static(predictor(model), Budget(neurons=0.5)), ids, dense)
    assert best < own < best + 0.1 * (min(drawn, fixed) - best)


def kl_of(model: PreTrainedModel, policy: Policy, ids: torch.Tensor, dense: torch.Tensor) -> float:
    """KL of the sparse model's predictions from the dense model's, nats per token."""
    with torch.no_grad(), gnomon.sparsify(model, policy, backend="mask", protocol="all"):
        sparse = model(ids).logits
    logs, base = sparse.log_softmax(-1), dense.log_softmax(-1)
    return float((base.exp() * (base - logs)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "gpt2", "qwen2"])
def test_moments_and_weights_are_those_of_the_ffn(family: str) -> None:
    """Act of what the copied rows give, times the up rows, is what the down-projection reads."""
    model, _ = tiny_host(family)
    spec, seen = describe(model), {}
    ids = torch.randint(0, 256, (4, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), HostHooks(model, spec) as hooks:
        hooks.on_tap(Tap(1, "ffn_input"), lambda x: seen.update(x=x))
        hooks.on_units("neurons", 1, lambda h: seen.update(h=h))
        model(ids)
    weights, biases, norms = ffn_weights(model, spec, 1)
    made = {role: seen["x"] @ w.T + biases.get(role, 0) for role, w in weights.items()}
    act = activation(spec)
    h = act(made["gate"]) * made["up"] if spec.gated else act(made["up"])
    torch.testing.assert_close(h, seen["h"], rtol=1e-4, atol=1e-6)
    assert norms.shape == (spec.F,)
    moments = ffn_moments(model, spec, ids, batch=3)
    rows = seen["x"].flatten(0, 1).double()
    torch.testing.assert_close(moments[1], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


def test_bytes_are_packed_codes_scales_and_offsets() -> None:
    model, _ = tiny_host("llama")
    spec = describe(model)
    made = predictor(model, "sketch", bits=3, up_bits=1).quantize()
    row = spec.D * 3 // 8 + spec.D // 8 + 5 * 4  # gate and up, two scales and floors, one offset
    assert made.bytes_for(("neurons",)) == spec.L * spec.F * row
    heads = spec.L * (8 * (spec.D + 4) + spec.H * (8 + 4 + 4))
    assert made.bytes_for(("heads",)) == heads and made.nbytes == heads + spec.L * spec.F * row
    policy = Sketch(made, Budget(neurons=0.5))
    policy.bind(model)
    assert policy.predictor_bytes == spec.L * spec.F * row


def test_a_sketch_of_an_ffn_with_biases_has_them() -> None:
    model, _ = tiny_host("opt")
    spec = describe(model)
    made = predictor(model, "sketch")
    assert made.params["bias"] and made.params["gated"] is False
    _, biases, _ = ffn_weights(model, spec, 0)
    assert made.up.bias is not None
    torch.testing.assert_close(made.up.bias[0].detach(), biases["up"])


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"bits": 5}, "predictor.bits=5"),
        ({"up_bits": 0}, "predictor.up_bits=0"),
        ({"rank": 0}, "predictor.rank=0"),
        ({"tokens": 0}, "predictor.tokens=0"),
        ({"heads_site": "ffn_input"}, "predictor.heads_site"),
    ],
)
def test_refused_settings(params: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SketchPredictor.for_host(describe(tiny_host("llama")[0]), **params)  # type: ignore[arg-type]


def test_it_needs_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One command makes it; its folder gives the scores that were measured."""
    given = ("predictor=sketch", "trainer.max_steps=0")
    cfg = configure(tmp_path, "host=tiny", "text=synthetic", "text.block=64", *SMALL[1:], *given)
    train.main(cfg)
    folder = last_line(capsys)
    made = gnomon.load_predictor(folder)
    assert isinstance(made, SketchPredictor) and made.quantized
    config = json.loads((folder / "config.json").read_text())
    assert config["metrics"]["neurons"]["recall"] > config["metrics"]["neurons"]["static"]["recall"]
    assert config["objective"] == "none" and config["metrics"]["rounding"]["tokens"] >= 2048
    assert config["weights"] == "2-bit copies, int8"
    assert "copies of the\nhost" in (folder / "README.md").read_text()
    assert config["metrics"]["heads"]["recall"] == config["metrics"]["heads"]["static"]["recall"]


def test_end_to_end_training_improves_a_one_bit_sketch() -> None:
    """The copies themselves are trained: less divergence, other codes."""
    model, tokenizer = tiny_host()
    spec = describe(model)
    net = SketchPredictor.for_host(spec, bits=1, tune=True, tokens=2048)
    sketch(net, model, tokenizer, spec, SyntheticText(block=32, tokens=4096))
    net.info = replace(net.info, host=spec.name, spec_hash=spec.hash)
    before = copy.deepcopy(net).quantize()
    found = fitted(net, Kl(balanced=True), 40, lr=2e-3, warm=True)["student"]
    assert found["kl"] < 0.9 * found["start"]["kl"]
    assert not torch.equal(before.up.codes, net.up.codes)
    assert found["float"]["kl"] == pytest.approx(found["kl"], rel=1e-3)  # rounding is in training


def test_row_objectives_train_the_heads_alone() -> None:
    model, tokenizer = tiny_host()
    spec = describe(model)
    net = SketchPredictor.for_host(spec, tokens=2048)
    sketch(net, model, tokenizer, spec, SyntheticText(block=32, tokens=4096))
    before = copy.deepcopy(net).quantize()
    metrics = fitted(net, Bce(), 80, lr=2e-2, density={"heads": 0.5, "neurons": 0.5})
    assert torch.equal(before.up.codes, net.up.codes)
    assert torch.equal(before.neurons_bias, net.neurons_bias)
    assert metrics["heads"]["recall"] > metrics["heads"]["static"]["recall"]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_training_goes_on_from_a_folder(family: str, tmp_path: Path) -> None:
    """Biases are read off the host, not configured: they come with the folder."""
    model, _ = tiny_host(family)
    spec = describe(model)
    made = predictor(model, "sketch", bits=3)
    made.save_pretrained(tmp_path)
    net = SketchPredictor.for_host(spec, bits=3, rank=8, tune=True)
    start_from(net, str(tmp_path), spec)
    assert net.bias == (family == "opt") and not net.quantized
    assert all(p.requires_grad for copy in net.copies for p in copy.parameters())
    net.quantize()
    x = torch.randn(4, spec.D)
    expected = made.quantize().score("neurons", 1, x)
    torch.testing.assert_close(net.score("neurons", 1, x), expected, rtol=1e-4, atol=1e-3)


def test_what_would_train_nothing_or_harm_is_refused() -> None:
    model, _ = tiny_host()
    net, spec = predictor(model, "sketch"), describe(model)
    with pytest.raises(ValueError, match=r"predictor\.tune=true under|tune=true, its heads"):
        Student(model, spec, net, Budget(neurons=0.5))
    tuned = SketchPredictor.for_host(spec, tune=True)
    density = {"heads": 0.5, "neurons": 0.5}
    with pytest.raises(ValueError, match="predictor.tune=true with objective=bce"):
        make_module(None, tuned, Bce(), Magnitude(), torch.optim.AdamW, None, density, False)
    with pytest.raises(ValueError, match="this sketch is empty"):
        Sketch(SketchPredictor.for_host(spec).quantize(), Budget(neurons=0.5)).bind(model)


def test_neurons_that_are_kept_whole_train_no_copies() -> None:
    model, _ = tiny_host()
    net = predictor(model, "sketch", tune=True)
    Student(model, describe(model), net, Budget(heads=0.5))
    trained = {name.partition(".")[0] for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {"inner", "outputs"}


def test_a_shared_set_adds_magnitudes_not_their_logs() -> None:
    """Else a neuron that is strong in one row and dead in another would lose to a middling one."""
    model, _ = tiny_host()
    policy = Sketch(predictor(model, "sketch").quantize(), Budget(neurons=0.25), batch="shared")
    policy.bind(model)
    scores = torch.full((2, 1, 4), 1.0).log()
    scores[:, 0, 0] = torch.tensor([3.0, 1e-6]).log()
    live = torch.ones(2, 1, dtype=torch.bool)
    seen = Seen(lambda tap: scores, torch.zeros(2, 1, dtype=torch.long), live, {})
    total = policy.combine("neurons", scores, seen)
    assert int(total.argmax()) == 0
    torch.testing.assert_close(
        total[0, 0], torch.tensor([3.0, 2.0, 2.0, 2.0]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_the_operator_scores_as_training_did(family: str) -> None:
    """Packed codes, scales, biases and floors, each in its place."""
    model, _ = tiny_host(family)
    spec = describe(model)
    made = predictor(model, "sketch", bits=3, up_bits=2)
    assert made.floors.gt(0).all()
    x = torch.randn(5, spec.D)
    trained = [made.score("neurons", layer, x).detach() for layer in range(spec.L)]
    made.quantize()
    for layer in range(spec.L):
        found = made.score("neurons", layer, x)
        torch.testing.assert_close(found, trained[layer], rtol=1e-4, atol=1e-4)
