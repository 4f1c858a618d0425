"""Scores of answers that a model writes, for local task files; versioned by ``SCORER``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

SCORER = 1  # part of what cached answers depend on
_NUMBER = re.compile(
    r"(?<!\d)(?<!\d\.)([-−–]?)\$?"
    r"((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
)
_GOES_ON = re.compile(r"[\w'’-]|[.,]\d")


def begins_with(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """1 where the text that was written begins with the target, in whole words and any case."""
    both = (answers[0], doc["target"])
    written, target = (text.strip().casefold().replace("’", "'") for text in both)
    rest = written[len(target) :] if target[-1:].isalnum() else ""
    return {"acc": float(written.startswith(target) and not _GOES_ON.match(rest))}


def same_number(doc: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """1 where :func:`number` of the text that was written is that of the answer."""
    wanted = number(doc["answer"])
    return {"exact_match": float(wanted is not None and number(answers[0]) == wanted)}


def number(text: str) -> float | None:
    """The first number after the first ``####``, or else the last one before; None without one."""
    before, _, after = text.partition("####")
    found = _NUMBER.findall(after)[:1] or _NUMBER.findall(before)[-1:]
    return (-1 if found[0][0] else 1) * float(found[0][1].replace(",", "")) if found else None
