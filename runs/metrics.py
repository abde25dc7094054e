"""Append-only metrics of a task: JSON lines for programs, TensorBoard events for people."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nas import ranks
from nas.tensor_file import write_text
from search_spaces.genotype import Genotype, genotype_from_data

FINAL_STEP = 0


class MetricsLog:
    """metrics.jsonl and TensorBoard events in a task's folder.

    ``restore`` sets both to the records a checkpoint knows, so that after a crash no line is lost or doubled;
    ``log`` adds one. Records hold no times: those of an interrupted and an uninterrupted run are the same.
    group: what TensorBoard shows the numbers under; networks of one group share their charts.
    """

    def __init__(self, folder: Path, group: str) -> None:
        self.folder = folder
        self.group = group
        self.path = folder / "metrics.jsonl"
        self.writer: Any = None
        self.cells: dict[str, Any] = {}
        self.told_by = threading.excepthook

    def restore(self, records: list[dict[str, Any]]) -> None:
        """Begin with ``records``, dropping lines written after the checkpoint they came from."""
        write_text("".join(json.dumps(record) + "\n" for record in records), self.path)
        if ranks.leads():
            self.writer = _writer(self.folder, len(records))
        self.cells = _cells(records[-1]) if records else {}

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one record. Of a data-parallel run, the first process does."""
        if not ranks.leads():
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        epoch = record["epoch"]
        for tag, value in _scalars(record, self.group):
            self.writer.add_scalar(tag, value, epoch)
        self._draw(record, epoch)
        # Shown at once, and on disk before the checkpoint that knows the record: else a kill would lose it.
        self.writer.flush()

    def _draw(self, record: Mapping[str, Any], epoch: int) -> None:
        """The mixing weights of the epoch, and the cells they give where these are not those of the epoch before."""
        weights, cells = record.get("mixing_weights") or {}, _cells(record)
        if not weights and not cells:
            return
        from nas.analysis.raster import cell_png, mixing_png

        for kind, table in weights.items():
            self._show(f"{self.group} mixing weights/{kind}", mixing_png(table), epoch)
        for kind, cell in cells.items():
            if cell != self.cells.get(kind):
                self._show(f"{self.group} cell/{kind}", cell_png(cell), epoch)
        self.cells = cells

    def _show(self, tag: str, png: bytes, epoch: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(encoded_image_string=png, colorspace=3)
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), epoch)

    def __enter__(self) -> MetricsLog:
        self.told_by = threading.excepthook
        threading.excepthook = self._of_a_thread
        return self

    def _of_a_thread(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread and raises here what fails there, a full disk: that is told once."""
        if not isinstance(failure.exc_value, OSError):
            self.told_by(failure)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.writer is not None:
                self.writer.close()
        finally:
            threading.excepthook = self.told_by


def log_outcome(folder: Path, recipe: Mapping[str, Any], outcome: Mapping[str, float | None]) -> None:
    """A row of TensorBoard's table of hyperparameters, in ``folder``: the keys of the recipe and what came of it."""
    from torch.utils.tensorboard.summary import hparams

    found = {f"whole run/{name}": value for name, value in outcome.items() if value is not None}
    settings = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in recipe.items()}
    writer = _writer(folder, FINAL_STEP)
    # Without the summary of the experiment, which would fix the columns to those of the first run found.
    _, start, end = hparams(settings, found)
    for summary in (start, end):
        writer.file_writer.add_summary(summary)
    for name, value in found.items():
        writer.add_scalar(name, value, FINAL_STEP)
    writer.close()


def _writer(folder: Path, first: int) -> Any:
    """A writer of events whose steps begin at ``first``: what older files in ``folder`` hold from there on is void."""
    # TensorBoard's import is slow: only tasks that log pay for it.
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first)


def _cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a record's genotype, by kind."""
    genotype = genotype_from_data(record["genotype"]) if "genotype" in record else None
    return dict(genotype.cells) if isinstance(genotype, Genotype) else {}


def _scalars(record: Mapping[str, Any], group: str) -> Iterator[tuple[str, float]]:
    """The numbers in a record; pairs [part, whole] as their share."""
    for name, value in record.items():
        if isinstance(value, bool) or name == "epoch":
            continue
        if isinstance(value, int | float):
            yield f"{group}/{name}", value
        elif isinstance(value, Mapping) and name not in ("genotype", "mixing_weights"):
            for key, item in value.items():
                number = item[0] / max(item[1], 1) if isinstance(item, list) and len(item) == 2 else item
                if isinstance(number, int | float):
                    yield f"{group} {name}/{key}", number
