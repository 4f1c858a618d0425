"""One decode step: the dense model's logits, the mask's semantics, and nothing read in vain."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from cases import FAMILIES
from gnomon.engine.arithmetic import read_arithmetic
from gnomon.engine.cache import Cache
from gnomon.engine.ops import ops
from gnomon.engine.step import Active, Decider, KeepAll, decode_step
from gnomon.engine.weights import StepWeights, compacted, laid_out
from gnomon.hooks import HostHooks
from gnomon.host import KINDS, HostSpec, Tap, UnitKind, UnsupportedHostError, describe
from gnomon.tiny import tiny_host
from tolerances import TOLERANCE, relative_rms

PROMPT, STEPS = 10, 20
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("mistral", {"sliding_window": 8}),
    ("gemma2", {"sliding_window": 8}),
    (
        "gemma3_text",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1}),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    ("stablelm", {"partial_rotary_factor": 0.5}),
    ("granite", {}),
]
OTHERS: dict[str, dict[str, Any]] = {  # hosts that no adapter was written for
    name: {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 258,
        "max_position_embeddings": 64,
        "pad_token_id": 256,
        "bos_token_id": None,
        "eos_token_id": 257,
    }
    for name in ("smollm3", "stablelm", "granite", "helium", "hunyuan_v1_dense", "olmo2", "cohere")
}


class Fixed(KeepAll):
    """Active sets that are given."""

    def __init__(self, sets: dict[tuple[UnitKind, int], Active], taps: Sequence[Tap] = ()) -> None:
        self.sets, self.taps = sets, taps
        self.seen: dict[Tap, Tensor] = {}

    def see(self, tap: Tap, hidden: Tensor) -> None:
        self.seen[tap] = hidden

    def active(self, kind: UnitKind, layer: int) -> Active | None:
        return self.sets.get((kind, layer))


def host(family: str, **overrides: Any) -> tuple[PreTrainedModel, HostSpec]:
    if family in OTHERS:
        config = CONFIG_MAPPING[family](**(OTHERS[family] | overrides))
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        return model, describe(model)
    layers = {"num_hidden_layers": len(overrides.get("layer_types", "123"))}
    model = tiny_host(family, **(layers | overrides))[0]
    return model, describe(model)


def draw(spec: HostSpec, rows: int, generator: torch.Generator) -> tuple[Any, Any]:
    """Random active sets: as masks (R, N), and as lists. A quarter of the units no row keeps."""
    masks: dict[tuple[UnitKind, int], Tensor] = {}
    sets: dict[tuple[UnitKind, int], Active] = {}
    for kind in KINDS:
        n, k = spec.units(kind), spec.units(kind) // 2
        for layer in range(spec.L):
            pool = torch.randperm(n, generator=generator)[: n - n // 4]
            order = [torch.randperm(len(pool), generator=generator)[:k] for _ in range(rows)]
            index = pool[torch.stack(order)].int()
            masks[kind, layer] = torch.zeros(rows, n, dtype=torch.bool).scatter(
                1, index.long(), True
            )
            places = torch.arange(k, dtype=torch.int32).repeat(rows, 1)
            slot = torch.full((rows, n), -1, dtype=torch.int32).scatter(1, index.long(), places)
            groups = torch.arange(2 * spec.G, dtype=torch.int32).repeat(rows, 1)
            kvq = torch.cat([groups, index + 2 * spec.G], 1) if kind == "heads" else None
            crowded = rows > 1 and (kind == "heads" or rows * k > n)
            wanted = (slot >= 0).any(0) if crowded else None
            sets[kind, layer] = Active(index, None, slot, kvq, wanted=wanted)
    return masks, sets


def masked(model: PreTrainedModel, spec: HostSpec, masks: Any, ids: Tensor) -> tuple[Any, Tensor]:
    """The prompt's dense cache, and logits of the steps after it with units multiplied by 0/1."""
    on = False
    with HostHooks(model, spec) as hooks, torch.no_grad():
        for (kind, layer), keep in masks.items():

            def fn(units: Tensor, keep: Tensor = keep, kind: str = kind) -> Tensor | None:
                mask = keep[:, None]
                mask = mask[..., None] if kind == "heads" else mask
                return torch.where(mask, units, 0.0) if on else None

            hooks.on_units(kind, layer, fn)
        past = model(ids[:, :PROMPT], use_cache=True).past_key_values
        start = deepcopy(past)
        on = True
        steps = [
            model(ids[:, t : t + 1], past_key_values=past, use_cache=True).logits[:, 0]
            for t in range(PROMPT, PROMPT + STEPS)
        ]
    return start, torch.stack(steps, 1)


