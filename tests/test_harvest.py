"""Harvest: what rows hold, same seed same hash, refusals, resumption, several processes."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.data import harvest as harvest_module
from gnomon.data import parts as parts_module
from gnomon.data import writer as writer_module
from gnomon.data.capture import Probe
from gnomon.data.codes import decode_rows, top_k
from gnomon.data.criteria import PlainAct, criterion
from gnomon.data.harvest import harvest
from gnomon.data.parts import LAUNCH, Parts
from gnomon.data.plan import make_plan
from gnomon.data.sources import FileText, SyntheticText
from gnomon.data.stage import prepare
from gnomon.data.store import TraceStore
from gnomon.data.text import Text
from gnomon.host import KINDS, Tap, describe
from gnomon.tiny import tiny_host
from harvest_job import finish, start

HOST, TOKENIZER = tiny_host()
SPEC = describe(HOST)
BLOCK = 32


def run(out: Path, text: Text | None = None, name: str = "plainact", **settings: Any) -> TraceStore:
    text = text or SyntheticText(block=BLOCK, tokens=32 * BLOCK)
    settings = {"heldout_tokens": 8 * BLOCK, "progress": False} | settings
    return harvest(HOST, TOKENIZER, SPEC, text, criterion(name), [Tap(1)], out, **settings)


def rows_of(store: TraceStore, split: Any = "train") -> dict[str, torch.Tensor]:
    pieces = list(store.iterate(split))
    return {k: torch.cat([p[k] for p in pieces]) for k in pieces[0]}


def captured(split: Any = "train", tokens: int = 32 * BLOCK, name: str = "plainact") -> Any:
    documents = "validation" if split == "heldout" else split
    blocks = SyntheticText(block=BLOCK, tokens=tokens).blocks(TOKENIZER, documents)
    return Probe(HOST, SPEC, [Tap(1)], criterion(name))(blocks.ids)


def partners(stored: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> torch.Tensor:
    """For each stored row the found row that is nearest in inputs and scores together; text repeats
    itself, so inputs alone do not tell rows apart."""

    def joint(rows: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [rows["inputs"].float()]
        for name in sorted(set(stored) - {"inputs"}):
            x = rows[name].float()
            parts.append(x / x.amax(-1, keepdim=True).clamp_min(1e-30))
        return torch.cat([p.flatten(1) for p in parts], dim=1)

    distance, partner = torch.cdist(joint(stored), joint(found)).min(1)
    assert len(partner.unique()) == len(partner), "one to one"
    return partner


def sorted_rows(x: torch.Tensor) -> torch.Tensor:
    x = x.flatten(1).float()
    for column in (2, 1, 0):
        x = x[x[:, column].argsort(stable=True)]
    return x


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_token_rows_are_every_predicting_position(tmp_path: Path, split: Any) -> None:
    store = run(tmp_path / "t")
    found = captured(split, (32 if split == "train" else 8) * BLOCK)
    expected = found.inputs[:, :-1].flatten(0, 1).half()
    stored = rows_of(store, split)
    torch.testing.assert_close(
        sorted_rows(stored["inputs"]), sorted_rows(expected), rtol=2e-3, atol=2e-3
    )
    assert not torch.equal(stored["inputs"], expected), "rows are shuffled inside a shard"


def test_scores_stay_with_their_inputs(tmp_path: Path) -> None:
    stored = rows_of(run(tmp_path / "t"))
    batch = decode_rows(stored, {"heads": SPEC.H, "neurons": SPEC.F}, {"scores"}, 0.5)
    found = captured()
    expected = {k: found.scores(k)[:, :-1].flatten(0, 1) for k in KINDS}
    expected["inputs"] = found.inputs[:, :-1].flatten(0, 1)
    check_rows(batch, expected)


def check_rows(batch: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    partner = partners(batch, expected)
    torch.testing.assert_close(batch["inputs"], expected["inputs"][partner], rtol=2e-3, atol=2e-3)
    for kind in KINDS:
        limit = expected[kind][partner].amax(-1, keepdim=True) / 100
        assert ((batch[kind] - expected[kind][partner]).abs() <= limit).all()


def test_means_are_over_all_tokens_whatever_is_stored(tmp_path: Path) -> None:
    found = captured()
    for i, settings in enumerate(({}, {"token_rate": 0.2}, {"format": "bits"})):
        store = run(tmp_path / str(i), **settings)
        for kind in KINDS:
            expected = found.scores(kind)[:, :-1].mean((0, 1))
            torch.testing.assert_close(store.means[kind], expected, rtol=1e-4, atol=1e-7)


def test_bits_hold_the_labels(tmp_path: Path) -> None:
    store = run(tmp_path / "t", format="bits", label_density={"heads": 0.5, "neurons": 0.25})
    stored = rows_of(store)
    batch = decode_rows(stored, store.units, {"labels"}, 0.5)
    assert batch["heads_labels"].sum(-1).eq(2).all()
    assert batch["neurons_labels"].sum(-1).eq(12).all()
    found = captured()
    expected = {
        "inputs": found.inputs[:, :-1].flatten(0, 1),
        "heads_labels": top_k(found.heads[:, :-1].flatten(0, 1), 0.5),
        "neurons_labels": top_k(found.neurons[:, :-1].flatten(0, 1), 0.25),
    }
    partner = partners(batch, expected)
    for name, value in expected.items():
        if name != "inputs":
            assert (batch[name] == value[partner]).float().mean() > 0.999
    assert "heads_codes" in rows_of(store, "heldout"), "held-out rows are always scores"
    assert store.label_density == {"heads": 0.5, "neurons": 0.25}


def test_token_rate(tmp_path: Path) -> None:
    store = run(tmp_path / "t", token_rate=0.25)
    assert store.rows("train") == 32 * 8
    assert store.rows("heldout") == 8 * 31, "held-out rows are not subsampled"
    everything = {
        tuple(r.tolist()) for r in captured().inputs[:, :-1].flatten(0, 1)[:, 0, :3].half()
    }
    kept = [tuple(r.tolist()) for r in rows_of(store)["inputs"][:, 0, :3]]
    assert sum(row in everything for row in kept) > 0.95 * len(kept)


def test_prompt_rows_are_sums_over_the_continuation(tmp_path: Path) -> None:
    store = run(tmp_path / "t", granularity="prompt", prompts=[8, 20])
    assert store.rows("train") == 64 and store.rows("heldout") == 16
    batch = decode_rows(rows_of(store), store.units, {"scores"}, 0.5)
    found = captured()
    expected = {
        kind: torch.cat([found.scores(kind)[:, p - 1 :].sum(1) for p in (8, 20)]) for kind in KINDS
    }
    expected["inputs"] = torch.cat([found.inputs[:, p - 2] for p in (8, 20)])
    check_rows(batch, expected)


def test_same_seed_same_hash(tmp_path: Path) -> None:
    first, again = run(tmp_path / "a"), run(tmp_path / "b")
    assert first.hash == again.hash
    other = [
        run(tmp_path / "seed", seed=1),
        run(tmp_path / "name", name="fisher"),
        run(tmp_path / "text", SyntheticText(block=BLOCK, tokens=32 * BLOCK, seed=1)),
    ]
    assert len({first.hash, *(s.hash for s in other)}) == 4


def test_held_out_rows_are_not_of_what_evaluation_reads(tmp_path: Path) -> None:
    text = SyntheticText(block=BLOCK, tokens=32 * BLOCK)
    manifest = run(tmp_path / "t", text).manifest
    digests = {s: text.blocks(TOKENIZER, s, 8 * BLOCK).digest for s in ("validation", "heldout")}
    assert manifest["text"]["digests"]["heldout"] == [digests["validation"]]
    assert digests["validation"] != digests["heldout"]
    assert manifest["text"]["split"] == text.facts("train", "validation")


def test_criteria_of_one_name_share_no_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Mine(PlainAct):
        pass

    monkeypatch.setattr(PlainAct, "version", "")
    text = SyntheticText(block=BLOCK, tokens=32 * BLOCK)
    plans = [
        make_plan(
            *(SPEC, text, made, [Tap(1)], "float32"),
            granularity="token",
            prompts=None,
            format="int8",
            label_density=0.5,
            token_rate=1.0,
            shard_blocks=8,
            heldout_tokens=8 * BLOCK,
            input_dtype="auto",
            seed=0,
            world=1,
        )
        for made in (PlainAct(), PlainAct(), Mine(), type("Fixed", (Mine,), {"version": "2"})())
    ]
    assert plans[0].identity["criterion"] == plans[2].identity["criterion"] == "plainact"
    keys = [plan.key for plan in plans]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    run(tmp_path / "t")
    monkeypatch.setattr(PlainAct, "version", "2")
    with pytest.raises(ValueError, match="criterion_class: .*PlainAct there, .*PlainAct@2 asked"):
        run(tmp_path / "t")


def test_a_complete_folder_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path / "t")
    monkeypatch.setattr(writer_module.Writer, "run", None)
    assert run(tmp_path / "t").hash == first.hash


def test_refuses_another_configuration(tmp_path: Path) -> None:
    run(tmp_path / "t")
    with pytest.raises(ValueError, match="holds another harvest .criterion: plainact there"):
        run(tmp_path / "t", name="fisher")
    (tmp_path / "t" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds another harvest .token_rate: 1.0 there, 0.5"):
        run(tmp_path / "t", token_rate=0.5)


def test_refuses_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not a trace folder .* thesis.txt"):
        run(tmp_path / "t")
    assert (tmp_path / "t" / "thesis.txt").read_text() == "mine"


def test_too_large_is_refused_before_the_host_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest_module, "Probe", None)
    with pytest.raises(ValueError, match="harvest.max_gb=0.0001.*token_rate.*bits.*online"):
        run(tmp_path / "t", max_gb=1e-4)
    monkeypatch.setattr(harvest_module.shutil, "disk_usage", lambda p: os.terminal_size((0, 0)))
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(harvest_module.shutil, "disk_usage", lambda p: full)
    with pytest.raises(ValueError, match="GB free: choose another folder"):
        run(tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_the_forecast_is_said_first_and_right(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    for i, settings in enumerate(({}, {"format": "bits"}, {"token_rate": 0.3})):
        store = run(tmp_path / str(i), **settings)
        said = float(caplog.text.split("folder about ")[1 + i].split(" GB")[0])
        assert abs(said - store.nbytes / 1e9) < 2e-3
    assert "8 tokens" not in caplog.text and "about" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "int4"}, "harvest.format='int4'"),
        ({"granularity": "word"}, "harvest.granularity='word'"),
        ({"token_rate": 0.0}, "harvest.token_rate=0.0"),
        ({"granularity": "prompt", "prompts": [BLOCK]}, "harvest.prompts=.32."),
        ({"granularity": "prompt", "token_rate": 0.5}, "leave it at 1"),
        ({"batch": 0}, "harvest.batch=0"),
        ({"shard_blocks": 0}, "harvest.shard_blocks=0"),
        ({"input_dtype": "int8"}, "harvest.input_dtype='int8'"),
        ({"heldout_tokens": 8}, "harvest.heldout_tokens=8"),
        ({"format": "bits", "label_density": 1.5}, "density for heads is 1.5"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "t", **settings)
    assert not (tmp_path / "t").exists()


def _stop_after(monkeypatch: pytest.MonkeyPatch, shards: int, error: BaseException) -> None:
    real, count = writer_module.save, iter(range(10**6))

    def save(*args: Any) -> None:
        if next(count) == shards:
            raise error
        real(*args)

    monkeypatch.setattr(writer_module, "save", save)


def test_disk_full_keeps_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _stop_after(patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="2 of 5 shards.*same command resumes") as error:
            run(tmp_path / "t")
    assert error.value.errno == errno.ENOSPC
    assert len(list((tmp_path / "t").glob("train-*"))) == 2
    assert run(tmp_path / "t").hash == whole.hash


def test_a_real_write_error_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(OSError, match="0 of 5 shards are complete.*same command resumes"):
            run(tmp_path / "t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in (tmp_path / "t").iterdir()] == ["harvest.json"]


def test_ctrl_c_keeps_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _stop_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "t")
    assert "3 of 5 shards are complete" in caplog.text
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "t").glob("train-*")}
    assert run(tmp_path / "t").hash == whole.hash
    assert all((tmp_path / "t" / n).stat().st_mtime_ns == t for n, t in kept.items())


def test_a_damaged_shard_is_harvested_again(tmp_path: Path, caplog: Any) -> None:
    whole = run(tmp_path / "t")
    (tmp_path / "t" / "manifest.json").unlink()
    shard = tmp_path / "t" / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert run(tmp_path / "t").hash == whole.hash
    assert "train-00001.safetensors is damaged" in caplog.text


def test_a_changed_text_is_not_mixed_in(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("one line of text\n" * 2000)
    run(tmp_path / "t", FileText(file, block=BLOCK, tokens=32 * BLOCK))
    (tmp_path / "t" / "manifest.json").unlink()
    file.write_text("another line of text\n" * 2000)
    with pytest.raises(ValueError, match="text.fingerprint"):
        run(tmp_path / "t", FileText(file, block=BLOCK, tokens=32 * BLOCK))


def test_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL in mid-harvest, then the same command: the rows of an uninterrupted run."""
    whole = run(tmp_path / "whole", shard_blocks=2)
    out = tmp_path / "killed"
    (process,) = start(out, 0.2)
    deadline = time.monotonic() + 60
    while len(list(out.glob("train-*.safetensors"))) < 3:
        assert time.monotonic() < deadline and process.exitcode is None
        time.sleep(0.02)
    process.kill()
    process.join()
    done = {p.name: p.stat().st_mtime_ns for p in out.glob("train-*.safetensors")}
    assert 3 <= len(done) < 16 and not (out / "manifest.json").exists()
    (out / "train-00009.safetensors.123.tmp").write_bytes(b"half a shard")
    with pytest.raises(ValueError, match="half-written"):
        TraceStore.open(out)

    resumed = run(out, shard_blocks=2)
    assert all((out / n).stat().st_mtime_ns == t for n, t in done.items()), "not harvested twice"
    assert resumed.hash == whole.hash
    assert not list(out.glob("*.tmp"))
    for split in ("train", "heldout"):
        mine, theirs = rows_of(resumed, split), rows_of(whole, split)
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def shard(file: str) -> dict[str, Any]:
    return {"file": file, "bytes": 3}


