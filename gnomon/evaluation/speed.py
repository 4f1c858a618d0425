"""Speed: milliseconds per decoded token of a policy beside the dense host, in the same run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnomon.accounting import account
from gnomon.engine.support import UnsupportedPolicyError
from gnomon.evaluation.bench import Bench, density_result, targets
from gnomon.evaluation.decoding import Cell, decode_row, open_dense
from gnomon.evaluation.generic import generic_row
from gnomon.evaluation.hf_decode import hf_decode, hf_mode
from gnomon.evaluation.results import warn
from gnomon.evaluation.subject import Subject
from gnomon.evaluation.traffic import Kept
from gnomon.host import UnsupportedHostError
from gnomon.policies import Policy

log = logging.getLogger(__name__)
_hf: dict[str, float] = {}


@dataclass(frozen=True)
class Speed:
    """Times a policy's decode steps against the dense twin, over batches and contexts.

    Attributes:
        batch: rows, one or several settings.
        context: tokens attended to, one or several settings.
        steps: timed steps of each contender, 50 or more.
        warmup: steps before them.
        check: teacher-forced steps of the agreement check.
        hf: Hugging Face decode beside it: ``auto`` (compiled on CUDA, else eager), ``compiled``,
            ``eager`` or ``off``.
    """

    batch: int | Sequence[int] = 1
    context: int | Sequence[int] = 1024
    steps: int = 64
    warmup: int = 8
    check_steps: int = 16
    hf: str = "auto"

    def cells(self) -> list[Cell]:
        """Every batch at every context.

        Raises:
            ValueError: a setting outside its range.
        """
        sizes = [(b, c) for b in _each(self.batch) for c in _each(self.context)]
        if not sizes:
            raise ValueError("speed.batch and speed.context name nothing to time: give one each")
        return [Cell(b, c, self.steps, self.warmup, self.check_steps) for b, c in sizes]

    def check(self, bench: Bench) -> None:
        """Raises ValueError for what cannot be timed, before anything is."""
        hf_mode(self.hf, bench.model.device)
        config = bench.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        for cell in self.cells():
            if limit is not None and cell.room > limit:
                raise ValueError(
                    f"speed.context={cell.context} with speed.steps={self.steps} needs "
                    f"{cell.room} tokens, the host's context is {limit}: lower speed.context to "
                    f"{cell.context - cell.room + limit}"
                )

    def run(self, bench: Bench, subject: Subject, results: dict[str, Any]) -> None:
        """Fills ``speed``; also ``density`` and ``backend`` where no other measure did.

        Raises:
            ValueError: the policy exists under ``mask`` alone and nothing else is measured.
        """
        policy, alone = subject.policy, "quality" not in results
        if policy.needs_units:
            message = f"policy={policy.name} exists under backend=mask alone and never has a speed"
            if alone:
                raise ValueError(f"{message}: use measure=[quality], or another policy")
            warn(f"{message}: `speed` left out")
            return
        policy.bytes_dtype = bench.bytes_dtype
        policy.bind(bench.model, bench.spec)
        rows, kept = [], Kept.all()
        for cell in self.cells():
            row, kept = self._row(bench, policy, cell)
            rows.append(row)
        results["speed"] = rows
        if alone:
            accounting = account(policy, kept.each, dtype=bench.bytes_dtype)
            target = targets(policy)
            results["density"] = density_result(target, kept.each, accounting, layers=True)
            results["backend"] = rows[0]["backend"]

    def _row(self, bench: Bench, policy: Policy, cell: Cell) -> tuple[dict[str, Any], Kept]:
        log.info("Timing batch %d at context %d", cell.batch, cell.context)
        ids = prompts(bench.blocks.ids, cell.batch, cell.prompt).to(bench.model.device)
        mode = hf_mode(self.hf, bench.model.device)
        found = {} if mode == "off" else {"ms_hf": self._dense_hf(bench, ids, cell, mode)}
        row, kept = _timed(bench, policy, ids, cell)
        if found:
            fastest = min(row["ms_dense"], found["ms_hf"])
            found |= {"hf": mode, "speedup_fastest": fastest / row["ms_sparse"]}  # type: ignore[dict-item]
        if found and fastest < row["ms_dense"]:
            warn(
                f"Hugging Face decode ({mode}) is faster than the dense twin at batch "
                f"{cell.batch}, context {cell.context}: quote `speedup_fastest`, which is over it"
            )
        return row | found, kept

    def _dense_hf(self, bench: Bench, ids: Tensor, cell: Cell, mode: str) -> float:
        key = f"{bench.key} {bench.blocks.digest} {cell} {mode} {torch.get_num_threads()}"
        if key not in _hf:
            log.info("Timing Hugging Face decode (%s)", mode)
            _hf[key] = hf_decode(bench.model, ids, cell.steps, cell.warmup, mode).median
        return _hf[key]


def prompts(ids: Tensor, batch: int, length: int) -> Tensor:
    """Prompts (batch, length) of running text from blocks (n, block).

    They start at equal distances; a text that is too short starts again from its beginning.
    """
    text = ids.flatten()
    starts = torch.arange(batch) * (len(text) // batch)
    return text[(starts[:, None] + torch.arange(length)) % len(text)]


def forget() -> None:
    """Empties the in-process cache of Hugging Face times."""
    _hf.clear()


def _timed(bench: Bench, policy: Policy, ids: Tensor, cell: Cell) -> tuple[dict[str, Any], Kept]:
    """In the decode engine where it can run host and policy, else on the generic path."""
    backend = "auto" if bench.backend == "mask" else bench.backend
    try:
        dense = open_dense(bench.model, ids, cell, backend=backend)
        try:
            return decode_row(bench.model, policy, dense, ids, cell)
        finally:
            dense.engine.close()
    except (UnsupportedHostError, UnsupportedPolicyError) as error:
        warn(f"No decode engine, timed on the generic path: {error}")
        return generic_row(bench.model, policy, ids, cell, bench.backend)


def _each(value: int | Sequence[int]) -> Sequence[int]:
    return [value] if isinstance(value, int) else value
