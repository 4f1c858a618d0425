"""Every shipped YAML composes, and every node with a ``_target_`` instantiates, on a tiny host."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from cases import calibration, predictor
from gnomon import policies
from gnomon.evaluation.subject import find, make_subject
from gnomon.host import describe
from gnomon.loading import load_host
from gnomon.predictors.folder import write_folder
from gnomon.tiny import tiny_host

CONF = Path(__file__).resolve().parent.parent / "conf"
PRIMARY = sorted(p.stem for p in CONF.glob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "__pycache__")
OPTIONS = sorted(
    str(p.relative_to(CONF).with_suffix("")) for p in CONF.glob("*/*.yaml") if p.parts[-2] in GROUPS
)
# What an option cannot do without, or would take long over.
NEEDS: dict[str, list[str]] = {
    "host/hf": ["host.name=tiny:llama"],
    "host/smollm2": ["host.name=tiny:llama"],  # the real one: test_loading.py
    "text/file": ["text.path={file}"],
    "text/wikitext2": ["text.path={file}"],
    "text/c4": ["text.path={jsonl}"],
}
_SWEEP = OmegaConf.load(CONF / "experiment" / "compare.yaml").hydra.sweeper.params
COMPARED = _SWEEP.policy.split(",")
HIGHEST = max(_SWEEP["budget.bytes"].split(","))  # others are out of reach for some
VARIANTS = sorted(f"variants/{p.stem}" for p in (CONF / "policy" / "variants").glob("*.yaml"))
VARIANTS.remove("variants/pretrained")  # the embedded host's: test_shipped.py
POLICY_FILES = sorted(p.stem for p in (CONF / "policy").glob("*.yaml"))
WHOLE = ("dense", "dense_int8", "ffsplit", "variants/ffsplit_int4", "variants/ffsplit_lowrank")
# Keys that evaluate.yaml adds to any text and reads itself.
TEXT_OF_EVALUATE = ("batch", "split")


def primary_of(group: str) -> list[str]:
    """The primary configs whose defaults name a group."""
    names = []
    for primary in PRIMARY:
        defaults = OmegaConf.to_container(OmegaConf.load(CONF / f"{primary}.yaml"))["defaults"]
        if any(isinstance(d, dict) and group in d for d in defaults):
            names.append(primary)
    return names


@pytest.fixture
def hydra_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``compose_(primary, *overrides)``, in a run folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GNOMON_ROOT", str(tmp_path / "outputs"))
    files = {"file": tmp_path / "text.txt", "jsonl": tmp_path / "text.jsonl"}
    files["file"].write_text(" = A title = \n\n" + "some words of text . \n" * 500)
    files["jsonl"].write_text('{"text": "some words"}\n' * 500)

    def compose_(primary: str, *overrides: str) -> DictConfig:
        filled = [o.format(**files) for o in overrides]
        run = f"hydra.runtime.output_dir={tmp_path}"
        cfg = compose(
            primary, overrides=[*filled, run, "hydra.job.num=0"], return_hydra_config=True
        )
        HydraConfig.instance().set_config(cfg)
        return cfg

    with initialize_config_module("gnomon.conf", version_base="1.3"):
        yield compose_


@pytest.fixture(scope="module")
def host() -> Any:
    model, tokenizer = load_host("tiny:llama")
    return model, tokenizer, describe(model)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """The outermost nodes with a ``_target_``; Hydra instantiates what is inside them."""
    if not isinstance(node, DictConfig):
        return
    if "_target_" in node:
        yield path, node
        return
    for key in node:
        if not OmegaConf.is_missing(node, key):
            yield from targets(node[key], f"{path}.{key}".lstrip("."))


def all_targets(node: Any) -> Iterator[str]:
    """The value of every ``_target_``, at any depth."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from all_targets(value)


def finish(path: str, made: Any, host: Any) -> Any:
    """Calls what a ``_partial_`` node left open."""
    if not callable(made) or not hasattr(made, "keywords"):
        return made
    if path == "predictor":
        predictor = made(host[2])
        assert predictor.check_host(host[2]) is None or predictor.L == host[2].L
        return predictor
    if path == "optimizer":
        return made([nn.Parameter(torch.zeros(2))])
    if path == "scheduler":
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
        return made(optimizer, 10)
    return made


def check(cfg: DictConfig, host: Any) -> None:
    user = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
    OmegaConf.to_container(user, resolve=True)  # every interpolation has a value
    if "protocol" in user:
        for key in TEXT_OF_EVALUATE:
            user.text.pop(key)
    for path, node in targets(user):
        if path != "host":
            assert finish(path, instantiate(node), host) is not None, path


