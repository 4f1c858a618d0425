"""Rules of truth on every host, and docs/hosts.md from what they find."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import gnomon
import gnomon.host as module
from cases import GATED_ONLY, POLICIES
from gnomon.accounting import HostBytes, account, expected_density
from gnomon.budget import Budget
from gnomon.engine.engine import Engine
from gnomon.host import UnsupportedHostError, describe, weight
from gnomon.policies import DenseInt8, Shadow
from gnomon.tiny import FAMILIES, VOCAB, tiny_host
from hosts import (
    CHECKS,
    HALF,
    HOSTS,
    MARKS,
    NO_PLAIN_LINEARS,
    PAGE,
    PLAIN_FFN,
    Host,
    forward,
    gathers,
    ids_of,
    row,
    static,
    table,
)
from tolerances import TOLERANCE, relative_rms

_rows: dict[str, str] = {}
hosts = pytest.mark.parametrize("host", HOSTS, ids=[h.title for h in HOSTS])


@hosts
def test_rules_of_truth(host: Host) -> None:
    """Every check of ``hosts.CHECKS`` passes, or names why the host is refused there."""
    _rows[host.title] = row(host)
    assert _rows[host.title].count("| yes") >= 2, _rows[host.title]  # mask and harvest


def test_the_table_in_the_docs_is_what_passes() -> None:
    rows = [_rows.get(host.title) or row(host) for host in HOSTS]
    shown = PAGE.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()
    assert shown == table(rows), f"run: {MARKS[0].split(': ')[1].removesuffix(' -->')}"


def test_every_tiny_family_is_in_the_table() -> None:
    assert {host.family for host in HOSTS} == set(FAMILIES)
    assert len({host.title for host in HOSTS}) == len(HOSTS)


# Pairwise: every policy meets several hosts, every host at least one policy.
def _refused(name: str, host: Host) -> bool:
    gateless = name in GATED_ONLY and host.family in PLAIN_FFN
    return gateless or ("ffsplit" in name and host.family in NO_PLAIN_LINEARS)


PAIRS = [
    (name, host)
    for i, name in enumerate(POLICIES)
    for host in (HOSTS[(i + shift) % len(HOSTS)] for shift in (0, 9, 18))
    if not _refused(name, host)
]


@pytest.mark.parametrize(("name", "host"), PAIRS, ids=lambda x: getattr(x, "title", x))
def test_generate_equals_teacher_forcing(name: str, host: Host) -> None:
    """Cached steps and one cacheless forward take the same sets and give the same logits."""
    model, _ = host.load()
    policy = POLICIES[name](model, HALF)
    prompt, more = 6, 3
    ids = ids_of(2, prompt + more)
    whole, taken = forward(model, policy, ids, "mask", protocol="decode", prompt_length=prompt)
    steps: dict[Any, list[torch.Tensor]] = defaultdict(list)
    logits, cache = [], None
    with torch.no_grad(), gnomon.sparsify(model, policy, backend="mask") as session:
        session.on_decision = lambda kind, layer, keep, _: steps[kind, layer].append(keep.clone())
        for part in (ids[:, :prompt], *ids[:, prompt:].split(1, 1)):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    assert taken and all(torch.equal(torch.cat(steps[key], 1), keep) for key, keep in taken.items())
    assert relative_rms(torch.cat(logits, 1), whole) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "olmo2"])
def test_triton_on_fused_and_mixing_hosts(family: str, device: torch.device) -> None:
    assert gathers(Host(family, family, {"num_hidden_layers": 2}), "triton") == "yes"


@hosts
def test_all_bytes_are_accounted(host: Host) -> None:
    """A dense token reads every parameter once, but for tables, of which it reads one row."""
    model, spec = host.load()
    counted = HostBytes.of(model, spec)
    parts = (counted.q_out, counted.kv_proj, counted.ffn, counted.whole, counted.head)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    skipped = sum(t.numel() - t.shape[1] for t in tables)
    tied = weight(model, spec.head) is weight(model, spec.embed)
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(parts) + counted.other == parameters - skipped + (counted.head if tied else 0)
    linears = sum(weight(model, path).numel() for x in spec.layers for path in x.linears)
    assert sum(parts[:-1]) == linears
    assert counted.kv_per_token == spec.L * 2 * spec.G * spec.d
    policy = static(spec)
    policy.bind(model, spec)
    found = account(policy, expected_density(policy, HALF))
    assert 0.2 < found.byte_density < 1
    assert (counted.whole > 0) == (host.family == "olmo2")


@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox"])
def test_dense_int8_rounds_every_output_by_its_own_scale(family: str) -> None:
    model, _ = tiny_host(family)
    spec = describe(model)
    paths = [path for layer in spec.layers for path in layer.linears]
    before = {path: weight(model, path).detach().clone() for path in paths}
    dense = model(ids_of()).logits
    with gnomon.sparsify(model, DenseInt8(), protocol="all"), torch.no_grad():
        for path in paths:
            step = before[path].abs().amax(1, keepdim=True) / 127
            assert ((weight(model, path) - before[path]).abs() <= step * 0.501).all()
            assert not torch.equal(weight(model, path), before[path])
        assert 0 < relative_rms(model(ids_of()).logits, dense) < 0.2
    assert all(torch.equal(weight(model, path), before[path]) for path in paths)


def test_an_unknown_order_of_rows_is_never_gathered() -> None:
    """CodeGen holds q, v, k for each of four slices: ``mask`` runs it, gathering is refused."""
    config = CONFIG_MAPPING["codegen"](
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    spec = describe(model)
    assert spec.qkv == "unknown"
    dense = model(ids_of()).logits
    masked, taken = forward(model, static(spec), ids_of(), "auto")
    assert taken and not torch.allclose(masked, dense)
    with (
        pytest.raises(ValueError, match=r"backend='torch' .*order that is not known.*backend=mask"),
        gnomon.sparsify(model, static(spec), backend="torch"),
    ):
        pass
    with pytest.raises(UnsupportedHostError, match="q, k and v are one linear"):
        Engine(model, None)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("stablelm", {"use_parallel_residual": True}, "norms of its layers|parallel_residual"),
        ("llama", {"clip_qkv": 1.0}, "clip_qkv=1.0"),
        ("llama", {"use_parallel_residual": True}, "use_parallel_residual=True"),
        ("llama", {"attn_temperature_tuning": True}, "attn_temperature_tuning=True"),
        ("llama", {"alibi": True}, "alibi=True"),
        ("granite", {"logits_scaling": 2.0, "residual_multiplier": 1.0}, "logits_scaling=2.0"),
    ],
)
def test_the_engine_refuses_what_it_does_not_compute(
    family: str, config: dict[str, Any], reason: str
) -> None:
    """A flag that is True must not pass for a factor that is 1."""
    model, _ = tiny_host(family, **({"embedding_multiplier": 1.0} | config))
    with pytest.raises(UnsupportedHostError, match=reason):
        Engine(model, None)


def test_a_norm_over_all_heads_is_found_by_trial() -> None:
    apart = {family: describe(tiny_host(family)[0]).heads_apart for family in FAMILIES}
    assert [family for family, alone in apart.items() if not alone] == ["olmo2"]
    for over, expected in ((32, False), (8, True)):
        model, _ = tiny_host("qwen3")
        for layer in model.model.layers:
            layer.self_attn.q_norm = _OverHeads(over)
        assert describe(model).heads_apart is expected


@pytest.mark.parametrize("family", ["opt", "qwen3", "olmo2", "llama"])
def test_a_host_without_numbers_is_told_by_shapes(family: str) -> None:
    """No trial on the meta device: bytes are accounted there as on the real one."""
    model, _ = tiny_host(family)
    with torch.device("meta"):
        empty, _ = tiny_host(family)
    real, meta = describe(model), describe(empty.to("meta"))
    apart = (meta.heads_apart, meta.neurons_apart)
    assert apart == (real.heads_apart, real.neurons_apart)
    assert replace(HostBytes.of(empty, meta), dtype="") == replace(
        HostBytes.of(model, real), dtype=""
    )


class _OverHeads(nn.Module):
    """An RMS norm of queries (B, T, H, d) over their last ``width`` numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.width = nn.Parameter(torch.ones(width)), width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(-2).unflatten(-1, (-1, self.width))
        return (nn.functional.rms_norm(flat, (self.width,)) * self.weight).reshape(x.shape)


