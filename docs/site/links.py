"""Links of a page that lead out of the folder of the pages: to the repository if its address is known, else plain text.

REPOSITORY=https://host/owner/name/blob/main mkdocs build --strict
"""

from __future__ import annotations

import os
import posixpath
import re
from typing import Any

PAGES = {"README.md": "index.md", "runs/reference/README.md": "results.md", "CHANGELOG.md": "changelog.md"}
"""Files outside that are pages of the site."""


def on_page_markdown(markdown: str, page: Any, **ignored: Any) -> str:
    """The text of ``page`` with links that the site can follow."""
    here = posixpath.dirname(f"docs/{page.file.src_uri}")
    repository = os.environ.get("REPOSITORY", "").rstrip("/")

    def link(found: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(here, found[3]))
        if place.startswith("docs/") and not place.startswith("docs/site/"):
            return found[0]
        inside = PAGES.get(place) or PAGES.get(f"{place}/README.md")
        if inside:
            return f"[{found[2]}]({posixpath.relpath(inside, here.removeprefix('docs').strip('/') or '.')})"
        if repository:
            return f"[{found[2]}]({repository}/{place})"
        return found[2] if found[2].startswith("`") else f"`{found[2]}`" if "." in found[2] else found[2]

    return re.sub(r"(?<!!)(\[)([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(?:#[^)\s]*)?\)", link, markdown)
