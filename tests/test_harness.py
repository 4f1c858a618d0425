"""Tasks through the harness: boundaries, a mask that bites, and one code path for every task."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate import settings
from torch import Tensor

import gnomon
from cases import POLICIES
from gnomon.budget import Budget
from gnomon.evaluation import harness
from gnomon.evaluation import tasks as module
from gnomon.evaluation.harness import ask, load_tasks, open_lm
from gnomon.evaluation.results import read_results
from gnomon.evaluation.run import evaluate
from gnomon.evaluation.tasks import compare
from gnomon.host import UnitKind, describe
from gnomon.policies import Policy
from gnomon.policies.base import Seen
from gnomon.tiny import byte_tokenizer, tiny_host
from task_folder import NAMES, examples, last_words, opinionated, prefer, write

pytest.importorskip("lm_eval", reason="lm-evaluation-harness (the eval extra) is not installed")
HALF = Budget(density=0.5)


class Nothing(Policy):
    """Keeps no unit at all."""

    name = "nothing"

    def decide(self, kind: UnitKind, layer: int, seen: Seen) -> Tensor:
        return torch.zeros(self.spec.units(kind), dtype=torch.bool)


@pytest.fixture(scope="module")
def host() -> Any:
    """A host of which some texts have a last word."""
    model, tokenizer = tiny_host("llama")
    opinionated(model)
    return model, tokenizer


@pytest.fixture(scope="module")
def folder(host: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of every form of which the dense host knows every answer."""
    model, tokenizer = host
    path = tmp_path_factory.mktemp("tasks")
    lm = open_lm(model, tokenizer, 8)
    for name in NAMES[:-1]:
        rows = examples(name)
        write(path, name, rows)
        found = ask(lm, load_tasks([name], path)[name], limit=None, seed=0)
        write(path, name, prefer(rows, found.logliks))
    write(path, "lambada", last_words(model))
    return path


def scores(host: Any, folder: Path, policy: Policy | None, **how: Any) -> dict[str, Any]:
    """Answers to all tasks."""
    lm = open_lm(*host, 8)
    loaded = load_tasks(NAMES, folder)
    if policy is None:
        return {name: ask(lm, task, limit=None, seed=0) for name, task in loaded.items()}
    with gnomon.sparsify(host[0], policy, **how) as session:
        lm.session = session
        return {name: ask(lm, task, limit=None, seed=0) for name, task in loaded.items()}


@pytest.mark.parametrize("protocol", ["decode", "all"])
def test_a_zero_mask_destroys_every_task(host: Any, folder: Path, protocol: str) -> None:
    dense = scores(host, folder, None)
    masked = scores(host, folder, Nothing(HALF), protocol=protocol)
    for name in NAMES:
        found, n = compare(dense[name], masked[name]), len(dense[name].scores)
        chance = 0 if name == "lambada" else 1 / len(dense[name].logliks[0])
        assert found["acc_dense"] == 1, name
        assert found["acc_sparse"] <= chance + 3 * math.sqrt(chance * (1 - chance) / n), found
        assert found["kl"] > 1, (name, found)


@pytest.mark.parametrize("name", ["oracle", "shadow", "static"])
def test_nothing_changes_at_density_one(host: Any, folder: Path, name: str) -> None:
    dense = scores(host, folder, None)
    full = scores(host, folder, POLICIES[name](host[0], Budget(density=1.0)))
    assert full == dense


REQUESTS = [  # contexts and continuations of unlike lengths, two of them over one context
    ("the wall", " of light"),
    ("a", "b"),
    ("the wall", " o"),
    ("the wall", " s"),
    ("noon, and the shadow of the stone", " is short"),
    ("iron or gold? gold or", " i"),
]


def requests(tokenizer: Any) -> list[Any]:
    return [((c, a), tokenizer(c)["input_ids"], tokenizer(a)["input_ids"]) for c, a in REQUESTS]


BOUNDARIES = [(name, how) for name in (None, "shadow", "random") for how in ("decode", "all")]


