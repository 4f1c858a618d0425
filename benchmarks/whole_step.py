"""Decode steps of whole models of published shapes, sparse beside the dense twin, on one GPU.

    python benchmarks/whole_step.py --out results.json llama-2-7b llama-3-8b opt-13b

Hosts are built from their shapes with random weights (bf16), so a row says nothing about quality;
predictors are random too, but run for real, on the hidden states of the step. Dense and sparse
engines take turns, step by step, in one process. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from gnomon.accounting import HostBytes, expected_density
from gnomon.budget import Budget
from gnomon.engine.agreement import agree
from gnomon.engine.decide import Fused
from gnomon.engine.engine import Engine
from gnomon.engine.weights import lay_out
from gnomon.evaluation.stopwatch import device_name, interleave
from gnomon.evaluation.traffic import Kept, predictor_traffic, step_traffic
from gnomon.host import describe
from gnomon.policies import Policy, Shadow
from gnomon.predictors.shadow import Shadow as ShadowPredictor

ROUNDS, WARMUP, TEST_STEPS = 60, 8, 8


def llama(vocab: int, width: int, ffn: int, layers: int, heads: int, groups: int) -> LlamaConfig:
    """A Llama's shape."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=8192,
    )


def opt(width: int, layers: int, heads: int) -> OPTConfig:
    """An OPT's shape."""
    return OPTConfig(
        hidden_size=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        word_embed_proj_dim=width,
    )


SHAPES = {
    "llama-2-7b": llama(32000, 4096, 11008, 32, 32, 32),
    "llama-3-8b": llama(128256, 4096, 14336, 32, 32, 8),
    "opt-13b": opt(5120, 40, 40),
    "opt-30b": opt(7168, 48, 56),
    "tiny": llama(500, 64, 96, 6, 4, 4),
}


