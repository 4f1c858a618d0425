"""Rows, tables, figures and the report at the end of a sweep, from results alone."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from gnomon.evaluation.callback import SweepReport
from gnomon.evaluation.figures import _range, _span, _ticks, layer_figure, sweep_figure, unit_axis
from gnomon.evaluation.report import read_sweep, show_run, show_sweep
from gnomon.evaluation.rows import COLUMNS, merge, rows_of, settings
from gnomon.evaluation.tables import csv_text, markdown, rich_table, short, title

PNG = b"\x89PNG"


def density(heads: float, neurons: float, byte_density: float, share: float = 0.0) -> dict:
    return {
        "target": {"heads": heads, "neurons": neurons},
        "heads": heads,
        "neurons": neurons,
        "byte_density": byte_density,
        "predictor_byte_share": share,
        "accounting": {},
    }


def texts(ratio: float, ci: bool = True) -> dict:
    text = {"tokens": 512, "ppl_dense": 20.0, "ppl_sparse": 20.0 * ratio, "ppl_ratio": ratio}
    interval = {"ppl_ratio_ci": [ratio * 0.95, ratio * 1.05]} if ci else {}
    return {"texts": {"wiki": text | interval}}


def run(policy: str = "shadow", d: float = 0.5, ratio: float = 2.0, seed: int = 0, **more) -> dict:
    results = {
        "host": {"name": "h", "family": "llama", **dict.fromkeys("LHGDF", 4), "dtype": "float32"},
        "policy": {
            "name": policy,
            "refresh": "token",
            "batch": "per_sequence",
            "kv": "keep",
            "params": {},
        },
        "backend": "mask",
        "protocol": {"name": "decode", "prompt": 32, "block": 64},
        "density": density(d, d, 0.2 + d, 0.1),
        "quality": texts(ratio) | {"generation": {"tokens": 8, "kl": 0.25, "agreement": 0.75}},
        "brackets": [
            {"policy": "dense_int8", "density": density(1, 1, 0.5), "quality": texts(1.001)},
            {"policy": "oracle", "density": density(d, d, 0.1 + d), "quality": texts(1.05)},
            {"policy": "random", "density": density(d, d, 0.1 + d), "quality": texts(900.0)},
        ],
        "versions": {},
        "commit": "c",
        "command": "x",
        "seed": seed,
    }
    results["policy"] |= more
    results["density"]["per_layer"] = {"heads": [1.0, d], "neurons": [1.0, d]}
    return results


def sweep(folder: Path, runs: list[dict | None]) -> Path:
    for number, results in enumerate(runs):
        (folder / str(number) / ".hydra").mkdir(parents=True)
        if results is not None:
            (folder / str(number) / "results.json").write_text(json.dumps(results))
    return folder


def test_rows_hold_what_was_measured_and_nothing_else():
    own, *brackets = rows_of(run())
    assert (own["kl"], own["agreement"], own["ci_low"]) == (0.25, 0.75, 1.9)
    assert [b["policy"] for b in brackets] == ["dense_int8", "oracle", "random"]
    assert all(b["bracket"] and "kl" not in b and "refresh" not in b for b in brackets)
    assert not {k for row in (own, *brackets) for k in row} - set(COLUMNS)
    bare = run()
    del bare["quality"], bare["brackets"]
    assert "ppl_ratio" not in rows_of(bare)[0]
    assert "| ppl |" in markdown(rows_of(run()))
    assert "| ppl |" not in markdown(rows_of(bare))  # an empty column says nothing


def test_shared_brackets_stand_once_and_give_way_to_runs_of_their_own():
    rows = merge([run(), run("dejavu", ratio=1.5), run(d=0.3)])
    names = [row["policy"] for row in rows]
    assert (names.count("shadow"), names.count("dense_int8")) == (2, 1)
    assert (names.count("oracle"), names.count("random")) == (2, 2)
    own = copy.deepcopy(run("oracle", ratio=1.05))
    own["density"] = density(0.5, 0.5, 0.6)
    oracle = [row for row in merge([run(), own]) if row["policy"] == "oracle"]
    assert len(oracle) == 1
    assert "bracket" not in oracle[0]


def test_predictor_metrics_and_label_reach_the_rows():
    results = run(predictor={"class": "shadow", "sha256": "0123456789ab"})
    results["quality"]["predictor"] = {"recall": {"heads": 0.9, "neurons": 0.7}, "mass": 0.8}
    own = rows_of(results)[0]
    assert (own["predictor"], own["recall"], own["mass"]) == ("shadow@01234567", 0.7, 0.8)


def test_csv_has_every_column_and_leaves_the_unmeasured_empty():
    table = list(csv.DictReader(io.StringIO(csv_text(merge([run()])))))
    assert list(table[0])[: len(COLUMNS)] == list(COLUMNS)
    bracket = next(row for row in table if row["policy"] == "oracle")
    assert (bracket["kl"], bracket["bracket"]) == ("", "True")


def test_markdown_and_rich_tables_show_the_same_rows():
    rows = merge([run(), run(refresh="prompt", ratio=3.0)])
    text = markdown(rows)
    assert "| shadow | token | 0.50 |" in text
    assert "| shadow | prompt | 0.50 |" in text
    assert "| (oracle) | – | 0.50 |" in text
    assert "h, wiki, protocol decode (prompt 32), dense perplexity 20.00, 512 targets" in text
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(rich_table(rows))
    shown = console.export_text()
    assert all(part in shown for part in ("shadow", "prompt", "(random)", "2.000 [1.900, 2.100]"))


def test_settings_that_differ_leave_the_title():
    rows = merge([run(), run() | {"protocol": {"name": "all", "block": 64}}])
    assert settings(rows).get("protocol") is None
    assert "protocol" not in title(rows)
    assert [short(x) for x in (1.0434, 12.349, 1109.4)] == ["1.043", "12.35", "1109"]


@pytest.mark.parametrize(
    ("densities", "axis", "label"),
    [
        ([(0.5, 0.5), (1, 1)], "neurons", "alike"),
        ([(1, 0.5), (1, 0.75)], "neurons", "heads dense"),
        ([(0.5, 1), (0.7, 1)], "heads", "neurons dense"),
        ([(0.67, 0.5), (0.67, 0.75), (1, 1)], "neurons", "heads 0.67"),
        ([(0.5, 0.3), (0.7, 0.5)], "neurons", "neuron density"),
    ],
)
def test_unit_axis_follows_what_is_skipped(densities, axis, label):
    rows = [
        {"policy": "dense_int8" if d == (1, 1) else "shadow", "target_heads": d[0]}
        | {"target_neurons": d[1]}
        for d in densities
    ]
    found, text = unit_axis(rows)
    assert found == axis
    assert label in text


def test_axis_limits():
    rows = [{"policy": "random", "ppl_ratio": 900.0}, {"policy": "shadow", "ppl_ratio": 2.0}]
    low, high = _range(rows)
    assert low < 1
    assert high == pytest.approx(12)
    ticks = _ticks(low, high)
    assert ticks[0] == 1
    assert all(b / a > 1.1 for a, b in zip(ticks, ticks[1:], strict=False))
    assert _span([0.5]) == pytest.approx((0.48, 1.02))
    assert _span([0.3, 1.3])[1] > 1.3


def test_figures_are_drawn(tmp_path):
    runs = [
        run(p, d, r) for p, d, r in (("shadow", 0.3, 6), ("shadow", 0.5, 2), ("dejavu", 0.5, 1.9))
    ]
    seeds = [run("shadow", 0.5, 2.2, seed=1), run("shadow", 0.5, 2.1, refresh="prompt")]
    path = sweep_figure(merge([*runs, *seeds]), tmp_path / "sub" / "sweep.png")
    assert path.read_bytes()[:4] == PNG
    one = sweep_figure(rows_of(run())[:1], tmp_path / "one.png")
    assert one.read_bytes()[:4] == PNG
    layers = layer_figure({"heads": [1, 0.5], "neurons": [1, 0.03]}, tmp_path / "layers.png", "x")
    assert layers.read_bytes()[:4] == PNG
    assert {p.name for p in tmp_path.iterdir()} == {"sub", "one.png", "layers.png"}
    with pytest.raises(ValueError, match="no result has a perplexity ratio"):
        sweep_figure([{"policy": "shadow"}], tmp_path / "none.png")


def test_a_sweep_ends_with_one_table_and_figure(tmp_path, capsys):
    folder = sweep(tmp_path, [run(), run("dejavu", ratio=1.8), None])
    config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}})
    SweepReport().on_multirun_end(config)
    printed = capsys.readouterr().out
    assert "that run failed" in printed
    assert printed.rstrip().splitlines()[-1].endswith("sweep.png")
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + 5
    assert "| dejavu |" in (folder / "sweep.md").read_text()
    assert (folder / "sweep.png").read_bytes()[:4] == PNG
    runs, missing = read_sweep(folder)
    assert len(merge(runs)) == 5
    assert [path.name for path in missing] == ["2"]


def test_warnings_stand_under_both_tables_of_a_sweep(tmp_path, capsys):
    seen, spread = "the text [0, 1] was seen", "bracket spread"
    runs = [run() | {"warnings": [seen, spread]}, run("dejavu") | {"warnings": [spread]}]
    show_sweep(sweep(tmp_path, runs))
    printed = " ".join(capsys.readouterr().out.split())
    table = (tmp_path / "sweep.md").read_text()
    for message in (f"shadow: {seen}", f"shadow, dejavu: {spread}"):
        assert f"Warning: {message}" in printed
        assert table.count(f"**Warning:** {message}.") == 1
    assert table.count("Warning") == 2


def test_an_empty_sweep_writes_nothing(tmp_path):
    assert show_sweep(sweep(tmp_path, [None])) == []
    assert not list(tmp_path.glob("sweep.*"))


def test_a_run_shows_its_brackets_its_layers_and_its_warning(tmp_path, capsys):
    results = run() | {"warnings": ["the text was seen", "bracket [static] left out"]}
    results["quality"]["predictor"] = {"recall": {"heads": 0.9, "neurons": 0.7}}
    show_run(results, tmp_path, "the text was seen")
    printed = capsys.readouterr().out
    assert "(oracle)" in printed
    assert "recall heads 0.900, neurons 0.700" in printed
    assert printed.count("warning: the text was seen") == 1
    assert "warning: bracket [static] left out" in printed
    assert (tmp_path / "layers.png").read_bytes()[:4] == PNG


def test_tables_say_in_which_dtype_bytes_are_counted():
    rows = [row | {"bytes_dtype": "bfloat16"} for row in rows_of(run())]
    assert title(rows).endswith("bytes in bfloat16")
    assert "bytes in" not in title([rows[0], rows[1] | {"bytes_dtype": "float32"}])
