"""Merges local texts into one .jsonl for training, e.g. WikiText-2 train (without <unk>) and C4.

    python benchmarks/prepare_text.py OUT.jsonl wikitext2:train.tokens.gz c4:c4.jsonl

Sources: ``wikitext2:FILE``, ``c4:FILE`` (fields prefix and gold_completion, or text),
``file:FILE``, ``embedded``. ``<unk>`` is removed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gnomon.data.sources import C4, EmbeddedText, FileText, Text, WikiText2


def source(name: str) -> Text:
    """The text behind one argument."""
    kind, _, path = name.partition(":")
    makers = {
        "wikitext2": lambda: WikiText2(path=path),
        "c4": lambda: C4(path=path, fields=_c4_fields(path)),
        "file": lambda: FileText(path=path),
        "embedded": EmbeddedText,
    }
    if kind not in makers:
        raise SystemExit(f"source {name!r}: use {', '.join(makers)}")
    return makers[kind]()


def documents(names: list[str]) -> Iterator[str]:
    """All documents of all sources, without <unk>."""
    for name in names:
        for document in source(name).documents("all"):
            text = re.sub(r" ?<unk>", "", document.text)
            if text.strip():
                yield text


def main() -> None:
    """Writes the file and says how large it is."""
    out, names = Path(sys.argv[1]), sys.argv[2:]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in documents(names)]
    out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{out}: {len(rows)} documents, {out.stat().st_size / 1e6:.1f} MB")


def _c4_fields(path: str) -> tuple[str, ...]:
    with open(path, encoding="utf-8") as lines:
        first = json.loads(next(lines))
    return ("text",) if "text" in first else ("prefix", "gold_completion")


if __name__ == "__main__":
    main()
