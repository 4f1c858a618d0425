"""train.py and evaluate.py in this process, as ``gnomon-train`` and ``gnomon-evaluate`` start them.

Importing takes longer than most of what a test asks of them. That the files themselves start is
tested in processes of their own: test_errors.py, test_evaluate.py, test_imports.py, test_train.py.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from gnomon import evaluate, train
from gnomon.evaluation import baseline, bench, run


@dataclass(frozen=True)
class Done:
    """What a command left: exit status and what it wrote."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def last(self) -> Path:
        """The path in its last line of output."""
        assert self.returncode == 0, self.stderr
        return Path(self.stdout.strip().splitlines()[-1])


def call(script: str, *words: str, cwd: Path) -> Done:
    """Runs ``python <script> <words>`` in a folder; an error other than an exit is raised."""
    main = {"train.py": train.main, "evaluate.py": evaluate.main}[script]
    baseline.forget()  # a new process remembers nothing
    bench.forget()
    run._last.clear()
    out, err, status = io.StringIO(), io.StringIO(), 0
    log = logging.getLogger()
    before = Path.cwd(), sys.argv, log.level, log.handlers[:]
    os.chdir(cwd)
    sys.argv = [script, *words]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        if isinstance(end.code, str):  # what the interpreter would print
            err.write(end.code)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os.chdir(before[0])
        sys.argv, log.level, log.handlers[:] = before[1:]
    return Done(status, out.getvalue(), err.getvalue())
