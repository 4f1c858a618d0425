"""Compute backends against ``mask``: the same logits and decisions, and nothing else is read."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gnomon
from cases import BACKENDS, POLICIES, families_of, predictor
from gnomon.budget import Budget
from gnomon.host import KINDS, describe
from gnomon.kernels import cpu_library
from gnomon.kernels.launch import interpreted
from gnomon.policies import DejaVu, Dense, DenseInt8, Oracle, Random, Shadow, Static
from gnomon.runtime import gathered
from gnomon.runtime.backends import choose_backend
from gnomon.tiny import tiny_host as tiny_host_on_cpu
from tolerances import TOLERANCE, relative_rms

HALF = Budget(density=0.5)
GREEDY = {"do_sample": False, "pad_token_id": 256, "eos_token_id": None}
COMPUTE = BACKENDS[1:]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton runs
NAMES = [name for name in POLICIES if name != "oracle"]


def tiny_host(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    model, tokenizer = tiny_host_on_cpu(*args, **kwargs)
    return model.to(DEVICE), tokenizer


def ids_of(rows: int = 1, length: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, length), generator=generator).to(DEVICE)


def steps(
    model, policy, backend: str, forced: list[Tensor], **how: Any
) -> tuple[Tensor, dict, gnomon.accounting.Density]:
    """Logits of the forwards ``forced`` on one cache, and every decision in order."""
    taken: dict = defaultdict(list)
    with torch.no_grad(), gnomon.sparsify(model, policy, backend=backend, **how) as session:
        assert session.backend == backend
        session.on_decision = lambda kind, layer, keep, _: taken[kind, layer].append(keep.clone())
        cache, logits = None, []
        for ids in forced:
            out = model(ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1), taken, session.density()


def text(rows: int = 1, prompt: int = 6, more: int = 3) -> list[Tensor]:
    whole = ids_of(rows, prompt + more)
    return [whole[:, :prompt], *(whole[:, i : i + 1] for i in range(prompt, prompt + more))]


def assert_same(a: tuple, b: tuple) -> None:
    assert relative_rms(a[0], b[0]) < TOLERANCE[torch.float32]
    assert a[1].keys() == b[1].keys() and a[1]
    for key, keeps in a[1].items():
        assert all(torch.equal(x, y) for x, y in zip(keeps, b[1][key], strict=True)), key
    assert a[2] == b[2]


# Every policy meets every backend, and every family both compute backends. Under Triton, where the
# interpreter is slow, variants of a policy that is tried on one and two sequences have one of them.
ONE = ["random-prompt", "dejavu-prompt", "dejavu-lookahead", "chess-ffn", "fallback-of-shadow"]
TWO = ["shadow-prompt", "shadow-context", "core-of-shadow", "ffsplit-of-shadow", "glass-prompt"]
TWO += ["prior-prompt"]
TWO += [name for name in NAMES if "shared" in name or "griffin-" in name]
PAIRS = [
    (rows, name, families_of(name)[(i + shift) % len(families_of(name))], backend)
    for i, name in enumerate(NAMES)
    for backend, shifts in (("torch", (0, 3)), ("triton", (0,)))
    for shift in shifts
    for rows in (1, 2)
    if backend == "torch" or DEVICE.type == "cuda" or name not in (TWO if rows == 1 else ONE)
]


@pytest.mark.parametrize(("rows", "name", "family", "backend"), PAIRS)
def test_decode_equals_mask(name: str, family: str, backend: str, rows: int) -> None:
    model, _ = tiny_host(family)
    forced = text(rows, more=3 if backend == "torch" else 0)
    masked = steps(model, POLICIES[name](model, HALF), "mask", forced)
    assert_same(steps(model, POLICIES[name](model, HALF), backend, forced), masked)


SPREAD = {
    "global": Budget(density=0.75, spread="global"),
    "hybrid": Budget(density=0.75, spread="hybrid", floor=0.6),
    "group": Budget(heads=0.5, head_unit="group"),
    "heads": Budget(heads=0.5),
    "neurons": Budget(neurons=0.4),
}


@pytest.mark.parametrize("name", ["static", "shadow", "dejavu", "shadow-prompt", "shadow-shared"])
@pytest.mark.parametrize("spread", SPREAD)
def test_any_budget_equals_mask(name: str, spread: str) -> None:
    if name == "dejavu" and spread == "group":
        name = "random"  # dejavu offers single heads alone
    model, _ = tiny_host("llama", num_hidden_layers=4)
    masked = steps(model, POLICIES[name](model, SPREAD[spread]), "mask", text(2))
    assert_same(steps(model, POLICIES[name](model, SPREAD[spread]), "torch", text(2)), masked)


def test_lists_of_varying_length_equal_mask_under_triton() -> None:
    model, _ = tiny_host("llama", num_hidden_layers=4)
    forced, made = text(2, more=1), POLICIES["shadow"]
    masked = steps(model, made(model, SPREAD["global"]), "mask", forced)
    assert_same(steps(model, made(model, SPREAD["global"]), "triton", forced), masked)


@pytest.mark.parametrize("backend", COMPUTE)
@pytest.mark.parametrize("name", ["static", "shadow-prompt", "shadow"])
def test_later_turns_of_several_tokens_equal_mask(name: str, backend: str) -> None:
    """Fixed decisions run them on small weights; token decisions are masked there."""
    model, _ = tiny_host("llama")
    forced = [*text(), ids_of(length=4, seed=3), ids_of(length=1, seed=4)]
    masked = steps(model, POLICIES[name](model, HALF), "mask", forced)
    assert_same(steps(model, POLICIES[name](model, HALF), backend, forced), masked)


@pytest.mark.parametrize("backend", COMPUTE)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_dropped_groups_have_no_keys_or_values(family: str, backend: str) -> None:
    model, _ = tiny_host(family)
    spec = describe(model)
    means = {k: torch.rand(spec.L, spec.units(k)) for k in KINDS}
    means["heads"][:, : spec.group_size] = -1  # the first group is idle in every layer
    made = lambda: Static(means, HALF, kv="drop")  # noqa: E731
    masked = steps(model, made(), "mask", text())
    assert_same(steps(model, made(), backend, text()), masked)
    with torch.no_grad(), gnomon.sparsify(model, made(), backend=backend):
        cache = model(ids_of(), use_cache=True).past_key_values
        model(ids_of(length=1), past_key_values=cache)
    for layer in cache.layers:
        assert bool((layer.keys[:, 0, -2:] == 0).all() & (layer.values[:, 0, -2:] == 0).all())
        assert bool((layer.keys[:, 1:, -2:] != 0).any())


def poison(model, taken: dict) -> None:
    """Everything of the units that the last decision skips becomes NaN."""
    spec = describe(model)
    with torch.no_grad():
        for (kind, layer), keeps in taken.items():
            where, keep = spec.layers[layer], keeps[-1][:, -1].any(0)
            rows = keep.repeat_interleave(spec.d) if kind == "heads" else keep
            paths = (where.q,) if kind == "heads" else (where.up, where.gate)
            for linear in (model.get_submodule(p) for p in paths if p):
                linear.weight[~rows] = torch.nan
                if linear.bias is not None:
                    linear.bias[~rows] = torch.nan
            out = model.get_submodule(where.out if kind == "heads" else where.down)
            out.weight[:, ~rows] = torch.nan


@pytest.mark.parametrize(
    ("name", "family", "backend", "batch"),
    [
        *[(n, "llama", "torch", 1) for n in ("static", "shadow", "dejavu", "random")],
        *[(n, "opt", "torch", 1) for n in ("static", "shadow", "shadow-prompt")],
        *[("shadow", f, "torch", 1) for f in ("gemma2", "qwen2", "qwen3")],
        *[(n, "llama", "torch", b) for n in ("shadow", "shadow-prompt") for b in (2, 4)],
        *[("shadow-shared", "opt", "torch", b) for b in (8, 24)],
        ("shadow", "llama", "triton", 1),
        ("shadow-prompt", "opt", "triton", 1),
        ("shadow", "llama", "triton", 4),
        ("shadow-shared", "llama", "triton", 8),
    ],
)
def test_unselected_weights_are_not_read(name: str, family: str, backend: str, batch: int) -> None:
    """Rule 2: after the decision unselected units' weights, on both sides, may be anything."""
    model, _ = tiny_host(family)
    policy, (prompt, token, *_) = POLICIES[name](model, HALF), text(batch)
    with torch.no_grad(), gnomon.sparsify(model, policy, backend=backend) as session:
        taken: dict = defaultdict(list)
        session.on_decision = lambda kind, layer, keep, _: taken[kind, layer].append(keep.clone())
        cache = model(prompt, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        if policy.refresh == "prompt":  # the decision belongs to the cache it was made with
            held = session._decisions.prompts._by_cache
            held[again] = dict(held[cache])
        clean = model(token, past_key_values=cache).logits
        poison(model, taken)
        poisoned = model(token, past_key_values=again).logits
    assert bool(clean.isfinite().all()) and torch.equal(clean, poisoned)


@pytest.mark.parametrize("backend", COMPUTE)
@pytest.mark.parametrize("name", ["shadow", "shadow-prompt", "static"])
def test_the_model_comes_back_as_it_was(name: str, backend: str) -> None:
    model, _ = tiny_host("opt")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    storage = [id(p) for p in model.parameters()]
    with (
        pytest.raises(RuntimeError, match="mine"),
        torch.no_grad(),
        gnomon.sparsify(model, POLICIES[name](model, HALF), backend=backend),
    ):
        model.generate(ids_of(rows=2), max_new_tokens=3, **GREEDY)
        raise RuntimeError("mine")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.is_contiguous() for p in model.parameters())
    assert storage == [id(p) for p in model.parameters()]
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operator makes, views of weights aside."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.numel = 0
        self._weights = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self._weights:
            self.numel = max(self.numel, out.numel())
        return out