def test_a_norm_over_all_neurons_is_found_and_not_skipped_into() -> None:
    """Rows of gate and up are all computed where a zero among them would change the rest."""
    model, _ = tiny_host("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = _Normed(layer.mlp.down_proj)
    spec = describe(model)
    assert spec.layers[0].down.endswith("mlp.down_proj.down_proj")
    masked, found = (forward(model, static(spec), ids_of(1), name)[0] for name in ("mask", "torch"))
    assert relative_rms(found, masked) < TOLERANCE[torch.float32]


class _Normed(nn.Module):
    """A down projection behind an RMS norm over the neurons, as in BitNet."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(linear.in_features))
        self.down_proj = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.rms_norm(x, (x.shape[-1],)) * self.weight)


def test_a_predictor_reads_a_fused_host_and_keeps_its_hash() -> None:
    """Taps, shadow predictions and the identity of the host on Phi-3, in every dtype."""
    model, _ = tiny_host("phi3")
    policy = POLICIES["shadow"](model, Budget(neurons=0.5))
    assert isinstance(policy, Shadow)
    logits, taken = forward(model, policy, ids_of(), "torch", protocol="decode", prompt_length=12)
    assert torch.isfinite(logits).all() and taken["neurons", 2].float().mean() < 1
    assert describe(copy.deepcopy(model).bfloat16()).hash == describe(model).hash


def test_checks_catch_a_host_that_computes_heads_otherwise() -> None:
    """Planted: a Phi-3 whose fused rows are said to be in groups fails the checks."""
    true = module._laid_out
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "_laid_out", lambda m, s: replace(true(m, s), qkv="groups"))
    with patch.context(), pytest.raises(AssertionError, match="torch is not mask|not a deleted"):
        CHECKS["mask"](Host("planted", "phi3"))
        CHECKS["`torch`, `triton`"](Host("planted", "phi3"))
    patch.undo()
