"""Tasks from local files: read, checked by line and field, and turned into harness configs.

A file holds one example a line and is named after its task: ``piqa.jsonl``, ``rte.tsv``,
``lambada.jsonl.gz``. Which of the forms below it follows is told by its fields; prompts are those
of the harness's own tasks, so that hub and local files run on one path.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import IO, Any

from gnomon.evaluation.written import begins_with, number, same_number

ENDINGS = (".jsonl", ".tsv", ".csv")
ALIASES = {"openbookqa": "openbook_qa", "lambada_openai": "lambada"}  # the harness's names
_ASKED = ("arc_easy", "arc_challenge", "boolq")  # their files' queries end before "Answer:"

Example = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One kind of example.

    Attributes:
        fields: that every line has.
        answer: the field with the right choice, or None where none is chosen.
        choices: the field with the list of choices, or how many there are.
        config: templates of the harness.
        generates: whether the model writes its answer.
        without: fields that tell a line of another form.
    """

    fields: tuple[str, ...]
    answer: str | None
    choices: str | int
    config: dict[str, Any]
    generates: bool = False
    without: tuple[str, ...] = ()


def _choice(text: str, choices: Any, target: str) -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": target,
    }


def _written(
    text: str, target: str, until: str, tokens: int, score: Any, metric: str
) -> dict[str, Any]:
    """Greedy text up to ``until``, of so many tokens at most."""
    settings = {"until": [until], "do_sample": False}
    return {
        "output_type": "generate_until",
        "doc_to_text": text,
        "doc_to_target": target,
        "generation_kwargs": settings | {"max_gen_toks": tokens},
        "process_results": score,
        "metric_list": [{"metric": metric}],
    }


FORMS: dict[str, Form] = {
    "query": Form(
        ("query", "choices", "gold"), "gold", "choices", _choice("{{query}}", "choices", "gold")
    ),
    "piqa": Form(
        ("goal", "sol1", "sol2", "label"),
        "label",
        2,
        _choice("Question: {{goal}}\nAnswer:", "{{[sol1, sol2]}}", "label"),
    ),
    "endings": Form(
        ("ctx", "endings", "label"), "label", "endings", _choice("{{ctx}}", "endings", "label")
    ),
    "winogrande": Form(  # the choice is in the context: one continuation after each of them
        ("context_options", "continuation", "gold"),
        "gold",
        "context_options",
        _choice("gold", "context_options", "continuation"),
    ),
    "entailment": Form(
        ("sentence1", "sentence2", "label"),
        "label",
        2,
        _choice(
            "{{sentence1}}\nQuestion: {{sentence2}} True or False?\nAnswer:",
            ["True", "False"],
            "label",
        ),
    ),
    "word_problem": Form(  # GSM8K: the answer ends in "#### 72"
        ("question", "answer"),
        None,
        0,
        _written(
            "Question: {{question}}\nAnswer:",
            "{{answer}}",
            "Question:",
            256,
            same_number,
            "exact_match",
        ),
        generates=True,
        without=("choices", "options", "passage", "A", "choice1"),
    ),
    "completion": Form(
        ("prompt", "target"),
        None,
        0,
        _written("{{prompt}}", "{{target}}", "\n", 16, begins_with, "acc"),
        generates=True,
    ),
    "last_word": Form(
        ("text",),
        None,
        1,
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        },
    ),
}


def local_config(folder: Path, name: str) -> dict[str, Any]:
    """The harness config of a task in a folder.

    Args:
        folder: ``tasks.path``.
        name: of the task: the file's stem, or the harness's name for it.

    Raises:
        ValueError: no such file, or a line that does not follow the form (file, line, field).
    """
    path = _file(folder, name)
    examples = list(read_examples(path))
    form = form_of(path, examples)
    config = dict(form.config)
    if _stem(path) in _ASKED and form is FORMS["query"]:
        config["doc_to_text"] = "{{query}}\nAnswer:"
    return (
        {"metric_list": [{"metric": "acc"}]}
        | config
        | {
            "task": name,
            "custom_dataset": partial(_dataset, tuple(examples)),
            "test_split": "test",
            "fewshot_split": "test",
        }
    )


def file_facts(folder: str | Path, names: Sequence[str]) -> list[tuple[str, int, int]]:
    """What tells a task's file from its earlier self: (resolved path, bytes, time in ns) of each.

    Raises:
        ValueError: no such folder or file.
    """
    files = [_file(Path(folder).expanduser(), name).resolve() for name in names]
    return [(str(f), (stat := f.stat()).st_size, stat.st_mtime_ns) for f in files]


