"""Loads hosts: the embedded one, a hub id, a local folder, a GGUF file, or a tiny random one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from gnomon._gguf import converted, embedded_file, model_name
from gnomon.tiny import FAMILIES, tiny_host

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FORMS = f"use 'smollm2', a hub id, a local folder, a .gguf file, or tiny:<{'|'.join(FAMILIES)}>"
HUB_TIMEOUT = 5.0  # seconds; a hub that does not answer must not hold the first error back

DeviceMap = str | Mapping[str, Any] | None
Host = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_host(
    name: str = "smollm2",
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    device_map: DeviceMap = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    cache: str | Path | None = None,
    family: str | None = None,
) -> Host:
    """Loads a host in evaluation mode, and its tokenizer (padding on the left).

    Args:
        name: ``smollm2`` (embedded), a hub id, a local folder, a ``.gguf`` file or
            ``tiny:<family>``.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``/None for the stored one.
        device: ``cpu``, ``cuda``, ``cuda:<n>``, or ``auto`` (CUDA where there is one).
        device_map: handed to transformers, for hosts larger than a device; ``device`` is unused.
        trust_remote_code: run code that a hub repository ships.
        revision: branch, tag or commit of a hub id.
        cache: where GGUF files are converted to; default ``GNOMON_CACHE`` or the platform's cache.
        family: for ``name='tiny'``: the same as ``tiny:<family>``.

    Raises:
        ValueError: unknown name, folder without a model, unknown dtype, missing device, or a hub
            that does not answer; each says what to do.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"host.name={name!r} names no host; {FORMS}")
    chosen, where = _dtype(dtype), _device(device)
    if name == "tiny" or name.startswith("tiny:"):
        model, tokenizer = tiny_host(family or name.partition(":")[2] or "llama")
        return model.to(device=where, dtype=chosen or torch.float32), tokenizer
    if family is not None:
        raise ValueError(f"host.family={family!r} goes with host=tiny, not host.name={name!r}")
    source, title, local = _locate(name, revision, cache)
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "revision": revision or "main",
        "local_files_only": local,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=chosen or "auto", device_map=device_map, **options
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise ValueError(f"host.name={name!r} could not be loaded: {_reason(error)}") from error
    if title is not None:
        model.config._name_or_path = title
    if device_map is None:
        model = model.to(where)
    return model.eval(), tokenizer


def _locate(
    name: str, revision: str | None, cache: str | Path | None
) -> tuple[str, str | None, bool]:
    """What transformers is to read, the host's name if not its own, and whether files are local."""
    if name == "smollm2":
        file = embedded_file()
        return str(converted(file, cache)), model_name(file), True
    path = Path(name).expanduser()
    if path.is_dir():
        _require_model(path)
        return str(path), path.resolve().name, True
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"host.name={name!r} is a file but not a .gguf file; {FORMS}")
        return str(converted(path, cache)), model_name(path), True
    if name.endswith(".gguf") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"host.name={name!r}: there is no such file or folder; {FORMS}")
    return name, None, not _on_hub(name, revision)


def _require_model(folder: Path) -> None:
    names = sorted(p.name for p in folder.iterdir())
    if "config.json" not in names:
        gguf = [n for n in names if n.endswith(".gguf")]
        hint = f"name the file: {folder / gguf[0]}" if gguf else "save_pretrained() writes one"
        raise ValueError(f"host.name='{folder}' has no model: config.json is missing; {hint}")
    if not any(n.endswith((".safetensors", ".bin")) for n in names):
        raise ValueError(
            f"host.name='{folder}' has a config.json but no weights (.safetensors or .bin)"
        )


def _on_hub(name: str, revision: str | None) -> bool:
    """Whether the hub answers and knows the model; False: only a local copy can serve.

    Asked once with a short timeout, because transformers asks for every file of a model in turn.
    """
    try:
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except HFValidationError as error:
        raise ValueError(f"host.name={name!r} is not a hub id ({error}); {FORMS}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"host.name={name!r} is gated: accept its licence on the hub, then run: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"host.revision={revision!r} does not exist for {name!r}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"host.name={name!r} is not on the hub (or is private); {FORMS}"
        ) from error
    except Exception:  # whatever its HTTP library raises: httpx or httpx2, by version
        if not _in_hub_cache(name, revision):
            raise ValueError(
                f"host.name={name!r} is not a local folder, and as a hub id it cannot be fetched: "
                f"{_why_unreachable()}. Connect once to download it, or give a local folder or "
                ".gguf file, or host=smollm2"
            ) from None
        return False
    return True


def _in_hub_cache(name: str, revision: str | None) -> bool:
    return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)


def _why_unreachable() -> str:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    return "HF_HUB_OFFLINE is set" if offline else "the hub does not answer"


def _reason(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return "it ships its own code; set host.trust_remote_code=true to run it"
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"host.dtype={dtype!r} is unknown; use one of auto, {', '.join(DTYPES)}")
    return DTYPES[str(dtype)]


def _device(device: str) -> torch.device:
    local = os.environ.get("LOCAL_RANK")  # torchrun: one device for each process
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and local is not None:
        device = f"cuda:{local}"
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"host.device={device!r} is unknown; use cpu, cuda or auto") from None
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"host.device={device!r}: this machine has {torch.cuda.device_count()} usable CUDA "
            "device(s); use host.device=cpu or auto"
        )
    return where
