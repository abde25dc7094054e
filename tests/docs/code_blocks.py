"""The code blocks of the pages, and the command line that their commands are held against."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from runs.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, the file it is (title="..."), its text."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All of a page. A fence that is not closed is an error."""
    found, opened = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            if opened is not None:
                opened[3].append(line)
        elif opened is None:
            language, _, rest = line[3:].partition(" ")
            title = re.search(r'title="([^"]*)"', rest)
            opened = (number, language, title[1] if title else "", [])
        else:
            found.append(Block(page, opened[0], opened[1], opened[2], "\n".join(opened[3])))
            opened = None
    assert opened is None, f"{page}: a block is not closed"
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each ``nas`` command of a console block, comments left out."""
    for line in block.text.splitlines():
        # Of a loop, the command in it; of several in a line, each.
        for part in re.split(r"&&|;(?:\s*do\b)?|\bdone\b", line):
            words = shlex.split(part.replace("$seed", "1"), comments=True)
            if words and words[0] == "nas":
                yield words[1:]


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of a command and the values of its parameters. Raises what the command line does for wrong ones."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("nas", list(arguments))
    name = []
    rest = [*getattr(context, "_protected_args", []), *context.args]
    while hasattr(command, "resolve_command") and rest:
        word, command, rest = command.resolve_command(context, rest)
        name.append(word)
        context = command.make_context(word, rest, parent=context)
        rest = [*getattr(context, "_protected_args", []), *context.args]
    return " ".join(name), context.params