@pytest.mark.parametrize(("name", "protocol"), [*BOUNDARIES, ("shadow-prompt", "decode")])
def test_every_row_has_its_own_boundary(host: Any, name: str | None, protocol: str) -> None:
    """A padded batch of requests gives what each gives alone, P being its own context."""
    model, tokenizer = host
    asked = requests(tokenizer)
    least = 2 if name == "shadow-prompt" else 1  # it decides from all of a prompt but its last
    lm, policy = open_lm(model, tokenizer, 3), POLICIES[name](model, HALF) if name else None
    expected = []
    for _, context, answer in asked:
        ids = torch.tensor([context + answer])
        how = {"protocol": protocol, "prompt_length": max(least, len(context))}
        with torch.no_grad():
            if policy is None:
                logits = model(ids, use_cache=False).logits
            else:
                with gnomon.sparsify(model, policy, **how):
                    logits = model(ids, use_cache=False).logits
        told = logits[0, len(context) - 1 : -1].log_softmax(-1)
        goal = torch.tensor(answer)
        best = bool((told.argmax(-1) == goal).all())
        expected.append((float(told.gather(1, goal[:, None]).sum()), best))
    if policy is None:
        found = lm._loglikelihood_tokens(asked)
    else:
        with gnomon.sparsify(model, policy, protocol=protocol) as lm.session:
            found = lm._loglikelihood_tokens(asked)
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=1e-4)
    assert [f[1] for f in found] == [e[1] for e in expected]


def test_the_first_answer_token_is_sparse_and_no_context_before_it(host: Any) -> None:
    """Sparse positions of a request are as many as its answer has tokens."""
    model, tokenizer = host
    lm, seen = open_lm(model, tokenizer, 2), []
    asked = requests(tokenizer)[:2] + requests(tokenizer)[4:]
    with gnomon.sparsify(model, POLICIES["random"](model, HALF), protocol="decode") as session:
        lm.session = session
        session.on_decision = lambda kind, layer, keep, step: seen.append(step.sparse.sum(1))
        sparse = lm._loglikelihood_tokens(asked)
    found = sorted(int(n) for step in seen[:: len(seen) // 2] for n in step)
    assert found == sorted(len(answer) for _, _, answer in asked)
    dense = open_lm(model, tokenizer, 2)._loglikelihood_tokens(asked)
    single = next(i for i, r in enumerate(asked) if len(r[2]) == 1)
    assert abs(sparse[single][0] - dense[single][0]) > 1e-3


def test_dense_answers_are_those_of_the_harness(host: Any) -> None:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = host
    asked = requests(tokenizer)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)._loglikelihood_tokens(
        asked, disable_tqdm=True
    )
    ours = open_lm(model, tokenizer, 4)._loglikelihood_tokens(asked)
    assert [x[0] for x in ours] == pytest.approx([x[0] for x in theirs], rel=1e-5)
    assert [x[1] for x in ours] == [x[1] for x in theirs]


def test_long_contexts_are_cut_on_the_left(host: Any) -> None:
    model, tokenizer = tiny_host("llama", max_position_embeddings=16)
    lm = open_lm(model, tokenizer, 2)
    words = ("x" * 40 + "the stone", " warm")
    ids = [tokenizer(w)["input_ids"] for w in words]
    whole, cut = ((words, ids[0], ids[1]), (words, ids[0][-12:], ids[1]))
    assert lm._loglikelihood_tokens([whole])[0] == pytest.approx(lm._loglikelihood_tokens([cut])[0])
    with pytest.raises(ValueError, match=r"10 and 40 tokens does not fit .*context of 16"):
        lm._loglikelihood_tokens([(words, ids[0][:10], ids[0][:40])])


def test_solved_examples_come_first_and_are_the_same_for_both(host: Any, folder: Path) -> None:
    lm = open_lm(*host, 8)
    task = load_tasks(["copa"], folder, fewshot=2)["copa"]
    first, second = (ask(lm, task, limit=5, seed=s) for s in (0, 0))
    contexts = [instance.args[0] for instance in task.instances]
    assert first == second
    own = [example["query"] for example in examples("copa")[:5]]
    for context, query in zip(contexts[::2], own, strict=True):
        assert context.endswith(query) and context.count("\n\n") == 2
        assert not any(line.startswith(query) for line in context.split("\n\n")[:-1])
    assert ask(lm, task, limit=5, seed=1).asked != first.asked
    plain = load_tasks(["copa"], folder)["copa"]
    assert ask(lm, plain, limit=5, seed=0).asked != first.asked


def test_tasks_that_generate_run_sparsely(host: Any) -> None:
    """``generate_until`` takes its boundary from the cache; the answer is the sparse model's."""
    model, tokenizer = host
    from lm_eval.api.instance import Instance

    policy = POLICIES["random"](model, HALF)
    context = "the shadow of the stone"
    until = {"until": ["\n\n\n"], "max_gen_toks": 8, "do_sample": False}
    ask_for = Instance(request_type="generate_until", doc={}, arguments=(context, until), idx=0)
    lm = open_lm(model, tokenizer, 2)
    dense = lm.generate_until([ask_for], disable_tqdm=True)
    with gnomon.sparsify(model, policy) as lm.session:
        lm._loglikelihood_tokens(requests(tokenizer)[4:5])  # its boundary is not the next prompt's
        found = lm.generate_until([ask_for], disable_tqdm=True)
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        out = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)
    written = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found == [written] and found != dense


