"""The subject of an evaluation: a policy, the predictor it asks, and where that came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gnomon.allocation import Sensitivity
from gnomon.budget import Budget
from gnomon.evaluation.bench import Bench
from gnomon.evaluation.brackets import identity, means_digest
from gnomon.host import KINDS, HostSpec
from gnomon.policies import POLICIES, Policy
from gnomon.predictors.base import Predictor, PredictorInfo
from gnomon.predictors.calibration import Calibration
from gnomon.predictors.folder import find_predictor, find_pretrained, load_predictor

if TYPE_CHECKING:
    from gnomon.data.text import Blocks


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        policy: the policy.
        identity: what tells it from other policies.
        means: per-unit means for the static bracket, if any predictor of the host holds them.
        metrics: the predictor's held-out metrics, recorded at training.
        params: the policy's own parameters, with what was found inside them.
        inside: predictors of the policies inside it.
    """

    policy: Policy
    identity: str
    means: Mapping[Any, Tensor] | None = None
    metrics: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    inside: tuple[Found, ...] = ()


@dataclass(frozen=True)
class Found:
    """A predictor and where it came from; both None for a policy without one."""

    predictor: Predictor | None = None
    source: str | None = None


def require_policy(name: str) -> None:
    """Raises ValueError for an unknown policy."""
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is unknown; use one of {', '.join(POLICIES)}")


def find(policy: str, reference: str | None, root: str | Path, spec: HostSpec) -> Found:
    """The predictor that a policy asks for.

    Args:
        policy: config name.
        reference: ``auto`` (the newest of the policy's class for this host; for a policy of means
            the newest whose means were harvested), ``pretrained`` (the one that ships with the
            project), a folder, a hub id, or None.
        root: folder of trained predictors.
        spec: the host's.

    Raises:
        ValueError: unknown policy, or no such predictor; says which command trains one.
    """
    require_policy(policy)
    if reference is None:
        return Found()
    accepts = getattr(POLICIES[policy], "accepts", None)
    where: str | Path = reference
    if reference == "pretrained":
        where = find_pretrained(spec, accepts)
    elif reference == "auto":
        where = find_predictor(Path(root), spec, accepts)
    predictor = load_predictor(str(where))
    predictor.check_host(spec)
    return Found(predictor, str(where))


def find_means(found: Found, root: str | Path, spec: HostSpec) -> Mapping[Any, Tensor] | None:
    """Harvested per-unit means for the static bracket: the run's own, else the host's newest."""
    if found.predictor is not None and not found.predictor.learned_means:
        return found.predictor.means
    try:
        return load_predictor(str(find_predictor(Path(root), spec, None))).means
    except (ValueError, OSError):
        return None


def with_sensitivity(budget: Budget, root: str | Path, spec: HostSpec) -> Budget:
    """The budget with the sensitivities that ``spread=calibrated`` names, and with no others.

    Raises:
        ValueError: no calibration of this host, or one without them.
    """
    if budget.spread != "calibrated":
        return replace(budget, sensitivity=None)
    if isinstance(budget.sensitivity, Sensitivity):
        return budget
    reference = budget.sensitivity or "auto"
    try:
        where = find_predictor(Path(root), spec, Calibration) if reference == "auto" else reference
        held = load_predictor(str(where))
    except ValueError as error:
        raise ValueError(f"budget.sensitivity={reference}: {error}") from error
    if not isinstance(held, Calibration):
        raise ValueError(
            f"budget.sensitivity={reference} holds a {held.name} predictor: give a calibration "
            "(python train.py predictor=calibration makes one)"
        )
    return replace(budget, sensitivity=held.sensitivity)


