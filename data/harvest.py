"""Harvest: text through the host into a trace folder, shard by shard; resumes where it stopped."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from gnomon.data.capture import Probe
from gnomon.data.codes import Density, Format
from gnomon.data.criteria import Criterion
from gnomon.data.parts import LAUNCH, Parts
from gnomon.data.plan import Granularity, Plan, make_plan
from gnomon.data.store import (
    MANIFEST,
    SETTINGS,
    Part,
    Shard,
    TraceStore,
    read_manifest,
    seal,
    write_json,
)
from gnomon.data.text import Blocks, Text
from gnomon.data.writer import Writer
from gnomon.host import KINDS, HostSpec, Tap

log = logging.getLogger(__name__)


def harvest(
    model: nn.Module,
    tokenizer: Any,
    spec: HostSpec,
    text: Text,
    criterion: Criterion,
    taps: Sequence[Tap],
    out: str | Path,
    *,
    granularity: Granularity = "token",
    prompts: Sequence[int] | None = None,
    format: Format = "int8",
    label_density: Density = 0.5,
    token_rate: float = 1.0,
    batch: int = 4,
    shard_blocks: int = 8,
    max_gb: float | None = 20.0,
    heldout_tokens: int = 2048,
    input_dtype: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> TraceStore:
    """Harvests what is missing of a trace folder and opens it.

    Under ``torchrun`` every process takes its own documents; the first one seals the folder.

    Args:
        model: the host, in eval mode.
        tokenizer: its tokenizer.
        spec: its description.
        text: where documents come from; ``text.tokens`` training tokens are harvested.
        criterion: what makes a score.
        taps: hidden states that become inputs.
        out: the trace folder.
        granularity: ``token`` or ``prompt``.
        prompts: prompt lengths P for ``prompt``; default half a block.
        format: ``int8`` scores or ``bits`` (labels at ``label_density``) for training rows.
        label_density: kept fraction of the labels, one value or per kind.
        token_rate: share of the positions stored.
        batch: blocks in one forward and backward.
        shard_blocks: blocks in one shard; memory holds one shard.
        max_gb: refuse a larger folder (10^9 bytes); None: no limit.
        heldout_tokens: tokens of validation documents, stored as int8 without subsampling.
        input_dtype: of stored inputs; ``auto``: bfloat16 for a bfloat16 host, else float16.
        seed: of the shuffle inside a shard and of the token subsample.
        progress: show a progress bar.

    Returns:
        The complete store.

    Raises:
        ValueError: a bad setting; a folder that holds something else; a forecast over ``max_gb``
            or over the free disk; NaN or inf in scores.
        OSError: the disk is full. Complete shards are kept, the same call resumes.
        TimeoutError: another process of this harvest is gone; see :mod:`gnomon.data.parts`.
    """
    out = Path(out).expanduser()
    rank, world = rank_world()
    if batch < 1:
        raise ValueError(f"harvest.batch={batch} must be at least 1")
    plan = make_plan(
        spec,
        text,
        criterion,
        taps,
        str(next(model.parameters()).dtype).removeprefix("torch."),
        granularity=granularity,
        prompts=prompts,
        format=format,
        label_density=label_density,
        token_rate=token_rate,
        shard_blocks=shard_blocks,
        heldout_tokens=heldout_tokens,
        input_dtype=input_dtype,
        seed=seed,
        world=world,
    )
    if is_complete(out, plan):
        log.info("harvest: %s is complete and used again", out)
        return TraceStore.open(out, spec)
    _check_size(out, plan, max_gb)
    texts: dict[Part, Blocks] = {
        "train": text.blocks(tokenizer, "train", None, rank, world),
        "heldout": text.blocks(tokenizer, "validation", heldout_tokens, rank, world),
    }
    _claim(out, plan)
    parts = Parts(out, rank, world)
    writer = Writer(plan, Probe(model, spec, taps, criterion), out, batch, rank)
    shards = writer.run(texts, progress and rank == 0)
    digests = {split: blocks.digest for split, blocks in texts.items()}
    part = {"digests": digests, "shards": [asdict(s) for s in shards]}
    if rank == 0:
        _seal(out, plan, text, batch, writer, parts.collect(part))
        parts.clear()
    else:
        parts.hand_in(part, out / MANIFEST)
    return TraceStore.open(out, spec)


def is_complete(out: Path, plan: Plan) -> bool:
    """Whether a folder already holds exactly what the plan would harvest.

    Raises:
        ValueError: it holds, or began to hold, something else, by the settings that differ.
    """
    if (out / MANIFEST).is_file():
        # traces are the same data whatever number of processes made them
        _require_same(out, read_manifest(out)["settings"], plan.identity, ignore=("world",))
        return True
    if (out / SETTINGS).is_file():
        _require_same(out, json.loads((out / SETTINGS).read_text()), plan.identity)
    elif out.exists():
        foreign = [] if not out.is_dir() else [p.name for p in out.iterdir() if _foreign(p.name)]
        if foreign or not out.is_dir():
            raise ValueError(
                f"{out} exists and is not a trace folder of this version (it holds "
                f"{', '.join(sorted(foreign)[:5]) or 'a file'}): choose another folder"
            )
    return False


def rank_world() -> tuple[int, int]:
    """This process and the number of processes, as ``torchrun`` says it."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _foreign(name: str) -> bool:
    return name not in (SETTINGS, LAUNCH) and not name.endswith(".tmp")


