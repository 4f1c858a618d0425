"""What a harvest will do: checked settings, row counts, sizes; decided before the host runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from gnomon.data.backward import loss_scales
from gnomon.data.capture import Capture, tap_width
from gnomon.data.codes import Density, Format, density_of
from gnomon.data.criterion import Criterion
from gnomon.data.text import Text
from gnomon.host import KINDS, HostSpec, Tap

Granularity = Literal["token", "prompt"]
FORMAT_VERSION = 2  # 2: held-out rows are of validation documents
INPUT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Rows:
    """Which rows a block gives.

    Attributes:
        granularity: ``token``: one row per kept position, with its token scores. ``prompt``: one
            row per prompt length P, with the input at position P-2 (what a decision at the end of
            the prompt may see) and the score of positions >= P-1 together.
        prompts: the values of P; empty for ``token``.
        per_block: rows of one block.
        seed: of the token subsample.
    """

    granularity: Granularity
    prompts: tuple[int, ...]
    per_block: int
    seed: int

    def take(
        self, found: Capture, name: str, first: int, full: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Inputs (R, n_taps, W) and scores kind -> (R, L, N) of a batch's rows, as :meth:`view`."""
        inputs, scores, index = self.view(found, name, first, full)
        return inputs[index], {kind: scores[kind][index] for kind in KINDS}

    def view(
        self, found: Capture, name: str, first: int, full: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Candidates (S, ...), not copied where possible, and the index (R,) of the rows in them.

        Args:
            found: capture of whole blocks (no padding).
            name: with ``first``, seeds the subsample.
            first: index of the batch's first block.
            full: every position (held-out rows are not subsampled).
        """
        if self.granularity == "prompt":
            return self._prompts(found)
        blocks, length = found.valid.shape
        count = length - 1 if full else self.per_block
        if count == length - 1:
            at = torch.arange(length - 1).expand(blocks, -1)
        else:
            at = torch.stack(
                [self._draw(name, first + b, length - 1, count) for b in range(blocks)]
            )
        index = (at + length * torch.arange(blocks)[:, None]).flatten().to(found.valid.device)
        scores: dict[str, Tensor] = {k: found.scores(k).flatten(0, 1) for k in KINDS}
        return found.inputs.flatten(0, 1), scores, index

    def _prompts(self, found: Capture) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        inputs = torch.stack([found.inputs[:, p - 2] for p in self.prompts], dim=1).flatten(0, 1)
        scores: dict[str, Tensor] = {
            kind: torch.stack([found.pooled(kind, p - 1) for p in self.prompts], dim=1).flatten(
                0, 1
            )
            for kind in KINDS
        }
        return inputs, scores, torch.arange(len(inputs), device=inputs.device)

    def _draw(self, name: str, block: int, length: int, count: int) -> Tensor:
        order = torch.randperm(length, generator=generator(self.seed, "tokens", name, block))
        return order[:count].sort().values


@dataclass(frozen=True)
class Plan:
    """One harvest, checked. ``identity`` is what a trace folder's content depends on."""

    spec: HostSpec
    taps: tuple[Tap, ...]
    rows: Rows
    format: Format
    label_density: dict[str, float] | None
    input_dtype: str
    width: int
    block: int
    train_blocks: int
    heldout_blocks: int
    shard_blocks: int
    world: int
    identity: dict[str, Any]

    def row_bytes(self, format: Format) -> int:
        """Bytes of one stored row."""
        size = len(self.taps) * self.width * INPUT_DTYPES[self.input_dtype].itemsize
        for kind in KINDS:
            units = self.spec.units(kind)
            size += self.spec.L * (units + 4 if format == "int8" else -(-units // 8))
        return size

    def heldout_rows_per_block(self) -> int:
        """Held-out rows are not subsampled."""
        return len(self.rows.prompts) or self.block - 1

    @property
    def total_bytes(self) -> int:
        """Forecast of the folder's size, over all processes."""
        heldout = self.heldout_blocks * self.heldout_rows_per_block() * self.row_bytes("int8")
        sums = 8 * self.spec.L * (self.spec.H + self.spec.F) * self.shards
        return (
            self.train_blocks * self.rows.per_block * self.row_bytes(self.format) + heldout + sums
        )

    @property
    def shards(self) -> int:
        """About how many shards, over all processes."""
        return -(-self.train_blocks // self.shard_blocks) + -(
            -self.heldout_blocks // self.shard_blocks
        )

    @property
    def key(self) -> str:
        """16 hex digits of the identity, the number of processes aside."""
        return sha({k: v for k, v in self.identity.items() if k != "world"})[:16]


def make_plan(
    spec: HostSpec,
    text: Text,
    criterion: Criterion,
    taps: Sequence[Tap],
    host_dtype: str,
    *,
    granularity: Granularity,
    prompts: Sequence[int] | None,
    format: Format,
    label_density: Density,
    token_rate: float,
    shard_blocks: int,
    heldout_tokens: int,
    input_dtype: str,
    seed: int,
    world: int,
) -> Plan:
    """Checks every setting and puts them together.

    Raises:
        ValueError: a setting that is out of range or unknown, by name.
    """
    if format not in get_args(Format):
        raise ValueError(f"harvest.format={format!r}: use {' or '.join(get_args(Format))}")
    if shard_blocks < 1:
        raise ValueError(f"harvest.shard_blocks={shard_blocks} must be at least 1")
    if input_dtype == "auto":
        input_dtype = "bfloat16" if host_dtype == "bfloat16" else "float16"
    if input_dtype not in INPUT_DTYPES:
        raise ValueError(
            f"harvest.input_dtype={input_dtype!r}: use auto, {', '.join(INPUT_DTYPES)}"
        )
    if heldout_tokens < text.block:
        raise ValueError(
            f"harvest.heldout_tokens={heldout_tokens} is fewer than one block ({text.block} tokens)"
        )
    rows = make_rows(text.block, granularity, prompts, token_rate, seed)
    criterion.require(granularity)
    densities: dict[str, float] | None = None
    if format == "bits":
        densities = {k: density_of(label_density, k) for k in KINDS}
    taps = tuple(taps)
    identity = {
        "version": FORMAT_VERSION,
        "host": {"hash": spec.hash, "family": spec.family, "dtype": host_dtype},
        "criterion": criterion.name,
        "criterion_class": criterion.identity,
        "taps": [asdict(t) for t in taps],
        "text": {
            "fingerprint": text.fingerprint,
            "block": text.block,
            "tokens": text.tokens,
            "heldout": text.heldout,
            "heldout_tokens": heldout_tokens,
            "seed": text.seed,
            "bos": text.bos,
        },
        "granularity": granularity,
        "prompts": list(rows.prompts),
        "format": format,
        "label_density": densities,
        "token_rate": token_rate,
        "input_dtype": input_dtype,
        "shard_blocks": shard_blocks,
        "seed": seed,
        "world": world,
    }
    scales = loss_scales(getattr(torch, host_dtype), criterion.needs_gradient)
    if scales != (1.0,):
        identity["loss_scales"] = list(scales)
    return Plan(
        spec=spec,
        taps=taps,
        rows=rows,
        format=format,
        label_density=densities,
        input_dtype=input_dtype,
        width=tap_width(spec, taps),
        block=text.block,
        train_blocks=text.tokens // text.block,
        heldout_blocks=heldout_tokens // text.block,
        shard_blocks=shard_blocks,
        world=world,
        identity=identity,
    )


def make_rows(
    block: int,
    granularity: Granularity,
    prompts: Sequence[int] | None,
    token_rate: float,
    seed: int,
) -> Rows:
    """Which rows a block gives; ``prompts`` defaults to half a block.

    Raises:
        ValueError: unknown granularity, a rate outside (0, 1], or a prompt that does not fit.
    """
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"harvest.granularity={granularity!r}: use {' or '.join(get_args(Granularity))}"
        )
    if not 0 < token_rate <= 1:
        raise ValueError(f"harvest.token_rate={token_rate} must be in (0, 1]")
    if granularity == "token":
        return Rows(granularity, (), max(1, round(token_rate * (block - 1))), seed)
    lengths = tuple(prompts) if prompts else (block // 2,)
    if token_rate != 1:
        raise ValueError(
            "harvest.token_rate subsamples tokens: leave it at 1 for granularity=prompt"
        )
    if not all(2 <= p < block for p in lengths):
        raise ValueError(
            f"harvest.prompts={list(lengths)}: each must be in [2, text.block={block}), so that "
            "there is a token before the decision and one after it"
        )
    return Rows(granularity, lengths, len(lengths), seed)


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by names and numbers."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def sha(value: Any) -> str:
    """sha256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
