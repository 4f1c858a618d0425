"""The trace store: row-major safetensors shards, and a manifest written last that seals them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gnomon.data import files
from gnomon.data.codes import Raw
from gnomon.data.plan import FORMAT_VERSION, sha
from gnomon.host import KINDS, HostSpec, Tap, UnitKind

log = logging.getLogger(__name__)

Part = Literal["train", "heldout"]
MANIFEST, SETTINGS, MEANS = "manifest.json", "harvest.json", "means.safetensors"
_EAGER = 2 << 30  # bytes hashed at opening; above, each shard is hashed when it is first read


@dataclass(frozen=True)
class Shard:
    """One file of rows. ``tokens`` are the valid positions it was harvested from."""

    file: str
    split: Part
    rows: int
    tokens: int
    bytes: int
    sha256: str


class TraceStore:
    """A complete trace folder, open for reading.

    Attributes:
        path: the folder.
        manifest: its ``manifest.json``.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.all_shards = tuple(Shard(**s) for s in manifest["shards"])
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: str | Path, spec: HostSpec | None = None) -> TraceStore:
        """Opens a trace folder.

        Args:
            path: the folder.
            spec: the host that will use it, checked against the one that was harvested.

        Raises:
            ValueError: no folder, half-written, truncated, changed, of an older format, or of
                another host.
        """
        path = Path(path).expanduser()
        store = cls(path, read_manifest(path))
        if spec is not None:
            store.check_host(spec)
        for shard in store.all_shards:
            file = path / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                found = "missing" if size is None else f"{size} bytes"
                raise ValueError(
                    f"trace folder {path}: {shard.file} is {found}, the manifest says "
                    f"{shard.bytes} bytes. {_AGAIN}"
                )
        store._verify(MEANS, manifest_sha=store.manifest["means"]["sha256"])
        if store.nbytes <= _EAGER:
            for shard in store.all_shards:
                store._verify(shard.file, shard.sha256)
        return store

    def check_host(self, spec: HostSpec) -> None:
        """Raises ValueError, naming both, if the traces are of another host."""
        mine = self.manifest["host"]
        if mine["hash"] != spec.hash:
            raise ValueError(
                f"trace folder {self.path} was harvested from {mine['name']} ({mine['hash']}), not "
                f"from {spec.name} ({spec.hash}): harvest again, or load that host"
            )

    @property
    def hash(self) -> str:
        """sha256 over what was harvested and how; no time, path or version in it."""
        return self.manifest["hash"]

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Where the inputs were read."""
        return tuple(Tap(**t) for t in self.manifest["settings"]["taps"])

    @property
    def format(self) -> str:
        """``int8`` or ``bits`` (training rows; held-out rows are always int8)."""
        return self.manifest["settings"]["format"]

    @property
    def label_density(self) -> dict[str, float] | None:
        """Density per kind of stored labels; None for int8."""
        return self.manifest["settings"]["label_density"]

    @property
    def units(self) -> dict[UnitKind, int]:
        """Units of a layer, per kind."""
        return {kind: self.manifest["host"]["units"][kind] for kind in KINDS}

    @property
    def nbytes(self) -> int:
        """Size of the shards."""
        return sum(s.bytes for s in self.all_shards)

    @cached_property
    def means(self) -> dict[UnitKind, Tensor]:
        """Mean token score (L, N) fp32 per kind, over all harvested training tokens."""
        stored = load_file(self.path / MEANS)
        return {kind: stored[kind] for kind in KINDS}

    def shards(self, split: Part) -> tuple[Shard, ...]:
        """The shards of a split, in order."""
        return tuple(s for s in self.all_shards if s.split == split)

    def rows(self, split: Part) -> int:
        """Rows of a split."""
        return sum(s.rows for s in self.shards(split))

    def read(self, shard: Shard, start: int = 0, stop: int | None = None) -> Raw:
        """Stored rows ``start:stop`` of a shard, as ``codes.encode_rows`` made them.

        Raises:
            ValueError: the shard's bytes are not those of the manifest.
        """
        self._verify(shard.file, shard.sha256)
        with _opened(self.path / shard.file) as file:
            names = [n for n in file.keys() if not n.endswith("_sum")]  # noqa: SIM118
            return {
                n: file.get_slice(n)[start : shard.rows if stop is None else stop] for n in names
            }

    def iterate(self, split: Part) -> Iterator[Raw]:
        """Shard after shard; memory holds one."""
        for shard in self.shards(split):
            yield self.read(shard)

    def _verify(self, name: str, manifest_sha: str) -> None:
        if name in self._verified:
            return
        file = self.path / name
        found = files.digest(file) if file.is_file() else "missing"
        if found != manifest_sha:
            raise ValueError(
                f"trace folder {self.path}: {name} is not what was harvested (sha256 {found[:12]}, "
                f"the manifest says {manifest_sha[:12]}). {_AGAIN}"
            )
        self._verified.add(name)


def seal(folder: Path, manifest: dict[str, Any], shards: list[Shard]) -> None:
    """Writes the means, then the manifest with the hash: the folder is complete with it."""
    write_means(folder, shards)
    ordered = sorted(shards, key=lambda s: s.file)
    manifest["shards"] = [asdict(s) for s in ordered]
    manifest["means"] = {"file": MEANS, "sha256": files.digest(folder / MEANS)}
    content = [[s.file, s.split, s.rows, s.tokens, s.sha256] for s in ordered]
    sealed = [manifest["settings"], manifest["text"]["digests"], content, manifest["means"]]
    write_json(folder / MANIFEST, {"version": FORMAT_VERSION, "hash": sha(sealed), **manifest})


def write_means(folder: Path, shards: list[Shard]) -> None:
    """Mean token scores from the sums in the training shards."""
    train = sorted((s for s in shards if s.split == "train"), key=lambda s: s.file)
    sums: dict[str, Tensor] = {}
    for shard in train:
        with _opened(folder / shard.file) as file:
            for kind in KINDS:
                part = file.get_tensor(f"{kind}_sum")
                sums[kind] = sums[kind] + part if kind in sums else part
    tokens = sum(s.tokens for s in train)
    save({k: (v / tokens).float() for k, v in sums.items()}, folder / MEANS)


def save(tensors: Raw, path: Path, note: str = "") -> None:
    """Writes safetensors under a temporary name and renames.

    Raises:
        OSError: the disk is full or cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # one key only: the order of several is not deterministic, and the bytes are hashed
        save_file(tensors, temporary, metadata={"gnomon": note})
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path.name}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON under a temporary name and renames."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_note(path: Path) -> str | None:
    """The note a shard was written with; None if it is not a complete file of ours."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("gnomon")
    except (SafetensorError, OSError):
        return None


def read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"trace folder {path} does not exist: harvest first (harvest.mode=store)")
    file = path / MANIFEST
    if not file.is_file():
        if (path / SETTINGS).is_file():
            raise ValueError(
                f"trace folder {path} is half-written (no {MANIFEST}): the command that began it "
                "resumes it"
            )
        raise ValueError(f"{path} is not a trace folder (no {MANIFEST})")
    try:
        manifest = json.loads(file.read_text())
        version = int(manifest["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"trace folder {path}: {MANIFEST} cannot be read ({error})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"trace folder {path} has format {version}, this version reads {FORMAT_VERSION}: "
            "harvest again into another folder"
        )
    return manifest


def _opened(path: Path) -> Any:
    return safe_open(path, "pt")


_AGAIN = "Delete the folder and harvest again."


def to_device(raw: Raw, device: torch.device | str) -> Raw:
    """Stored rows on a device."""
    return {name: tensor.to(device) for name, tensor in raw.items()}
