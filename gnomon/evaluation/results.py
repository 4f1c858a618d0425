"""results.json: what one evaluation run measured, checked against results.schema.json."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import gnomon
from gnomon.errors import Refused
from gnomon.evaluation.baseline import write_atomic

NAME = "results.json"
REFUSED = "refused.txt"

log = logging.getLogger(__name__)
_collected: ContextVar[list[str] | None] = ContextVar("warnings of the run", default=None)


class ResultsError(ValueError):
    """A results file that does not follow results.schema.json."""


def write_refusal(folder: Path, policy: str, error: Refused) -> None:
    """Leaves ``refused.txt`` in a run's folder, which a sweep's table quotes."""
    write_atomic(folder / REFUSED, f"{policy}: {error}\n")


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of results.json."""
    text = files("gnomon.evaluation").joinpath("results.schema.json").read_text(encoding="utf-8")
    return json.loads(text)


def validate(results: dict[str, Any], source: str = NAME) -> None:
    """Checks results against the schema.

    Raises:
        ResultsError: the first fields that are wrong, each with its place.
    """
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

    errors = sorted(Draft202012Validator(schema()).iter_errors(results), key=lambda e: e.json_path)
    if errors:
        found = "; ".join(f"{e.json_path}: {e.message}" for e in errors[:3])
        raise ResultsError(f"{source} does not follow results.schema.json: {found}")


def warn(message: str) -> None:
    """Logs what a reader of the results must know, and records it where a run collects it."""
    log.warning(message)
    found = _collected.get()
    if found is not None and message not in found:
        found.append(message)


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """The messages of every :func:`warn` inside, in order, each once."""
    found: list[str] = []
    token = _collected.set(found)
    try:
        yield found
    finally:
        _collected.reset(token)


def require_new(folder: Path) -> Path:
    """The path of a run folder's results, which must not exist yet.

    Raises:
        FileExistsError: the folder holds the results of another run.
    """
    path = folder / NAME
    if path.exists():
        raise FileExistsError(
            f"{path} exists and is never overwritten: give another hydra.run.dir, or move it away"
        )
    return path


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Validates, then writes ``results.json`` atomically into a folder; returns its path.

    Raises:
        ResultsError: the results do not follow the schema, or hold NaN or infinity.
        FileExistsError: the folder holds results already.
    """
    path = require_new(folder)
    validate(results)
    try:
        ordered = {key: results[key] for key in schema()["properties"] if key in results}
        text = json.dumps(ordered | results, indent=2, allow_nan=False)
    except ValueError as error:
        raise ResultsError(
            f"results hold NaN or infinity, which JSON cannot say: {error}"
        ) from error
    write_atomic(path, text + "\n")
    return path


def read_results(path: Path) -> dict[str, Any]:
    """Reads and checks a results file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON: {error}") from error
    validate(results, str(path))
    return results


@cache
def commit() -> str:
    """Git commit of the checkout that runs, ``+changes`` if edited; ``unknown`` without one.

    ``GNOMON_COMMIT`` says it for a copy without its history, on a borrowed machine.
    """
    told = os.environ.get("GNOMON_COMMIT")
    if told:
        return told
    root = Path(gnomon.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *command], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()