def test_token_refresh_copies_no_weights_and_prompt_refresh_copies_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cpu_library.library() is None:
        pytest.skip("no C compiler: the reference copies the rows that it multiplies")
    made: list[int] = []
    of = gathered.Compact.of
    monkeypatch.setattr(gathered.Compact, "of", lambda *a: made.append(1) or of(*a))
    model, _ = tiny_host_on_cpu("llama", hidden_size=64, intermediate_size=512, vocab_size=260)
    linears = 5 * (3 - 1)  # q, out, gate, up, down of the layers that a shadow decides
    for name, copies in (("shadow", 0), ("shadow-prompt", linears)):
        made.clear()
        policy = POLICIES[name](model, Budget(neurons=0.5, heads=0.5))
        forced = [ids.cpu() for ids in text(more=4)]
        with torch.no_grad(), gnomon.sparsify(model, policy, backend="torch"):
            cache = model(forced[0], use_cache=True).past_key_values
            model(forced[1], past_key_values=cache)
            with Largest(model, policy.predictor) as largest:
                for token in forced[2:]:
                    model(token, past_key_values=cache)
        assert largest.numel <= 1024 < 64 * 512 // 2
        assert len(made) == copies


@pytest.mark.parametrize(
    ("name", "cache", "backend"),
    [
        ("shadow", None, "torch"),
        ("shadow", "static", "torch"),
        ("shadow-prompt", None, "torch"),
        ("shadow-prompt", "static", "torch"),
        ("shadow-shared", "static", "triton"),
    ],
)
def test_generate_equals_mask(name: str, cache: str | None, backend: str) -> None:
    model, _ = tiny_host("llama")
    batch, mask = ids_of(rows=2), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    batch[0, :4], mask[0, :4] = 256, 0
    outs = []
    for which in ("mask", backend):
        with gnomon.sparsify(model, POLICIES[name](model, HALF), backend=which):
            out = model.generate(
                batch,
                attention_mask=mask,
                max_new_tokens=4,
                cache_implementation=cache,
                output_logits=True,
                return_dict_in_generate=True,
                **GREEDY,
            )
        outs.append(torch.stack(out.logits, 1))
    assert relative_rms(outs[1], outs[0]) < TOLERANCE[torch.float32]


