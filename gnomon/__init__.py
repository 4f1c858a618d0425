"""Gnomon: learn which heads and neurons of a language model matter, and run it without the rest."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnomon import policies as policies
    from gnomon.budget import Budget as Budget
    from gnomon.evaluation.dial import find_budget as find_budget
    from gnomon.evaluation.split import find_split as find_split
    from gnomon.host import HostSpec as HostSpec
    from gnomon.host import Tap as Tap
    from gnomon.host import describe as describe
    from gnomon.loading import load_host as load_host
    from gnomon.policies.base import Policy as Policy
    from gnomon.predictors.folder import load_predictor as load_predictor
    from gnomon.runtime.generate import generate as generate
    from gnomon.runtime.sparsify import sparsify as sparsify

__version__ = "0.1.0"

# Imported on first use, so that `import gnomon` is cheap and has no side effects.
_WHERE = {
    "Budget": "gnomon.budget",
    "HostSpec": "gnomon.host",
    "Policy": "gnomon.policies.base",
    "Tap": "gnomon.host",
    "describe": "gnomon.host",
    "find_budget": "gnomon.evaluation.dial",
    "find_split": "gnomon.evaluation.split",
    "generate": "gnomon.runtime.generate",
    "load_host": "gnomon.loading",
    "load_predictor": "gnomon.predictors.folder",
    "sparsify": "gnomon.runtime.sparsify",
}
__all__ = [*_WHERE, "policies"]


def __getattr__(name: str) -> Any:
    if name == "policies":
        return import_module("gnomon.policies")
    if name not in _WHERE:
        raise AttributeError(f"module 'gnomon' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
