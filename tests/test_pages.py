"""README and docs: short enough to be read once, with links that lead somewhere, code that runs."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
LARGEST_PICTURE = 150_000  # bytes


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings: lower case, hyphens for spaces, no punctuation."""
    found = set()
    for heading in HEADING.findall(text(page)):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


def test_the_readme_is_read_once():
    assert len(text(README).splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in LINK.findall(text(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in LINK.findall(text(README))}
    assert set(PAGES) - {README} <= linked


def test_the_readme_prints_what_its_snippet_computes():
    (snippet,) = PYTHON.findall(text(README))
    names = {}
    exec(snippet, names)
    (printed,) = re.findall(r"print\(value\)  # ([\d.]+);", snippet)
    assert round(float(names["value"]), 4) == float(printed)
    shapes = jax.tree.map(lambda leaf: leaf.shape, names["gradients"])
    assert shapes == {"router": (8, 64), "w_gate": (8, 64, 32)}


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs" / "figures").iterdir()}
    assert sizes
    assert max(sizes.values()) < LARGEST_PICTURE, sizes
