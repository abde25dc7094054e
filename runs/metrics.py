"""Append-only metrics of a task: JSON lines for programs, TensorBoard events for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nas.tensor_file import write_text


class MetricsLog:
    """metrics.jsonl and TensorBoard events in a task's folder.

    ``restore`` sets both to the records a checkpoint knows, so that after a crash no line is lost or doubled;
    ``log`` adds one. Records hold no times: those of an interrupted and an uninterrupted run are the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.writer: Any = None

    def restore(self, records: list[dict[str, Any]]) -> None:
        """Begin with ``records``, dropping lines written after the checkpoint they came from."""
        # TensorBoard's import is slow: only tasks that log pay for it.
        from torch.utils.tensorboard import SummaryWriter

        write_text("".join(json.dumps(record) + "\n" for record in records), self.path)
        self.writer = SummaryWriter(str(self.folder), purge_step=len(records) or None)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for tag, value in _scalars(record):
            self.writer.add_scalar(tag, value, record["epoch"])

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.writer is not None:
            self.writer.close()


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in a record; pairs [part, whole] as their first number."""
    for name, value in record.items():
        if isinstance(value, bool) or name == "epoch":
            continue
        if isinstance(value, int | float):
            yield name, value
        elif isinstance(value, Mapping) and name != "genotype":
            for key, item in value.items():
                first = item[0] if isinstance(item, list) and item else item
                if isinstance(first, int | float):
                    yield f"{name}/{key}", first