def test_files_whose_answers_are_written(host: Any, tmp_path: Path) -> None:
    """The dense host's own words are the targets: it has them all, half of its units not."""
    model, tokenizer = host
    made = examples("cloze", 6)
    for example in made:
        ids = torch.tensor([tokenizer(example["prompt"])["input_ids"]])
        out = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=256)
        line = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
        example["target"] = line.strip() or "none"
    write(tmp_path, "cloze", made)
    task, lm = load_tasks(["cloze"], tmp_path)["cloze"], open_lm(model, tokenizer, 2)
    dense = ask(lm, task, limit=None, seed=0)
    kept = [e["target"] != "none" for e in made]
    assert dense.scores == [float(k) for k in kept] and sum(kept) > 3 and dense.metric == "acc"
    with gnomon.sparsify(model, POLICIES["random"](model, HALF)) as lm.session:
        sparse = ask(lm, task, limit=None, seed=0)
    shots = load_tasks(["cloze"], tmp_path, fewshot=1)["cloze"]
    shots.set_fewshot_seed(seed=0)
    asked = shots.fewshot_context(made[0], 1)
    assert asked.endswith("\n\n" + made[0]["prompt"]) and "  " not in asked.partition("\n\n")[0]
    row = compare(dense, sparse)
    assert row["acc_sparse"] < row["acc_dense"] and row["n"] == 6 and "kl" not in row


def plan(tmp_path: Path, folder: Path, policy: str = "random", **changes: Any) -> dict[str, Any]:
    """Settings of an evaluation of tasks alone."""
    config = settings(tmp_path, policy)
    config["measure"] = {
        "tasks": {
            "_target_": "gnomon.evaluation.tasks.Tasks",
            "names": ["copa", "rte"],
            "path": str(folder),
            "limit": 10,
            "brackets": ["dense_int8", "oracle"],
        }
        | changes
    }
    return config


def test_a_run_of_tasks_writes_valid_results(tmp_path: Path, folder: Path) -> None:
    outcome = evaluate(plan(tmp_path, folder), tmp_path / "run", "python evaluate.py")
    found = read_results(outcome.path)
    tasks = found["quality"]["tasks"]
    assert set(found["quality"]) == {"tasks"} and list(tasks) == ["copa", "rte"]
    for task in tasks.values():
        assert task["n"] == 10 and task["metric"] == "acc" and task["kl"] > 0
    assert [b["policy"] for b in found["brackets"]] == ["dense_int8", "oracle"]
    assert set(found["brackets"][0]["quality"]["tasks"]) == {"copa", "rte"}
    assert found["density"]["neurons"] == pytest.approx(0.5, abs=0.01)
    assert outcome.ratio is None


