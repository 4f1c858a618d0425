"""benchmarks/: rows of a tiny shape on the CPU, a wrong operator is caught, parts of a step."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import gnomon
from gnomon.tiny import tiny_host

ROOT = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = [
    *("shapes=[tiny]", "device=cpu", "dtype=float32"),
    *("rank=8", "out=unused"),
]
TIMES = ["steps=50", "warmup=2", "check=4", "context=[64]", "hidden=8"]
LAYERS = 2


def module(name: str) -> ModuleType:
    """A file of benchmarks/ or its support folder, under a name that nothing else has."""
    path = ROOT / f"{name}.py"
    path = path if path.exists() else ROOT / "support" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(autouse=True)
def support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "support"))


def config(name: str, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(name, overrides=[*SMALL, *overrides])
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))


def decode(*overrides: str) -> tuple[list[dict], list[str]]:
    rows: list[dict] = []
    left_out = module("decode").run(config("decode", *TIMES, *overrides), rows.append)
    return rows, left_out


def test_decode_rows_share_one_host_and_hold_what_the_contract_names():
    names = ["shadow", "dejavu", "prompt", "static", "random", "dense_int8", "sketch"]
    rows, left_out = decode(f"policies=[{','.join(names)}]", "hf=eager")
    assert [row["policy"] for row in rows] == names
    assert left_out == []
    for row in rows:
        assert row["shape"] == "tiny"
        assert row["speedup"] == pytest.approx(row["ms_dense"] / row["ms_sparse"])
        assert row["agreement"]["steps"] == 4
        assert row["ms_hf"] > 0
        assert row["host"] == {"dtype": "float32", "weights": "random"}
    exact = [row["agreement"] for row in rows if row["policy"] != "dense_int8"]
    assert all(found["sets"] == 1 and found["logits_rms"] < 1e-5 for found in exact)
    assert [row["kv"] for row in rows[:4]] == ["keep", "keep", "drop", "drop"]
    assert 0 < rows[0]["decision_share"] < 1
    assert rows[5]["density"] == {"heads": 1, "neurons": 1}
    json.dumps(rows)


@pytest.mark.parametrize("rows", [1, 2])
def test_decode_of_thresholds_placed_on_the_random_host(rows):
    names = ["teal", "chess", "chess_ffn", "cats"]
    found, left_out = decode(f"policies=[{','.join(names)}]", f"batch=[{rows}]", "density=[0.4]")
    assert [row["policy"] for row in found] == names
    assert left_out == []
    for row in found:
        assert row["engine"] == "lean"
        assert row["agreement"]["sets"] == 1
        assert row["agreement"]["logits_rms"] < 1e-5
        assert row["density"]["neurons"] == pytest.approx(0.4, abs=0.06)
        assert row["union"]["neurons"] >= row["density"]["neurons"]
        assert row["speedup_ideal"] > 1
        assert row["rank"] is None
    assert set(found[0]["density"]["channels"]) == {"q", "k", "v", "out", "gate", "up", "down"}
    assert set(found[1]["density"]["channels"]) == {"q", "out"}
    assert "channels" not in found[3]["density"]
    assert found[0]["speedup_ideal"] > found[3]["speedup_ideal"]
    json.dumps(found)


def test_decode_of_a_sketchs_thresholds():
    (other,), _ = decode("policies=[sketch_threshold]", "bytes=[0.97]")
    assert other["density"]["heads"] == 1
    assert other["byte_density"] == pytest.approx(0.97, abs=0.03)
    (row, top), _ = decode("policies=[sketch_threshold,sketch]", "heads=1", "neurons=0.5")
    assert row["agreement"]["sets"] == 1
    assert row["agreement"]["logits_rms"] < 1e-5
    assert top["density"]["neurons"] == 0.5
    assert row["density"]["neurons"] == pytest.approx(0.5, abs=0.25)
    assert row["density"]["heads"] == 1


def test_decode_at_equal_bytes():
    names = ["griffin", "glass", "teal", "teal_attention", "dense_int8"]
    found, left_out = decode(f"policies=[{','.join(names)}]", "bytes=[0.95,0.9]")
    assert left_out == []
    assert [row["policy"] for row in found] == [n for n in names[:-1] for _ in "12"] + names[-1:]
    assert [row.get("bytes") for row in found] == [0.95, 0.9] * 4 + [None]
    for row in found[:-1]:
        assert row["byte_density"] == pytest.approx(row["bytes"], abs=0.03)
    out_of_reach, _ = decode("policies=[griffin]", "bytes=[0.5]")
    assert "cannot be reached" in out_of_reach[0]["error"]


def test_one_calibration_serves_every_row():
    bench = module("decode").Bench.build(config("decode", *TIMES), "tiny", torch.device("cpu"))
    made = bench.calibration()
    assert bench.calibration() is made
    assert bool((made.values > 1000).all())
    assert bool((made.cut("gate", 0.3) > made.cut("gate", 0.6)).all())


def test_decode_of_a_batch_on_random_caches():
    rows, _ = decode("batch=[3]", "cache=random", "heads=0.5", "neurons=1", "head_unit=group")
    shadow, prompt = rows
    assert shadow["density"]["neurons"] == 1
    assert shadow["union"]["heads"] >= shadow["density"]["heads"]
    assert shadow["agreement"]["sets"] == 1
    assert "ttft_ms" not in shadow
    assert "use cache=prompt" in prompt["error"]


def test_an_int8_host_is_timed_against_an_int8_twin():
    rows, _ = decode("policies=[shadow]", "int8=true")
    whole, _ = decode("policies=[shadow]")
    assert rows[0]["bytes_dense"] < 0.6 * whole[0]["bytes_dense"]
    assert rows[0]["speedup_ideal"] > 1


def test_the_limit_leaves_out_and_says_so():
    rows, left_out = decode("limit_s=0")
    assert (rows, left_out) == ([], ["tiny"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policies=[best]", r"policies=\['best'\] are unknown; use any of shadow"),
        ("shapes=[gpt]", r"shape='gpt' is unknown; use one of llama-2-7b"),
        ("cache=none", r"cache='none' is unknown"),
        ("profile=true", r"profile=true .* use device=cuda"),
        ("steps=10", r"speed.steps=10: use 50 or more"),
    ],
)
def test_bad_settings_of_decode(override, message):
    with pytest.raises(ValueError, match=message):
        decode(*override.split())


def test_every_shape_has_the_parameters_of_its_name():
    shapes = module("shapes")
    sizes = {"llama-2-7b": 6.74, "llama-3-8b": 8.03, "opt-13b": 12.85, "opt-30b": 29.97}
    for name, billions in (sizes | {"qwen2.5-1.5b": 1.54, "smollm2-135m": 0.1345}).items():
        model = shapes.random_host(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=4e-3)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def kernels(*overrides: str, bench: ModuleType | None = None) -> list[dict]:
    rows: list[dict] = []
    fast = ["kept=[1.0,0.5]", "rounds=2", "warmup=1", "flush_mb=1", "context=16"]
    (bench or module("kernel_bench")).run(config("kernels", *fast, *overrides), rows.append)
    return rows


@pytest.mark.parametrize("int8", ["false", "true"])
def test_every_operator_is_checked_then_timed(int8):
    names = list(module("kernel_cases").OPS)
    rows = kernels(f"ops=[{','.join(names)}]", f"int8={int8}")
    assert {row["op"] for row in rows} == set(names)
    for row in rows:
        assert "error" not in row, row
        assert row["us"] > 0
        assert row["sets"] >= 4
        assert row["gbps_read_ceiling"] > 0
        whole = row["op"] == "sketched_ffn" and row["kept"] == 1  # copies beside everything
        assert whole or row["bytes"] <= row["bytes_dense"]
    halves = {row["op"]: row["speedup_ideal"] for row in rows if row["kept"] == 0.5}
    if int8 == "false":
        assert halves["gathered_ffn"] == pytest.approx(2)


def test_a_wrong_operator_is_reported_and_not_timed(monkeypatch):
    bench = module("kernel_bench")
    whole = bench.Make.case

    def wrong(self, op, kept):
        case = whole(self, op, kept)
        return replace(case, run=lambda: case.run() * 1.01)

    monkeypatch.setattr(bench.Make, "case", wrong)
    rows = kernels("ops=[ffn_up]", bench=bench)
    assert all("differs from its reference" in row["error"] for row in rows)
    assert not any("us" in row for row in rows)


def step(*decision: str) -> list[str]:
    layer = ["_row_kernel", "_attention_kernel", "_column_kernel", "_row_kernel", "_column_kernel"]
    return ["gather", *layer, *decision, *layer, "_row_kernel", "argmax"]


def test_launches_are_told_apart_by_their_order():
    account = module("step_account")
    layer = ["kvq", "attention", "out", "up", "down"]
    assert account.parts_of(step()) == ["embedding", *layer, *layer, "head", "next"]
    sparse = step("elementwise", "_row_kernel", "_select_kernel")
    parts = account.parts_of(sparse, embedding=1)
    assert parts == ["embedding", *layer, *[account.DECISION] * 3, *layer, "head", "next"]
    with pytest.raises(ValueError, match="no layer is found"):
        account.parts_of(["a", "b"])


def test_an_account_adds_up_to_the_step():
    account = module("step_account")
    kernels = [account.Kernel(name, 2.0, 3.0) for name in step("_select_kernel")]
    parts = account.parts_of([k.name for k in kernels])
    rows = account.account(kernels, parts, {"kvq": 4000.0})
    assert sum(row["us"] for row in rows) == 2.0 * len(kernels)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    by_part = {row["part"]: row for row in rows}
    assert by_part["kvq"]["launches"] == LAYERS
    assert by_part["kvq"]["gbps"] == pytest.approx(4000 / 4 / 1e3)
    assert by_part[account.DECISION]["launches"] == 1
    named = account.by_name([*kernels, account.Kernel("void copy<float, 4>", 5.0, 1.0)])
    assert named["void copy"] == {"launches": 1, "us": 5.0}
    assert sum(own["us"] for own in named.values()) == 2.0 * len(kernels) + 5.0
    assert sum(own["launches"] for own in named.values()) == len(kernels) + 1


def test_the_script_runs_and_writes_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    args = ["shapes=[tiny]", "ops=[select_topk]", "kept=[0.5]", "device=cpu", "dtype=float32"]
    args += ["rounds=2", "flush_mb=1", f"out={out}", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels.py"), *args], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    row = json.loads(out.read_text())
    assert (row["op"], row["shape"]) == ("select_topk", "tiny")
    assert row["command"].startswith("python benchmarks/kernels.py shapes=[tiny]")


def test_shared_runs_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"word{i}" for i in range(40)]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(json.dumps({"text": " ".join(words[:20])}) + "\n")
    rows = [" ".join(words[5:20]).upper() + ", " + " ".join(words[30:40]), " ".join(words[:12])]
    test.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    monkeypatch.setitem(sys.modules, "prepare_text", module("prepare_text"))
    overlap = module("overlap")
    monkeypatch.setattr(sys, "argv", ["overlap.py", f"file:{train}", f"file:{test}"])
    overlap.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["runs"], found["in_training_text"]) == (25 - 12, 15 - 12)
    monkeypatch.setattr(sys, "argv", ["overlap.py", f"file:{train}"])
    with pytest.raises(SystemExit, match=r"python benchmarks/overlap.py"):
        overlap.main()


def test_candidates_beside_copies_are_measured_alike():
    features = module("features")
    given = ["--host", "tiny", "--blocks", "2", "--block", "64", "--tokens", "1024"]
    rows = list(features.study(features.arguments(given)))
    found = {(row["candidate"], row["neurons"]): row for row in rows}
    assert len(found) == len(rows) == 2 * (6 + 3 + 3 * len(features.LAMBDAS))
    for row in rows:
        assert 0 < row["recall"] < 1
        assert row["mass"] < row["mass_of_best"] < 1
    for share in features.SHARES:
        two, one = (found[f"copies, {bits}", share]["recall"] for bits in ("2 bits", "1 bits"))
        assert two > one > found["static", share]["recall"]
    spec = gnomon.describe(tiny_host()[0])
    for held in (1, spec.L):
        rank = features.rank_of(2, 2, spec, held)
        exact = 2 * spec.F * spec.D * 2 / 8  # bytes of two copies of 2 bits
        factors = [r * (2 * spec.F + spec.D / held) for r in (rank, rank + 1)]
        assert factors[0] <= exact < factors[1]
