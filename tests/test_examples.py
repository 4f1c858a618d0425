"""The examples run as their first lines say."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a script of examples/ in an empty folder; gives its lines."""

    def main(script: str, *args: str) -> list[str]:
        path = str(ROOT / "examples" / script)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [path, *args])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return main


def test_train_and_use(run, tmp_path: Path) -> None:
    lines = run("train_and_use.py", "--steps", "8")
    config = json.loads((tmp_path / "my-predictor" / "config.json").read_text())
    assert config["host"]["name"] == "tiny-llama-0" or config["host"] == "tiny-llama-0"
    assert "neurons kept: 0.50" in lines


def test_add_criterion(run) -> None:
    lines = run("add_criterion.py")
    errors = {line.split()[0]: float(line.split()[-1]) for line in lines if "error" in line}
    assert set(errors) == {"plainact", "absact"}
    assert all(0 < value < 2 for value in errors.values())


def test_training_free(run) -> None:
    lines = run("training_free.py")
    found = {line.split(":")[0]: line.split() for line in lines if " bytes " in line}
    assert len(found) == 11
    assert found["sketch"][2] == "1.00" and found["sketch"][4] == "0.50"
    assert found["griffin"][2] == "1.00" and found["griffin"][4] == "0.50"
    assert found["skip_sublayers"][2] == found["combined"][2] == "0.75"
    assert all(0 < float(words[-1]) < 1 for words in found.values())
