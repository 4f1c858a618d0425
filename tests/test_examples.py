"""The examples run as their first lines say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *args: str, cwd: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_train_and_use(tmp_path: Path) -> None:
    lines = run("train_and_use.py", "--steps", "8", cwd=tmp_path)
    config = json.loads((tmp_path / "my-predictor" / "config.json").read_text())
    assert config["host"]["name"] == "tiny-llama-0" or config["host"] == "tiny-llama-0"
    assert "neurons kept: 0.50" in lines


def test_add_criterion(tmp_path: Path) -> None:
    lines = run("add_criterion.py", cwd=tmp_path)
    errors = {line.split()[0]: float(line.split()[-1]) for line in lines if "error" in line}
    assert set(errors) == {"plainact", "absact"}
    assert all(0 < value < 2 for value in errors.values())


def test_training_free(tmp_path: Path) -> None:
    lines = run("training_free.py", cwd=tmp_path)
    found = {line.split(":")[0]: line.split() for line in lines if " bytes " in line}
    assert len(found) == 11
    assert found["sketch"][2] == "1.00" and found["sketch"][4] == "0.50"
    assert found["griffin"][2] == "1.00" and found["griffin"][4] == "0.50"
    assert found["skip_sublayers"][2] == found["combined"][2] == "0.75"
    assert all(0 < float(words[-1]) < 1 for words in found.values())
