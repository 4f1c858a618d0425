"""Small task files of every form, for tests: random words, or answers that a host prefers."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LINES = 24
WORDS = [
    "sun",
    "shadow",
    "stone",
    "dial",
    "noon",
    "hour",
    "light",
    "wall",
    "east",
    "west",
    "gold",
    "iron",
    "glass",
    "sand",
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = ("copa", "piqa", "hellaswag", "winogrande", "rte", "arc_easy", "lambada")
WRITTEN = ("gsm8k", "cloze")  # of which the model writes the answers
Example = dict[str, Any]


def examples(name: str, lines: int = LINES, seed: int = 0) -> list[Example]:
    """Examples of a task with random texts, all answered 0."""
    draw = random.Random(f"{name}{seed}")

    def text(words: int = 3) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    def choices(count: int) -> list[str]:
        """Of equal length, so that none is likelier for being short."""
        return ["".join(draw.choices(LETTERS, k=5)) for _ in range(count)]

    make: dict[str, Callable[[], Example]] = {
        "copa": lambda: {"query": text(4), "choices": choices(2), "gold": 0},
        "piqa": lambda: {"goal": text(), "sol1": choices(1)[0], "sol2": choices(1)[0], "label": 0},
        "hellaswag": lambda: {"ctx": text(5), "endings": choices(4), "label": 0},
        "winogrande": lambda: {
            "context_options": [f"{text()} {end}" for end in choices(2)],
            "continuation": text(),
            "gold": 0,
        },
        "rte": lambda: {"sentence1": text(5), "sentence2": text(), "label": 0},
        "arc_easy": lambda: {"query": f"Question: {text()}?", "choices": choices(4), "gold": 0},
        "lambada": lambda: {"text": text(5)},
        "gsm8k": lambda: {
            "question": text(5),
            "answer": f"{text()} #### 1,{draw.randint(100, 999)}",
        },
        "cloze": lambda: {"prompt": text(5), "target": text(1)},
    }
    return [make[name]() for _ in range(lines)]


def write(folder: Path, name: str, rows: list[Example]) -> Path:
    """Writes a task's file in the kind that its namesake has: jsonl, tsv or jsonl.gz."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "rte":
        path = folder / "rte.tsv"
        lines = ["\t".join(rows[0]), *("\t".join(str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name == "lambada":
        path = folder / "lambada.jsonl.gz"
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path = folder / f"{name}.jsonl"
        path.write_text(text)
    return path


def prefer(rows: list[Example], logliks: list[list[float]]) -> list[Example]:
    """The same examples, with what a host finds likeliest as the right answers."""
    field = "gold" if "gold" in rows[0] else "label"
    best = [max(range(len(found)), key=found.__getitem__) for found in logliks]
    return [row | {field: answer} for row, answer in zip(rows, best, strict=True)]


@torch.no_grad()
def opinionated(model: Any) -> None:
    """Makes a random byte-level host sure of itself, moved by its context, and fond of words."""
    ids = _byte_ids()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 3
        layer.mlp.down_proj.weight *= 3
    model.lm_head.weight *= 6
    model.lm_head.weight[ids[32]] *= 4
    model.lm_head.weight[ids[torch.tensor([ord(letter) for letter in LETTERS])]] *= 3


@torch.no_grad()
def last_words(model: Any, count: int = LINES) -> list[Example]:
    """Texts whose last word, a letter after a space, is what a byte-level host writes by itself."""
    generator = torch.Generator().manual_seed(0)
    ids = _byte_ids()
    codes = torch.randint(97, 123, (4000, 8), generator=generator)
    first = model(ids[codes]).logits[:, -1].argmax(-1)
    second = model(torch.cat([ids[codes], first[:, None]], 1)).logits[:, -1].argmax(-1)
    ends = {int(ids[ord(letter)]): letter for letter in LETTERS}
    found = [
        {"text": "".join(map(chr, row)) + " " + ends[then]}
        for row, space, then in zip(codes.tolist(), first.tolist(), second.tolist(), strict=True)
        if space == ids[32] and then in ends
    ]
    assert len(found) >= count, f"only {len(found)} texts found"
    return found[:count]


def _byte_ids() -> torch.Tensor:
    """(256,) token of each byte in :func:`gnomon.tiny.byte_tokenizer`."""
    from gnomon.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    ids = torch.full((256,), -1)
    for code in range(128):
        ids[code] = tokenizer(chr(code))["input_ids"][0]
    return ids
