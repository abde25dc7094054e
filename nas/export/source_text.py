"""The text of exported source files: a module as an expression, and how code is laid out."""

from __future__ import annotations

import builtins
import keyword
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from nas.export.source_cells import CellClass

WIDTH = 110
"""Lines of generated code are broken above this many characters."""

TAKEN = {
    *("json", "math", "sys", "Path", "torch", "Tensor", "nn", "annotations"),
    *("CLASSES", "INPUT_SHAPE", "MEAN", "STD", "build", "load", "read_weights"),
    *dir(builtins),
    *keyword.kwlist,
}
"""Names that the exported file uses itself, beside the classes of plain_torch.py."""

POSITIONAL = ("nn.Sequential", "nn.ModuleList")
"""What takes its modules without their names."""


@dataclass(frozen=True)
class Written:
    """A module as an exported file makes it.

    call: its class;  arguments: texts that it is given;  parts: its modules by their names, None where there is none;
    tensors: of its own, by name;  makes_parts: whether its class makes them itself, so that the text is silent of them;
    plain: what of plain_torch.py may make it whole;  comment: stands behind it.
    """

    call: str
    arguments: Sequence[str] = ()
    parts: Mapping[str, Written | None] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    makes_parts: bool = False
    plain: Plain | None = None
    comment: str = ""

    def named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """All tensors of the module by their names in its state."""
        for name, tensor in self.tensors.items():
            yield prefix + name, tensor
        for name, part in self.parts.items():
            if part is not None:
                yield from part.named_tensors(f"{prefix}{name}.")

    def all(self) -> Iterator[Written]:
        """The module and all in it."""
        yield self
        for part in self.parts.values():
            if part is not None:
                yield from part.all()


@dataclass(frozen=True)
class Plain:
    """A block of plain_torch.py that may make a module whole: class name, numbers, and what is not at its default."""

    name: str
    numbers: tuple[int, ...]
    options: Mapping[str, int]

    @property
    def arguments(self) -> list[str]:
        """As texts."""
        return [*map(str, self.numbers), *(f"{name}={value}" for name, value in self.options.items())]


Shapes = Mapping[str, Sequence[int]]
"""What modules of a network give for one image, by name; empty where nobody asks."""


@dataclass(frozen=True)
class Body:
    """What is particular to one network.

    size: its size in words;  parts: its modules in the order in which they are made;  forward: the statements of its
    forward;  kinds: its classes of cells;  tensors: of its own, by name, and init: the statements that make them.
    """

    size: str
    parts: Mapping[str, Written]
    forward: Sequence[str]
    kinds: Sequence[CellClass] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    init: Sequence[str] = ()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights and statistics by their names in the exported network."""
        yield from self.tensors.items()
        for name, part in self.parts.items():
            yield from part.named_tensors(f"{name}.")


def noted(shapes: Shapes, name: str, before: str = "") -> str:
    """The comment that tells what module ``name`` gives."""
    return f"{before}-> {[*shapes[name]]}" if name in shapes else ""


def spelled(written: Written | None) -> str:
    """The expression on one line."""
    if written is None:
        return "None"
    opening, closing = _brackets(written)
    items = [*written.arguments, *(key + spelled(part) for key, part in _shown(written))]
    return opening + ", ".join(items) + closing


def expression(written: Written | None, before: str, after: str, indent: int) -> list[str]:
    """``before``, the expression and ``after``: on one line where that fits, else a line for each argument."""
    margin = " " * indent
    comment = f"  # {written.comment}" if written is not None and written.comment else ""
    line = margin + before + spelled(written) + after + comment
    commented = any(part.comment for part in (*written.all(),)[1:]) if written is not None else False
    if written is None or (len(line) <= WIDTH and not commented):
        return [line]
    opening, closing = _brackets(written)
    shown = [*_shown(written)]
    if not shown and len(line) - len(comment) <= WIDTH:
        return [margin + comment.strip(), line.removesuffix(comment)]
    lines = [margin + before + opening + comment]
    if not shown and len(inner := ", ".join(written.arguments)) + indent + 4 <= WIDTH:
        lines.append(f"{margin}    {inner}")
    else:
        for argument in written.arguments:
            lines += wrapped(f"{argument},", indent + 4)
        for key, part in shown:
            lines += expression(part, key, ",", indent + 4)
    return [*lines, margin + closing + after]


def wrapped(text: str, indent: int) -> list[str]:
    """A text in lines that are broken at its spaces."""
    margin = " " * indent
    return textwrap.wrap(
        text, WIDTH, initial_indent=margin, subsequent_indent=margin + "    ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def listed(opening: str, items: Sequence[str], closing: str, *, indent: int) -> list[str]:
    """``opening``, items separated by commas, ``closing``: on one line where it fits, else one line an item."""
    margin = " " * indent
    line = margin + opening + ", ".join(items) + closing
    if len(line) <= WIDTH:
        return [line]
    lines = [f"{margin}    {item}," for item in items]
    # The name of a class of images may be longer than any line.
    lines = [f"{item}  # noqa: E501" if len(item) > WIDTH else item for item in lines]
    return [margin + opening, *lines, margin + closing]


def quoted(text: str) -> str:
    """A string literal, in double quotes where that needs no escape."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if '"' not in literal else literal


def words(text: str) -> str:
    """The letters and digits of a name from a file, which may hold anything: safe inside code and docstrings."""
    return " ".join(re.findall("[A-Za-z0-9]+", text)) or "unnamed"


def _brackets(written: Written) -> tuple[str, str]:
    square = written.call == "nn.ModuleList"
    return written.call + ("([" if square else "("), "])" if square else ")"


def _shown(written: Written) -> Iterator[tuple[str, Written | None]]:
    """The parts that the text tells of, each with what stands before it."""
    if not written.makes_parts:
        for name, part in written.parts.items():
            yield "" if written.call in POSITIONAL else f"{name}=", part
