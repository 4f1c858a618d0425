"""Documents: links lead somewhere, the README is short and finished, settings it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/results/**/*.md")]
)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)")
COMMAND = re.compile(r"^python (train|evaluate)\.py (?P<rest>[^#\n]*)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_readme_is_short_and_finished() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    assert not re.findall(r"\b[A-Z]+_(?:OUTPUT|TABLE)\b", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_documents_compose(page: Path) -> None:
    """Every train.py and evaluate.py command shown takes the overrides that it shows."""
    for match in COMMAND.finditer(page.read_text(encoding="utf-8")):
        words = [w for w in match["rest"].split() if "=" in w and not w.startswith("-")]
        overrides = [re.sub(r"<.*>?", "x", w) for w in words if "hydra." not in w]
        overrides = [re.split(r",(?![^\[]*\])", w)[0].rstrip("…") for w in overrides]
        with initialize_config_module("gnomon.conf", version_base="1.3"):
            compose(config_name=match[1], overrides=overrides)
