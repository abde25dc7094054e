"""What the machine refuses or does: a full disk, a folder that may not be written, memory that runs out, a clock that
jumps."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, differences, nas, settings, small_recipe

from nas.errors import Failure, InputError, of_the_machine
from nas.tensor_file import write_bytes


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within it, no process started here or later can write a file beyond ``size`` bytes: a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def out_of_memory(*arguments: Any, **options: Any) -> Any:
    """More than any machine has."""
    return torch.empty(1 << 50)


def test_a_file_is_written_whole_or_not_at_all_and_the_error_names_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_bytes(b"old", path)
    with largest_file(1000), pytest.raises(OSError) as caught:
        write_bytes(b"x" * 5000, path)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_which_errors_are_the_machines() -> None:
    with pytest.raises(RuntimeError) as caught:
        out_of_memory()
    assert isinstance(of_the_machine(caught.value), Failure)
    assert isinstance(of_the_machine(MemoryError()), Failure)
    assert isinstance(of_the_machine(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")), Failure)
    for number in (errno.ENOSPC, errno.EDQUOT):
        assert isinstance(of_the_machine(OSError(number, os.strerror(number), "a/b")), Failure)
    for number in (errno.EACCES, errno.EROFS):
        assert isinstance(of_the_machine(OSError(number, os.strerror(number), "a/b")), InputError)
    assert of_the_machine(FileNotFoundError(errno.ENOENT, "no such file")) is None
    assert of_the_machine(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


FULL = "File too large; make room, then --resume continues a run"


@pytest.mark.slow
def test_a_run_goes_on_when_there_is_room_again(tmp_path: Path, finished_run: Path) -> None:
    run = tmp_path / "run"
    with largest_file(30_000):
        outcome = nas("run", "digits", "--out", run, *TINY)
    assert outcome.status == 1 and FULL in outcome.err, outcome.err
    assert "Traceback" not in outcome.err
    assert not list(run.rglob("*.part"))
    assert nas("run", "--resume", run).status == 0
    assert differences(run, finished_run) == []


@pytest.mark.slow
def test_a_worker_tells_of_a_full_disk(tmp_path: Path) -> None:
    with largest_file(30_000):
        outcome = nas("run", "digits", "--out", tmp_path / "run", *TINY, "--set", "workers=2")
    assert outcome.status == 1 and FULL in outcome.err, outcome.err
    assert "Traceback" not in outcome.err


def test_a_recipe_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with largest_file(100):
        outcome = nas("new", "mine", "--data", "digits")
    assert outcome.status == 1 and FULL in outcome.err and outcome.err.count("\n") == 1, outcome.err
    assert os.listdir(tmp_path) == []


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runs.networks.train", out_of_memory)
    recipe = small_recipe(tmp_path)
    outcome = nas("run", recipe, "--out", tmp_path / "run", *settings("workers=1"))
    assert outcome.status == 1 and outcome.err.count("\n") == 1, outcome.err
    assert "memory ran out; lower workers, batch sizes or channels" in outcome.err


@pytest.mark.slow
def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set back or on by days while it runs, as by a machine that wakes or asks for the time: nothing goes by it."""
    recipe = small_recipe(tmp_path)
    assert nas("run", recipe, "--out", tmp_path / "steady", *settings("workers=1")).status == 0
    jumps, real = itertools.cycle((0, 86_400 * 400, -86_400, 3_600, -86_400 * 9_000)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    outcome = nas("run", recipe, "--out", tmp_path / "jumping", *settings("workers=1"))
    assert outcome.status == 0, outcome.err
    assert differences(tmp_path / "jumping", tmp_path / "steady") == []
    assert nas("report", tmp_path / "jumping").status == 0