def run(
    model: PreTrainedModel,
    spec: HostSpec,
    weights: StepWeights,
    past: Any,
    ids: Tensor,
    decider: Decider,
    backend: str = "torch",
    lengths: Sequence[int] | None = None,
    steps: int = STEPS,
) -> Tensor:
    """Logits of the steps after the prompt."""
    rows = ids.shape[0]
    cache = Cache(spec, rows, 64, next(model.parameters()).dtype, ids.device)
    cache.fill(past, torch.tensor(lengths or [PROMPT] * rows, dtype=torch.int32))
    math = read_arithmetic(model, spec, cache.capacity)
    logits = [
        decode_step(ids[:, t], cache, weights, math, spec, decider, ops(backend))
        for t in range(PROMPT, PROMPT + steps)
    ]
    return torch.stack(logits, 1)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=str)
def test_dense_step_is_the_host(family: str, overrides: dict[str, Any]) -> None:
    model, spec = host(family, **overrides)
    ids = torch.randint(0, 256, (2, PROMPT + STEPS))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits[:, PROMPT:]
        past = model(ids[:, :PROMPT], use_cache=True).past_key_values
    with laid_out(model, spec) as weights:
        y = run(model, spec, weights, past, ids, KeepAll())
        with torch.no_grad():
            inside = model(ids).logits[:, PROMPT:]
    assert relative_rms(y, expected) < TOLERANCE[torch.float32]
    assert relative_rms(inside, expected) < TOLERANCE[torch.float32]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "batch", "own"),
    [
        *((family, 2, own) for family in FAMILIES for own in (False, True)),
        *((family, batch, True) for family in ("llama", "opt") for batch in (4, 8, 24)),
    ],
)
def test_sparse_step_is_the_mask(family: str, batch: int, own: bool) -> None:
    """With one set for all sequences or a set each; what none of them keeps may be anything."""
    model, spec = host(family)
    ids = torch.randint(0, 256, (batch, PROMPT + STEPS))
    masks, sets = draw(spec, batch if own else 1, torch.Generator().manual_seed(1))
    past, expected = masked(model, spec, masks, ids)
    with laid_out(model, spec) as weights:
        _forget_unselected(weights, spec, masks)
        y = run(model, spec, weights, past, ids, Fixed(sets))
    assert relative_rms(y, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("family", "batch", "rows"),
    [
        *(("llama", 2, 1), ("opt", 2, 1), ("gemma3_text", 2, 2), ("llama", 8, 1)),
        *(("llama", 4, 4), ("opt", 4, 4), ("llama", 8, 8), ("opt", 24, 24)),
    ],
)
def test_triton_step_is_the_torch_step(
    family: str, batch: int, rows: int, device: torch.device
) -> None:
    model, spec = host(family, num_hidden_layers=2 if batch < 8 else 1)
    model.to(device)
    ids = torch.randint(0, 256, (batch, PROMPT + STEPS), device=device)
    masks, sets = draw(spec, rows, torch.Generator().manual_seed(1))
    chosen = Fixed({key: _to(active, device) for key, active in sets.items()})
    with torch.no_grad():
        past = model(ids[:, :PROMPT], use_cache=True).past_key_values
    with laid_out(model, spec) as weights:
        for decider in (KeepAll(), chosen) if batch == 2 else (chosen,):
            if decider is chosen:
                _forget_unselected(weights, spec, masks)
            steps = 2 if batch == 2 and decider is chosen else 1
            a, b = (
                run(model, spec, weights, past, ids, decider, name, steps=steps)
                for name in ("torch", "triton")
            )
            assert relative_rms(b, a) < TOLERANCE[torch.float32]


def test_rows_of_different_length() -> None:
    model, spec = host("llama")
    ids = torch.randint(0, 256, (2, PROMPT + STEPS))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        past = model(
            ids[:, :PROMPT],
            attention_mask=mask[:, :PROMPT],
            position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, :PROMPT],
            use_cache=True,
        ).past_key_values
        whole, short = model(ids[:1]).logits, model(ids[1:, 4:]).logits
    with laid_out(model, spec) as weights:
        y = run(model, spec, weights, past, ids, KeepAll(), lengths=[PROMPT, PROMPT - 4])
    assert relative_rms(y[0], whole[0, PROMPT:]) < TOLERANCE[torch.float32]
    assert relative_rms(y[1], short[0, PROMPT - 4 :]) < TOLERANCE[torch.float32]


