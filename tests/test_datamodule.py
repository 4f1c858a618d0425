"""Data modules: the batches of the contract, from a store and straight from the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from gnomon.data.batches import rebatch, share
from gnomon.data.capture import Probe
from gnomon.data.codes import top_k
from gnomon.data.criteria import criterion
from gnomon.data.datamodule import OnlineDataModule, TraceDataModule
from gnomon.data.harvest import harvest
from gnomon.data.sources import SyntheticText
from gnomon.data.store import TraceStore
from gnomon.host import KINDS, Tap, describe
from gnomon.tiny import tiny_host

HOST, TOKENIZER = tiny_host()
SPEC = describe(HOST)
BLOCK, ROWS, HELD = 32, 32 * 31, 8 * 31
TEXT = SyntheticText(block=BLOCK, tokens=32 * BLOCK)
TAPS = [Tap(1), Tap(2)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TraceStore]:
    root = tmp_path_factory.mktemp("traces")
    return {
        format: harvest(
            HOST,
            TOKENIZER,
            SPEC,
            TEXT,
            criterion("plainact"),
            TAPS,
            root / format,
            format=format,  # type: ignore[arg-type]
            heldout_tokens=8 * BLOCK,
            shard_blocks=6,
            progress=False,
        )
        for format in ("int8", "bits")
    }


def online(**settings: Any) -> OnlineDataModule:
    base = {"heldout_tokens": 8 * BLOCK, "means_tokens": 4 * BLOCK, "batch_size": 100}
    module = OnlineDataModule(
        HOST, TOKENIZER, SPEC, TEXT, criterion("plainact"), TAPS, **(base | settings)
    )
    module.setup()
    return module


def make(source: str, stores: dict[str, TraceStore], **settings: Any) -> Any:
    if source == "online":
        return online(**settings)
    return TraceDataModule(stores[source], **({"needs": {"labels"}, "batch_size": 100} | settings))


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        ("int8", {"scores"}),
        ("int8", {"labels"}),
        ("int8", {"labels", "scores"}),
        ("bits", {"labels"}),
        ("online", {"scores"}),
        ("online", {"labels"}),
        ("online", {"labels", "scores"}),
    ],
)
def test_batches_are_those_of_the_contract(
    source: str, needs: set[str], stores: dict[str, TraceStore]
) -> None:
    module = make(source, stores, needs=needs)
    loader = module.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == ROWS // 100
    names = {"inputs"}
    for kind in KINDS:
        names |= {kind} if "scores" in needs else set()
        names |= {f"{kind}_labels"} if "labels" in needs else set()
    for batch in batches:
        assert set(batch) == names
        assert batch["inputs"].shape == (100, 2, SPEC.D)
        assert batch["inputs"].dtype == torch.float32
    held = list(module.val_dataloader())
    assert len(module.val_dataloader()) == len(held) == 3
    assert sum(len(b["inputs"]) for b in held) == HELD
    both = {"inputs", "heads", "neurons", "heads_labels", "neurons_labels"}
    for batch in held:
        assert set(batch) == both
        for kind in KINDS:
            assert batch[kind].dtype == torch.float32
            assert batch[f"{kind}_labels"].dtype == torch.bool
            assert batch[kind].shape[1:] == (SPEC.L, SPEC.units(kind))
            assert torch.equal(batch[f"{kind}_labels"], top_k(batch[kind], 0.5))
    assert len(list(module.test_dataloader())) == 3


def test_store_and_host_give_the_same_rows(stores: dict[str, TraceStore]) -> None:
    def table(module: Any) -> dict[str, torch.Tensor]:
        batches = list(module.train_dataloader())
        rows = {k: torch.cat([b[k] for b in batches]) for k in batches[0]}
        return rows

    stored = table(make("int8", stores, needs={"scores"}, batch_size=ROWS))
    fresh = table(make("online", stores, needs={"scores"}, batch_size=ROWS))
    # text repeats itself: scores, which depend on what follows, tell equal inputs apart
    joint = [torch.cat([r[k].flatten(1) for k in sorted(r)], 1) for r in (stored, fresh)]
    nearest = torch.cdist(*joint).argmin(1)
    assert len(nearest.unique()) == ROWS
    for kind in KINDS:
        expected = fresh[kind][nearest]
        limit = expected.amax(-1, keepdim=True) / 100
        assert ((stored[kind] - expected).abs() < limit).all()


@pytest.mark.parametrize("source", ["int8", "online"])
def test_every_epoch_has_every_row_in_another_order(
    source: str, stores: dict[str, TraceStore]
) -> None:
    loader = make(source, stores, batch_size=31).train_dataloader()
    first, second = ([b["inputs"][:, 0, 0] for b in loader] for _ in range(2))
    assert not torch.equal(first[0], second[0])
    a, b = torch.cat(first).sort().values, torch.cat(second).sort().values
    assert len(a) == ROWS
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    again = make(source, stores, batch_size=31).train_dataloader()
    assert torch.equal(next(iter(again))["inputs"][:, 0, 0], first[0])


@pytest.mark.parametrize("source", ["int8", "online"])
def test_processes_have_as_many_batches_and_other_rows(
    source: str, stores: dict[str, TraceStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, held = [], []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        module = make(source, stores, batch_size=50, needs={"scores"})
        seen.append([b["neurons"] for b in module.train_dataloader()])
        held.append([b["neurons"] for b in module.val_dataloader()])
    if source == "int8":  # online processes agree by an all-reduce: the next test
        assert len({len(s) for s in seen}) == 1
    assert len({sum(len(x) for x in h) for h in held}) == 1
    for parts in (seen, held):
        rows = [{tuple(r) for x in p for r in x[:, 1, :6].tolist()} for p in parts]
        assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


JOB = """
import os, sys
import torch.distributed as dist
from gnomon.data.criteria import criterion
from gnomon.data.datamodule import OnlineDataModule
from gnomon.data.sources import SyntheticText
from gnomon.host import Tap, describe
from gnomon.tiny import tiny_host

