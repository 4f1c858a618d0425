"""Task files, statistics and tables; nothing here needs the harness."""

from __future__ import annotations

import json
import math
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gnomon.evaluation import harness
from gnomon.evaluation import tasks as module
from gnomon.evaluation.harness import Answers, answers_of, require_harness
from gnomon.evaluation.rows import rows_of
from gnomon.evaluation.tables import markdown
from gnomon.evaluation.task_files import local_config, read_examples
from gnomon.evaluation.task_tables import csv_tasks, markdown_tasks, task_rows
from gnomon.evaluation.tasks import Tasks, answer_distribution, compare, divergence
from task_folder import LINES, NAMES, WRITTEN, examples, write

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tasks"
COUNTS = {
    "piqa": 1838,
    "copa": 100,
    "openbookqa": 500,
    "winogrande": 1267,
    "rte": 277,
    "hellaswag": 1005,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "boolq": 1000,
    "lambada_openai": 5153,
}


@pytest.mark.parametrize("name", [*NAMES, *WRITTEN])
def test_every_form_is_read(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, examples(name))
    found = list(read_examples(path))
    assert found == examples(name)  # answers of a .tsv are numbers again
    config = local_config(tmp_path, name)
    assert config["custom_dataset"]()["test"].num_rows == LINES
    assert config["test_split"] == config["fewshot_split"] == "test"


WRITTEN_ANSWERS = [
    ("gsm8k", {"answer": "3 + 4 #### 1,007"}, " so 1007 #### 1007.\n", 1),
    ("gsm8k", {"answer": "#### 7"}, "3 and 4 are 7", 1),
    ("gsm8k", {"answer": "#### 7"}, " 7 less 1 #### 6", 0),
    ("gsm8k", {"answer": "#### -2.50"}, "it is -2.5", 1),
    ("gsm8k", {"answer": "#### 7"}, "none", 0),
    ("gsm8k", {"answer": "#### 72"}, " #### 72 apples in 3 bags #### 8", 1),
    ("gsm8k", {"answer": "#### 7"}, "so 7 #### ", 1),
    ("gsm8k", {"answer": "#### 5"}, "10-5", 1),
    ("gsm8k", {"answer": "-$5"}, "it is −5", 1),
    ("gsm8k", {"answer": "0.5"}, "thus .5", 1),
    ("gsm8k", {"answer": "1000"}, "$1,000.", 1),
    ("cloze", {"target": "Sand"}, " sand, and stone", 1),
    ("cloze", {"target": "sand"}, " sandstone", 0),
    ("gsm8k", {"answer": "#### 72"}, "USD72 in all", 1),
    ("gsm8k", {"answer": "#### 12"}, "it is...12", 1),
    ("cloze", {"target": "sand"}, "", 0),
    ("cloze", {"target": "x ="}, "x =5", 1),
    ("cloze", {"target": "O’Brien"}, "O'Brien said", 1),
    ("cloze", {"target": "don"}, "don't", 0),
    ("cloze", {"target": "1"}, "1.5 hours", 0),
    ("cloze", {"target": "1"}, "1. hour", 1),
]


@pytest.mark.parametrize(("name", "doc", "written", "right"), WRITTEN_ANSWERS)
def test_written_answers_are_scored(
    tmp_path: Path, name: str, doc: dict[str, str], written: str, right: int
) -> None:
    write(tmp_path, name, examples(name))
    config = local_config(tmp_path, name)
    assert config["output_type"] == "generate_until"
    (score,) = config["process_results"](doc, [written]).values()
    assert score == right


def test_names_of_the_harness_find_files_of_other_names(tmp_path: Path) -> None:
    write(tmp_path, "lambada", examples("lambada"))
    (tmp_path / "openbook_qa.jsonl").write_text(json.dumps(examples("copa", 1)[0]))
    assert local_config(tmp_path, "lambada_openai")["task"] == "lambada_openai"
    assert local_config(tmp_path, "openbookqa")["task"] == "openbookqa"
    assert local_config(tmp_path, "openbook_qa")["task"] == "openbook_qa"


