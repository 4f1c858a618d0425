"""Every architecture that Gnomon describes, tried: what runs on it, for tests and docs/hosts.md.

``python tests/hosts.py`` writes the table of docs/hosts.md from what these checks find.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import gnomon
from cases import POLICIES
from gnomon.budget import Budget
from gnomon.data.capture import capture
from gnomon.data.criteria import criterion
from gnomon.engine.agreement import agree
from gnomon.engine.engine import Engine
from gnomon.host import KINDS, HostSpec, Tap, UnsupportedHostError, describe, weight
from gnomon.policies import Policy, Static
from gnomon.tiny import tiny_host
from tolerances import TOLERANCE, relative_rms

PAGE = Path(__file__).resolve().parent.parent / "docs" / "hosts.md"
MARKS = ("<!-- table: python tests/hosts.py -->", "<!-- end of table -->")
HALF = Budget(density=0.5)
PLAIN_FFN = ("opt", "gpt2", "gpt_neox", "falcon", "bloom", "phi", "starcoder2")  # no gate
NO_PLAIN_LINEARS = ("phi3", "gpt2", "glm4")  # of the FFN: fused, or turned


@dataclass(frozen=True)
class Host:
    """One architecture: its name in the docs, and a tiny random model of it."""

    title: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)

    def load(self) -> tuple[PreTrainedModel, HostSpec]:
        """The model, and what its adapter says."""
        model, _ = tiny_host(self.family, **self.config)
        return model, describe(model)


HOSTS = [
    Host("Llama 2, 3; SmolLM2", "llama"),
    Host("Mistral", "mistral"),
    Host("Mistral, sliding window", "mistral", {"sliding_window": 8}),
    Host("Qwen2, Qwen2.5", "qwen2"),
    Host("Qwen3", "qwen3"),
    Host("Gemma", "gemma"),
    Host("Gemma 2", "gemma2"),
    Host("Gemma 3 (text)", "gemma3_text"),
    Host("Phi-3, Phi-4", "phi3"),
    Host("Phi-1, Phi-2", "phi"),
    Host("OPT", "opt"),
    Host("OPT-350m", "opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    Host("GPT-2", "gpt2"),
    Host("GPT-NeoX, Pythia", "gpt_neox"),
    Host("GPT-NeoX, sequential residual", "gpt_neox", {"use_parallel_residual": False}),
    Host("Falcon-7B", "falcon"),
    Host("Falcon-40B", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Host("Falcon-RW", "falcon", {"multi_query": False, "alibi": True, "parallel_attn": False}),
    Host("BLOOM", "bloom"),
    Host("StableLM", "stablelm"),
    Host("StableLM 2 12B", "stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    Host("OLMo-2", "olmo2"),
    Host("Granite", "granite"),
    Host("Cohere Command R", "cohere"),
    Host("Cohere Command R+", "cohere", {"use_qk_norm": True}),
    Host("SmolLM3", "smollm3"),
    Host("StarCoder2", "starcoder2"),
    Host("GLM-4", "glm4"),
]


def ids_of(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """(rows, length) random bytes."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


def static(spec: HostSpec, budget: Budget = HALF, **how: Any) -> Static:
    """A fixed policy with random means."""
    generator = torch.Generator().manual_seed(0)
    means = {k: torch.rand(spec.L, spec.units(k), generator=generator) for k in KINDS}
    return Static(means, budget, **how)


def forward(model: PreTrainedModel, policy: Policy, ids: Tensor, backend: str, **how: Any) -> Any:
    """Logits of one forward, and every decision as {(kind, layer): bool (B, T', N)}."""
    taken: dict[Any, Tensor] = {}
    how = {"protocol": "all"} | how
    with torch.no_grad(), gnomon.sparsify(model, policy, backend=backend, **how) as session:
        session.on_decision = lambda kind, layer, keep, _: taken.update({(kind, layer): keep})
        return model(ids).logits, taken


def delete_units(model: PreTrainedModel, spec: HostSpec, keep: dict[Any, Tensor]) -> None:
    """Really deletes: zero columns of out- and down-projections, zero rows of what makes them."""
    with torch.no_grad():
        for (kind, layer), taken in keep.items():
            gone, paths = ~taken[0, 0], spec.layers[layer]
            size = spec.d if kind == "heads" else 1
            columns = gone.repeat_interleave(size)
            last = paths.out if kind == "heads" else paths.down
            weight(model, last)[:, columns] = 0
            for role in ("q",) if kind == "heads" else ("gate", "up"):
                path = getattr(paths, role)
                apart = spec.heads_apart if kind == "heads" else spec.neurons_apart
                layout = spec.qkv if kind == "heads" else spec.gate_up
                if path is not None and apart and layout != "unknown":
                    blocks = spec.blocks(role)[gone]
                    rows = (blocks[:, None] * size + torch.arange(size)).flatten()
                    weight(model, path)[rows] = 0