def test_only_parts_of_this_launch_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of an earlier launch, whatever it says, is not taken; the live one is."""
    monkeypatch.setattr(parts_module, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(parts_module, "_POLL_SECONDS", 0.02)
    (tmp_path / "a").write_text("abc")
    stale = {"launch": "earlier", "shards": [shard("a")]}
    (tmp_path / "part-0.json").write_text(json.dumps(stale))
    (tmp_path / "part-1.json").write_text(json.dumps(stale))
    (tmp_path / LAUNCH).write_text(json.dumps({"launch": "earlier"}))
    first = Parts(tmp_path, 0, 2)
    assert not (tmp_path / "part-0.json").exists()
    with pytest.raises(TimeoutError, match="for 0.3 s while waiting for process 1 of 2.*resumes"):
        first.collect({"shards": []})

    other = Parts(tmp_path, 1, 2)
    assert not (tmp_path / "part-1.json").exists()
    live = {"shards": [shard("a")], "digests": {}}
    with pytest.raises(TimeoutError, match="the first process to seal"):
        other.hand_in(live, tmp_path / "manifest.json")
    assert first.collect({"shards": []})[1] == {"launch": first.launch, **live}
    (tmp_path / "a").write_text("abcd")
    with pytest.raises(ValueError, match="a is 4 bytes, its process wrote 3"):
        first.collect({"shards": []})
    (tmp_path / "a").unlink()
    with pytest.raises(ValueError, match="a is missing"):
        first.collect({"shards": []})
    first.clear()
    assert not list(tmp_path.iterdir())


def test_a_part_is_handed_in_again_to_a_new_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "_POLL_SECONDS", 0.02)
    other = Parts(tmp_path, 1, 2)
    (tmp_path / LAUNCH).write_text(json.dumps({"launch": "earlier"}))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.hand_in, {"shards": []}, tmp_path / "manifest.json")
        while not (tmp_path / "part-1.json").exists():
            time.sleep(0.01)
        first = Parts(tmp_path, 0, 2)
        found = first.collect({"shards": []})
        (tmp_path / "manifest.json").write_text("{}")
        waiting.result(timeout=5)
    assert found[1]["launch"] == first.launch


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace folder that two processes made."""
    folder = tmp_path_factory.mktemp("two") / "two"
    finish(start(folder, 0, 0))
    return folder


