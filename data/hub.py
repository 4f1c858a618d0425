"""Rows of a data set on the Hugging Face hub, with a quick error where there is no network."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlparse

_PROBE_SECONDS = 5.0  # the hub's own client retries for minutes


def rows(name: str, config: str, part: str, streaming: bool = False) -> Iterable[dict[str, Any]]:
    """Rows of one part of a hub data set.

    Raises:
        ValueError: the hub cannot be reached, or does not have the data set.
    """
    if not offline():
        _require_network(name)
    import datasets  # slow to import, and only needed here

    try:
        return datasets.load_dataset(name, config, split=part, streaming=streaming)
    except Exception as error:
        raise ValueError(f"cannot load {name} ({config}, {part}): {error}. {_WAY_OUT}") from error


def offline() -> bool:
    """Whether the user switched the hub off."""
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(s, "").upper() in ("1", "ON", "YES", "TRUE") for s in switches)


_WAY_OUT = (
    "Without a network, use a local copy: text=file text.path=<file.txt|.raw|.jsonl> "
    "(text.path= also works for text=wikitext2 and text=c4), or text=embedded; "
    "HF_HUB_OFFLINE=1 uses what the hub's cache already holds."
)


def _require_network(name: str) -> None:
    proxies = (os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    url = urlparse(next(filter(None, proxies), hub))
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_PROBE_SECONDS).close()
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{name} is on the hub, and {url.netloc} cannot be reached ({error}). {_WAY_OUT}"
        ) from error
