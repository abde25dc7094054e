"""Tiny runs through the real command line: the entry point called in this process, small recipes, small data."""

from __future__ import annotations

import io
import json
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runs.cli import main

NAS = Path(sys.executable).with_name("nas")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit status and both streams."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output as JSON, which must be all there is on it."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    @property
    def refusal(self) -> str:
        """The one line with which wrong input is refused."""
        assert self.status == 2, f"exit status {self.status}\n{self.out}\n{self.err}"
        assert self.err.startswith("nas: ") and self.err.endswith("\n"), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.removeprefix("nas: ").rstrip("\n")


def nas(*arguments: object) -> Outcome:
    """``nas ARGUMENTS`` through its entry point, without the price of a new process."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["nas", *map(str, arguments)])
        patch.delenv("FORCE_COLOR", raising=False)
        try:
            main()
        except SystemExit as stop:
            status = stop.code or 0
        except Exception:
            # What Python itself does with an exception that nobody caught.
            traceback.print_exc()
            status = 1
    return Outcome(status, out.getvalue(), err.getvalue())


def settings(*assignments: str) -> list[str]:
    """``--set`` before each."""
    return [part for assignment in assignments for part in ("--set", assignment)]


def toml(path: Path) -> str:
    """A path as a TOML value."""
    return json.dumps(str(path))


TINY = settings(
    "workers=1",
    "threads=1",
    "search.channels=2",
    "search.cells=4",
    "data.validation=0.8",
    "search.batch_size=128",
    "search.monitored=32",
    "search.gradient={name='first_order'}",
    "search.attack.steps=1",
    "search.stages.0.until=1",
    "search.stages.1.until=2",
    "train.parameters=0",
    "train.channels=3",
    "train.epochs=1",
    "train.batch_size=16",
    "train.attack.steps=1",
    "train.validation_attack={name='pgd', steps=1}",
    "baselines.random=1",
    "baselines.tolerance=0.3",
    "baselines.plain_depths=[1, 1]",
    "baselines.plain_widths=[4, 8]",
    "evaluate.trials=[{name='fgsm', attack={name='fgsm'}}, {name='pgd', attack={name='pgd', steps=2}, restarts=2}]",
)
"""The digits recipe cut down until every task takes about a second."""


def save_arrays(path: Path, **changes: Any) -> Path:
    """As .npz: 96 training and 96 test images of two classes that differ a little in brightness."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 96), ("test", 96)):
        labels = np.arange(count) % 2
        arrays[f"y_{part}"] = labels
        arrays[f"x_{part}"] = (random.integers(0, 120, (count, 8, 8)) + 15 * labels[:, None, None]).astype(np.uint8)
    np.savez(path, **(arrays | changes))
    return path


SMALL = """
name = "small"
device = "cpu"

[data]
name = "arrays"
path = {path}
validation = 0.5

[threat_model]
epsilon = 0.04

[search]
channels = 2
cells = 4
batch_size = 32
monitored = 8
gradient = {{ name = "first_order" }}
attack = {{ name = "pgd", steps = 1 }}

[[search.stages]]
until = 1
objectives = ["adversarial"]

[[search.stages]]
until = 3
objectives = ["natural", "adversarial"]
combine = "min_norm"

[train]
channels = 2
cells = 4
epochs = 3
batch_size = 8
attack = {{ name = "pgd", steps = 1 }}
validation_attack = {{ name = "fgsm" }}

[compress]
name = "magnitude"
fine_tune = {{ epochs = 2 }}

[baselines]
random = 0

[evaluate]
trials = [
    {{ name = "fgsm", attack = {{ name = "fgsm" }} }},
    {{ name = "pgd x 3", attack = {{ name = "pgd", steps = 1 }}, restarts = 3 }},
]
"""


def small_recipe(folder: Path) -> Path:
    """A recipe of the user's own, on data of the user's own, whose run takes seconds."""
    path = folder / "mine.toml"
    path.write_text(SMALL.format(path=toml(save_arrays(folder / "mine.npz"))), encoding="utf-8")
    return path


def record(run: Path) -> dict[str, bytes]:
    """Every file of a run, by name, but those that hold times or tell of the machine."""
    volatile = ("timing.json", "throughput.json", "report.html", "MODEL_CARD.md", "environment.json")
    volatile += ("lock", "lock.workers")
    files = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if path.name not in volatile and not path.name.startswith("events.")
    }


def differences(run: Path, reference: Path) -> list[str]:
    """Files that only one of two runs has, or that differ."""
    one, other = record(run), record(reference)
    assert "results.json" in other and "train/searched/checkpoint.safetensors" in other
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
