"""User errors of the entry points are one line and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = [
    ("train.py", ["objective=hinge"], "Could not find 'objective/hinge'"),
    ("train.py", ["text=file", "text.path=/nowhere.txt"], "/nowhere.txt"),
    ("evaluate.py", ["policy=random", "budget.density=0"], "budget.density=0 is outside (0, 1]"),
    ("evaluate.py", ["policy=shadow"], "train.py"),
]


@pytest.mark.parametrize(("script", "overrides", "message"), CASES)
def test_bad_input_is_one_line(
    script: str, overrides: list[str], message: str, tmp_path: Path
) -> None:
    base = ["host=tiny", f"paths.root={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}"]
    if "text=file" not in overrides:
        base.append("text=synthetic")
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *base, *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if "Could not find" not in message:  # Hydra's own message for a group option
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