def test_quality_and_tasks_stand_side_by_side_and_dense_is_asked_once(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.forget()
    count: list[str] = []
    real = module.ask

    def counted(lm: Any, task: Any, **how: Any) -> Any:
        count.append("dense" if lm.session is None else "sparse")
        return real(lm, task, **how)

    monkeypatch.setattr(module, "ask", counted)
    for i, order in enumerate((("quality", "tasks"), ("tasks", "quality"))):
        config = plan(tmp_path, folder, "oracle" if i else "random")
        both = config["measure"] | {"quality": settings(tmp_path)["measure"]["quality"]}
        both["quality"]["brackets"], both["quality"]["generation"]["tokens"] = ["dense_int8"], 0
        config["measure"] = {key: both[key] for key in order}
        found = evaluate(config, tmp_path / f"run{i}", "python evaluate.py").results
        assert set(found["quality"]) == {"texts", "tasks"}
        quality = {b["policy"]: set(b["quality"]) for b in found["brackets"]}
        assert quality["dense_int8"] == {"texts", "tasks"}
        assert quality.get("oracle", {"tasks"}) == {"tasks"}
    # Two tasks each: dense, random, dense_int8 and oracle, once in the two runs together.
    assert count.count("dense") == 2 and count.count("sparse") == 6
    module.forget()
    evaluate(plan(tmp_path, folder, brackets=[]), tmp_path / "again", "python evaluate.py")
    assert count.count("dense") == 2, "the dense answers are kept on disk"


def test_other_questions_are_not_answered_from_the_cache(tmp_path: Path, folder: Path) -> None:
    """The same name with other lines, or another limit, is asked again."""
    config = plan(tmp_path, tmp_path / "own", brackets=[], names=["copa"], limit=None)
    sizes = []
    for seed, lines in ((0, 8), (1, 8), (1, 6)):
        write(tmp_path / "own", "copa", examples("copa", lines, seed))
        out = evaluate(config, tmp_path / f"run{seed}{lines}", "python evaluate.py")
        sizes.append(out.results["quality"]["tasks"]["copa"])
    assert [s["n"] for s in sizes] == [8, 8, 6]
    assert sizes[0]["kl"] != sizes[1]["kl"]


def test_bad_tasks_are_named_before_the_host_is_loaded(tmp_path: Path, folder: Path) -> None:
    config = plan(tmp_path, folder, names=["copa", "wsc"])
    config["host"] = {"_target_": "gnomon.loading.load_host", "name": "no/such-host"}
    with pytest.raises(ValueError, match=r"tasks\.names='wsc' has no file in .*there: arc_easy"):
        evaluate(config, tmp_path / "run", "python evaluate.py")


def test_names_of_the_hub_are_checked_and_a_missing_hub_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The harness's own tasks are thousands of files, a quarter of a minute: it lists few."""
    from lm_eval.tasks._index import TaskIndex

    own = TaskIndex._iter_yaml_files
    folders = [f"/lm_eval/tasks/{name}/" for name in ("piqa", "copal_id")]

    def few(root: Path) -> Iterator[Path]:
        return (path for path in own(root) if any(f in path.as_posix() for f in folders))

    monkeypatch.setattr(TaskIndex, "_iter_yaml_files", staticmethod(few))
    monkeypatch.setattr(harness, "_manager", cache(harness._manager.__wrapped__))
    with pytest.raises(ValueError, match=r"tasks\.names='piqqa' is unknown .*near it: piqa"):
        load_tasks(["piqqa"], None)
    with pytest.raises(ValueError, match=r"tasks\.names='piqa' could not be fetched .*tasks\.path"):
        load_tasks(["piqa"], None)


def test_the_harness_is_quiet_and_leaves_loggers_as_they_were(
    host: Any, folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    level = logging.getLogger("lm_eval").level
    ask(open_lm(*host, 4), load_tasks(["rte"], folder)["rte"], limit=3, seed=0)
    assert logging.getLogger("lm_eval").level == level
    assert not [r for r in caplog.records if r.name.startswith("lm")]
    assert capsys.readouterr().err == ""


def test_a_fused_host_answers_too(folder: Path) -> None:
    """Tasks on Phi-3 and BLOOM (no logits_to_keep needed, ALiBi with padding on the right)."""
    for family in ("phi3", "bloom", "gpt2"):
        model, _ = tiny_host(family)
        policy = POLICIES["random"](model, HALF)
        found = scores((model, byte_tokenizer()), folder, policy)
        assert all(len(a.scores) >= 6 for a in found.values())
        assert describe(model).family == family
        json.dumps({name: a.logliks for name, a in found.items()}, allow_nan=False)
