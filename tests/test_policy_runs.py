"""Every system from its config through evaluate(), alone and inside others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cases import calibration, predictor
from gnomon.evaluation.run import evaluate
from gnomon.tiny import tiny_host

SMALL = [
    "host=tiny",
    "text=synthetic",
    "text.block=48",
    "text.tokens=240",
    "protocol.prompt=24",
    "measure.quality.brackets=[static,random]",
    "measure.quality.generation.tokens=4",
    "measure.quality.generation.prompt=8",
]
# policy, overrides, heads, neurons
RUNS: list[tuple[str, list[str], float, float]] = [
    ("griffin", [], 1.0, 0.5),
    ("griffin", ["policy.params.variant=magnitude"], 1.0, 0.5),
    ("glass", [], 1.0, 0.5),
    ("cats", [], 1.0, 0.5),
    ("chess", [], 1.0, 0.5),
    ("teal", ["budget.density=null", "budget.bytes=0.9"], 1.0, -1),
    ("skip_sublayers", ["budget.density=0.67"], 2 / 3, 1.0),
    ("skip_sublayers", ["policy.predictor=auto", "policy.params.choose=similarity"], -1, 1.0),
    ("ffsplit", ["policy.params.rest=int4"], 1.0, 1.0),
    ("core", [], 0.5, 0.5),
    ("dense_fallback", ["policy.params.inner.name=griffin", "budget.density=0.9"], 1.0, 1.0),
    (
        "skip_sublayers",
        [
            "policy.params.layers=[2]",
            "++policy.params.inner={name: ffsplit, predictor: auto, params: {heavy: 0.1, inner: "
            "{name: shadow, predictor: auto}}}",
        ],
        -1,
        0.5,
    ),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a calibration and a shadow predictor of the tiny host."""
    where = tmp_path_factory.mktemp("root")
    model, _ = tiny_host()
    for name, made in (("calibration", calibration(model)), ("shadow", predictor(model))):
        made.info = replace(made.info, created=f"2026-01-0{1 + (name == 'calibration')}")
        made.save_pretrained(where / "predictors" / name)
    return where


def settings(root: Path, policy: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("gnomon.conf", version_base="1.3"):
        cfg = compose("evaluate", [f"policy={policy}", f"paths.root={root}", *SMALL, *overrides])
        return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("policy", "overrides", "heads", "neurons"),
    RUNS,
    ids=[f"{i}-{name}" for i, (name, *_) in enumerate(RUNS)],
)
def test_results_follow_the_schema_and_the_budget(
    root: Path, tmp_path: Path, policy: str, overrides: list[str], heads: float, neurons: float
) -> None:
    found = evaluate(settings(root, policy, *overrides), tmp_path, "x").results
    density = found["density"]
    for kind, wanted in (("heads", heads), ("neurons", neurons)):
        if wanted >= 0:
            assert density[kind] == pytest.approx(wanted, abs=0.1), kind
    assert density["byte_density"] < 1.0 or policy == "dense_fallback"
    if "budget.bytes=0.9" in overrides:
        assert density["byte_density"] == pytest.approx(0.9, abs=0.03)
    assert found["quality"]["texts"]["synthetic"]["ppl_sparse"] > 0
    brackets = {row["policy"]: row["density"] for row in found["brackets"]}
    if policy in ("griffin", "glass", "cats"):  # brackets stand at the policy's own budget
        assert brackets["random"]["heads"] == 1.0
        assert brackets["random"]["neurons"] == pytest.approx(0.5, abs=0.02)


def test_shadowllm_as_published_runs(root: Path, tmp_path: Path) -> None:
    with initialize_config_module("gnomon.conf", version_base="1.3"):
        small = [o for o in SMALL if "generation" not in o and "prompt" not in o]
        overrides = ["experiment=shadowllm_published_eval", f"paths.root={root}", *small]
        cfg = OmegaConf.to_container(compose("evaluate", overrides), resolve=True)
    found = evaluate(cfg, tmp_path, "x").results  # type: ignore[arg-type]
    assert found["protocol"] == {"name": "published", "block": 48, "batch": 4}
    assert found["density"]["per_layer"]["neurons"][0] == 1.0
    assert found["quality"]["texts"]["synthetic"]["tokens"] == 5 * 47


def test_a_sparse_prefill_is_recorded_and_scored_where_a_dense_one_is(
    root: Path, tmp_path: Path
) -> None:
    runs = [
        evaluate(settings(root, "static", f"policy.prefill={prefill}"), tmp_path / prefill, "x")
        for prefill in ("dense", "sparse")
    ]
    dense, sparse = (run.results for run in runs)
    assert [r["policy"]["params"]["prefill"] for r in (dense, sparse)] == ["dense", "sparse"]
    a, b = (r["quality"]["texts"]["synthetic"] for r in (dense, sparse))
    assert a["tokens"] == b["tokens"] and a["ppl_dense"] == b["ppl_dense"]
    assert a["ppl_sparse"] != b["ppl_sparse"]
    assert dense["density"]["neurons"] == sparse["density"]["neurons"]


def test_policies_inside_are_recorded_and_told_apart(root: Path, tmp_path: Path) -> None:
    one = evaluate(settings(root, "core"), tmp_path / "one", "x").results
    inner = one["policy"]["params"]["inner"]
    assert inner["name"] == "shadow" and inner["predictor"].endswith("predictors/shadow")
    other = ["policy.params.inner.name=griffin", "policy.params.inner.predictor=null"]
    two = evaluate(settings(root, "core", *other), tmp_path / "two", "x").results
    ppl = [r["quality"]["texts"]["synthetic"]["ppl_sparse"] for r in (one, two)]
    assert ppl[0] != ppl[1]


@pytest.mark.parametrize(
    ("policy", "overrides", "message"),
    [
        ("core", ["policy.params.inner=null"], "policy=core is put round another policy"),
        ("core", ["++policy.params.inner={predictor: auto}"], None),
        ("core", ["++policy.params.inner.density=0.5"], "policy.params.inner: density; its keys"),
        ("skip_sublayers", ["policy.params.inner={name: griffin}"], "needs a budget, or"),
        ("skip_sublayers", ["policy.params.layers=[9]"], r"layers=\[9\]: host tiny-llama-0"),
        ("griffin", ["budget.heads=0.5"], r"budget\.heads=0\.5: policy=griffin"),
        ("chess", ["host.family=opt", "policy.predictor=auto"], "no calibration for host"),
        ("shadow", ["policy.prefill=sparse"], "policy=shadow with refresh=token decides from the"),
        ("cats", ["policy.prefill=sparse"], "policy=cats with refresh=token decides from the"),
        ("griffin", ["protocol=all"], "protocol='all' has no prompt"),
        ("random", ["protocol=published"], "cannot generate; set it to 0"),
    ],
)
def test_bad_input_is_refused_by_name(
    root: Path, tmp_path: Path, policy: str, overrides: list[str], message: str | None
) -> None:
    if message is None:
        overrides, message = ["~policy.params.inner.name"], "policy.params.inner: no name"
    with pytest.raises(ValueError, match=message):
        evaluate(settings(root, policy, *overrides), tmp_path, "x")
