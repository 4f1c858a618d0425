"""The predictor folder: config.json, model.safetensors, README.md (DESIGN: contracts)."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gnomon.host import KINDS, HostSpec
from gnomon.predictors.base import Predictor, PredictorInfo

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "shipped"
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


def write_folder(predictor: Predictor, folder: Path) -> None:
    """Writes a predictor with row-scaled int8 weights; config.json comes last.

    Weights still in fp32 are quantised in a copy: call ``quantize()`` first to hold in memory the
    very scores that the folder gives.
    """
    if not predictor.quantized:
        predictor = copy.deepcopy(predictor).quantize()
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in predictor.state_dict().items()}
    partial = folder / f"{WEIGHTS}.tmp"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors writes 0600, which a shared folder cannot use
    os.replace(partial, folder / WEIGHTS)
    (folder / CARD).write_text(predictor.card(), encoding="utf-8")
    partial = folder / f"{CONFIG}.tmp"
    partial.write_text(_config_text(predictor), encoding="utf-8")
    os.replace(partial, folder / CONFIG)


def load_predictor(path: str | Path, *, revision: str | None = None) -> Predictor:
    """Loads a predictor for inference: same scores, bit for bit, as when it was saved.

    Args:
        path: a predictor folder, or the id of a repository on the Hugging Face hub.
        revision: of the hub repository.

    Raises:
        ValueError: no such folder or repository, a damaged or unknown config, weights that do not
            fit the config.
    """
    folder = _folder(path, revision)
    config = read_config(folder)
    predictor = _build(config, folder)
    state = _read_weights(folder)
    for kind in KINDS:  # folders from before spread=learned have none
        state.setdefault(f"tilt_{kind}", torch.zeros(predictor.L))
    expected = predictor.state_dict()
    for key in sorted(expected.keys() | state.keys()):
        found, wanted = state.get(key), expected.get(key)
        if (
            found is None
            or wanted is None
            or (found.shape, found.dtype)
            != (
                wanted.shape,
                wanted.dtype,
            )
        ):
            raise ValueError(
                f"{folder / WEIGHTS}: {key} is {_shape(found)}, but {CONFIG} (class "
                f"{config['class']!r}, params {config['params']}) needs {_shape(wanted)}; the two "
                "files are not from one predictor: copy or train it again"
            )
    predictor.load_state_dict(state, assign=True)
    predictor.info = _info(config)
    return predictor.requires_grad_(False).eval()


def find_predictor(
    root: str | Path, spec: HostSpec, cls: str | type[Predictor] | None = None
) -> Path:
    """The newest complete predictor for a host below a folder (``policy.predictor=auto``).

    Args:
        root: ``${paths.predictors}``; its sub-folders are searched.
        spec: the host.
        cls: class or its name; None for any whose per-unit means were harvested, which those of
            ``static`` were not.

    Raises:
        ValueError: there is none; names the command that trains one.
    """
    name = cls if isinstance(cls, str) or cls is None else cls.name
    found: list[tuple[str, str, Path]] = []
    for file in Path(root).glob(f"**/{CONFIG}"):
        try:
            config = read_config(file.parent)
        except ValueError:
            continue
        fits = name == config["class"] or (name is None and not _learned_means(config["class"]))
        if config["host"]["spec_hash"] == spec.hash and fits:
            found.append((config["created"], str(file.parent), file.parent))
    if not found:
        raise ValueError(
            f"policy.predictor=auto: no {name or 'predictor'} for host {spec.name!r} (spec "
            f"{spec.hash}) below {root}. Train one: python train.py predictor={name or 'shadow'} "
            "with the same host=… options, or give a folder: policy.predictor=<folder|hub id>"
        )
    return max(found)[2]


def find_pretrained(spec: HostSpec, cls: str | type[Predictor] | None = None) -> Path:
    """The predictor of a host that ships with the project (``policy.predictor=pretrained``).

    Args:
        spec: the host.
        cls: class or its name; None for any.

    Raises:
        ValueError: none ships for this host and class; lists what does.
    """
    try:
        return find_predictor(SHIPPED, spec, cls)
    except ValueError:
        pass
    held = [read_config(file.parent) for file in sorted(SHIPPED.glob(f"**/{CONFIG}"))]
    names = ", ".join(f"{c['class']} for {c['host']['name']}" for c in held) or "none"
    name = cls if isinstance(cls, str) or cls is None else cls.name
    raise ValueError(
        f"policy.predictor=pretrained: no {name or 'predictor'} ships for host {spec.name!r} (spec "
        f"{spec.hash}); what ships: {names}. Use policy.predictor=auto, a folder or a hub id"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a predictor folder, checked.

    Raises:
        ValueError: missing, not JSON, of another format, or incomplete.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not a predictor folder: {file.name}: {error}") from error
    needed = {"format", "class", "params", "host", "created", "means"}
    if not isinstance(config, dict) or not needed <= config.keys():
        missing = sorted(needed - set(config)) if isinstance(config, dict) else "everything"
        raise ValueError(f"{file} is not a predictor's: it lacks {missing}")
    if config["format"] != FORMAT:
        raise ValueError(
            f"{file}: format {config['format']} is not {FORMAT}; train the predictor again or use "
            "the version of gnomon that wrote it"
        )
    return config


def _learned_means(name: str) -> bool:
    return name in Predictor.registry and Predictor.registry[name].learned_means


def _folder(path: str | Path, revision: str | None) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    text = str(path)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(
            f"predictor={text!r} is neither a folder nor a hub id (<owner>/<name>); train one with "
            "train.py, whose last line is the folder"
        )
    try:
        return Path(
            snapshot_download(text, revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD])
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(
            f"predictor={text!r} is no folder here and could not be fetched from the hub "
            f"({type(error).__name__}: {error}). Give a folder, or check the id and the network"
        ) from error


def _build(config: dict[str, Any], folder: Path) -> Predictor:
    known = Predictor.registry
    if config["class"] not in known:
        raise ValueError(
            f"{folder / CONFIG}: class {config['class']!r} is unknown; known are "
            f"{', '.join(sorted(known))}. Import the module that defines it first"
        )
    try:
        with torch.device("meta"):
            return known[config["class"]].from_params(config["params"]).quantize()
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / CONFIG}: params do not fit: {error}") from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder / WEIGHTS} cannot be read ({error}); copy or train the predictor again"
        ) from error


def _info(config: dict[str, Any]) -> PredictorInfo:
    flat = {**config, **_host(config["host"]), **_text(config.get("text", {}))}
    known = {f.name for f in fields(PredictorInfo)}
    return PredictorInfo(**{k: v for k, v in flat.items() if k in known})


def _host(host: dict[str, str]) -> dict[str, str]:
    return {"host": host["name"], "revision": host["revision"], "spec_hash": host["spec_hash"]}


def _text(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": text.get("name", ""),
        "text_digest": text.get("digest", ""),
        "text_split": text.get("split", {}),
    }


def _config_text(predictor: Predictor) -> str:
    info = asdict(predictor.info)
    host = {
        "name": info.pop("host"),
        "revision": info.pop("revision"),
        "spec_hash": info.pop("spec_hash"),
    }
    text = {
        "name": info.pop("text"),
        "digest": info.pop("text_digest"),
        "split": info.pop("text_split"),
    }
    head = {
        "format": FORMAT,
        "class": predictor.name,
        "params": predictor.params,
        "weights": predictor.stored,
        "host": host,
        "text": text,
        **info,
    }
    means = {
        kind: [[_digits(x) for x in row] for row in predictor.means[kind].tolist()]
        for kind in KINDS
    }
    body = json.dumps(head, indent=2, allow_nan=False)[:-2]
    return f'{body},\n  "means": {json.dumps(means, separators=(",", ":"))}\n}}\n'


def _digits(x: float) -> float | None:
    """Four significant digits; the exact means are in model.safetensors."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def _shape(t: torch.Tensor | None) -> str:
    return "absent" if t is None else f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
