"""A working directory for every test, and one tiny finished run on the digits that the tests look at or copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_runs import TINY, nas, save_arrays, small_recipe


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Runs go to ./runs unless told otherwise: no test may leave one in the project."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """An .npz file of the user's own."""
    return save_arrays(tmp_path / "mine.npz")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A small recipe of the user's own."""
    return small_recipe(tmp_path)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, carried out once; look at it, but work on a ``run_copy``."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    path = shared / "finished_run"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            outcome = nas("run", "digits", "--out", f"{path}.begun", *TINY)
            assert outcome.status == 0, outcome.err
            # A run directory can be moved.
            os.rename(f"{path}.begun", path)
    return path


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to work on."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))
