"""How a command line tells a user what was wrong: one line, not a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
STATUS = 2  # exit status of a user error, as argparse has it


class Refused(ValueError):
    """A policy does not apply to a host, or cannot meet a budget: a sweep goes on without it."""


def one_line(main: Callable[P, R]) -> Callable[P, R]:
    """Turns a ValueError or OSError of an entry point into its message and exit status 2.

    Hydra wraps errors of instantiated objects; the message shown is the first cause's.
    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except Exception as error:
            cause = first_cause(error)
            if os.environ.get("HYDRA_FULL_ERROR") or not isinstance(cause, (ValueError, OSError)):
                raise
            sys.stdout.flush()
            sys.stderr.write(f"error: {cause}\n")
            raise SystemExit(STATUS) from error

    return run


def first_cause(error: BaseException) -> BaseException:
    """The error that an instantiation or import error was raised from."""
    while type(error).__module__.startswith("hydra") and error.__cause__ is not None:
        error = error.__cause__
    return error
