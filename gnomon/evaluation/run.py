"""One evaluation run: what ``evaluate.py`` needs between its config and its results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate

from gnomon.accounting import account, expected_density
from gnomon.allocation import Sensitivity
from gnomon.budget import Budget
from gnomon.env import versions
from gnomon.evaluation.baseline import host_key
from gnomon.evaluation.bench import Bench, density_result, targets
from gnomon.evaluation.quality import Protocol
from gnomon.evaluation.results import (
    collect_warnings,
    commit,
    require_new,
    warn,
    write_results,
)
from gnomon.evaluation.subject import (
    Found,
    Subject,
    describe_predictor,
    find,
    find_means,
    make_subject,
    overlap,
    require_policy,
    with_sensitivity,
)
from gnomon.evaluation.tasks import Tasks
from gnomon.evaluation.validation import Validation, solved
from gnomon.host import describe
from gnomon.runtime.backends import choose_backend

if TYPE_CHECKING:
    from gnomon.data.text import Text

log = logging.getLogger(__name__)
_last: dict[str, tuple[str, Any]] = {}


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its results and where they lie.

    ``warning`` says that the predictor may have seen the text; it is in the results too.
    """

    results: dict[str, Any]
    path: Path
    warning: str | None

    @property
    def ratio(self) -> float | None:
        """Perplexity ratio on the first text, where it was measured."""
        texts = self.results.get("quality", {}).get("texts", {})
        return next((text["ppl_ratio"] for text in texts.values()), None)


def evaluate(settings: Mapping[str, Any], folder: Path, command: str) -> Outcome:
    """Runs every measure of a resolved evaluation config and writes ``results.json``.

    Args:
        settings: the config of ``conf/evaluate.yaml`` as plain values.
        folder: of this run; must not hold results yet.
        command: that makes this run again.

    Raises:
        Refused: the policy does not apply to this host, or cannot meet this budget.
        ValueError: anything else the user has to change, before the expensive part where possible.
        FileExistsError: the folder holds results.
    """
    require_new(folder)
    policy, budget = settings["policy"], instantiate(settings["budget"])
    require_policy(policy["name"])
    # An experiment may hold settings of a measure that was not chosen.
    chosen = [
        measure for measure in settings["measure"].values() if measure and "_target_" in measure
    ]
    measures = [instantiate(measure) for measure in chosen]
    for measure in measures:
        if isinstance(measure, Tasks):  # before the host is loaded
            measure.require()
    bench = open_bench(
        settings["host"],
        settings["text"],
        settings["protocol"],
        backend=settings["backend"],
        cache=settings["paths"]["cache"],
        bytes_dtype=settings["bytes"]["dtype"],
    )
    root, seed = settings["paths"]["predictors"], int(settings["seed"])
    found = find(policy["name"], policy.get("predictor"), root, bench.spec)
    if found.predictor is not None:
        found.predictor.check(criterion=policy.get("criterion"), rank=policy.get("rank"))
    means = find_means(found, root, bench.spec)
    for measure in measures:
        measure.check(bench)

    def subject_at(budget: Budget) -> Subject:
        return make_subject(policy, budget, found, means, root, bench.spec)

    budget = with_sensitivity(budget, root, bench.spec)
    plan = Validation(**settings.get("validation", {}))
    subject = solved(bench, settings["text"], plan, budget, subject_at)
    label = policy.get("label")
    results = start_results(
        bench, subject, found, subject.params, label=label, command=command, seed=seed
    )
    with collect_warnings() as warnings:
        leaks = [overlap(bench, source) for source in (found, *subject.inside)]
        for leak in filter(None, leaks):
            warn(leak)
        for measure in measures:
            measure.run(bench, subject, results)
    if warnings:
        results["warnings"] = warnings
    return Outcome(results, write_results(results, folder), next(filter(None, leaks), None))


def once(kind: str, config: Mapping[str, Any], make: Any) -> Any:
    """``make()``, or what it made last for the same config: the jobs of a sweep share one host."""
    key = json.dumps(config, sort_keys=True, default=str)
    if _last.get(kind, ("", None))[0] != key:
        _last.pop(kind, None)  # frees the old host before the next is loaded
        _last[kind] = (key, make())
    return _last[kind][1]


