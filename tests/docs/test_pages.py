"""What pages point at is there: files, tests, recipes' results; every method has its place on a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nas import plugins

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "runs/reference/README.md", *ROOT.glob("docs/**/*.md")]
)


def links(page: Path) -> list[tuple[str, str]]:
    """Text and target of every link but those into the web and within the page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text)
    return [(name, target) for name, target in found if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for name, target in links(page):
        place = (page.parent / target.partition("#")[0]).resolve()
        assert place.exists(), f"[{name}]({target})"
        assert ROOT in place.parents, f"[{name}]({target}) leads out of the project"


def test_named_tests_are_there() -> None:
    named = [(name, target) for name, target in links(ROOT / "docs/methods.md") if target.startswith("../tests/")]
    assert len(named) >= 40
    for name, target in named:
        text = (ROOT / "docs" / target).read_text(encoding="utf-8")
        assert f"def test_{name.replace(' ', '_')}(" in text, f"{target} has no {name}"


def test_twenty_systems_have_code_a_test_and_what_is_known_of_them() -> None:
    rows = [line for line in (ROOT / "docs/methods.md").read_text(encoding="utf-8").splitlines() if line[:4] == "| **"]
    assert len(rows) == 20
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 5 and all(cells), row
        # What the page says of the evidence is what the code, its first file, says of it.
        module = ROOT / "docs" / re.findall(r"\]\((\.\./[^)]*)\)", cells[1])[0]
        text = module.read_text(encoding="utf-8") if module.is_file() else ""
        said = re.search(r"\(reconstruction\)|\bA \*?reconstruction|Reconstruction after", text)
        assert ("**Reconstruction**" in row) == bool(said), row


@pytest.mark.parametrize("folder", ["training", "compression", "activations"])
def test_every_method_is_on_a_page(folder: str) -> None:
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in plugins.available(folder):
        assert re.search(rf"\b{name}\b", pages), f"no page tells of {folder}/{name}"