def test_questions_of_arc_and_boolq_are_asked_for_an_answer(tmp_path: Path) -> None:
    for name in ("arc_easy", "mine"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(examples("arc_easy", 1)[0]))
    assert local_config(tmp_path, "arc_easy")["doc_to_text"] == "{{query}}\nAnswer:"
    assert local_config(tmp_path, "mine")["doc_to_text"] == "{{query}}"


GOOD = '{"query": "a", "choices": ["b", "c"], "gold": 1}\n'
BAD = [
    ('{"query": "a", "choices": ["b", "c"]}', r": field 'gold' is missing; give query, choices"),
    ('{"query": "a", "choices": ["b", "c"], "gold": 2}', r"'gold' is 2, not a number from 0 to 1"),
    ('{"query": "a", "choices": ["b", "c"], "gold": true}', r"'gold' is True, not a number"),
    ('{"query": "a", "choices": ["b"], "gold": 0}', r"'choices' is \['b'\], not a list of two"),
    ('{"query": "a", "choices": "b c", "gold": 0}', r"'choices' is 'b c', not a list of two"),
    ('{"query": " ", "choices": ["b", "c"], "gold": 0}', r"'query' is ' ', not a text"),
    ("{", r" is not JSON"),
    ("[1]", r" is not a JSON object"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[m for _, m in BAD])
def test_a_wrong_line_is_named_with_file_and_field(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "copa.jsonl").write_text(GOOD + line)
    with pytest.raises(ValueError, match=rf"copa\.jsonl, line 2.*{message}"):
        local_config(tmp_path, "copa")


def test_wrong_folders_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks\.path='.*none' is not a folder"):
        local_config(tmp_path / "none", "copa")
    write(tmp_path, "rte", examples("rte"))
    with pytest.raises(ValueError, match=r"tasks\.names='copa' has no file in .*\(there: rte\)"):
        local_config(tmp_path, "copa")
    (tmp_path / "copa.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no example"):
        local_config(tmp_path, "copa")
    (tmp_path / "copa.jsonl").write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(ValueError, match="line 1: field 'answer' is 'b', which gives no one"):
        local_config(tmp_path, "copa")
    for line, message in (
        ('{"question": "a", "answer": "#### 3/4"}', "no one number: end it in #### and a number"),
        ('{"prompt": "a", "target": "b\\nc"}', "the model writes one line: give one"),
        ('{"question": "a", "choices": ["b"], "answer": "1"}', "field 'query' is missing"),
    ):
        (tmp_path / "copa.jsonl").write_text(line)
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            local_config(tmp_path, "copa")
    (tmp_path / "copa.jsonl").write_text('{"question": "a", "answer": 1e-5}')
    assert list(read_examples(tmp_path / "copa.jsonl")) == [{"question": "a", "answer": "0.00001"}]
    (tmp_path / "copa.jsonl").write_text('{"riddle": "a", "solution": "b"}')
    with pytest.raises(ValueError, match="line 1: fields riddle, solution are of no known task"):
        local_config(tmp_path, "copa")
    (tmp_path / "word.jsonl").write_text('{"text": "one"}')
    with pytest.raises(ValueError, match="field 'text' has no last word"):
        local_config(tmp_path, "word")
    (tmp_path / "rte.tsv").write_text("sentence1\tlabel\na\t1\n")
    with pytest.raises(ValueError, match=r"rte\.tsv, line 2: field 'sentence2' is missing"):
        local_config(tmp_path, "rte")


@pytest.mark.parametrize("name", COUNTS)
def test_the_shared_files_are_read_whole(name: str) -> None:
    if not SHARED.is_dir():
        pytest.skip("the evaluation files are not beside this checkout")
    config = local_config(SHARED, name)
    assert config["custom_dataset"]()["test"].num_rows == COUNTS[name]


def answers(scores: list[float], logliks: list[list[float]]) -> Answers:
    return Answers([str(i) for i in range(len(scores))], scores, logliks, "acc")


def test_differences_are_paired() -> None:
    """Answers that move together have a smaller error than their two separate ones."""
    draw = np.random.default_rng(0)
    dense = (draw.random(400) < 0.6).astype(float)
    flips = draw.random(400) < 0.05
    sparse = np.where(flips, 1 - dense, dense)
    found = compare(*(answers(list(map(float, s)), [[]] * 400) for s in (dense, sparse)))
    gaps = sparse - dense
    assert found["n"] == 400
    assert found["acc_sparse"] - found["acc_dense"] == pytest.approx(gaps.mean())
    assert found["stderr_diff"] == pytest.approx(math.sqrt(gaps.var(ddof=1) / 400))
    apart = math.sqrt(dense.var(ddof=1) / 400 + sparse.var(ddof=1) / 400)
    assert 0 < found["stderr_diff"] < 0.5 * apart
    assert "kl" not in found  # nothing to choose from: absent, not zero


def test_the_same_answers_have_no_difference() -> None:
    same = answers([1.0, 0.0, 1.0], [[-1.0, -2.0], [-3.0, -1.0], [-0.5, -4.0]])
    found = compare(same, same)
    assert (found["stderr_diff"], found["kl"]) == (0, 0)
    with pytest.raises(AssertionError, match="the same questions"):
        compare(same, Answers(["0", "2", "1"], same.scores, same.logliks, "acc"))


def test_divergence_is_that_of_normalised_likelihoods() -> None:
    dense, sparse = torch.tensor([-12.0, -11.0, -15.0]), torch.tensor([-13.0, -10.0, -11.0])
    p, q = dense.softmax(0), sparse.softmax(0)
    expected = float((p * (p / q).log()).sum())
    assert divergence(dense.tolist(), sparse.tolist()) == pytest.approx(expected, rel=1e-6)
    assert divergence(sparse.tolist(), dense.tolist()) != pytest.approx(expected, rel=1e-2)
    assert divergence([-800.0, -900.0], [-900.0, -800.0]) == pytest.approx(100)  # no underflow


def test_a_single_continuation_is_told_from_everything_else() -> None:
    assert np.exp(answer_distribution([math.log(0.25)])) == pytest.approx([0.25, 0.75])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence([math.log(0.25)], [math.log(0.5)]) == pytest.approx(expected)
    assert math.isfinite(divergence([0.0], [-50.0]))


def test_the_first_filter_and_score_of_a_task_count() -> None:
    samples = [
        {"filter": f, "doc_id": i, "prompt_hash": f"q{i}", "filtered_resps": ["text"],
         "metrics": ["exact_match"], "exact_match": float(i == 1 and f == "strict")}
        for f in ("strict", "flexible") for i in (1, 0)
    ]  # fmt: skip
    found = answers_of(samples, "gsm8k")
    assert found == Answers(["q0", "q1"], [0.0, 1.0], [[], []], "exact_match")
    with pytest.raises(ValueError, match=r"tasks\.names='wikitext' gives word_perplexity and none"):
        answers_of([{"filter": "none", "doc_id": 0, "metrics": ["word_perplexity"]}], "wikitext")


def test_jobs_share_tasks_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Any] = []

    def load(names: Any, path: Any, fewshot: Any) -> dict[str, Any]:
        loads.append(path)
        if path is None:
            return {}
        return {name: list(read_examples(Path(path) / f"{name}.jsonl")) for name in names}

    monkeypatch.setattr(module, "load_tasks", load)
    monkeypatch.chdir(tmp_path)
    module.forget()
    write(tmp_path, "copa", examples("copa", 2))
    first = Tasks(["copa"], str(tmp_path)).tasks
    assert Tasks(["copa"], ".").tasks is first and len(loads) == 1  # the same folder
    write(tmp_path, "copa", examples("copa", 3))
    assert len(Tasks(["copa"], str(tmp_path)).tasks["copa"]) == 3
    write(tmp_path / "None", "copa", examples("copa", 2))
    for path in (None, "None"):
        Tasks(["copa"], path).tasks  # noqa: B018
    assert loads[-2:] == [None, "None"]
    module.forget()


