"""Triton's interpreter, without what it does again at every call of a device function.

A launch puts NumPy versions of ``triton.language`` in place, and so does every function that a
kernel calls, ``tl.sum`` included, although they are there by then: a third of the time of a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Leaves the language as it is where a launch has patched it already."""
    patch: Callable[[Any], Any] | None = getattr(interpreter, "_patch_lang", None)
    if patch is None:  # another Triton: slower, and as right
        return

    def patch_lang(fn: Any) -> Any:
        modules = [m for m in fn.__globals__.values() if inspect.ismodule(m)]
        langs = [m for m in modules if m is tl or m is tl.core]
        done = bool(langs) and not any(
            tl.core.is_builtin(f) for m in langs for f in (m.arange, m.tensor.__add__)
        )
        # A launch undoes its own patch and wants the record of it; one inside has none to undo.
        return None if done else patch(fn)

    interpreter._patch_lang = patch_lang