def test_compiled_hosts_skip_too() -> None:
    model, _ = tiny_host("llama")
    eager = steps(model, POLICIES["shadow"](model, HALF), "torch", text())
    model.model.compile(backend="eager")
    compiled = steps(model, POLICIES["shadow"](model, HALF), "torch", text())
    torch.compiler.reset()
    assert_same(compiled, eager)


def test_gradients_flow_as_under_mask() -> None:
    model, _ = tiny_host("llama")
    grads = []
    for backend in ("mask", "torch"):
        model.zero_grad()
        with gnomon.sparsify(model, POLICIES["shadow"](model, HALF), backend, "all"):
            model(ids_of(length=1)).logits.sum().backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())
    assert torch.equal(*grads) and bool(grads[0].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_hosts(dtype: torch.dtype) -> None:
    model, _ = tiny_host("llama")
    model = model.to(dtype)
    means = {k: torch.rand(3, describe(model).units(k)) for k in KINDS}
    masked = steps(model, Static(means, HALF), "mask", text())[0]
    dense = steps(model, Dense(), "mask", text())[0]
    for backend in COMPUTE:
        logits = steps(model, Static(means, HALF), backend, text())[0]
        assert logits.dtype == dtype
        error = relative_rms(logits[:, -1], masked[:, -1])
        assert error < 0.2 * relative_rms(dense[:, -1], masked[:, -1])
        assert error < 10 * TOLERANCE[dtype]  # three layers, each rounding a dozen times


def test_a_context_that_decides_neurons_is_read_without_skipped_heads() -> None:
    """The values of skipped heads were never computed, so no backend may decide from them."""
    model, _ = tiny_host("llama")
    made = predictor(
        model, "dejavu", lookahead=1, heads_site="attn_context", neurons_site="attn_context"
    )
    runs = [steps(model, DejaVu(made, HALF), b, text()) for b in BACKENDS]
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


def test_auto_takes_what_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_host_on_cpu("llama")
    means = {k: torch.rand(3, describe(model).units(k)) for k in KINDS}

    def chosen(policy, backend: str = "auto") -> str:
        policy.bind(model)
        return choose_backend(backend, model, policy)

    assert chosen(Random(HALF)) == "torch"
    assert chosen(Static(means, HALF)) == "torch"
    for policy in (Dense(), DenseInt8(), Oracle(HALF), Random(Budget(density=1.0))):
        assert chosen(policy) == "mask"
    for backend in COMPUTE if interpreted() else ["torch"]:
        assert chosen(Random(HALF), backend) == backend
        with pytest.raises(ValueError, match="policy=oracle.*backend=mask"):
            chosen(Oracle(HALF), backend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs Triton and a CUDA device"):
        chosen(Random(HALF), "triton")

    class Packed(nn.Linear):
        pass

    where = describe(model).layers[1].down
    parent = model.get_submodule(where.rpartition(".")[0])
    parent.down_proj = Packed(48, 32, bias=False)
    assert chosen(Random(HALF)) == "mask"
    with pytest.raises(ValueError, match=r"layers\.1.*Packed: use backend=mask"):
        chosen(Random(HALF), "torch")


def test_a_planted_wrong_gather_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_host("llama")
    policy = Shadow(predictor(model), HALF)
    masked = steps(model, policy, "mask", text())[0]
    index = gathered.Kept.index

    def shifted(self: gathered.Kept, block: int) -> gathered.Index:
        units, block, count = index(self, block)
        return (units + 1) % self.keep.shape[-1], block, count

    monkeypatch.setattr(gathered.Kept, "index", shifted)
    assert relative_rms(steps(model, policy, "torch", text())[0], masked) > 1e-2