def build(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A host of random weights, made on the device."""
    config = SHAPES[shape]
    config._name_or_path = f"random-{shape}"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.fill_(1.0)
    model.tie_weights()
    rotary = getattr(model.model, "rotary_emb", None)
    if rotary is not None:
        model.model.rotary_emb = type(rotary)(config).to(device)
    return model


def cells(shape: str, batch: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], bool]]:
    """(label, budget, settings, int8) of what is timed on a shape."""
    token: dict[str, Any] = {"refresh": "token"}
    if batch > 1:
        yield "kv groups 0.5", {"heads": 0.5, "neurons": 1.0}, token, False
        return
    if shape == "opt-30b":
        yield "heads 0.5, neurons 0.075", {"heads": 0.5, "neurons": 0.075}, token, False
        yield "0.5", {"density": 0.5}, token, False
        return
    yield "0.5", {"density": 0.5}, token, False
    yield "0.25", {"density": 0.25}, token, False
    yield "0.5 prompt, kv=drop", {"density": 0.5}, {"refresh": "prompt", "kv": "drop"}, False
    if shape == "llama-2-7b":
        yield "0.5 int8 host", {"density": 0.5}, token, True


def measure(
    shape: str, model: Any, shared: Any, batch: int, context: int, write: Any, limit: float
) -> None:
    """Times every cell of a shape against the dense twin on the same weights."""
    spec, host = describe(model), HostBytes.of(model, describe(model))
    device = next(model.parameters()).device
    ids = torch.randint(4, spec.V, (batch, context), device=device)
    torch.manual_seed(0)
    predictor = ShadowPredictor.for_host(spec, hidden=256, rank=256).quantize().to(device)
    small = None
    for label, budget, settings, int8 in cells(shape, batch):
        if time.monotonic() > limit:
            return
        if int8 and small is None:
            small = shared.quantized()
        weights = small if int8 else shared
        policy = Shadow(predictor, Budget(**budget), **settings)
        room = context + 2 * (ROUNDS + WARMUP) + TEST_STEPS
        with (
            Engine(model, None, batch=batch, context=room, weights=weights) as twin,
            Engine(model, policy, batch=batch, context=room, weights=weights) as engine,
        ):
            row = _cell(twin, engine, policy, host, ids, int8)
            found = {"shape": shape, "policy": "shadow", "density": label, **settings, **row}
            agreement = agree(engine, model, policy, ids[:1], TEST_STEPS) if batch == 1 else None
            if agreement is not None and not int8:  # int8 rows round otherwise than their policy
                found["agreement"] = agreement
        write(found)
        gc.collect()
        torch.cuda.empty_cache() if device.type == "cuda" else None


def _cell(
    twin: Engine, engine: Engine, policy: Policy, host: HostBytes, ids: Any, int8: bool
) -> dict[str, Any]:
    batch, context = ids.shape
    device = engine.device
    for one in (twin, engine):
        one.prefill(ids)
    times = interleave({"dense": twin.step, "sparse": engine.step}, ROUNDS, WARMUP, device)
    density = expected_density(policy, policy.resolved)
    read = {"context": context, "batch": batch, "int8": int8}
    dense = step_traffic(host, Kept.all(), **read).total
    predictor = predictor_traffic(policy)
    drop = policy.kv == "drop"
    kept = Kept(density, density if batch == 1 else Kept.all().each)
    sparse = step_traffic(host, kept, drop=drop, predictor=predictor, **read).total
    ms = {name: span.median for name, span in times.items()}
    speedup, ideal = ms["dense"] / ms["sparse"], dense / sparse
    row = {
        "device": device_name(device),
        "engine": "cuda-graph" if device.type == "cuda" else "lean",
        "batch": batch,
        "context": context,
        "ms_dense": ms["dense"],
        "ms_sparse": ms["sparse"],
        "ms_sparse_p95": times["sparse"].p95,
        "speedup": speedup,
        "speedup_ideal": ideal,
        "of_ideal": speedup / ideal,
        "gbps_dense": dense / ms["dense"] / 1e6,
        "gbps_sparse": sparse / ms["sparse"] / 1e6,
        "weights": "random int8" if int8 else "random",
    }
    share = _decision_ms(engine, ids)
    if share is not None:
        row["ms_decision"] = share
        row["decision_share"] = share / ms["sparse"]
    if device.type == "cuda":
        row["bytes_allocated"] = torch.cuda.memory_allocated(device)
    return row


def _decision_ms(engine: Engine, ids: Any) -> float | None:
    """Predictor and selection alone, as one graph of their own."""
    from gnomon.engine.graph import Replay

    decider = engine.decider
    if not isinstance(decider, Fused):
        return None
    hidden = torch.randn(len(ids), engine.spec.D, device=engine.device)
    position = torch.zeros(len(ids), dtype=torch.int32, device=engine.device)
    live = torch.ones(len(ids), dtype=torch.bool, device=engine.device)

    @torch.no_grad()
    def decide() -> None:
        decider.begin(position, live)
        for tap in decider.taps:
            decider.see(tap, hidden)

    replay = Replay(decide, engine.device)
    return interleave({"decide": replay}, 50, 5, engine.device)["decide"].median


def _commit() -> str:
    from gnomon.evaluation.results import commit  # needs packages that a bare machine may not have

    return commit()


def main() -> None:
    """Runs the shapes named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=500, help="no cell starts after so many s")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    limit, rows = time.monotonic() + args.limit, []
    about = {"commit": os.environ.get("GNOMON_COMMIT") or _commit(), "torch": torch.__version__}

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")
        keys = ("ms_dense", "ms_sparse", "speedup", "of_ideal", "decision_share")
        print(
            row["shape"],
            row["density"],
            {k: round(row[k], 3) for k in keys if k in row},
            flush=True,
        )
        print("   ", row.get("agreement"), flush=True)

    for shape in args.shapes:
        if time.monotonic() > limit:
            break
        model = build(shape, device, dtype)
        shared = lay_out(model, describe(model))
        measure(shape, model, shared, args.batch, args.context, write, limit)
        del model, shared
        gc.collect()


if __name__ == "__main__":
    main()