os.environ["WORLD_SIZE"] = "2"
child = os.fork()  # two processes share the time that imports take
os.environ["RANK"] = "1" if child == 0 else "0"
dist.init_process_group("gloo", f"file://{sys.argv[1]}store", rank=int(child == 0), world_size=2)
model, tokenizer = tiny_host()
text = SyntheticText(block=32, tokens=33 * 32)  # 17 blocks for one process, 16 for the other
module = OnlineDataModule(model, tokenizer, describe(model), text, criterion("plainact"), [Tap(1)],
                          heldout_tokens=256, means_tokens=64, batch_size=31)
module.setup()
loader = module.train_dataloader()
counts = (len(loader), sum(1 for _ in loader), len(module._train_blocks()))
open(sys.argv[1] + os.environ["RANK"], "w").write(repr(counts))
dist.destroy_process_group()
if child:
    sys.exit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.slow
def test_online_processes_agree_on_the_number_of_batches(tmp_path: Path) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    command = [sys.executable, str(job), str(tmp_path / "rank")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [(tmp_path / f"rank{r}").read_text() for r in range(2)]
    assert counts == ["(16, 16, 17)", "(16, 16, 16)"]


def test_means(stores: dict[str, TraceStore]) -> None:
    found = Probe(HOST, SPEC, TAPS, criterion("plainact"))(TEXT.blocks(TOKENIZER, "train").ids)
    module = online()
    first = module.means
    list(module.train_dataloader())
    for kind in KINDS:
        expected = found.scores(kind)[:, :-1].mean((0, 1))
        torch.testing.assert_close(make("int8", stores).means[kind], expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(module.means[kind], expected, rtol=1e-4, atol=1e-7)
        assert first[kind].shape == expected.shape and not torch.equal(first[kind], expected)


@pytest.mark.parametrize("source", ["int8", "bits", "online"])
def test_info(source: str, stores: dict[str, TraceStore]) -> None:
    info = make(source, stores).info
    assert set(info) == {
        *("criterion", "granularity", "text", "text_digest", "source", "trace_hash", "tokens"),
        "text_split",
    }
    assert info["text_split"] == TEXT.facts("train", "validation")
    assert info["text_split"].keys() == {"seed", "heldout", "fingerprint"}
    assert info["criterion"] == "plainact" and info["text"] == "synthetic"
    assert info["text_digest"] == TEXT.blocks(TOKENIZER, "train").digest
    assert (info["trace_hash"] is None) == (source == "online")


def test_asking_for_what_a_store_does_not_hold(stores: dict[str, TraceStore]) -> None:
    with pytest.raises(ValueError, match="holds labels only .format bits.*format=int8"):
        TraceDataModule(stores["bits"], needs={"scores"})
    with pytest.raises(ValueError, match="labels of heads at density 0.5, asked for 0.3"):
        TraceDataModule(stores["bits"], needs={"labels"}, density=0.3)
    with pytest.raises(ValueError, match="density for neurons is None"):
        TraceDataModule(stores["int8"], needs={"labels"}, density={"heads": 0.5})
    with pytest.raises(ValueError, match="batch_size=0"):
        TraceDataModule(stores["int8"], needs={"labels"}, batch_size=0)
    with pytest.raises(ValueError, match="needs="):
        TraceDataModule(stores["int8"], needs=set())
    module = TraceDataModule(stores["int8"], {"labels"}, {"heads": 0.5, "neurons": 0.25})
    batch = next(iter(module.train_dataloader()))
    assert (
        batch["neurons_labels"].sum(-1).eq(12).all() and batch["heads_labels"].sum(-1).eq(2).all()
    )


@pytest.mark.parametrize("source", ["int8", "online"])
def test_validation_rows_are_not_of_what_evaluation_reads(
    source: str, stores: dict[str, TraceStore]
) -> None:
    rows = torch.cat([b["inputs"] for b in make(source, stores).val_dataloader()])[:, 0]

    def nearest(split: Any) -> torch.Tensor:
        blocks = TEXT.blocks(TOKENIZER, split, 8 * BLOCK)
        found = Probe(HOST, SPEC, TAPS, criterion("plainact"))(blocks.ids).inputs
        return torch.cdist(rows, found[:, :-1, 0].flatten(0, 1).float()).min(1).values

    assert nearest("validation").max() < 0.1
    assert nearest("heldout").max() > 0.5


def test_online_prompt_rows() -> None:
    module = online(granularity="prompt", prompts=[8, 16], batch_size=16, needs={"scores"})
    assert len(list(module.train_dataloader())) == 4
    assert sum(len(b["inputs"]) for b in module.val_dataloader()) == 16


def test_online_token_rate_draws_anew_each_epoch() -> None:
    loader = online(token_rate=0.25, batch_size=64).train_dataloader()
    first, second = (torch.cat([b["inputs"][:, 0, 0] for b in loader]) for _ in range(2))
    assert len(first) == 32 * 8
    assert len(set(first.tolist()) & set(second.tolist())) < 0.6 * len(first)


def test_a_set_smaller_than_a_batch_is_one_batch(stores: dict[str, TraceStore]) -> None:
    batches = list(make("int8", stores, batch_size=5000).train_dataloader())
    assert [len(b["inputs"]) for b in batches] == [ROWS]


def test_rebatch_crosses_pieces() -> None:
    pieces = [({"x": torch.arange(i * 10, i * 10 + n)}, torch.arange(n)) for i, n in
              enumerate((3, 7, 1, 9))]  # fmt: skip
    batches = [b["x"].tolist() for b in rebatch(pieces, 4, 5)]
    assert [len(b) for b in batches] == [4] * 5
    assert sum(batches, []) == [*range(3), *range(10, 17), 20, *range(30, 39)]
    assert len(list(rebatch(pieces, 4, 2))) == 2 and not list(rebatch(pieces, 4, 0))
    assert [share(10, r, 3) for r in range(3)] == [(0, 3), (3, 6), (6, 9)]


class Mean(pl.LightningModule):
    """The smallest thing that Lightning trains: one linear from inputs to neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen, self.validated = nn.Linear(SPEC.D, SPEC.F), 0, 0

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen += len(batch["inputs"])
        target = batch["neurons_labels"][:, 1].float()
        return (self.linear(batch["inputs"][:, 0]) - target).square().mean()

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.validated += len(batch["inputs"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("source", ["bits", "int8", "online"])
def test_lightning_trains_on_it(source: str, stores: dict[str, TraceStore], tmp_path: Path) -> None:
    module = Mean()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=make(source, stores, batch_size=100))
    assert module.seen == 2 * 900
    assert module.validated >= 2 * HELD
    assert trainer.estimated_stepping_batches == 18
    assert not any(p.grad is not None for p in HOST.parameters())