def _require_same(
    out: Path, held: dict[str, Any], wanted: dict[str, Any], ignore: tuple[str, ...] = ()
) -> None:
    held, wanted = _flat(held), _flat(json.loads(json.dumps(wanted)))
    differ = [k for k in sorted(held | wanted) if held.get(k) != wanted.get(k) and k not in ignore]
    if differ:
        listed = "; ".join(f"{k}: {held.get(k)} there, {wanted.get(k)} asked" for k in differ[:6])
        raise ValueError(
            f"trace folder {out} holds another harvest ({listed}): use another folder, the same "
            "settings, or delete it"
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat


def _claim(out: Path, plan: Plan) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if not (out / SETTINGS).is_file():
        write_json(out / SETTINGS, plan.identity)


def _check_size(out: Path, plan: Plan, max_gb: float | None) -> None:
    needed = plan.total_bytes
    per_token = needed / max(1, (plan.train_blocks + plan.heldout_blocks) * plan.block)
    if max_gb is not None and needed > max_gb * 1e9:
        raise ValueError(
            f"the harvest would take {needed / 1e9:.2f} GB ({per_token:,.0f} bytes per token), "
            f"over harvest.max_gb={max_gb}: lower text.tokens or harvest.token_rate, use "
            "harvest.format=bits or harvest.mode=online, or raise harvest.max_gb"
        )
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    held = sum(p.stat().st_size for p in out.glob("*.safetensors")) if out.is_dir() else 0
    free = shutil.disk_usage(there).free
    if needed - held > free:
        raise ValueError(
            f"the harvest needs {(needed - held) / 1e9:.2f} GB more and the disk of {out} has "
            f"{free / 1e9:.2f} GB free: choose another folder (paths.traces) or harvest less"
        )


def _seal(
    out: Path,
    plan: Plan,
    text: Text,
    batch: int,
    writer: Writer,
    parts: Sequence[dict[str, Any]],
) -> None:
    """Merges the parts of all processes into one manifest."""
    spec = plan.spec
    sizes = {k: getattr(spec, k) for k in ("L", "H", "G", "d", "D", "F")}
    manifest = {
        "settings": plan.identity,
        "host": {
            "name": spec.name,
            "revision": spec.revision,
            "hash": spec.hash,
            "sizes": sizes,
            "units": {k: spec.units(k) for k in KINDS},
        },
        "shape": {"taps": len(plan.taps), "width": plan.width},
        "text": {
            "name": text.name,
            "digests": {s: [p["digests"][s] for p in parts] for s in ("train", "heldout")},
            "split": text.facts("train", "validation"),
        },
        "run": {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "batch": batch,
            "tokens": writer.tokens,
            "capture_seconds": round(writer.capture_seconds, 3),
            "write_seconds": round(writer.write_seconds, 3),
            "versions": {p: _version(p) for p in ("gnomon", "torch", "transformers")},
        },
    }
    seal(out, manifest, [Shard(**s) for p in parts for s in p["shards"]])
    for leftover in out.glob("*.tmp"):
        leftover.unlink(missing_ok=True)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
