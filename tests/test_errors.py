"""User errors of the entry points are one line and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import call

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    ("train.py", ["objective=hinge"], "Could not find 'objective/hinge'"),
    ("train.py", ["text=file", "text.path=/nowhere.txt"], "/nowhere.txt"),
    ("evaluate.py", ["policy=random", "budget.density=0"], "budget.density=0 is outside (0, 1]"),
    ("evaluate.py", ["policy=shadow"], "train.py"),
]


def words(overrides: list[str], folder: Path) -> list[str]:
    base = ["host=tiny", f"paths.root={folder}", f"hydra.run.dir={folder / 'run'}"]
    if "text=file" not in overrides:
        base.append("text=synthetic")
    return [*base, *overrides]


def check(done: Any, message: str) -> None:
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "Could not find" not in message:  # Hydra's own message for a group option
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(("script", "overrides", "message"), CASES)
def test_bad_input_is_one_line(
    script: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    check(call(script, *words(overrides, tmp_path), cwd=tmp_path), message)


def test_it_is_one_line_of_a_process(tmp_path: Path) -> None:
    script, overrides, message = CASES[2]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *words(overrides, tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    check(done, message)
