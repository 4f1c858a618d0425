"""The gnomon command."""

from __future__ import annotations

import pytest

from gnomon.cli import main

BASE = [
    "generate",
    "--host",
    "tiny:llama",
    "--device",
    "cpu",
    "--prompt",
    "hello",
    "--max-new-tokens",
]


def test_generate_shows_dense_and_sparse_with_their_density(capsys):
    assert main([*BASE, "8", "--policy", "oracle", "--density", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "oracle: heads 0.50, neurons 0.50, bytes 0." in printed


def test_dense_and_dense_policy_write_the_same(capsys):
    assert main([*BASE, "8", "--policy", "dense"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("│"))
    left, right = (cell.strip() for cell in row.strip("│").split("│"))
    assert left == right != ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*BASE, "8", "--policy", "zzz"], "policy='zzz' is unknown; use one of dense,"),
        ([*BASE, "8", "--density", "2"], "budget.density=2.0 is outside (0, 1]"),
        ([*BASE, "0", "--policy", "dense"], "--max-new-tokens=0 must be at least 1"),
        ([*BASE, "2000", "--policy", "dense"], "exceed the host's context of 1024"),
        ([*BASE, "8", "--policy", "dense", "--prompt", ""], "--prompt is empty"),
        ([*BASE, "8", "--policy", "dense", "--chat"], "no chat template"),
        ([*BASE, "8", "--root", "nowhere"], "Train one: python train.py predictor=shadow"),
        ([*BASE, "8", "--host", "tiny:zzz"], "'zzz' is unknown; use one of llama"),
    ],
)
def test_errors_are_one_line_and_status_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("gnomon generate: ")
    assert message in error


def test_report_of_a_folder_without_runs(capsys, tmp_path):
    assert main(["report", str(tmp_path)]) == 2
    assert "give the folder of a sweep" in capsys.readouterr().err


def test_env_lists_versions(capsys):
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out
