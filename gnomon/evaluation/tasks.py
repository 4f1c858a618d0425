"""Tasks: accuracy of the sparse and the dense model on the same questions, through the harness."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gnomon
from gnomon.accounting import account
from gnomon.env import versions
from gnomon.evaluation.baseline import write_atomic
from gnomon.evaluation.bench import Bench, density_result, targets
from gnomon.evaluation.brackets import check_brackets, measure_brackets
from gnomon.evaluation.harness import Answers, ask, load_tasks, open_lm, require_harness
from gnomon.evaluation.rows import BRACKETS
from gnomon.evaluation.subject import Subject
from gnomon.evaluation.task_files import file_facts
from gnomon.evaluation.written import SCORER
from gnomon.policies import Policy

SEVEN = ("piqa", "copa", "openbookqa", "winogrande", "rte", "hellaswag", "arc_easy")

log = logging.getLogger(__name__)
_dense: dict[str, Answers] = {}
_asked: dict[str, Asked] = {}
_loaded: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Asked:
    """A policy's answers to every task, and what it kept.

    Attributes:
        answers: by task.
        density: the ``density`` object of results.json, over all tasks.
        backend: that executed the skipping.
    """

    answers: dict[str, Answers]
    density: dict[str, Any]
    backend: str


@dataclass(frozen=True)
class Tasks:
    """Accuracy and answer distribution on tasks, beside the dense model and brackets.

    Attributes:
        names: of the harness's tasks, or of files in ``path``.
        path: folder of task files; None for the harness's own tasks from the hub.
        limit: first examples of each task; None for all.
        fewshot: solved examples before each question; None for the task's own number.
        batch: questions per forward.
        brackets: measured beside the policy, any of ``dense_int8 oracle static random``.
        seed: of the solved examples and the random bracket.
    """

    names: Sequence[str] = SEVEN
    path: str | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch: int = 8
    brackets: Sequence[str] = BRACKETS
    seed: int = 0

    def require(self) -> None:
        """Raises ValueError for anything wrong that shows without a host."""
        require_harness()
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"tasks.names={list(self.names)}: give one or more, each once")
        lowest = {"limit": 2, "fewshot": 0, "batch": 1}  # one example has no standard error
        for field, least in lowest.items():
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < least):
                none = "" if field == "batch" else ", or null"
                raise ValueError(f"tasks.{field}={value}: use a whole number from {least}{none}")
        check_brackets(self.brackets, "tasks.brackets")
        assert self.tasks  # files are read, and hub tasks fetched, before the host is

    def check(self, bench: Bench) -> None:
        """Raises ValueError for what cannot be measured on this host."""
        small = [name for name, task in self.tasks.items() if len(task.eval_docs) < 2]
        if small:
            raise ValueError(f"tasks.names={small[0]!r} has one example: give two or more")

    @cached_property
    def tasks(self) -> dict[str, Any]:
        """The harness's tasks by name; the jobs of a sweep share them while the files last."""
        files = None if self.path is None else file_facts(self.path, self.names)
        key = json.dumps([list(self.names), files, self.fewshot])
        if key not in _loaded:
            _loaded.clear()
            _loaded[key] = load_tasks(self.names, self.path, self.fewshot)
        return _loaded[key]

    def run(self, bench: Bench, subject: Subject, results: dict[str, Any]) -> None:
        """Fills ``quality.tasks`` and its brackets; density and backend where nothing else did."""
        lm = open_lm(bench.model, bench.tokenizer, self.batch)
        dense = {name: self._dense(bench, lm, name) for name in self.tasks}

        def measure(policy: Policy, identity: str) -> tuple[dict[str, Any], dict[str, Any]]:
            found = self._asked(bench, lm, policy, identity)
            rows = {n: compare(dense[n], found.answers[n], self._shots(n)) for n in dense}
            return found.density, {"tasks": rows}

        density, quality = measure(subject.policy, subject.identity)
        if "texts" not in results.get("quality", {}):
            results["density"] = density
            results["backend"] = self._asked(bench, lm, subject.policy, subject.identity).backend
        results["quality"] = results.get("quality", {}) | quality
        measure_brackets(
            results, subject.policy, self.brackets, subject.means, measure, seed=self.seed
        )

    def _dense(self, bench: Bench, lm: Any, name: str) -> Answers:
        """The dense model's answers: from memory, disk, or asked once."""
        facts = bench.key | self._facts(name)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        path = bench.cache / "dense" / f"{digest}.json" if bench.cache else None
        if digest not in _dense:
            found = _read(path, facts) if path else None
            if found is None:
                log.info("Tasks: dense on %s", name)
                found = ask(lm, self.tasks[name], limit=self.limit, seed=self.seed)
                if path:
                    write_atomic(path, json.dumps({"facts": facts, "answers": asdict(found)}))
            _dense[digest] = found
        return _dense[digest]

    def _asked(self, bench: Bench, lm: Any, policy: Policy, identity: str) -> Asked:
        """A policy's answers; the same policy is never asked twice in one process."""
        about = [bench.key, asdict(bench.protocol)["name"], bench.backend, bench.bytes_dtype]
        facts = [*about, self.batch, identity, *(self._facts(name) for name in self.tasks)]
        key = json.dumps(facts, sort_keys=True)
        if key in _asked:
            return _asked[key]
        policy.bytes_dtype = bench.bytes_dtype
        answers = {}
        with gnomon.sparsify(
            bench.model, policy, backend=bench.backend, protocol=bench.protocol.name
        ) as session:
            lm.session = session
            try:
                for name, task in self.tasks.items():
                    log.info("Tasks: %s on %s", policy.name, name)
                    answers[name] = ask(lm, task, limit=self.limit, seed=self.seed)
            finally:
                lm.session = None
            density = session.density()
        accounting = account(policy, density, dtype=bench.bytes_dtype)
        result = density_result(targets(policy), density, accounting, layers=True)
        _asked[key] = Asked(answers, result, session.backend)
        return _asked[key]

    def _facts(self, name: str) -> dict[str, str]:
        """What the answers of a task depend on, beside the model."""
        task = self.tasks[name]
        docs = json.dumps(list(islice(iter(task.eval_docs), self.limit)), default=str)
        templates = [task.get_config(f"doc_to_{key}") for key in ("text", "choice", "target")]
        written = {}
        if task.get_config("output_type") == "generate_until":
            written = {"written": f"{task.get_config('generation_kwargs')} {SCORER}"}
        return written | {
            "task": name,
            "docs": hashlib.sha256(docs.encode()).hexdigest()[:16],
            "prompt": json.dumps([t for t in templates if isinstance(t, str | list)]),
            "fewshot": str(self._shots(name)),
            "seed": str(self.seed),
            "versions": f"{versions().get('lm-eval')} {torch.__version__}",
        }

    def _shots(self, name: str) -> int:
        return int(self.tasks[name].get_config("num_fewshot") or 0)