def test_a_missing_harness_is_one_command_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(harness, "version", missing)
    with pytest.raises(ValueError, match=r"not installed: pip install 'gnomon\[eval\]'"):
        require_harness()


@pytest.mark.parametrize("other", ["0.4.9", "0.5.0", "1.0"])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    monkeypatch.setattr(harness, "version", lambda name: other)
    with pytest.raises(ValueError, match=rf"lm-eval {other} is not supported, use 0.4.13 up to"):
        require_harness()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("limit", 1, r"tasks\.limit=1: use a whole number from 2, or null"),
        ("limit", 0.5, r"tasks\.limit=0\.5: use a whole number"),
        ("fewshot", -1, r"tasks\.fewshot=-1: use a whole number from 0"),
        ("batch", 0, r"tasks\.batch=0: use a whole number from 1$"),
        ("names", [], r"tasks\.names=\[\]: give one or more"),
        ("names", ["rte", "rte"], r"tasks\.names=.*each once"),
        ("brackets", ["best"], r"tasks\.brackets='best' is unknown"),
    ],
)
def test_wrong_settings_are_named(
    monkeypatch: pytest.MonkeyPatch, field: str, value: Any, message: str
) -> None:
    monkeypatch.setattr("gnomon.evaluation.tasks.require_harness", lambda: None)
    with pytest.raises(ValueError, match=message):
        Tasks(**{"names": ["rte"], field: value}).require()


