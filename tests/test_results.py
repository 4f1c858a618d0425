"""results.json: the contract's example validates, wrong fields are named, no overwriting."""

from __future__ import annotations

import copy
import json

import pytest
from jsonschema import Draft202012Validator

from gnomon.evaluation import results as module
from gnomon.evaluation.results import (
    ResultsError,
    commit,
    read_results,
    schema,
    validate,
    write_results,
)

EXAMPLE = {
    "host": {
        "name": "h",
        "family": "llama",
        **{"L": 3, "H": 4, "G": 2, "D": 32, "F": 48},
        "dtype": "float32",
    },
    "policy": {
        "name": "shadow",
        "refresh": "token",
        "batch": "per_sequence",
        "kv": "keep",
        "predictor": {"class": "shadow", "source": "p", "sha256": "ab"},
        "params": {},
    },
    "backend": "mask",
    "protocol": {"name": "decode", "prompt": 256, "block": 512},
    "density": {
        "target": {"heads": 0.5, "neurons": 0.5},
        "heads": 0.5,
        "neurons": 0.5,
        "byte_density": 0.7,
        "predictor_byte_share": 0.1,
        "accounting": {"context": 1024},
    },
    "quality": {
        "texts": {
            "wikitext2": {
                "tokens": 100,
                "ppl_dense": 21.5,
                "ppl_sparse": 43.0,
                "ppl_ratio": 2.0,
                "ppl_ratio_ci": [1.9, 2.1],
            }
        },
        "generation": {"tokens": 256, "kl": 0.3, "agreement": 0.8},
        "tasks": {
            "piqa": {
                "n": 100,
                "acc_dense": 0.7,
                "acc_sparse": 0.6,
                "stderr_diff": 0.01,
                "kl": 0.1,
            }
        },
        "predictor": {
            "density": {"heads": 0.5, "neurons": 0.5},
            "recall": {"heads": 0.8, "neurons": 0.7},
            "mass": 0.9,
            "spearman": 0.6,
        },
    },
    "speed": [
        {
            "device": "d",
            "engine": "triton",
            "batch": 1,
            "context": 1024,
            "ms_dense": 2.0,
            "ms_sparse": 1.0,
            "speedup": 2.0,
            "speedup_ideal": 2.5,
            "gbps_dense": 2000.0,
            "gbps_sparse": 1800.0,
            "ms_hf": 3.0,
            "ttft_ms": 12.0,
            "peak_bytes": 1000000,
            "agreement": {"steps": 32, "same_sets": True, "logit_error": 1e-3},
        }
    ],
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "command": "python evaluate.py",
    "seed": 0,
}


def changed(path: str, value: object) -> dict:
    results = copy.deepcopy(EXAMPLE)
    *parents, last = path.split(".")
    place = results
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return results


def test_the_schema_is_a_schema_and_takes_the_contracts_example():
    Draft202012Validator.check_schema(schema())
    validate(EXAMPLE)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("density.heads", 1.5),
        ("density.target.neurons", 0),
        ("density.byte_density", 0),
        ("quality.generation.agreement", 2),
        ("quality.generation.tokens", 0),
        ("quality.texts.wikitext2.ppl_ratio_ci", [1.0]),
        ("policy.refresh", "sometimes"),
        ("backend", "auto"),
        ("protocol.name", "train"),
        ("host.L", "3"),
        ("seed", 0.5),
        ("speed.0.speedup", 0),
        ("quality.extra", {}),
        ("warnings", "seen"),
        ("warnings", [1]),
    ],
)
def test_a_wrong_field_is_named(path, value):
    with pytest.raises(ResultsError, match=r"does not follow.*\$"):
        validate(changed(path, value))


@pytest.mark.parametrize("key", ["host", "policy", "density", "versions", "commit", "command"])
def test_required_keys(key):
    results = {k: v for k, v in EXAMPLE.items() if k != key}
    with pytest.raises(ResultsError, match=f"'{key}' is a required property"):
        validate(results)


def test_writing_is_ordered_atomic_and_never_overwrites(tmp_path):
    shuffled = dict(reversed(EXAMPLE.items()))
    path = write_results(shuffled, tmp_path / "run")
    assert read_results(path) == EXAMPLE
    assert list(json.loads(path.read_text()))[:2] == ["host", "policy"]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    with pytest.raises(FileExistsError, match=r"never overwritten.*hydra.run.dir"):
        write_results(EXAMPLE, tmp_path / "run")


def test_nan_is_refused_and_leaves_nothing(tmp_path):
    results = changed("quality.texts.wikitext2.ppl_sparse", float("nan"))
    with pytest.raises(ResultsError, match="NaN or infinity"):
        write_results(results, tmp_path)
    assert not list(tmp_path.iterdir())


def test_reading_what_is_not_json_names_the_file(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ResultsError, match=r"results.json is not JSON"):
        read_results(tmp_path / "results.json")


def test_commit_of_a_checkout_and_without_one(monkeypatch, tmp_path):
    commit.cache_clear()
    fake = tmp_path / "gnomon" / "__init__.py"
    monkeypatch.setattr(module.gnomon, "__file__", str(fake))
    assert commit() == "unknown"
    commit.cache_clear()
