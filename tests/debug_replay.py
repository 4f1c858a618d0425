"""A captured step whose indices then go wrong; a program, as a device's assert ends its process.

GNOMON_DEBUG=1 python tests/debug_replay.py FIELD DEVICE
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from gnomon.engine.graph import Replay
from gnomon.kernels.column_gather import column_gather_triton
from gnomon.kernels.decode_attention import decode_attention_triton
from gnomon.kernels.gathered_ffn import ffn_up_triton
from gnomon.kernels.row_gather import row_gather_triton

# field -> a value that is outside; "none" leaves everything as it was
WRONG = {"index": 12, "column": -1, "ffn": 99, "count": 4, "slot": 7, "kv_slot": 2, "position": 9}


def step(field: str, device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """A kernel on static tensors, and the one of them that will go wrong."""
    w, x = torch.randn(12, 12, device=device), torch.randn(1, 12, device=device)
    index = torch.tensor([3, 5, 0], dtype=torch.int32, device=device)
    count = torch.tensor([3], dtype=torch.int32, device=device)
    if field == "column":
        return lambda: column_gather_triton(x[:, :3], w, index, 1, count), index
    if field == "ffn":
        return lambda: ffn_up_triton(x, w, w, index, count), index
    if field in ("index", "count", "none"):
        return lambda: row_gather_triton(x, w, index, 1, count), (
            count if field == "count" else index
        )
    keys, values = torch.randn(2, 1, 2, 8, 4, device=device)
    places = {
        "position": torch.tensor([5], dtype=torch.int32, device=device),
        "slot": torch.tensor([[0, -1]], dtype=torch.int32, device=device),
        "kv_slot": torch.tensor([[0, -1]], dtype=torch.int32, device=device),
    }
    q, new = torch.randn(1, 4, device=device), torch.randn(2, 1, 4, device=device)

    def attend() -> None:
        decode_attention_triton(
            q, *new, keys, values, places["position"], places["slot"],
            write="active", kv_slot=places["kv_slot"],
        )  # fmt: skip

    return attend, places[field]


def say(text: str) -> None:
    """A line that is out before anything fails."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(field: str, where: str) -> None:
    """Captures, replays as it was, then with a wrong value."""
    device = torch.device(where)
    fn, target = step(field, device)
    replay = Replay(fn, device)  # type: ignore[arg-type]
    replay()
    if device.type == "cuda":
        torch.cuda.synchronize()
    say("replayed")
    if field != "none":
        target.view(-1)[0] = WRONG[field]
    replay()
    if device.type == "cuda":
        torch.cuda.synchronize()
    say("went on")


if __name__ == "__main__":
    main(*sys.argv[1:])
