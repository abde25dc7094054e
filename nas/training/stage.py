"""What a training method prepares, kept on disk so that a call that was cut off goes on where it stood."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.tensor_file import Tree, read_tree, write_tree


@dataclass(frozen=True)
class Stage:
    """A result in the file ``name``.safetensors of ``folder`` (None: kept nowhere), made from ``source``.

    source: all that the result depends on, as values that print what they are. What was made from something else is
    not this stage's result: it is made again.
    """

    folder: Path | None
    name: str
    source: tuple[Any, ...]

    def read(self) -> Tree:
        """What was written last, or an empty tree."""
        if self.path is None or not self.path.exists():
            return {}
        tree = read_tree(self.path)
        return tree["result"] if tree.get("source") == self._digest else {}

    def write(self, result: Tree) -> None:
        """Keep ``result``, which may be one that is not finished yet."""
        if self.path is not None:
            write_tree({"source": self._digest, "result": result}, self.path)

    @property
    def path(self) -> Path | None:
        """The file."""
        return None if self.folder is None else self.folder / f"{self.name}.safetensors"

    @property
    def _digest(self) -> str:
        return hashlib.blake2b(repr(self.source).encode(), digest_size=8).hexdigest()