def test_two_processes_killed_and_resumed(tmp_path: Path, two: Path) -> None:
    """The second process is done and waits when all are killed; then a shard of it is lost."""
    out = tmp_path / "killed"
    processes = start(out, 1, 0)
    deadline = time.monotonic() + 60
    while not (out / "part-1.json").exists():
        assert time.monotonic() < deadline and processes[0].exitcode is None
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    assert not (out / "manifest.json").exists()
    lost = out / "train-r1-00003.safetensors"
    lost.unlink()

    finish(start(out, 0, 0, late=2))
    assert TraceStore.open(out, SPEC).hash == TraceStore.open(two, SPEC).hash
    assert not list(out.glob("part-*")) and not (out / LAUNCH).exists()


def test_two_processes_share_the_work(two: Path) -> None:
    out = two
    store = TraceStore.open(out, SPEC)
    assert store.manifest["settings"]["world"] == 2
    files = [s.file for s in store.shards("train")]
    assert sum(f.startswith("train-r0-") for f in files) == 8
    assert sum(f.startswith("train-r1-") for f in files) == 8
    assert store.rows("train") == 32 * 31 and store.rows("heldout") == 8 * 31
    assert not list(out.glob("part-*"))

    text = SyntheticText(block=BLOCK, tokens=32 * BLOCK)
    digests = [text.blocks(TOKENIZER, "train", rank=r, world=2).digest for r in range(2)]
    assert store.manifest["text"]["digests"]["train"] == digests
    order = [d.id for d in text.documents("train")]
    assert not set(order[::2]) & set(order[1::2])

    sums = [captured_sum(text, rank) for rank in range(2)]
    expected = (sums[0] + sums[1]) / (32 * 31)
    torch.testing.assert_close(store.means["neurons"], expected, rtol=1e-4, atol=1e-7)

    began = json.loads((out / "manifest.json").read_text())["run"]["time"]
    again = run(out, shard_blocks=2)  # one process uses what two have made
    assert again.hash == store.hash and again.manifest["run"]["time"] == began