def test_taps_are_the_hosts_hidden_states() -> None:
    model, spec = host("llama")
    ids = torch.randint(0, 256, (1, PROMPT + STEPS))
    taps = [
        Tap(layer, site)  # type: ignore[arg-type]
        for layer in (0, 1)
        for site in ("layer_input", "attn_input", "attn_context", "ffn_input")
    ]
    found: dict[Tap, Tensor] = {}
    masks, sets = draw(spec, 1, torch.Generator().manual_seed(1))
    with HostHooks(model, spec) as hooks:
        for tap in taps:
            hooks.on_tap(tap, lambda h, tap=tap: found.update({tap: h}))  # type: ignore[misc]
        past, _ = masked(model, spec, masks, ids)
    decider = Fixed(sets, taps)
    with laid_out(model, spec) as weights:
        run(model, spec, weights, past, ids, decider)
    for tap in taps:
        assert relative_rms(decider.seen[tap], _context(found[tap][:, 0], tap, masks, spec)) < 1e-5


def test_int8_rows_are_their_rounded_values() -> None:
    model, spec = host("llama")
    ids = torch.randint(0, 256, (1, PROMPT + STEPS))
    with torch.no_grad():
        past = model(ids[:, :PROMPT], use_cache=True).past_key_values
    with laid_out(model, spec) as weights:
        small = weights.quantized()
        assert small.layers[0].up.nbytes < 0.5 * weights.layers[0].up.nbytes
        y = run(model, spec, small, past, ids, KeepAll())
        for a, b in zip(weights.layers, small.layers, strict=True):
            for name in ("kvq", "out_t", "up", "gate", "down_t"):
                matrix = getattr(b, name)
                getattr(a, name).weight.copy_(matrix.weight * matrix.scale[:, None])
        weights.head.weight.copy_(small.head.weight * small.head.scale[:, None])
        rounded = run(model, spec, weights, past, ids, KeepAll())
    assert relative_rms(y, rounded) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("drop", [False, True], ids=["keep", "drop"])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
def test_compacted_weights_are_the_mask(family: str, drop: bool) -> None:
    model, spec = host(family)
    ids = torch.randint(0, 256, (2, PROMPT + STEPS))
    masks, sets = draw(spec, 1, torch.Generator().manual_seed(1))
    for layer in range(spec.L):  # the first group's heads alone: another group is idle
        masks["heads", layer] = (torch.arange(spec.H) < spec.group_size)[None]
        sets["heads", layer] = _of_groups(spec, [0], drop)
    sets = {key: replace(active, compacted=True, early=True) for key, active in sets.items()}
    kept = {
        key: (active.index if active.kvq is None else active.kvq)[0].long()
        for key, active in sets.items()
    }
    past, expected = masked(model, spec, masks, ids)
    with laid_out(model, spec) as weights:
        _forget_unselected(weights, spec, masks)
        if drop:
            for layer in weights.layers:
                layer.kvq.weight.unflatten(0, (-1, spec.d))[1 : spec.G] = torch.nan
                layer.kvq.weight.unflatten(0, (-1, spec.d))[spec.G + 1 : 2 * spec.G] = torch.nan
        small = compacted(weights, spec, kept)
        assert small.layers[0].kvq.weight.shape[0] < weights.layers[0].kvq.weight.shape[0]
        again = compacted(weights, spec, kept, small)
        assert again.layers[0].kvq.weight.data_ptr() == small.layers[0].kvq.weight.data_ptr()
        y = run(model, spec, small, past, ids, Fixed(sets))
        lists = {key: replace(active, compacted=False) for key, active in sets.items()}
        in_place = run(model, spec, weights, past, ids, Fixed(lists))
    assert relative_rms(y, expected) < TOLERANCE[torch.float32]
    assert relative_rms(in_place, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_step_is_the_host(dtype: torch.dtype) -> None:
    """Nearer to the host in fp32 than the host in half precision is."""
    model, spec = host("llama")
    model.to(dtype)
    ids = torch.randint(0, 256, (2, PROMPT + STEPS))
    with torch.no_grad():
        exact = deepcopy(model).float()(ids).logits[:, PROMPT:]
        rounded = model(ids).logits[:, PROMPT:]
        past = model(ids[:, :PROMPT], use_cache=True).past_key_values
    with laid_out(model, spec) as weights:
        y = run(model, spec, weights, past, ids, KeepAll())
    assert y.dtype == torch.float32
    assert relative_rms(y, exact) < relative_rms(rounded, exact)


def test_norms_are_told_apart_by_what_they_do() -> None:
    """Gemma stores gains less one, and large ones: 60 and 61 differ by less than rounding."""
    model, spec = host("gemma2")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.full((spec.D,), 300.0))
    model.bfloat16()
    math = read_arithmetic(model, spec, 16)
    assert math.final.kind == "rms"
    assert math.final.weight is not None
    assert float(math.final.weight.mean()) == 301
    assert math.embed_scale == pytest.approx(spec.D**0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("granite", {"residual_multiplier": 0.5}, "residual_multiplier=0.5"),
        ("granite", {"logits_scaling": 4.0}, "logits_scaling=4.0"),
        ("helium", {"head_dim": 8}, "other pairs of columns"),
        ("hunyuan_v1_dense", {"head_dim": 8}, "such as layers.0.self_attn.query_layernorm"),
        ("olmo2", {}, "the norms of its layers"),
        ("cohere", {}, "logit_scale=0.0625"),
        ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}, "parameters such as"),
        ("llama", {"hidden_act": "relu2"}, "activation 'relu2' has no kernel"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "exceeds 1024 tokens, and context=2048 does",
        ),
    ],
    ids=str,
)
def test_what_a_step_cannot_express_is_refused(
    family: str, overrides: dict[str, Any], reason: str
) -> None:
    model, spec = host(family, **overrides)
    with pytest.raises(UnsupportedHostError, match=f"no fused decode step.*{reason}"):
        read_arithmetic(model, spec, 2048)