def test_primary_configs_exist() -> None:
    assert PRIMARY == ["evaluate", "train"]


def test_every_group_belongs_to_a_primary_config() -> None:
    assert [g for g in GROUPS if not primary_of(g)] == []


@pytest.mark.parametrize("primary", PRIMARY)
def test_primary(primary: str, hydra_config: Any, host: Any) -> None:
    cfg = hydra_config(primary, "host=tiny")
    check(cfg, host)
    callbacks = cfg.hydra.get("callbacks") or OmegaConf.create({})
    for target in all_targets(OmegaConf.to_container(callbacks)):
        assert get_class(target)


@pytest.mark.parametrize("option", [o for o in OPTIONS if not o.startswith("experiment/")])
def test_option(option: str, hydra_config: Any, host: Any) -> None:
    group, _, name = option.partition("/")
    for primary in primary_of(group):
        value = f"[{name}]" if group == "measure" else name
        small = [] if group == "host" else ["host=tiny"]
        cfg = hydra_config(primary, f"{group}={value}", *small, *NEEDS.get(option, []))
        check(cfg, host)
        if group == "host":
            model, _ = instantiate(cfg.host)
            assert describe(model).L == 3


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(name: str, hydra_config: Any, host: Any) -> None:
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    head = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    command = re.search(rf"^# python (\w+)\.py (-m )?.*experiment={name}\b", head, re.MULTILINE)
    assert command, f"{name}.yaml must start with the command that runs it, not {head!r}"
    cfg = hydra_config(command[1], f"experiment={name}")
    check(cfg, host)


@pytest.mark.parametrize("path", sorted((CONF / "policy" / "variants").glob("*.yaml")), ids=str)
def test_variants_are_policies_with_a_label(path: Path, hydra_config: Any) -> None:
    policy = hydra_config("evaluate", "host=tiny", f"policy=variants/{path.stem}").policy
    plain = hydra_config("evaluate", "host=tiny", f"policy={policy.name}").policy
    assert policy.label == path.stem
    assert {key for key in policy if policy[key] != plain.get(key)} - {"label"}


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny host with the wide FFN of real ones, and a folder with one predictor of each class."""
    root = tmp_path_factory.mktemp("predictors")
    model, _ = tiny_host("llama", intermediate_size=512)
    for made in (
        calibration(model),
        predictor(model),
        predictor(model, "dejavu"),
        predictor(model, "sketch"),
        predictor(model, "prior"),
    ):
        write_folder(made, root / made.name)
    return model, describe(model), root


def test_the_comparison_sweeps_policies_once_and_has_every_variant() -> None:
    assert len(set(COMPARED)) == len(COMPARED) and set(VARIANTS) < set(COMPARED)


@pytest.mark.parametrize("option", sorted({*COMPARED, *VARIANTS, *POLICY_FILES}))
def test_policies_of_the_comparison_are_built_and_bound(
    option: str, hydra_config: Any, compared: Any
) -> None:
    model, spec, root = compared
    sweep = ("experiment=compare", "host=tiny", f"policy={option}", f"budget.bytes={HIGHEST}")
    cfg = hydra_config("evaluate", *sweep)
    config = OmegaConf.to_container(cfg.policy, resolve=True)
    found = find(config["name"], config["predictor"], root, spec)
    if found.predictor is not None:
        found.predictor.check(criterion=config.get("criterion"), rank=config.get("rank"))
    subject = make_subject(config, instantiate(cfg.budget), found, None, root, spec)
    subject.policy.bytes_dtype = cfg.bytes.dtype
    subject.policy.bind(model, spec)
    assert subject.policy.name == config["name"]
    assert subject.policy.skips_nothing == (option in WHOLE)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("policy/")])
def test_policy_files_are_named_after_their_policy(option: str, hydra_config: Any) -> None:
    name = option.partition("/")[2]
    known = {p.name for p in vars(policies).values() if isinstance(p, type) and hasattr(p, "name")}
    assert hydra_config("evaluate", "host=tiny", f"policy={name}").policy.name == name
    assert name in known


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("criterion/")])
def test_criterion_files_are_named_after_their_criterion(option: str, hydra_config: Any) -> None:
    name = option.partition("/")[2]
    assert instantiate(hydra_config("train", f"criterion={name}").criterion).name == name


def test_folders_lie_where_the_environment_says(hydra_config: Any) -> None:
    cfg = hydra_config("train", "host=tiny")
    assert Path(cfg.paths.predictors).is_relative_to(os.environ["GNOMON_ROOT"])