def make_subject(
    config: Mapping[str, Any],
    budget: Budget,
    found: Found,
    means: Mapping[Any, Tensor] | None,
    root: str | Path,
    spec: HostSpec,
) -> Subject:
    """Builds the policy from its config (``name refresh batch kv params``).

    ``root`` and ``spec`` find the predictors of policies inside it (``params.inner``).
    """
    from gnomon.evaluation.inner import build

    built = build(config, budget, found, root, spec)
    policy, params, predictor = built.policy, built.params, found.predictor
    source = ""
    if predictor is not None:
        learned = policy.predictor is not None
        source = predictor_digest(predictor) if learned else means_digest(predictor.means)
    known = predictor is not None and policy.predictor is predictor
    metrics = predictor_metrics(predictor) if known else None
    about = identity(policy, params, source + built.identity)
    return Subject(policy, about, means, metrics, params, built.inside)


def predictor_metrics(predictor: Any) -> dict[str, Any] | None:
    """Held-out metrics of training, per unit kind: ``density recall mass spearman``."""
    recorded = predictor.info.metrics
    if not recorded:
        return None
    found: dict[str, Any] = {"density": recorded["density"]}
    for key in ("recall", "mass", "spearman"):
        found[key] = {kind: recorded[kind][key] for kind in KINDS if key in recorded.get(kind, {})}
    return {key: value for key, value in found.items() if value}


def predictor_digest(predictor: Any) -> str:
    """Sha256 over a predictor's tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(predictor.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe_predictor(found: Found) -> dict[str, Any]:
    """The ``policy.predictor`` object of results.json."""
    predictor = found.predictor
    assert predictor is not None
    info = predictor.info
    fields = ("criterion", "objective", "granularity", "text", "text_digest", "trace_hash", "seed")
    kept = {key: getattr(info, key) for key in fields if getattr(info, key, None) is not None}
    kept |= {"text_split": info.text_split} if info.text_split else {}
    return {
        "class": predictor.name,
        "source": found.source,
        "sha256": _sha256(found),
        **kept,
    }


def _sha256(found: Found) -> str:
    """Hash of the predictor's folder, as tracked artifacts have it; else of its tensors."""
    if found.source and Path(found.source).is_dir():
        from gnomon.tracking import folder_sha256

        return folder_sha256(Path(found.source))
    return predictor_digest(found.predictor)


def overlap(bench: Bench, found: Found) -> str | None:
    """A warning when the predictor saw, or may have seen, the evaluated documents.

    ``heldout`` documents of the predictor's text are unseen if it split that text in the same way.
    """
    if found.predictor is None:
        return None
    blocks, info = bench.blocks, found.predictor.info
    if not _same_text(blocks, info):
        return None
    name = f"the {found.predictor.name} predictor was trained on this text ({blocks.name})"
    if blocks.digest == info.text_digest or blocks.split != "heldout":
        return (
            f"{name} and text.split={blocks.split} does not keep out the documents of its training "
            "and validation: the quality below is flattered. Use text.split=heldout or another text"
        )
    theirs = info.text_split
    if not theirs:
        return (
            f"{name}, but its folder does not say which documents it held out: it may have seen "
            "some of these. Train it again, or use another text"
        )
    mine = blocks.source.facts(blocks.split)
    ids_are_stable = "files" in theirs and "files" in mine  # whichever files are chosen
    keys = ("seed", "heldout", "parts", *(() if ids_are_stable else ("fingerprint",)))
    differing = [key for key in keys if mine.get(key) != theirs.get(key)]
    if not differing:
        return None
    listed = ", ".join(f"{k} {theirs.get(k)} there and {mine.get(k)} here" for k in differing)
    return (
        f"{name}, split otherwise ({listed}): it may have seen some of these documents. Use the "
        "text settings it was trained with, or another text"
    )


def _same_text(blocks: Blocks, info: PredictorInfo) -> bool:
    """Whether text and training text may share documents: by digest, content, or name."""
    if blocks.digest == info.text_digest:
        return True
    # WikiText-2's files and parts have one name, so that only its content tells.
    if info.text != blocks.name and not info.text_split:
        return False
    if info.text == blocks.name != "wikitext2":
        return True
    mine, theirs = blocks.source.facts(blocks.split), info.text_split
    if "parts" in mine and "parts" in theirs:
        return bool(set(mine["parts"]) & set(theirs["parts"]))
    return mine["fingerprint"] == theirs.get("fingerprint")