def read_examples(path: Path) -> Iterator[Example]:
    """The checked examples of a file, with answers as whole numbers.

    Raises:
        ValueError: names file, line and field.
    """
    form: Form | None = None
    for line, found in _lines(path):
        form = form or _guess(path, line, found)
        yield _checked(path, line, found, form)
    if form is None:
        raise ValueError(f"{path} holds no example: give one a line")


def form_of(path: Path, examples: Sequence[Example]) -> Form:
    """The form that a file's examples follow."""
    return _guess(path, 1, examples[0])


def _file(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise ValueError(f"tasks.path='{folder}' is not a folder: give one with task files")
    found = {_stem(p): p for p in sorted(folder.iterdir()) if _stem(p) is not None}
    path = found.get(name) or found.get(ALIASES.get(name, ""))
    if path is None:
        known = ", ".join(sorted(str(stem) for stem in found)) or "none"
        raise ValueError(
            f"tasks.names={name!r} has no file in tasks.path='{folder}' (there: {known}): add "
            f"{name}.jsonl, or set tasks.path=null for the harness's own task from the hub"
        )
    return path


def _stem(path: Path) -> str | None:
    """Name of the task in a file, or None for other files."""
    name = path.name.removesuffix(".gz")
    ending = next((e for e in ENDINGS if name.endswith(e)), None)
    return name.removesuffix(ending) if ending else None


def _lines(path: Path) -> Iterator[tuple[int, Example]]:
    """(line number, example) of every line that is not empty."""
    with _open(path) as file:
        if ".jsonl" in path.name:
            for line, text in enumerate(file, 1):
                if text.strip():
                    yield line, _parsed(path, line, text)
            return
        if ".tsv" in path.name:
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(file)
        for row in rows:
            yield rows.line_num, {k: v for k, v in row.items() if k is not None and v is not None}


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _parsed(path: Path, line: int, text: str) -> Example:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {line} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}, line {line} is not a JSON object: write one example a line")
    return found


def _guess(path: Path, line: int, example: Example) -> Form:
    """The form whose fields an example has; else the error for the one that comes closest."""
    able = [f for f in FORMS.values() if not any(name in example for name in f.without)]
    for form in able:
        if all(name in example for name in form.fields):
            return form
    closest = max(able, key=lambda f: sum(name in example for name in f.fields))
    if not any(name in example for name in closest.fields):
        kinds = "; ".join(", ".join(form.fields) for form in FORMS.values())
        raise ValueError(
            f"{path}, line {line}: fields {', '.join(example) or 'none'} are of no known task; "
            f"use one of: {kinds}"
        )
    return closest


def _checked(path: Path, line: int, example: Example, form: Form) -> Example:
    where = f"{path}, line {line}"
    for name in form.fields:
        if name not in example:
            raise ValueError(f"{where}: field {name!r} is missing; give {', '.join(form.fields)}")
    kept = {name: example[name] for name in form.fields}
    if form.generates:
        kept = {k: _plain(v) if type(v) in (int, float) else v for k, v in kept.items()}
    for name, value in kept.items():
        listed = name == form.choices
        fits = isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)
        if (listed and not fits) or (not listed and name != form.answer and not _text(value)):
            wanted = "a list of two texts or more" if listed else "a text that is not empty"
            raise ValueError(f"{where}: field {name!r} is {value!r}, not {wanted}")
    if form.generates:
        answer = kept.get("answer", "0")
        if number(answer) is None or re.search(
            r"\d\s*/\s*\d", answer.partition("####")[2] or answer
        ):
            raise ValueError(
                f"{where}: field 'answer' is {answer!r}, which gives no one number: end it in "
                "#### and a number, as in #### 72"
            )
        if "\n" in kept.get("target", "").strip():
            raise ValueError(
                f"{where}: field 'target' is {kept['target']!r}, and the model writes one line: "
                "give one"
            )
        return kept
    if form.answer is None:
        if " " not in kept["text"].strip():
            raise ValueError(f"{where}: field 'text' has no last word to predict")
        return {"text": kept["text"].strip()}
    count = form.choices if isinstance(form.choices, int) else len(kept[form.choices])
    return kept | {form.answer: _index(where, form.answer, kept[form.answer], count)}


def _plain(value: float) -> str:
    """A JSON number without an exponent."""
    return format(Decimal(str(value)), "f")


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _index(where: str, name: str, value: Any, count: int) -> int:
    number = int(value) if str(value).isdecimal() and not isinstance(value, bool) else -1
    if not 0 <= number < count:
        raise ValueError(
            f"{where}: field {name!r} is {value!r}, not a number from 0 to {count - 1}"
        )
    return number


def _dataset(examples: tuple[Example, ...], **_: Any) -> dict[str, Any]:
    """What the harness takes for a dataset: its splits by name."""
    from datasets import Dataset

    return {"test": Dataset.from_list(list(examples))}
