"""The text of exported source files: what one kind of network contributes, and how code is laid out."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from nas.export.plain_torch import ConvBnRelu, FactorisedReduce, ReluConvBn, SeparableConv

WIDTH = 110
"""Lines of generated code are broken above this many characters."""

LAYERS: tuple[type[nn.Module], ...] = (ReluConvBn, FactorisedReduce, SeparableConv, ConvBnRelu)
"""The layers an exported file may contain, in the order in which it defines them."""

TAKEN = {layer.__name__ for layer in LAYERS} | {
    *("json", "sys", "Path", "torch", "Tensor", "nn", "annotations"),
    *("CLASSES", "INPUT_SHAPE", "MEAN", "STD", "build", "load", "read_weights"),
    *dir(builtins),
    *keyword.kwlist,
}
"""Names that the exported file uses itself."""


@dataclass(frozen=True)
class Body:
    """What is particular to one network.

    size: its size in words;  cells: the texts of its classes of cells;  init, forward: the statements of its
    constructor and its forward;  renamed: the name that a layer of the package's network has in the exported one.
    """

    size: str
    cells: Sequence[str]
    init: Sequence[str]
    forward: Sequence[str]
    renamed: Callable[[str], str]


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