def test_hosts_without_a_step_are_refused_by_name() -> None:
    model, spec = host("llama")
    model.model.layers[1].post_attention_layernorm = torch.nn.Tanh()
    with pytest.raises(UnsupportedHostError, match="norm Tanh has no weight"):
        read_arithmetic(model, spec, 16)
    model, spec = host("qwen3")
    model.model.layers[0].self_attn.q_norm = torch.nn.LayerNorm(spec.d)
    with pytest.raises(UnsupportedHostError, match="heads is not an RMS norm"):
        read_arithmetic(model, spec, 16)
    model, spec = host("opt")
    with pytest.raises(ValueError, match="context=4096 exceeds"):
        read_arithmetic(model, spec, 4096)


def _of_groups(spec: HostSpec, groups: list[int], drop: bool) -> Active:
    """Every head of some groups; ``drop``: no other group's keys and values are computed."""
    heads = torch.arange(spec.H).view(spec.G, -1)[groups].flatten().int()
    chosen = torch.tensor(groups if drop else range(spec.G), dtype=torch.int32)
    slot = torch.full((1, spec.H), -1, dtype=torch.int32)
    slot[0, heads.long()] = torch.arange(len(heads), dtype=torch.int32)
    place = torch.full((1, spec.G), -1, dtype=torch.int32)
    place[0, chosen.long()] = torch.arange(len(chosen), dtype=torch.int32)
    kvq = torch.cat([chosen, chosen + spec.G, heads + 2 * spec.G])[None]
    if not drop:
        return Active(heads[None], None, slot, kvq)
    return Active(heads[None], None, slot, kvq, groups=len(groups), kv_slot=place)


def _forget_unselected(weights: StepWeights, spec: HostSpec, masks: Any) -> None:
    for layer, w in enumerate(weights.layers):
        device = w.up.weight.device
        heads, neurons = (masks[kind, layer].any(0).to(device) for kind in KINDS)
        for matrix in (w.up, w.gate, w.down_t):
            if matrix is not None:
                matrix.weight[~neurons] = torch.nan
        for bias in (w.up_bias, w.gate_bias):
            if bias is not None:
                bias[~neurons] = torch.nan
        if w.kvq_bias is not None:
            w.kvq_bias.view(-1, spec.d)[2 * spec.G :][~heads] = torch.nan
        w.kvq.weight.unflatten(0, (-1, spec.d))[2 * spec.G :][~heads] = torch.nan
        w.out_t.weight.unflatten(0, (-1, spec.d))[~heads] = torch.nan


def _to(active: Active, device: torch.device) -> Active:
    fields = {name: getattr(active, name) for name in ("index", "count", "slot", "kvq", "wanted")}
    return Active(**{k: v.to(device) if v is not None else None for k, v in fields.items()})


def _context(hidden: Tensor, tap: Tap, masks: Any, spec: HostSpec) -> Tensor:
    """The hook sees the context before heads are masked, the step after."""
    if tap.site != "attn_context":
        return hidden
    return torch.where(
        masks["heads", tap.layer][..., None], hidden.view(1, spec.H, spec.d), 0
    ).flatten(1)