def obeys_the_mask(host: Host) -> str:
    """Rule of truth 4 under ``mask``: identity, the mask bites like deleted weights, no trace."""
    model, spec = host.load()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = ids_of()
    dense = model(ids).logits.detach()
    full, _ = forward(model, static(spec, Budget(density=1.0)), ids, "mask")
    assert torch.equal(full, dense), "density 1.0 is not the dense model"
    masked, taken = forward(model, static(spec), ids, "mask")
    assert len(taken) == 2 * spec.L
    assert relative_rms(masked, dense) > 1e-2, "the mask does not bite"
    deleted = copy.deepcopy(model)
    delete_units(deleted, spec, taken)
    error = relative_rms(masked, deleted(ids).logits)
    assert error < TOLERANCE[torch.float32], f"a masked unit is not a deleted one ({error:.2g})"
    assert torch.equal(model(ids).logits, dense)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return "yes"


def harvests(host: Host) -> str:
    """A unit's score is the slope of the loss when it is scaled, for one unit of each kind."""
    model, spec = host.load()
    model.double()
    ids = ids_of(1, 8)
    found = capture(model, spec, [Tap(1)], criterion("plainact"), ids)
    for kind in KINDS:
        layer, unit = 1, int(found.scores(kind)[0, 3, 1].argmax())
        score = float(found.scores(kind)[0, 3, layer, unit])
        slope = _slope(model, spec, kind, layer, unit, ids)
        assert abs(score - abs(slope)) < 1e-2 * score, (kind, score, slope)
    return "yes"


def _slope(
    model: PreTrainedModel, spec: HostSpec, kind: Any, layer: int, unit: int, ids: Tensor
) -> float:
    """d loss / d factor of one unit at token 3, by central differences."""
    sums = []
    for factor in (1.01, 0.99):

        def scale(units: Tensor, factor: float = factor) -> Tensor:
            units = units.clone()
            units[0, 3, unit] *= factor
            return units

        with gnomon.hooks.HostHooks(model, spec) as hooks, torch.no_grad():
            hooks.on_units(kind, layer, scale)
            logits = model(ids).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return float(sums[0] - sums[1]) / 0.02


def gathers(host: Host, backend: str = "torch") -> str:
    """Cached decode under a compute backend equals ``mask``; else why it is refused."""
    model, spec = host.load()
    refusal = refused(lambda: static(spec), model, backend)
    if refusal:
        with gnomon.sparsify(model, static(spec), prompt_length=4) as session:
            assert session.backend == "mask", "auto must fall back"
        return refusal
    made: list[Callable[[], Policy]] = [
        lambda: static(spec),
        lambda: static(spec, kv="drop"),
        lambda: POLICIES["random"](model, HALF),
    ]
    for make in made if backend == "torch" else made[2:]:
        steps = 3 if backend == "torch" else 1
        expected, found = (decoded(model, make(), name, steps) for name in ("mask", backend))
        error = relative_rms(found, expected)
        assert error < TOLERANCE[torch.float32], f"{backend} is not mask ({error:.2g})"
    return "yes"


def refused(make: Callable[[], Policy], model: PreTrainedModel, backend: str) -> str:
    """Why a backend refuses a host, in short; empty if it does not."""
    try:
        with gnomon.sparsify(model, make(), backend=backend, protocol="all"):
            return ""
    except ValueError as error:
        text = str(error)
        assert "use backend=mask" in text, text
        kind = text.rpartition(" is a ")[2].partition(":")[0]
        return f"`mask` ({kind})" if " is a " in text else "`mask` (unknown order of rows)"


def decoded(model: PreTrainedModel, policy: Policy, backend: str, steps: int = 3) -> Tensor:
    """Logits of a prompt of 6 tokens and some steps on its cache."""
    ids, logits, cache = ids_of(2, 6 + steps), [], None
    with torch.no_grad(), gnomon.sparsify(model, policy, backend=backend):
        for part in (ids[:, :6], *ids[:, 6:].split(1, 1)):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1)


def engine(host: Host) -> str:
    """The decode engine agrees with ``mask``, dense and sparse; else why it refuses the host."""
    model, spec = host.load()
    for policy in (None, static(spec), POLICIES["random"](model, HALF)):
        try:
            with Engine(model, policy, context=64) as opened:
                found = agree(opened, model, policy, ids_of(1, 18), 8)
        except UnsupportedHostError as error:
            reason = str(error).partition(": ")[2].partition(". The generic")[0]
            return "no: " + reason.partition(" (")[0].partition(" such as")[0]
        assert found["sets"] == 1 and found["logits_rms"] < TOLERANCE[torch.float32], found
    return "yes"


CHECKS: dict[str, Callable[[Host], str]] = {
    "mask": obeys_the_mask,
    "harvest": harvests,
    "`torch`, `triton`": gathers,
    "decode engine": engine,
}


def row(host: Host) -> str:
    """The host's line of the table, from what its checks return."""
    _, spec = host.load()
    layout = [] if spec.qkv == "separate" else [f"qkv ({spec.qkv})"]
    layout += [] if spec.gate_up == "separate" else ["gate_up"]
    kind = "gated" if spec.gated else "plain"
    found = [check(host) for check in CHECKS.values()]
    cells = [host.title, f"`{host.family}`", kind, ", ".join(layout) or "–", *found]
    return "| " + " | ".join(cells) + " |"


def table(rows: list[str]) -> str:
    """The Markdown table."""
    names = ["host", "`model_type`", "FFN", "fused", *CHECKS]
    return "\n".join(["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *rows])


def written(page: str, made: str) -> str:
    """The page with its table replaced."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{made}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), table([row(host) for host in HOSTS])))
