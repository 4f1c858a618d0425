"""The network is off in the whole suite (tests/conftest.py)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest


def test_connections_off_this_machine_are_refused() -> None:
    with socket.socket() as s, pytest.raises(OSError, match="the network is off in this suite"):
        s.connect(("192.0.2.1", 80))
    with pytest.raises(OSError, match="the network is off in this suite"):
        socket.create_connection(("example.org", 443), timeout=1)


def test_connections_on_this_machine_work() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5).close()


def test_http_is_refused_here_and_in_subprocesses() -> None:
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen("http://example.org", timeout=2)
    code = "import urllib.request as u; u.urlopen('http://example.org', timeout=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0
    assert "refused" in done.stderr


def test_libraries_are_told() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert os.environ["WANDB_MODE"] == "offline"
