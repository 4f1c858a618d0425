"""Reading text files, with clear errors, and their lossless division into documents."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

PLAIN = (".txt", ".raw", ".tokens")
RECORDS = (".jsonl",)
_HEADING = re.compile(r"^ = (?!=).*(?<!=) = *$", re.MULTILINE)  # WikiText's ` = Title = `
_GROUP = 2000  # characters of a document made of paragraphs


def suffix(path: Path) -> str:
    """The file's type: its suffix without ``.gz``.

    Raises:
        ValueError: not a file, or a type that cannot be read.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"text.path={path} {found}; give one file of {_kinds()}")
    kind = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if kind not in PLAIN + RECORDS:
        raise ValueError(f"text.path={path} has an unknown type {kind!r}; use {_kinds()}")
    return kind


def read_text(path: Path) -> str:
    """The whole text of a plain file, newlines as they are.

    Raises:
        ValueError: unreadable, empty, not UTF-8 or binary.
    """
    try:
        with _open(path) as stream:
            data = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"text.path={path} cannot be read: {error}") from error
    return _decode(path, data)


def read_records(path: Path, fields: Sequence[str], patience: int = 5) -> Iterator[tuple[int, str]]:
    """Lines of a JSON-lines file as (line number, fields concatenated); blank ones are skipped.

    Args:
        path: a ``.jsonl`` or ``.jsonl.gz`` file.
        fields: names of the text fields.
        patience: bad lines collected before the error is raised (1: at the first).

    Raises:
        ValueError: unreadable or empty file, or bad lines, each with its number.
    """
    bad: list[str] = []
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                text, problem = _record(line, fields)
                if problem:
                    bad.append(f"line {number}: {problem}")
                    if len(bad) >= patience:
                        break
                else:
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"text.path={path} cannot be read: {error}") from error
    if bad:
        more = " (and perhaps more)" if len(bad) >= patience else ""
        raise ValueError(f"text.path={path} has bad lines{more}: {'; '.join(bad)}")
    if number == 0:
        raise ValueError(f"text.path={path} is empty")


def divide(text: str) -> list[str]:
    """Documents of a plain text; joined, they are the text again.

    Cut at WikiText's top-level headings if there are any, else into groups of paragraphs of at
    least 2000 characters (lines, where the text has no blank line).
    """
    cuts = [m.start() for m in _HEADING.finditer(text)]
    if not cuts:
        ends = [m.end() for m in re.finditer(r"\n[^\S\n]*\n+", text)] or [
            m.end() for m in re.finditer(r"\n", text)
        ]
        last = 0
        for end in ends:
            if end - last >= _GROUP:
                cuts.append(end)
                last = end
    edges = [0, *(c for c in cuts if 0 < c < len(text)), len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))  # type: ignore[arg-type]
    return path.open("rb")


def _decode(path: Path, data: bytes) -> str:
    if not data.strip():
        raise ValueError(f"text.path={path} is empty")
    if b"\0" in data:
        raise ValueError(f"text.path={path} looks binary (it has zero bytes); give UTF-8 text")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"text.path={path} is not UTF-8 (line {line}): {error.reason}") from error


def _record(line: bytes, fields: Sequence[str]) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return "", f"not JSON ({error})"
    if not isinstance(record, dict):
        return "", f"a JSON {type(record).__name__}, not an object"
    for field in fields:
        if not isinstance(record.get(field), str):
            found = ", ".join(map(str, record)) or "none"
            return "", f"no text in field {field!r} (fields found: {found}; set text.fields)"
    return "".join(record[field] for field in fields), ""


def _kinds() -> str:
    return ", ".join(PLAIN + RECORDS) + ", each optionally .gz"
