"""Pages of the site that are made from other files: the README, results, changes, and the reference from docstrings."""

from __future__ import annotations

import re
from pathlib import Path

import mkdocs_gen_files

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("search_spaces", "nas", "runs")


def moved(source: str, target: str) -> None:
    """``source``, a page outside of the folder of the pages, as ``target`` in it, its links still right."""
    path = ROOT / source
    text = path.read_text(encoding="utf-8")

    def link(found: re.Match[str]) -> str:
        place = (path.parent / found[2]).resolve().relative_to(ROOT)
        inside = place.parts[0] == "docs"
        return f"{found[1]}({'/'.join(place.parts[1:]) if inside else f'../{place}'}{found[3]})"

    text = re.sub(r"(\[[^\]]*\])\((?![a-z]+:|#)([^)#\s]+)((?:#[^)\s]*)?)\)", link, text)
    with mkdocs_gen_files.open(target, "w") as file:
        file.write(text)


def reference() -> None:
    """One page a module, and their order."""
    lines = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if "__main__" in name or any(part.startswith("_") for part in name.split(".")):
                continue
            depth = name.count(".")
            with mkdocs_gen_files.open(f"reference/{name}.md", "w") as file:
                file.write(f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n")
            lines.append(f"{'    ' * depth}* [{name.rpartition('.')[2]}]({name}.md)\n")
    with mkdocs_gen_files.open("reference/SUMMARY.md", "w") as file:
        file.writelines(lines)


moved("README.md", "index.md")
moved("runs/reference/README.md", "results.md")
moved("CHANGELOG.md", "changelog.md")
reference()
