"""The bench: one host, text and protocol, on which each policy is measured at most once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

import gnomon
from gnomon.accounting import Accounting, Density, account
from gnomon.evaluation.baseline import dense_nll
from gnomon.evaluation.quality import Perplexity, Protocol, block_nll, perplexity
from gnomon.host import HostSpec
from gnomon.policies import Policy

if TYPE_CHECKING:
    from gnomon.data.text import Blocks


@dataclass(frozen=True)
class Measured:
    """A policy's teacher-forced pass over the text.

    Attributes:
        nll: (n,) NLL sums of the blocks, in nats.
        density: achieved over the sparse positions.
        accounting: bytes at that density.
        target: density aimed at per unit kind (solved, under ``budget.bytes``).
        backend: that executed the skipping.
    """

    nll: Tensor
    density: Density
    accounting: Accounting
    target: dict[str, float]
    backend: str

    def as_result(self, *, layers: bool) -> dict[str, Any]:
        """The ``density`` object of results.json; ``layers`` adds the densities of every layer."""
        return density_result(self.target, self.density, self.accounting, layers=layers)


@dataclass(frozen=True)
class Bench:
    """Where policies are measured.

    Attributes:
        key: from :func:`gnomon.evaluation.baseline.host_key`.
        batch: blocks per forward.
        cache: folder of the dense baselines; None keeps them in process only.
        bytes_dtype: dtype of byte accounting; None takes the host's.
        progress: whether to draw progress bars (on stderr).
    """

    model: PreTrainedModel
    tokenizer: Any
    spec: HostSpec
    key: dict[str, str]
    blocks: Blocks
    protocol: Protocol
    backend: str = "auto"
    batch: int = 4
    cache: Path | None = None
    bytes_dtype: str | None = None
    progress: bool = True

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.blocks.ids.shape[1]

    def dense(self) -> Tensor:
        """The dense model's NLL (n,), computed once per host, text and protocol."""
        with self._bar("dense") as advance:
            return dense_nll(
                self.model,
                self.blocks.ids,
                self.blocks.digest,
                self.protocol,
                key=self.key,
                batch=self.batch,
                cache=self.cache,
                progress=advance,
            )

    def measure(self, policy: Policy, identity: str | None) -> Measured:
        """Runs a policy over the text under :func:`gnomon.sparsify`.

        Args:
            policy: the policy.
            identity: what tells it from other policies; the same one is never measured twice.
                None measures, and remembers nothing.
        """
        if identity is None:
            return self._run(policy)
        facts = [self.key, self.blocks.digest, asdict(self.protocol), self.backend, self.batch]
        name = json.dumps([*facts, self.bytes_dtype, identity], sort_keys=True)
        if name not in _measured:
            _measured[name] = self._run(policy)
        return _measured[name]

    def perplexity(self, measured: Measured, *, resamples: int, seed: int) -> Perplexity:
        """A measured policy's perplexity beside the dense model's."""
        targets = self.protocol.targets(self.block)
        return perplexity(measured.nll, self.dense(), targets, resamples=resamples, seed=seed)

    def _run(self, policy: Policy) -> Measured:
        policy.bytes_dtype = self.bytes_dtype
        with (
            gnomon.sparsify(
                self.model,
                policy,
                backend=self.backend,
                protocol=self.protocol.name,
                prompt_length=self.protocol.prompt_length,
            ) as session,
            self._bar(policy.name) as advance,
        ):
            nll = block_nll(
                self.model, self.blocks.ids, self.protocol, batch=self.batch, advance=advance
            )
            density = session.density()
        accounting = account(policy, density, dtype=self.bytes_dtype)
        return Measured(nll, density, accounting, targets(policy), session.backend)

    @contextmanager
    def _bar(self, name: str) -> Iterator[Callable[[int], object]]:
        columns = (
            TextColumn(f"{name} over {self.blocks.name}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("blocks"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        disable = not (self.progress and console.is_terminal)
        with Progress(*columns, console=console, transient=True, disable=disable) as bar:
            task = bar.add_task(name, total=len(self.blocks.ids))
            yield lambda blocks: bar.advance(task, blocks)


_measured: dict[str, Measured] = {}


def forget() -> None:
    """Empties the in-process cache of measured policies."""
    _measured.clear()


def targets(policy: Policy) -> dict[str, float]:
    """Target densities of a bound policy, and the byte target where that is what was asked for."""
    found = {kind: policy.resolved.target(kind) for kind in ("heads", "neurons")}
    asked = policy.budget.bytes
    return found if asked is None else found | {"bytes": asked}


def density_result(
    target: dict[str, float], density: Density, accounting: Accounting, *, layers: bool
) -> dict[str, Any]:
    """The ``density`` object of results.json."""
    found: dict[str, Any] = {
        "target": target,
        "heads": density.heads,
        "neurons": density.neurons,
        "groups": density.groups,
        "byte_density": accounting.byte_density,
        "predictor_byte_share": accounting.predictor_byte_share,
        "accounting": accounting.inputs,
    }
    if density.channels:
        found["channels"] = density.channels
    return found | ({"per_layer": density.per_layer} if layers and density.per_layer else {})
