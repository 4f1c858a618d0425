"""lm-evaluation-harness: found or asked for, tasks loaded by name or file, and run on a host."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

from gnomon.evaluation.task_files import local_config

SUPPORTED = ((0, 4, 13), (0, 5))  # from, below
INSTALL = "pip install 'gnomon[eval]' (in a checkout: pip install -c constraints.txt -e '.[eval]')"
SCORES = ("acc", "exact_match", "em", "f1")  # the first that a task gives is its score


@dataclass(frozen=True)
class Answers:
    """What a model said to the n examples of one task.

    Attributes:
        asked: (n,) hashes of the prompts, to pair examples.
        scores: (n,) 1 for right, 0 for wrong (a share for graded metrics).
        logliks: (n,) lists of log-likelihoods of the choices; empty for tasks that generate.
        metric: the harness's name of the score.
    """

    asked: list[str]
    scores: list[float]
    logliks: list[list[float]]
    metric: str


def require_harness() -> None:
    """Raises ValueError where the harness is missing or of another version."""
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        raise ValueError(
            f"measure=[tasks] needs lm-evaluation-harness, which is not installed: {INSTALL}"
        ) from None
    low, high = SUPPORTED
    parts = tuple(int(p) for p in found.split(".")[:3] if p.isdecimal())
    if not low <= parts < high:
        wanted = f"{'.'.join(map(str, low))} up to, not including, {'.'.join(map(str, high))}"
        raise ValueError(f"lm-eval {found} is not supported, use {wanted}: {INSTALL}")


def load_tasks(
    names: Sequence[str], path: str | Path | None, fewshot: int | None = None
) -> dict[str, Any]:
    """Harness tasks by name; a group of the harness becomes its tasks.

    Args:
        names: of the harness, or of files in ``path``.
        path: folder of task files; None for the harness's own tasks from the hub.
        fewshot: solved examples before each question; None for the task's own number, which is
            also kept where it is zero by design.

    Raises:
        ValueError: an unknown task, a file that is wrong, or a hub that cannot be reached.
    """
    with _quiet():
        manager = _manager(hub=path is None)
        configs: list[Any] = (
            [_known(name, manager.all_tasks) for name in names]
            if path is None
            else [local_config(Path(path).expanduser(), name) for name in names]
        )
        found: dict[str, Any] = {}
        for name, config in zip(names, configs, strict=True):
            try:
                found |= manager.load([config])["tasks"]
            except (OSError, ConnectionError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else "offline"
                raise ValueError(
                    f"tasks.names={name!r} could not be fetched from the hub ({reason}): connect "
                    "once, or give local files with tasks.path=<folder>"
                ) from error
    for task in found.values():
        own = task.get_config("num_fewshot")
        shots = own if own == 0 or fewshot is None else fewshot
        task.set_config(key="num_fewshot", value=shots or 0)
    return found


def open_lm(model: Any, tokenizer: Any, batch: int) -> Any:
    """A :class:`~gnomon.evaluation.boundary_lm.BoundaryLM` around a host."""
    from gnomon.evaluation.boundary_lm import BoundaryLM

    with _quiet():
        return BoundaryLM(model, tokenizer, batch)


def ask(lm: Any, task: Any, *, limit: int | None, seed: int) -> Answers:
    """Runs one task on a host, dense or inside :func:`gnomon.sparsify`.

    Args:
        lm: from :func:`open_lm`.
        task: from :func:`load_tasks`.
        limit: first examples; None for all.
        seed: of the choice of solved examples: the same ones every time.
    """
    from lm_eval import evaluator

    task.set_fewshot_seed(seed=seed)
    loaded: Any = {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}
    with _quiet():
        found = evaluator.evaluate(
            lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True
        )
    assert found is not None
    return answers_of(next(iter(found["samples"].values())), task.task_name)


def answers_of(samples: Sequence[Mapping[str, Any]], name: str) -> Answers:
    """Answers from the harness's samples; the first filter where a task has several.

    Raises:
        ValueError: a task without a score between 0 and 1.
    """
    first = samples[0]["filter"]
    ours = sorted((s for s in samples if s["filter"] == first), key=lambda s: int(s["doc_id"]))
    metric = next((m for m in SCORES if m in ours[0]), None)
    if metric is None:
        raise ValueError(
            f"tasks.names={name!r} gives {', '.join(ours[0]['metrics'])} and none of "
            f"{', '.join(SCORES)}: leave it out"
        )
    return Answers(
        asked=[str(s["prompt_hash"]) for s in ours],
        scores=[float(s[metric]) for s in ours],
        logliks=[_logliks(s["filtered_resps"]) for s in ours],
        metric=metric,
    )


def _logliks(responses: Any) -> list[float]:
    """Log-likelihoods of the choices; a response that is text has none."""
    if isinstance(responses, tuple) or (
        isinstance(responses, list) and responses and isinstance(responses[0], int | float)
    ):
        responses = [responses]  # a single continuation
    pairs = [r for r in responses if isinstance(r, list | tuple) and len(r) == 2]
    return [float(pair[0]) for pair in pairs]


@cache
def _manager(hub: bool) -> Any:
    """The harness's index of tasks; its own thousands take some ten seconds to list."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=hub)


def _known(name: str, every: Sequence[str]) -> str:
    if name not in every:
        near = difflib.get_close_matches(name, every, n=5, cutoff=0.6)
        raise ValueError(
            f"tasks.names={name!r} is unknown to the harness"
            + (f"; near it: {', '.join(near)}" if near else "")
            + " (lm-eval ls tasks lists all), or give local files with tasks.path=<folder>"
        )
    return name


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness says what it does at every step: errors are kept, and bars on a terminal."""
    theirs = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    before = [logger.level for logger in theirs]
    try:
        for logger in theirs:
            logger.setLevel(logging.ERROR)
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(theirs, before, strict=True):
            logger.setLevel(level)
