"""Decode steps of whole models: policies, densities, batches and contexts on one GPU.

    python benchmarks/decode.py shapes=[llama-2-7b] policies=[shadow,prompt] density=[0.5,0.25]
    python benchmarks/decode.py shapes=[llama-3-8b] policies=[teal,chess,cats] density=[0.7,0.5]
    python benchmarks/decode.py shapes=[llama-2-7b] policies=[shadow,griffin,teal] bytes=[0.7]
    python benchmarks/decode.py shapes=[opt-30b] policies=[shadow] heads=0.5 neurons=0.075
    python benchmarks/decode.py batch=[8,24] context=[3968] heads=0.5 neurons=1 cache=random

Hosts have published shapes and random weights, so a row says nothing about quality. Predictors are
random too, but run for real, on the hidden states of the step; thresholds are placed on what the
host shows of random tokens. Every shape is built once; the dense
twin and all policies share its weights and take turns step by step. Rows are written as they come.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

if __name__ == "__main__":  # kernels.py here must not answer to Hugging Face's package
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.path[:] = [str(here / "support"), *others]

from decode_parts import POLICIES, THRESHOLDS, Bench, RandomCache
from step_account import account, by_name, part_bytes, parts_of, record

from gnomon.accounting import Density
from gnomon.accounting import account as bytes_of
from gnomon.budget import Budget
from gnomon.engine.decide import Fused
from gnomon.engine.engine import Engine
from gnomon.engine.graph import Replay
from gnomon.engine.weights import StepWeights, lay_out
from gnomon.env import versions
from gnomon.evaluation.decoding import Cell, Contender, decode_row, from_prompt, open_dense
from gnomon.evaluation.hf_decode import hf_decode
from gnomon.evaluation.results import commit
from gnomon.evaluation.stopwatch import interleave
from gnomon.policies import Policy
from gnomon.policies.threshold import Threshold

log = logging.getLogger("benchmarks.decode")


class Limit:
    """The time there is, and what was left out when it ended."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def over(self, name: str) -> bool:
        """Whether nothing may start any more; notes what does not."""
        if time.monotonic() < self._end:
            return False
        self.left_out.append(name)
        return True


def run(cfg: Any, write: Callable[[dict[str, Any]], None]) -> list[str]:
    """Times everything that the config names; returns what there was no time for."""
    limit = Limit(cfg.limit_s)
    cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if cfg.profile and not cuda:
        raise ValueError("profile=true reads the launches of a CUDA graph: use device=cuda")
    unknown = [name for name in cfg.policies if name not in POLICIES]
    for field in ("density", "bytes"):
        if isinstance(cfg[field], int | float):
            raise ValueError(f"{field}={cfg[field]:g}: give a list, as in {field}=[{cfg[field]:g}]")
    if cfg.cache not in ("prompt", "random"):
        raise ValueError(f"cache={cfg.cache!r} is unknown; use prompt or random")
    if unknown:
        raise ValueError(f"policies={unknown} are unknown; use any of {', '.join(POLICIES)}")
    cells = [Cell(b, c, cfg.steps, cfg.warmup, cfg.check) for b in cfg.batch for c in cfg.context]
    for shape in cfg.shapes:
        if limit.over(shape):
            continue
        start = time.monotonic()
        bench = Bench.build(cfg, shape, device)
        log.info("%s built in %.0f s", shape, time.monotonic() - start)
        _shape(bench, cells, limit, write)
        del bench
        _free()
    return limit.left_out


def _shape(bench: Bench, cells: list[Cell], limit: Limit, write: Any) -> None:
    cfg, hf = bench.cfg, {}
    if cfg.hf not in ("off", False):
        for cell in cells:  # in the host's own layout
            if not limit.over(f"{bench.shape} hf {cell.batch}x{cell.context}"):
                hf[cell] = hf_decode(
                    bench.model, _tokens(bench, cell), cfg.steps, cfg.warmup, cfg.hf
                ).median
    # No copy back at the end, which would hold all weights twice: this host is thrown away.
    shared = lay_out(bench.model, bench.spec)
    weights = shared.quantized() if cfg.int8 else shared
    for cell in cells:
        if limit.over(f"{bench.shape} batch {cell.batch} context {cell.context}"):
            continue
        about = {} if cell not in hf else {"ms_hf": hf[cell], "hf": cfg.hf}
        try:
            _cell(bench, cell, weights, limit, lambda row, about=about: write(row | about))
        except (ValueError, torch.OutOfMemoryError) as error:  # other cells may still fit
            write({"shape": bench.shape, "policy": "dense twin", "error": _first(error)})
        _free()


def _cell(
    bench: Bench, cell: Cell, weights: StepWeights, limit: Limit, write: Callable[..., None]
) -> None:
    cfg, ids = bench.cfg, _tokens(bench, cell)
    settings = {"backend": cfg.backend, "weights": weights, "int8": cfg.int8}
    start = RandomCache(bench, cell) if cfg.cache == "random" else from_prompt
    dense = open_dense(bench.model, ids, cell, **settings, start=start)
    for name, budget in _budgets(cfg):
        label = f"{bench.shape} {name} {_aim(budget)}"
        if limit.over(f"{label} batch {cell.batch} context {cell.context}"):
            continue
        try:
            row = _row(bench, name, budget, dense, ids, cell)
        except (ValueError, torch.OutOfMemoryError) as error:
            row = {"error": _first(error)}
        aimed = {} if budget.bytes is None else {"bytes": budget.bytes}
        write({"shape": bench.shape, "policy": name, **aimed, **row})
        _free()
    dense.engine.close()