def captured_sum(text: Text, rank: int) -> torch.Tensor:
    ids = text.blocks(TOKENIZER, "train", rank=rank, world=2).ids
    probe = Probe(HOST, SPEC, [Tap(1)], criterion("plainact"))
    return probe(ids).neurons[:, :-1].sum((0, 1))


def test_another_number_of_processes_does_not_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "t")
    (tmp_path / "t" / "manifest.json").unlink()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="world: 1 there, 2 asked"):
        run(tmp_path / "t")


def test_prepare_names_and_reuses_the_folder(tmp_path: Path) -> None:
    def stage(**settings: Any) -> Any:
        base: dict[str, Any] = {
            "text": SyntheticText(block=BLOCK, tokens=32 * BLOCK),
            "criterion": criterion("plainact"),
            "taps": [Tap(1)],
            "needs": {"labels"},
            "heldout_tokens": 8 * BLOCK,
            "batch_size": 64,
        }
        return prepare(
            model=HOST, tokenizer=TOKENIZER, spec=SPEC, out_root=tmp_path, **(base | settings)
        )

    store = stage(mode="only")
    assert isinstance(store, TraceStore) and store.format == "bits"
    assert store.path.name.startswith("tiny-llama-0-plainact-token-bits-synthetic-")
    module = stage(seed=7)
    assert module.store.hash == store.hash, "the run's seed does not harvest again"
    scores = stage(needs={"scores"})
    assert scores.store.format == "int8"
    assert len(list(tmp_path.iterdir())) == 2
    for settings, message in (
        ({"mode": "disk"}, "harvest.mode='disk'"),
        ({"format": "int4"}, "harvest.format='int4'"),
        ({"needs": {"logits"}}, "needs=.*logits"),
        ({"needs": {"scores"}, "format": "bits"}, "labels only"),
    ):
        with pytest.raises(ValueError, match=message):
            stage(**settings)