def results(policy: str, acc: float, **changes: Any) -> dict[str, Any]:
    def task(right: float) -> dict[str, Any]:
        return {"n": 100, "acc_dense": 0.5, "acc_sparse": right, "stderr_diff": 0.03, "kl": 0.1}

    density = {
        "target": {"heads": 0.5, "neurons": 0.5},
        "heads": 0.5,
        "neurons": 0.5,
        "byte_density": acc,
        "predictor_byte_share": 0.0,
        "accounting": {"dtype": "bfloat16"},
    }
    quality = {"tasks": {"copa": task(acc), "rte": task(acc + 0.02)}}
    bracket = {"policy": "random", "density": density, "quality": {"tasks": {"copa": task(0.3)}}}
    return {
        "host": {"name": "tiny"},
        "policy": {"name": policy, "refresh": "token", "batch": "per_sequence", "kv": "keep"},
        "backend": "mask",
        "protocol": {"name": "decode"},
        "seed": 0,
        "density": density,
        "quality": quality,
        "brackets": [bracket | {"density": density | {"byte_density": 0.25}}],
    } | changes


def test_tasks_stand_in_the_tables_of_sweeps() -> None:
    runs = [results("shadow", 0.4), results("static", 0.35)]
    text = markdown([row for run in runs for row in rows_of(run)])
    assert "| tasks | Δ tasks |" in text.splitlines()[2]
    error = math.hypot(0.03, 0.03) / 2
    assert f"| 0.410 | -0.090 ± {error:.3f} |" in text
    assert "ppl |" not in text  # not measured: no empty column
    lines = markdown_tasks(task_rows(runs)).splitlines()
    assert lines[0] == "Tasks (examples: copa 100, rte 100)"
    assert lines[2] == "| policy | bytes | copa | rte | mean | Δ ± se |"
    assert lines[4] == "| dense model | 1.000 | 0.500 | 0.500 | 0.500 | – |"
    assert lines[5] == f"| shadow | 0.400 | 0.400 | 0.420 | 0.410 | -0.090 ± {error:.3f} |"
    assert sum("(random)" in line for line in lines) == 1  # two runs share it
    table = csv_tasks(task_rows(runs)).splitlines()
    assert len(table) == 1 + 2 + 2 + 1
    assert "copa,100,,,0.5,0.4,0.03,0.1" in table[1]


def test_a_bracket_on_another_backend_stands_once() -> None:
    runs = [results("shadow", 0.4), results("oracle", 0.4, backend="torch")]
    assert [row["policy"] for row in task_rows(runs)].count("random") == 1