def compare(dense: Answers, sparse: Answers, fewshot: int = 0) -> dict[str, Any]:
    """The ``quality.tasks.<name>`` object of results.json.

    ``stderr_diff`` is the standard error of the mean of the paired differences; ``kl`` the mean of
    KL(dense ‖ sparse) of :func:`answer_distribution`, absent for tasks without choices.
    """
    assert dense.asked == sparse.asked, "both models are asked the same questions in one order"
    n = len(dense.scores)
    gaps = np.subtract(sparse.scores, dense.scores)
    found: dict[str, Any] = {
        "n": n,
        "acc_dense": float(np.mean(dense.scores)),
        "acc_sparse": float(np.mean(sparse.scores)),
        "stderr_diff": float(np.std(gaps, ddof=1) / math.sqrt(n)),
        "metric": dense.metric,
        "fewshot": fewshot,
    }
    if all(dense.logliks) and all(sparse.logliks):
        pairs = zip(dense.logliks, sparse.logliks, strict=True)
        found["kl"] = float(np.mean([divergence(p, q) for p, q in pairs]))
    return found


def divergence(dense: Sequence[float], sparse: Sequence[float]) -> float:
    """KL(dense ‖ sparse) of two answer distributions, in nats."""
    log_p, log_q = answer_distribution(dense), answer_distribution(sparse)
    return max(0.0, float(np.sum(np.exp(log_p) * (log_p - log_q))))


def answer_distribution(logliks: Sequence[float]) -> np.ndarray:
    """Log-probabilities over the choices: their likelihoods normalised; (n,) -> (n,).

    A single continuation (LAMBADA) is told from everything else: (1,) -> (2,).
    """
    found = np.asarray(logliks, dtype=np.float64)
    if len(found) == 1:
        rest = math.log(max(-math.expm1(min(found[0], 0.0)), 1e-300))
        return np.asarray([found[0], rest])
    return found - np.logaddexp.reduce(found)


def forget() -> None:
    """Empties the in-process caches."""
    _dense.clear()
    _asked.clear()
    _loaded.clear()


def _read(path: Path, facts: Mapping[str, str]) -> Answers | None:
    """Cached answers; None where there are none or the file is not what it should be."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        return Answers(**held["answers"]) if held["facts"] == facts else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
