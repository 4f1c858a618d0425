"""The structural host adapter over every family, and the structures it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from gnomon.hooks import HostHooks
from gnomon.host import HostSpec, Tap, UnsupportedHostError, describe, module, weight
from gnomon.tiny import FAMILIES, VOCAB, tiny_host

# (family, overrides of its config, facts that the spec must state)
PLAIN: dict[str, Any] = {"G": 4, "gated": False}
FACTS: dict[str, dict[str, Any]] = {
    "gemma2": {"activation": "gelu_pytorch_tanh"},
    "phi3": {"qkv": "blocks", "gate_up": "blocks"},
    "opt": PLAIN | {"activation": "relu"},
    "gpt2": PLAIN | {"qkv": "blocks", "activation": "gelu_new"},
    "gpt_neox": PLAIN | {"qkv": "groups", "activation": "gelu"},
    "falcon": {"gated": False, "G": 1, "qkv": "blocks"},
    "bloom": PLAIN | {"qkv": "groups", "F": 128, "activation": "gelu_new"},
    "phi": PLAIN,
    "starcoder2": {"gated": False},
    "glm4": {"gate_up": "blocks"},
}
HOSTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    *((f, {}, {}) for f in FAMILIES),
    ("opt", {"do_layer_norm_before": False}, {"gated": False}),
    ("opt", {"enable_bias": False}, {"gated": False}),
    ("opt", {"word_embed_proj_dim": 16}, {"D": 32}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, {"G": 2, "qkv": "groups"}),
    ("falcon", {"multi_query": False, "alibi": True}, {"G": 4, "qkv": "groups"}),
    ("gpt_neox", {"use_parallel_residual": False}, {}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}, {}),
    ("cohere", {"use_qk_norm": True}, {}),
    ("llama", {"tie_word_embeddings": True}, {"tied": True}),
    ("llama", {"tie_word_embeddings": False}, {"tied": False}),
    ("llama", {"num_key_value_heads": 4}, {"G": 4}),
    ("llama", {"num_key_value_heads": 1}, {"G": 1}),
    ("llama", {"head_dim": 16}, {"d": 16, "D": 32}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"gated": True}),
    ("qwen2", {"tie_word_embeddings": True}, {"tied": True}),
]
IDS = ["-".join([f, *(f"{k}={v}" for k, v in o.items())]) for f, o, _ in HOSTS]


@pytest.fixture(params=HOSTS, ids=IDS)
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, HostSpec, str, dict[str, Any]]:
    family, overrides, facts = request.param
    model, _ = tiny_host(family, **overrides)
    return model, describe(model), family, facts


def test_spec_states_sizes_and_structure(case) -> None:
    model, spec, family, facts = case
    expected = {
        "family": family,
        "name": f"tiny-{family}-0",
        "L": 3,
        "H": 4,
        "G": 2,
        "d": 8,
        "D": 32,
        "F": 48,
        "V": VOCAB,
        "gated": True,
        "activation": spec.activation,
        "tied": model.config.tie_word_embeddings,
        "qkv": "separate",
        "gate_up": "separate",
    }
    expected |= FACTS.get(family, {}) | facts
    assert {k: getattr(spec, k) for k in expected} == expected
    assert spec.activation != "unknown"
    assert len(spec.layers) == spec.L
    assert len(spec.fingerprint) == len(spec.hash) == 16
    assert module(model, spec.embed) is model.get_input_embeddings()
    assert module(model, spec.head) is model.get_output_embeddings()


def test_paths_point_at_linears_of_the_stated_shape(case) -> None:
    model, spec, _, _ = case
    kv, neurons = (spec.G * spec.d, spec.D), (spec.F, spec.D)
    shapes = {"q": (spec.H * spec.d, spec.D), "k": kv, "v": kv, "up": neurons}
    if spec.qkv != "separate":
        shapes |= dict.fromkeys("qkv", ((spec.H + 2 * spec.G) * spec.d, spec.D))
    if spec.gated:
        shapes["gate"] = neurons
    if spec.gate_up != "separate":
        shapes |= dict.fromkeys(("gate", "up"), (2 * spec.F, spec.D))
    shapes |= {"out": (spec.D, spec.H * spec.d), "down": (spec.D, spec.F)}
    fused = 2 * (spec.qkv != "separate") + (spec.gate_up != "separate")
    for i, layer in enumerate(spec.layers):
        assert f".{i}" in layer.path
        assert len(set(layer.linears)) == len(layer.linears) == len(shapes) - fused
        for role, shape in shapes.items():
            assert tuple(weight(model, getattr(layer, role)).shape) == shape, (layer.path, role)


def test_unit_tensors_and_taps_have_their_shapes(case) -> None:
    model, spec, _, _ = case
    ids = torch.randint(0, 256, (2, 5))
    seen: dict[str, tuple[int, ...]] = {}
    with HostHooks(model, spec) as hooks, torch.no_grad():
        hooks.on_units("heads", 1, lambda x: seen.update(heads=tuple(x.shape)))
        hooks.on_units("neurons", 2, lambda x: seen.update(neurons=tuple(x.shape)))
        for site in ("layer_input", "attn_input", "attn_context", "ffn_input"):
            tap = Tap(1, site)
            hooks.on_tap(tap, lambda x, s=site: seen.update({s: tuple(x.shape)}))
        model(input_ids=ids)
    assert seen == {
        "heads": (2, 5, spec.H, spec.d),
        "neurons": (2, 5, spec.F),
        **{s: (2, 5, spec.width(s)) for s in ("layer_input", "attn_input", "attn_context")},
        "ffn_input": (2, 5, spec.D),
    }


def test_hooks_leave_no_trace(case) -> None:
    model, spec, _, _ = case
    ids = torch.randint(0, 256, (1, 6))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with HostHooks(model, spec) as hooks:
            hooks.on_units("neurons", 0, torch.zeros_like)
            changed = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert not torch.equal(before, changed)
    assert torch.equal(before, after)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_hash_is_the_same_in_every_dtype_and_differs_across_seeds(family: str) -> None:
    model, _ = tiny_host(family)
    spec = describe(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        again = describe(copy.deepcopy(model).to(dtype))
        assert again == spec  # layouts found by trial too
    other = describe(tiny_host(family, seed=1)[0])
    assert other.fingerprint != spec.fingerprint
    assert other.hash != spec.hash


def test_hash_does_not_depend_on_name_or_revision() -> None:
    model, _ = tiny_host("llama")
    spec = describe(model)
    model.config._name_or_path = "/somewhere/else/my-model/"
    model.config._commit_hash = "abc"
    renamed = describe(model)
    assert (renamed.name, renamed.revision) == ("my-model", "abc")
    assert renamed.hash == spec.hash


def test_hash_depends_on_structure() -> None:
    hashes = {
        describe(tiny_host("llama", **o)[0]).hash
        for o in ({}, {"num_key_value_heads": 4}, {"intermediate_size": 40}, {"hidden_act": "relu"})
    }
    assert len(hashes) == 4


def _random(family: str, **config: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config))


_MOE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
_MOE |= {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
MIXTURES = {
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "olmoe": {"num_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_mixture_of_experts_is_refused_by_name(family: str) -> None:
    model = _random(family, **(_MOE | MIXTURES[family]))
    with pytest.raises(UnsupportedHostError, match=rf"'{family}' is a mixture.*router already"):
        describe(model)


def test_unknown_structure_is_refused_with_what_was_found() -> None:
    model = _random("mamba", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(UnsupportedHostError) as error:
        describe(model)
    text = str(error.value)
    assert "no linear found for q, k, v" in text
    assert "mixer.in_proj" in text  # what was found
    assert "ROLES in gnomon/roles.py" in text  # how to add it


def test_exact_tensor_parallel_mode_is_refused() -> None:
    """It computes projections on slices of their weights, where no hook sees the units."""
    model, _ = tiny_host("bloom", slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(UnsupportedHostError, match="slow_but_exact=True with pretraining_tp=2"):
        describe(model)


def test_missing_role_is_named() -> None:
    model, _ = tiny_host("llama")
    for layer in model.model.layers:
        layer.mlp.wide = layer.mlp.up_proj
        del layer.mlp.up_proj
    with pytest.raises(UnsupportedHostError, match=r"no linear found for up; linears found.*wide"):
        describe(model)


def test_layers_that_differ_are_refused() -> None:
    model, _ = tiny_host("llama")
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 40, bias=False)
    with pytest.raises(UnsupportedHostError, match=r"layers\.2 differs from .*layers\.0 in up"):
        describe(model)


def test_unknown_site_is_refused() -> None:
    with pytest.raises(ValueError, match="site='nowhere' is unknown; use one of layer_input"):
        Tap(0, "nowhere")  # type: ignore[arg-type]


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"host\.family='bert' is unknown; use one of llama"):
        tiny_host("bert")


@pytest.mark.parametrize("role", ["q", "k", "v", "out", "gate", "up", "down"])
def test_other_weights_anywhere_are_another_host(role: str) -> None:
    model, _ = tiny_host("llama")
    before = describe(model).hash
    with torch.no_grad():
        changed = weight(model, getattr(describe(model).layers[1], role))
        changed.copy_(torch.randn_like(changed))
    assert describe(model).hash != before


def test_other_embeddings_are_another_host() -> None:
    model, _ = tiny_host("llama")
    before = describe(model).hash
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_()
    assert describe(model).hash != before
