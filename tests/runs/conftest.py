"""The real command line called in this process, tiny data, and one tiny finished run that the tests copy."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from runs.cli import main


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


Nas = Callable[..., Outcome]


def nas_in_process(*arguments: object) -> Outcome:
    """``nas ARGUMENTS`` through the real entry point, without the price of a new process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["nas", *map(str, arguments)])
        patch.delenv("FORCE_COLOR", raising=False)
        try:
            main()
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    return Outcome(status, out.getvalue(), err.getvalue())


@pytest.fixture
def nas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nas]:
    """The command line, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield nas_in_process
    torch.set_num_threads(threads)


def settings(*assignments: str) -> list[str]:
    """``--set`` before each."""
    return [part for assignment in assignments for part in ("--set", assignment)]


TINY = (
    "workers=1",
    "threads=1",
    "search.channels=2",
    "search.cells=4",
    "search.batch_size=256",
    "search.monitored=32",
    'search.gradient.name="first_order"',
    "search.attack.steps=1",
    "search.stages.0.until=1",
    "search.stages.1.until=2",
    "train.parameters=0",
    "train.channels=3",
    "train.epochs=1",
    "train.batch_size=256",
    "train.attack.steps=1",
    'train.validation_attack={name="pgd", steps=1}',
    "baselines.random=1",
    "baselines.tolerance=0.3",
    "baselines.plain_depths=[1, 1]",
    "baselines.plain_widths=[4, 8]",
    'evaluate.trials=[{name="fgsm", attack={name="fgsm"}}, {name="pgd-2", attack={name="pgd", steps=2}, restarts=2}]',
)
"""The digits recipe cut down until every task takes about a second."""


def save_arrays(path: Path, **changes: Any) -> Path:
    """Forty-eight training and sixteen test images of two classes that differ in brightness, as .npz."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 48), ("test", 16)):
        labels = np.arange(count) % 2
        arrays[f"y_{part}"] = labels
        arrays[f"x_{part}"] = (random.integers(0, 120, (count, 8, 8)) + 100 * labels[:, None, None]).astype(np.uint8)
    np.savez(path, **(arrays | changes))
    return path


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """A data set of the user's own, small enough that a whole run takes seconds."""
    return save_arrays(tmp_path / "mine.npz")


def small(arrays: Path) -> list[str]:
    """Settings of a run on ``arrays`` that passes through every task but the baselines'."""
    return settings(*TINY, f'data={{name="arrays", path="{arrays}"}}', "baselines={random=0}", "search.batch_size=16")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one tiny run on the digits, carried out once; look at it, but change only a ``run_copy``."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    path = shared / "finished_run"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            outcome = nas_in_process("run", "digits", "--out", f"{path}.begun", *settings(*TINY))
            assert outcome.status == 0, outcome.err
            Path(f"{path}.out").write_text(outcome.out, encoding="utf-8")
            # A run directory can be moved.
            os.rename(f"{path}.begun", path)
    return path


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to work on."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
