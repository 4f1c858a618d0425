"""Training under torchrun: two CPU processes, one set of weights, one predictor folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from gnomon.predictors.folder import load_predictor

ROOT = Path(__file__).resolve().parent.parent
TESTS = str(ROOT / "tests")


def torchrun(folder: Path, script: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in two processes."""
    command = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    return subprocess.run(
        [sys.executable, *command, f"--master_port={free_port()}", str(script), *args],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TESTS": TESTS},
        capture_output=True,
        text=True,
        timeout=240,
    )


def free_port() -> int:
    """A port that nothing listens on."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_train_py_in_two_processes(tmp_path: Path) -> None:
    done = torchrun(
        tmp_path,
        ROOT / "train.py",
        "experiment=smoke",
        f"paths.root={tmp_path}",
        "trainer.max_steps=20",
        "trainer.val_check_interval=10",
        "text.tokens=2048",
        "harvest.heldout_tokens=256",
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert len(list(tmp_path.glob("predictors/*/*"))) == 1 and folder.is_dir()
    assert len(list(tmp_path.glob("traces/*/manifest.json"))) == 1
    (last,) = tmp_path.glob("checkpoints/*/*/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 20
    predictor = load_predictor(folder)
    config = json.loads((folder / "config.json").read_text())
    stored = json.loads(next(tmp_path.glob("traces/*/manifest.json")).read_text())
    heldout = sum(s["rows"] for s in stored["shards"] if s["split"] == "heldout")
    assert config["metrics"]["rows"] == heldout, "every held-out row is counted once"
    assert predictor.quantiles["neurons"][predictor.first("neurons") :].isfinite().all()


SCRIPT = """
import functools, hashlib, os, sys
import pytorch_lightning as pl, torch
import torch.distributed as dist
sys.path.insert(0, os.environ["TESTS"])
from synthetic_rows import SyntheticRows
from gnomon.predictors import Shadow
from gnomon.predictors.module import PredictorModule
from gnomon.predictors.objectives import Bce
from gnomon.training import distributed

rank = int(os.environ["RANK"])
torch.manual_seed(rank)  # different starts: DDP must make them one
net = Shadow(3, 4, 48, 32, hidden=16, rank=8)
data = SyntheticRows()
half = data.train.inputs.shape[0] // 2
data.train.inputs = data.train.inputs[rank * half :][:half]
for kind in data.train.scores:
    data.train.scores[kind] = data.train.scores[kind][rank * half :][:half]
module = PredictorModule(net, Bce(), functools.partial(torch.optim.AdamW, lr=1e-2), None,
                         {"heads": 0.5, "neurons": 0.5})
options = distributed()
assert options == {"devices": 2, "num_nodes": 1, "strategy": "ddp"}, options
trainer = pl.Trainer(accelerator="cpu", max_steps=4, logger=False, enable_progress_bar=False,
                     enable_checkpointing=False, use_distributed_sampler=False, **options)
trainer.fit(module, datamodule=data)
flat = torch.cat([p.detach().flatten() for p in net.parameters()])
both = [torch.empty_like(flat) for _ in range(2)]
dist.all_gather(both, flat)
assert torch.equal(*both), "the processes' weights differ"
assert trainer.global_step == 4
if rank == 0:
    print("one set of weights")
"""


def test_gradients_are_shared(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    done = torchrun(tmp_path, script)
    assert "one set of weights" in done.stdout, done.stderr[-4000:]
