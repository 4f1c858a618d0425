"""The root's kernels/, evaluate.py and train.py must not answer for the packages of those names.

Each test runs `python` in the repository root, which Python then puts first on ``sys.path``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A site folder with a `kernels` distribution in transformers' range, and an `evaluate`."""
    site = tmp_path / "site"
    for name, version in (("kernels", "0.18.2"), ("evaluate", "0.4.9")):
        (site / name).mkdir(parents=True)
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n")
        (info / "top_level.txt").write_text(f"{name}\n")
    (site / "kernels" / "__init__.py").write_text(
        textwrap.dedent(
            '''
            """Every name that transformers takes from PyPI kernels, doing nothing."""
            __version__ = "0.18.2"

            class _Anything:
                def __init__(self, *args, **kwargs): ...

            class Mode:
                TRAINING = INFERENCE = TORCH_COMPILE = 0

            def _decorate(*args, **kwargs):
                return lambda cls: cls

            def register_kernel_mapping(*args, **kwargs): ...

            def __getattr__(name):
                if name.startswith("__"):
                    raise AttributeError(name)
                return _Anything if name[0].isupper() else _decorate
            '''
        )
    )
    (site / "evaluate" / "__init__.py").write_text("def load(name):\n    return 'hf evaluate'\n")
    return site


def run(*args: str, site: Path | None = None, cwd: Path = ROOT) -> str:
    env = dict(os.environ)
    if site is not None:
        env["PYTHONPATH"] = str(site)
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_takes_pypi_kernels_not_ours(stubs: Path) -> None:
    code = (
        "import transformers.activations, kernels\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available(), kernels.__file__)"
    )
    assert run("-c", code, site=stubs).split() == ["True", str(stubs / "kernels" / "__init__.py")]


def test_transformers_without_pypi_kernels() -> None:
    code = (
        "import transformers.activations\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available())"
    )
    assert run("-c", code).split() == ["False"]


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [("train.py", ["--help"], "host"), ("evaluate.py", ["--cfg", "job"], "generation:")],
)
def test_script_takes_the_root_off_the_path(
    stubs: Path, script: str, words: list[str], said: str
) -> None:
    """It starts beside both packages, and afterwards bare names reach them."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = {[script, *words]!r}\n"
        f"sys.path[:1] = [{str(ROOT)!r}, '']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
        "import evaluate, kernels, importlib.util\n"
        "print('FOUND', evaluate.load('x'), kernels.__version__)\n"
        "print('BARE', [importlib.util.find_spec(n) for n in ('train', 'predictors', 'conf')])\n"
    )
    out = run("-c", code, site=stubs)
    assert said in out
    assert "FOUND hf evaluate 0.18.2" in out
    assert "BARE [None, None, None]" in out


def test_each_module_loads_once() -> None:
    code = (
        "import gnomon, sys, pkgutil, importlib\n"
        "for m in ('gnomon.data', 'gnomon.predictors', 'gnomon.conf', 'gnomon.kernels'):\n"
        "    importlib.import_module(m)\n"
        "print([n for n in ('data', 'predictors', 'conf', 'kernels') if n in sys.modules])"
    )
    assert run("-c", code).strip() == "[]"


def test_importing_gnomon_is_cheap(tmp_path: Path) -> None:
    """No torch, no transformers, no tracker before they are used; from any folder."""
    code = (
        "import gnomon, sys\n"
        "heavy = ('torch', 'transformers', 'pytorch_lightning', 'wandb', 'datasets', 'triton')\n"
        "print([n for n in heavy if n in sys.modules], gnomon.__version__)"
    )
    assert run("-c", code, cwd=tmp_path).startswith("[] ")


def test_every_public_name_resolves() -> None:
    import gnomon

    assert {"sparsify", "load_host", "describe", "Budget", "policies"} <= set(gnomon.__all__)
    for name in gnomon.__all__:
        assert getattr(gnomon, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gnomon.nothing  # type: ignore[attr-defined]


def test_env_report() -> None:
    out = run("-m", "gnomon.env")
    assert "torch:" in out and "embedded host:" in out and str(Path.home()) not in out
