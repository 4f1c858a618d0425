"""Comparisons at equal bytes: labels, refusals, and the short table over budget.bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

import gnomon.evaluate as entry
from gnomon.errors import Refused
from gnomon.evaluation.by_bytes import markdown_by_bytes
from gnomon.evaluation.figure_lines import lines_of, panels, style, within
from gnomon.evaluation.report import read_refusals, show_sweep
from gnomon.evaluation.results import write_refusal
from gnomon.evaluation.rows import merge
from tests.test_report import density, run, sweep, texts


def at(policy: str, asked: float, ratio: float, reached: float | None = None, **more) -> dict:
    """A run at a byte density, without brackets."""
    found = run(policy, 0.5, ratio, **more)
    found["density"] = density(0.5, 0.5, reached or asked)
    found["density"]["target"]["bytes"] = asked
    return found | {"brackets": []}


def test_a_line_for_each_policy_and_a_column_for_each_byte_density():
    int8 = run("dense_int8", 1.0, 1.002) | {"density": density(1, 1, 0.54), "brackets": []}
    runs = [at("shadow", 0.9, 1.2), at("shadow", 0.8, 1.5), at("griffin", 0.9, 3.0, 0.85), int8]
    table = markdown_by_bytes(merge(runs))
    assert table is not None
    lines = table.splitlines()
    assert lines[0] == "| policy | wiki 0.9 | wiki 0.8 |"
    assert lines[2] == "| shadow | 1.200 | 1.500 |"
    assert "| griffin | 3.000 (0.85) | – |" in lines
    assert "| dense_int8 | 1.002 (0.54) | 1.002 (0.54) |" in lines


def test_one_byte_density_is_no_sweep():
    assert markdown_by_bytes(merge([at("shadow", 0.9, 1.2), at("griffin", 0.9, 2.0)])) is None


def test_predictors_of_several_objectives_are_told_apart():
    runs = [at("dejavu", b, r) for b, r in ((0.9, 1.3), (0.8, 1.9))]
    trained = [at("dejavu", b, r) for b, r in ((0.9, 1.2), (0.8, 1.4))]
    for results, objective in ((runs, "bce"), (trained, "kl")):
        for found in results:
            found["policy"]["predictor"] = {"class": "dejavu", "objective": objective}
    rows = merge([*runs, *trained])
    table = markdown_by_bytes(rows)
    assert table is not None
    assert "| dejavu (kl) | 1.200 | 1.400 |" in table
    assert list(lines_of(rows)) == ["dejavu, bce", "dejavu, kl"]


def test_a_label_names_the_policy_and_tasks_have_their_columns():
    tasks = {"piqa": {"n": 9, "acc_dense": 0.6, "acc_sparse": 0.5, "stderr_diff": 0.1}}
    runs = [at("chess", 0.9, 1.1), at("chess", 0.8, 1.2)]
    for found in runs:
        found["policy"]["label"] = "chess_ffn"
        found["quality"] = texts(1.1) | {"tasks": tasks}
    table = markdown_by_bytes(merge(runs))
    assert table is not None
    assert table.splitlines()[0].endswith("tasks 0.9 | tasks 0.8 |")
    assert "| chess_ffn | 1.100 | 1.100 | -0.100 | -0.100 |" in table


def test_a_policy_looks_the_same_in_every_panel():
    rows = merge([at("shadow", 0.9, 1.2), at("dejavu", 0.9, 1.1)])
    other = [row | {"text": "c4"} for row in rows if row["policy"] == "dejavu"]
    lines = lines_of([*rows, *other])
    parts = panels([*rows, *other])
    names = list(lines)
    assert names == ["shadow", "dejavu"]
    alone = within(lines, parts["text c4"])
    assert {name: len(points) for name, points in alone.items()} == {"dejavu": 1}
    assert style("dejavu", names)["color"] != style("shadow", names)["color"]


def test_many_policies_have_different_looks():
    names = [f"p{i}" for i in range(30)]
    looks = {(style(n, names)["color"], style(n, names)["marker"]) for n in names}
    assert len(looks) == 30


def test_a_sweep_goes_on_past_a_refusal(tmp_path: Path, capsys):
    folder = sweep(tmp_path, [at("shadow", 0.9, 1.2), None])
    write_refusal(folder / "1", "griffin", Refused("budget.bytes=0.1 cannot be reached"))
    show_sweep(folder)
    printed = " ".join(capsys.readouterr().out.split())
    assert "that run failed" not in printed
    assert "griffin: budget.bytes=0.1 cannot be reached" in printed
    assert "griffin: budget.bytes=0.1" in (folder / "sweep.md").read_text()
    assert read_refusals(folder) == ["griffin: budget.bytes=0.1 cannot be reached"]


def test_a_mistake_ends_a_sweep(tmp_path: Path, monkeypatch, capsys):
    """A parameter that does not exist is no refusal: nothing would be measured as it was meant."""
    command = (
        "evaluate.py -m experiment=smoke_eval policy=griffin +policy.params.varient=half "
        f"paths.root={tmp_path} hydra.sweep.dir={tmp_path / 'sweep'}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 2
    assert "varient" in capsys.readouterr().err


def test_a_sweep_of_refusals_alone_fails(tmp_path: Path, monkeypatch, capsys):
    command = (
        "evaluate.py -m experiment=smoke_eval policy=griffin budget.density=null "
        f"budget.bytes=0.2,0.3 paths.root={tmp_path} hydra.sweep.dir={tmp_path / 'sweep'}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 2
    assert "griffin: budget.bytes=0.2 cannot be reached" in capsys.readouterr().out


def test_a_policy_that_was_run_stands_for_its_brackets():
    """griffin's random bracket keeps every head, a run of random does not: one line, the run's."""
    bracket = {"policy": "random", "density": density(1, 0.3, 0.9), "quality": texts(1.2)}
    bracket["density"]["target"]["bytes"] = 0.9
    griffin = at("griffin", 0.9, 2.0) | {"brackets": [bracket]}
    rows = merge([griffin, at("griffin", 0.8, 2.5), at("random", 0.9, 50.0)])
    table = markdown_by_bytes(rows)
    assert table is not None
    assert "| random | 50.00 | – |" in table
    assert [len(points) for points in lines_of(rows).values()] == [2, 1]
    twice = merge([at("random", 0.9, 50.0), at("random", 0.9, 40.0, seed=1), at("random", 0.8, 9)])
    assert "50.00 / 40.00" in (markdown_by_bytes(twice) or "")


def test_from_the_command_line(tmp_path: Path, monkeypatch, capsys):
    """griffin cannot reach 0.3 on this host, and oracle can: one is measured, the other named."""
    folder = tmp_path / "sweep"
    command = (
        "evaluate.py -m experiment=smoke_eval policy=griffin,oracle budget.density=null "
        f"budget.bytes=0.6,0.9 paths.root={tmp_path} hydra.sweep.dir={folder} "
        "measure.quality.generation.tokens=0 measure.quality.brackets=[]"
    )
    monkeypatch.setattr("sys.argv", command.split())
    entry.main()
    table = (folder / "sweep.md").read_text()
    assert table.startswith("| policy | synthetic 0.9 | synthetic 0.6 |")
    assert "griffin: budget.bytes=0.6 cannot be reached" in table
    assert (folder / "0" / "refused.txt").exists()
    assert not (folder / "0" / "results.json").exists()
    assert "that run failed" not in capsys.readouterr().out