def open_bench(
    host: Mapping[str, Any],
    text: Mapping[str, Any],
    protocol: Mapping[str, Any],
    *,
    backend: str,
    cache: str | Path | None,
    bytes_dtype: str | None = None,
) -> Bench:
    """Loads host and text from their configs.

    Args:
        host: config of the host (``_target_`` and arguments).
        text: config of the text, with ``batch`` (blocks per forward) and ``split``
            (``auto`` or one of ``Split``) beside the arguments of its class.
        protocol: ``name`` and ``prompt``.
        backend: of :func:`gnomon.sparsify`.
        cache: folder of the dense baselines.
        bytes_dtype: dtype of byte accounting; None takes the host's.

    Raises:
        ValueError: what host or text is wrong, or a prompt that fills its block.
    """
    rules = Protocol(protocol["name"], protocol["prompt"])
    own = {key: value for key, value in text.items() if key not in ("batch", "split")}
    source: Text = instantiate(own)
    rules.targets(int(own["block"]))
    split = choose_split(str(text["split"]), str(own["_target_"]))
    model, tokenizer = once("host", host, lambda: instantiate(dict(host)))
    about = {"host": dict(host), "text": own, "split": split}
    blocks = once("blocks", about, lambda: source.blocks(tokenizer, split))  # type: ignore[arg-type]
    spec = describe(model)
    return Bench(
        model=model,
        tokenizer=tokenizer,
        spec=spec,
        key=host_key(model, spec),
        blocks=blocks,
        protocol=rules,
        backend=backend,
        batch=int(text["batch"]),
        cache=Path(cache) if cache else None,
        bytes_dtype=bytes_dtype,
    )


def choose_split(split: str, target: str) -> str:
    """``auto``: ``heldout`` for texts that training uses (embedded, synthetic), else ``all``."""
    known = ("auto", "train", "validation", "heldout", "all")
    if split not in known:
        raise ValueError(f"text.split={split!r} is unknown; use one of {', '.join(known)}")
    if split != "auto":
        return split
    shared = target.endswith(("EmbeddedText", "SyntheticText"))
    return "heldout" if shared else "all"


def start_results(
    bench: Bench,
    subject: Subject,
    found: Found,
    params: Mapping[str, Any],
    *,
    label: str | None = None,
    command: str,
    seed: int,
) -> dict[str, Any]:
    """Results before anything is measured: identities, and the densities that the budget aims at.

    Binds the policy, so that a budget that cannot be met fails here. ``label`` names the policy in
    tables and figures.
    """
    policy, spec = subject.policy, bench.spec
    policy.bytes_dtype = bench.bytes_dtype
    policy.bind(bench.model, spec)
    aimed = expected_density(policy, policy.resolved)
    accounting = account(policy, aimed, dtype=bench.bytes_dtype)
    about: dict[str, Any] = {
        "name": policy.name,
        "refresh": policy.refresh,
        "batch": policy.batch,
        "kv": policy.kv,
        "params": dict(params) | {"spread": policy.budget.spread, "prefill": policy.prefill},
    } | ({"label": label} if label else {})
    if isinstance(policy.budget.sensitivity, Sensitivity):
        about["params"]["sensitivity"] = policy.budget.sensitivity.facts
    if found.predictor is not None:
        about["predictor"] = describe_predictor(found)
    prompt = bench.protocol.prompt_length
    return {
        "host": {
            **{key: getattr(spec, key) for key in ("name", "family", "revision", "hash")},
            **{key: getattr(spec, key) for key in "LHGDF"},
            "dtype": bench.key["dtype"],
            "device": bench.key["device"],
        },
        "policy": about,
        "backend": choose_backend(bench.backend, bench.model, policy),
        "protocol": {"name": bench.protocol.name, "block": bench.block, "batch": bench.batch}
        | ({"prompt": prompt} if prompt else {}),
        "density": density_result(targets(policy), aimed, accounting, layers=False),
        "versions": versions(),
        "commit": commit(),
        "command": command,
        "seed": seed,
    }
