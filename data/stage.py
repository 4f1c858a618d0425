"""The data stage of a training run: from plain settings to a data module or a finished store."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from gnomon.data.blocks import BlockDataModule, BlockSettings
from gnomon.data.codes import Density, Format, Need, check_needs
from gnomon.data.criteria import Criterion
from gnomon.data.datamodule import OnlineDataModule, TraceDataModule
from gnomon.data.harvest import harvest, rank_world
from gnomon.data.plan import Granularity, make_plan
from gnomon.data.store import TraceStore
from gnomon.data.text import Text
from gnomon.host import HostSpec, Tap

Mode = Literal["store", "online", "only"]


def prepare(
    *,
    model: nn.Module,
    tokenizer: Any,
    spec: HostSpec,
    text: Text,
    criterion: Criterion,
    taps: Sequence[Tap],
    needs: Iterable[Need],
    out_root: str | Path,
    density: Density = 0.5,
    batch_size: int = 1024,
    mode: Mode = "store",
    granularity: Granularity = "token",
    prompts: Sequence[int] | None = None,
    format: Format | Literal["auto"] = "auto",
    label_density: Density | None = None,
    token_rate: float = 1.0,
    batch: int = 4,
    shard_blocks: int = 8,
    max_gb: float | None = 20.0,
    heldout_tokens: int = 2048,
    means_tokens: int = 4096,
    input_dtype: str = "auto",
    trace_seed: int = 0,
    seed: int = 0,
    blocks: BlockSettings | None = None,
) -> OnlineDataModule | TraceDataModule | TraceStore:
    """Makes the rows that an objective needs available.

    The trace folder lies below ``out_root``; its name says what it is and ends in a hash of all
    settings, so that a complete one is used again and a begun one resumed.

    Args:
        model: the host, in eval mode.
        tokenizer: its tokenizer.
        spec: its description.
        text: where documents come from.
        criterion: what makes a score.
        taps: hidden states that the predictor reads.
        needs: what the objective needs: ``labels``, ``scores`` or both.
        out_root: folder of trace folders.
        density: kept fraction of the labels, one value or per kind.
        batch_size: rows of a training batch.
        mode: ``store``: harvest, then read the store; ``online``: no store; ``only``: harvest and
            return the store.
        format: ``int8``, ``bits``, or ``auto``: bits if labels are all that is needed.
        label_density: of stored labels; None: ``density``.
        means_tokens: for ``online``, tokens of the first means.
        trace_seed: ``seed`` of the harvest; runs of several seeds share one store.
        seed: of the order of training rows.
        blocks: for objectives that run the host: training batches are blocks of token ids.
        granularity, prompts, token_rate, batch, shard_blocks, max_gb, heldout_tokens,
        input_dtype: as in :func:`gnomon.data.harvest.harvest`.

    Returns:
        A data module that is set up, or the store for ``only``.

    Raises:
        ValueError: a bad setting, by name; see :func:`gnomon.data.harvest.harvest`.
    """
    if mode not in get_args(Mode):
        raise ValueError(
            f"harvest.mode={mode!r} is unknown; use one of {', '.join(get_args(Mode))}"
        )
    if format not in ("auto", *get_args(Format)):
        raise ValueError(f"harvest.format={format!r}: use auto, {', '.join(get_args(Format))}")
    wanted = check_needs(needs)
    if blocks is not None and mode != "online":
        raise ValueError(
            f"harvest.mode={mode}: objective=kl and objective.on_policy=true run the sparse host "
            "itself and read no stored traces; use harvest.mode=online"
        )
    if mode == "online":
        kind = OnlineDataModule if blocks is None else partial(BlockDataModule, blocks)
        online = kind(
            model,
            tokenizer,
            spec,
            text,
            criterion,
            taps,
            needs=wanted,
            density=density,
            granularity=granularity,
            prompts=prompts,
            batch_size=batch_size,
            host_batch=batch,
            token_rate=token_rate,
            heldout_tokens=heldout_tokens,
            means_tokens=means_tokens,
            seed=seed,
        )
        online.setup()
        return online
    chosen: Format = ("bits" if wanted == {"labels"} else "int8") if format == "auto" else format
    labels = density if label_density is None else label_density
    plan = make_plan(
        spec,
        text,
        criterion,
        taps,
        str(next(model.parameters()).dtype).removeprefix("torch."),
        granularity=granularity,
        prompts=prompts,
        format=chosen,
        label_density=labels,
        token_rate=token_rate,
        shard_blocks=shard_blocks,
        heldout_tokens=heldout_tokens,
        input_dtype=input_dtype,
        seed=trace_seed,
        world=rank_world()[1],
    )
    parts = (spec.name or spec.family, criterion.name, granularity, chosen, text.name, plan.key)
    name = "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)
    store = harvest(
        model,
        tokenizer,
        spec,
        text,
        criterion,
        taps,
        Path(out_root).expanduser() / name,
        granularity=granularity,
        prompts=prompts,
        format=chosen,
        label_density=labels,
        token_rate=token_rate,
        batch=batch,
        shard_blocks=shard_blocks,
        max_gb=max_gb,
        heldout_tokens=heldout_tokens,
        input_dtype=input_dtype,
        seed=trace_seed,
    )
    if mode == "only":
        return store
    return TraceDataModule(store, wanted, density, batch_size, seed)