def _row(
    bench: Bench, name: str, budget: Budget, dense: Contender, ids: Tensor, cell: Cell
) -> dict[str, Any]:
    policy = POLICIES[name](bench, budget)
    extra: dict[str, Any] = {}

    def look(engine: Engine, kept: Any) -> None:
        extra.update(_decision(engine))
        if bench.cfg.profile:
            for one in (dense.engine, engine):  # makes room for the steps that are recorded
                dense.start(one, ids)
            extra["launches"] = by_name(record(engine.step))
            if name not in THRESHOLDS:  # whose parts its order of launches does not tell
                extra["account"] = _accounts(policy, dense.engine, engine, kept, cell)

    row, kept = decode_row(bench.model, policy, dense, ids, cell, look)
    threshold = isinstance(policy, Threshold)
    if "ms_decision" in extra:
        extra["decision_share"] = extra["ms_decision"] / row["ms_sparse"]
    if bench.cfg.cache == "random":
        row = {key: value for key, value in row.items() if not key.startswith("ttft")}
    return {
        "refresh": policy.refresh,
        "policy_batch": policy.batch,
        "kv": policy.kv,
        "density": _densities(kept.each),
        "groups": kept.each.groups,
        "union": _densities(kept.union),
        "byte_density": bytes_of(policy, kept.each).byte_density,
        "rank": None if policy.predictor is None or threshold else bench.cfg.rank,
        "host": {"dtype": "int8" if bench.cfg.int8 else bench.cfg.dtype, "weights": "random"},
        "cache": bench.cfg.cache,
        **row,
        **extra,
    }


def _densities(kept: Density) -> dict[str, Any]:
    units = {"heads": kept.heads, "neurons": kept.neurons}
    return units | ({"channels": dict(kept.channels)} if kept.channels else {})


def _decision(engine: Engine) -> dict[str, float]:
    """Predictor and selection alone, as one graph of their own, where one tap decides all."""
    decider = engine.decider
    if not isinstance(decider, Fused):
        return {}
    device, rows = engine.device, engine.batch
    hidden = torch.randn(rows, engine.spec.D, device=device)
    position = torch.zeros(rows, dtype=torch.int32, device=device)
    live = torch.ones(rows, dtype=torch.bool, device=device)

    @torch.no_grad()
    def decide() -> None:
        decider.begin(position, live)
        for tap in decider.taps:
            decider.see(tap, hidden)

    times = interleave({"decide": Replay(decide, device)}, 50, 5, device)
    return {"ms_decision": times["decide"].median}


def _accounts(
    policy: Policy, dense: Engine, sparse: Engine, kept: Any, cell: Cell
) -> dict[str, Any]:
    kernels = {name: record(engine.step) for name, engine in (("dense", dense), ("sparse", sparse))}
    first = parts_of([k.name for k in kernels["dense"]])
    found = {}
    for name, engine in (("dense", dense), ("sparse", sparse)):
        names = [k.name for k in kernels[name]]
        parts = parts_of(names, first.count("embedding"))
        own = kept if name == "sparse" else type(kept).all()
        found[name] = account(
            kernels[name], parts, part_bytes(engine, policy.bytes, own, cell.context)
        )
    return found


def _budgets(cfg: Any) -> Iterator[tuple[str, Budget]]:
    """Every policy at every density, or byte density; what has none once."""
    fixed = cfg.heads is not None and cfg.neurons is not None
    base = Budget(density=1.0, heads=cfg.heads, neurons=cfg.neurons, head_unit=cfg.head_unit)
    field = "density" if cfg.bytes is None else "bytes"
    for name in cfg.policies:
        if fixed or name == "dense_int8":
            yield name, base
            continue
        for value in cfg[field]:
            yield name, replace(base, **({"density": None} | {field: value}))


def _aim(budget: Budget) -> str:
    if budget.bytes is not None:
        return f"bytes {budget.bytes:g}"
    return f"{budget.target('heads')}/{budget.target('neurons')}"


def _tokens(bench: Bench, cell: Cell) -> Tensor:
    generator = torch.Generator().manual_seed(bench.cfg.seed)
    ids = torch.randint(4, bench.spec.V, (cell.batch, cell.prompt), generator=generator)
    return ids.to(bench.model.device)


def _first(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['shape']:13s} {row['policy']:11s} {row['error'][:80]}"
    share = f"{row['decision_share']:.3f}" if "decision_share" in row else "–"
    kept = row["density"]
    return (
        f"{row['shape']:13s} {row['policy']:11s} {kept['heads']:.2f} {kept['neurons']:.3f} "
        f"{row['batch']:3d} {row['context']:5d} {row['ms_dense']:8.3f} {row['ms_sparse']:8.3f} "
        f"{row['speedup']:6.2f} {row['speedup_ideal']:6.2f} {row['of_ideal']:6.2f} "
        f"{row['gbps_dense']:6.0f} {row['gbps_sparse']:6.0f} {share:>6s} "
        f"{row['agreement']['sets']:.4f} {row['agreement']['logits_rms']:.1e}"
    )


@hydra.main(version_base="1.3", config_path="conf", config_name="decode")
def main(cfg: DictConfig) -> None:
    """Runs, appends rows to ``out``, prints a table last."""
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/decode.py", *HydraConfig.get().overrides.task])
    about = {"commit": commit(), "command": command, "versions": versions()}
    rows: list[dict[str, Any]] = []

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | about) + "\n")
        log.info(_line(row))

    left_out = run(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)), write)
    print(
        "shape         policy    heads neurons B   ctx   ms dense   sparse   gain  ideal   of it "
        "GB/s d    s   decide sets   rms"
    )
    for row in rows:
        print(_line(row))
    for name in left_out:
        print(f"left out, limit_s={cfg.limit_s:g} was over: {name}")
    print(out)


if __name__ == "__main__":
    main()
