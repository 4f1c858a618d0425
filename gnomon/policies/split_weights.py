"""The stored form of an FFSplit: which neurons are heavy, and the compressed others."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from gnomon.host import HostSpec
from gnomon.policies.compressed import Compressed, check_method

CONFIG, WEIGHTS = "split.json", "split.safetensors"
Key = tuple[int, str]  # layer, role


@dataclass(frozen=True)
class SplitWeights:
    """A split of every FFN of a host.

    Attributes:
        method: of the rest.
        heavy: (L, F) bool.
        share: of the neurons that are heavy.
        rank: share of the full rank (``lowrank``).
        parts: (layer, role) -> the rest, one row per neuron (down transposed).
    """

    method: str
    heavy: Tensor
    share: float
    rank: float
    parts: dict[Key, Compressed]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rest."""
        return sum(part.nbytes for part in self.parts.values())

    def put(self, weight: Tensor, layer: int, role: str, part: Compressed) -> Tensor:
        """A linear's weight (out, in) with the rest as it is stored; heavy rows are untouched."""
        rows = weight.t().clone() if role == "down" else weight.clone()
        where = ~self.heavy[layer].to(rows.device)
        rows[where] = part.dense().to(rows)
        return rows.t().contiguous() if role == "down" else rows

    def save(self, folder: Path, spec: HostSpec) -> None:
        """Writes ``split.safetensors``, then ``split.json``.

        Raises:
            ValueError: the folder holds something.
        """
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} exists and is never overwritten: give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{layer}.{role}.{name}": tensor.cpu().contiguous()
            for (layer, role), part in self.parts.items()
            for name, tensor in part.tensors.items()
        }
        _replace(folder / WEIGHTS, lambda to: save_file({"heavy": self.heavy, **tensors}, to))
        shapes = {f"{layer}.{role}": part.shape for (layer, role), part in self.parts.items()}
        about = {
            "host": {"name": spec.name, "spec_hash": spec.hash},
            "method": self.method,
            "share": self.share,
            "rank": self.rank,
            "nbytes": self.nbytes,
            "shapes": shapes,
        }
        _replace(folder / CONFIG, lambda to: to.write_text(json.dumps(about, indent=2) + "\n"))

    @classmethod
    def load(cls, folder: Path, spec: HostSpec) -> SplitWeights:
        """Reads a split of this host.

        Raises:
            ValueError: no split, a damaged one, or another host's.
        """
        try:
            about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / WEIGHTS)
            host, method = about["host"], about["method"]
            parts: dict[Key, Compressed] = {}
            for key, shape in about["shapes"].items():
                layer, role = key.split(".")
                own = {
                    n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{key}.")
                }
                parts[int(layer), role] = Compressed(method, (shape[0], shape[1]), own)
            found = cls(method, tensors["heavy"], about["share"], about["rank"], parts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"policy.params.weights={folder}: no split of FFSplit ({error}); make one with "
                "FFSplit.save"
            ) from error
        if host["spec_hash"] != spec.hash:
            raise ValueError(
                f"policy.params.weights={folder} is a split of host {host['name']!r} (spec "
                f"{host['spec_hash']}), and this host is {spec.name!r} (spec {spec.hash}): save "
                "one of this host"
            )
        check_method(method)
        return found


def _replace(path: Path, write) -> None:  # type: ignore[no-untyped-def]
    partial = path.with_name(path.name + ".tmp")
    write(partial)
    partial.chmod(0o644)
    os.replace(partial, path)
