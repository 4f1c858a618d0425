"""The wheel, the links inside gnomon/, and the bans that keep them working."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import gnomon

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("predictors", "data", "conf", "kernels", "train.py", "evaluate.py")
FOLDERS = ("gnomon", "data", "predictors", "kernels", "conf", "tests", "benchmarks", "examples")
BARE = {"kernels", "data", "conf", "predictors", "evaluate", "train"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def sources() -> list[Path]:
    """Every Python file of the project, once, at its real place."""
    files = [*ROOT.glob("*.py")]
    for folder in FOLDERS:
        files += [
            p
            for p in (ROOT / folder).rglob("*.py")
            if not (folder == "gnomon" and p.relative_to(ROOT).parts[1] in LINKS)
        ]
    return sorted(files)


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative_and_lead_to_the_root(name: str) -> None:
    link = ROOT / "gnomon" / name
    assert link.is_symlink(), f"{link} must be a symlink (git config core.symlinks true)"
    assert str(link.readlink()) == f"../{name}"
    assert link.exists()


def test_kernels_is_no_regular_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_bare_imports() -> None:
    bad = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            bad += [f"{path.name}: {n}" for n in names if n.partition(".")[0] in BARE]
    assert bad == []


def test_version_is_stated_once() -> None:
    assert PROJECT["version"] == gnomon.__version__
    assert f"## [{gnomon.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_lie_within_the_bounds() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(p.specifier).startswith("==") for p in pins)
    pinned = {canonicalize_name(p.name): str(p.specifier)[2:] for p in pins}
    extras = PROJECT["optional-dependencies"]
    for text in (*PROJECT["dependencies"], *extras["dev"], *extras["tensorboard"]):
        wanted = Requirement(text)
        if wanted.name != "triton":  # the torch build chooses it
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), text


def test_no_index_or_machine_path_in_the_setup() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|https?://|file:/|/home/|/root/|/opt/", text), (
            name
        )


@pytest.mark.parametrize("script", ["gnomon", "gnomon-train", "gnomon-evaluate"])
def test_console_scripts_load(script: str) -> None:
    (entry,) = entry_points(group="console_scripts", name=script)
    assert callable(entry.load())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names inside the wheel, built from a copy of the tree (links kept)."""
    copy = tmp_path_factory.mktemp("tree") / "gnomon"
    copy.mkdir()
    for name in (*LINKS, "gnomon"):
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, copy)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(copy / done.stdout.splitlines()[-1]) as archive:
        return set(archive.namelist())


def test_wheel_has_one_namespace(wheel: set[str]) -> None:
    assert {n.partition("/")[0] for n in wheel} == {
        "gnomon",
        f"gnomon-{gnomon.__version__}.dist-info",
    }


def test_wheel_has_every_module_config_and_data_file(wheel: set[str]) -> None:
    suffixes = {".py", ".yaml", ".json", ".typed", ".safetensors"}
    wanted = {
        str(path.relative_to(ROOT))
        for path in _walk(ROOT / "gnomon")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }
    assert wanted - wheel == set()
    assert "gnomon/py.typed" in wheel
    assert "gnomon/conf/host/smollm2.yaml" in wheel
    assert "gnomon/kernels/__init__.py" not in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def _walk(folder: Path) -> list[Path]:
    """Files below a folder, through its links (rglob does not follow them before Python 3.13)."""
    found: list[Path] = []
    for path in folder.iterdir():
        found += _walk(path) if path.is_dir() else [path]
    return found
