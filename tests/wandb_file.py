"""Reads a ``.wandb`` file: W&B 0.31 has no Python reader for its own transaction log any more.

The format is LevelDB's log behind a 7-byte header: blocks of 32 KiB, records cut into chunks of
``crc32 (4) | length (2) | type (1) | data``, type 1 whole, 2 first, 3 middle, 4 last.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(folder: Path) -> list[Any]:
    """Every record (protobuf) of the one run below a folder."""
    (file,) = folder.glob("**/*.wandb")
    found = []
    for data in _payloads(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


def _payloads(raw: bytes) -> Iterator[bytes]:
    assert raw[:4] == b":W&B", "not a .wandb file"
    at, parts = HEADER, b""
    while at + HEADER <= len(raw):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", raw, at)
        if (crc, length, kind) == (0, 0, 0):
            at += left
            continue
        data = raw[at + HEADER : at + HEADER + length]
        assert zlib.crc32(bytes([kind]) + data) == crc, f"damaged chunk at {at}"
        parts += data
        at += HEADER + length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
