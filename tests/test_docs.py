"""Files and names that docs/*.md speak of are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "erde_hub"
PAGES = [pytest.param(page, id=page.stem) for page in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_paths_are_there(page):
    text = page.read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"[\w/]+/[\w/]*(?:\.py|\.md)?", text) if re.search(r"\.\w+$|^\w+/$", path)}
    assert len(paths) > 5
    assert [p for p in paths if "NAME" not in p and not any((base / p).exists() for base in (PACKAGE, ROOT))] == []
    assert all((page.parent / target).exists() for target in re.findall(r"\]\(([^)#:]+)\)", text))


@pytest.mark.parametrize("page", PAGES)
def test_names_are_where_the_page_says(page):
    """Names after the path they are in (a table), or before it (the ways through the code)."""
    text = page.read_text(encoding="utf-8")
    pairs = re.findall(r"`([\w/]+\.py)`, `(\w+)`", text)
    pairs += [(path, name) for name, path in re.findall(r"^ *(\w+)(?:\.\w+)* +([\w/]+\.py)\b", text, re.MULTILINE)]
    assert len(pairs) > 5
    for path, name in pairs:
        module = importlib.import_module("erde_hub." + path.removesuffix(".py").replace("/", "."))
        assert hasattr(module, name), f"{name} is not in {path}"
