"""The dense baseline: NLL of each block, computed once per host, text and protocol."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.evaluation.quality import Protocol, block_nll
from gnomon.host import HostSpec, weight

_memory: dict[str, Tensor] = {}


def host_key(model: nn.Module, spec: HostSpec) -> dict[str, str]:
    """Identity of a host *as loaded*: structure, weights, stored dtype and kind of device.

    The spec's own fingerprint is the same for a quantised copy of a host, whose perplexity is not.
    """
    tensor = weight(model, spec.layers[0].down)
    return {
        "host": spec.hash,
        "weights": _weights_digest(model, spec),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": tensor.device.type,
    }


def dense_nll(
    model: nn.Module,
    ids: Tensor,
    digest: str,
    protocol: Protocol,
    *,
    key: dict[str, str],
    batch: int = 4,
    cache: Path | None = None,
    progress: Callable[[int], object] = lambda blocks: None,
) -> Tensor:
    """The dense model's NLL (n,) of each block, from memory, disk or one pass over the text.

    Args:
        model: the host, outside of :func:`gnomon.sparsify`.
        ids: (n, block) tokens.
        digest: of ``ids``.
        protocol: which targets are scored.
        key: from :func:`host_key`.
        batch: blocks per forward.
        cache: folder for the small JSON files; None keeps memory only.
        progress: called with the number of blocks done after each forward.
    """
    facts = key | {
        "text": digest,
        "block": str(ids.shape[1]),
        "protocol": protocol.name,
        "prompt": str(protocol.prompt_length),
        "torch": torch.__version__,
    }
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    path = cache / "dense" / f"{name}.json" if cache else None
    if name not in _memory:
        found = _read(path, facts, len(ids)) if path else None
        if found is None:
            found = block_nll(model, ids, protocol, batch=batch, advance=progress)
            if path:
                write_atomic(path, json.dumps({"facts": facts, "nll": found.tolist()}))
        _memory[name] = found
    return _memory[name]


def forget() -> None:
    """Empties the in-process cache."""
    _memory.clear()


def write_atomic(path: Path, text: str) -> None:
    """Writes a small text file under a temporary name in its folder, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.fchmod(handle, 0o644)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path, facts: dict[str, str], blocks: int) -> Tensor | None:
    """The cached sums; None where there are none or the file is not what it should be."""
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
        nll = torch.tensor(held["nll"], dtype=torch.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return nll if held.get("facts") == facts and nll.shape == (blocks,) else None


def _weights_digest(model: nn.Module, spec: HostSpec) -> str:
    digest = hashlib.sha256()
    for tensor in _samples(model):
        if tensor.is_meta:
            return f"offloaded-{spec.name}-{spec.revision}"
        digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _samples(model: nn.Module) -> Iterable[Tensor]:
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        yield flat[:: max(1, flat.numel() // 256)]
