"""The record of a run: made whole, locked against a second writer, and each result written in one step."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import nas.tensor_file
from nas.errors import InputError
from runs.directory import create, default_path, flatten, open_run
from runs.metrics import MetricsLog, log_outcome
from search_spaces.catalogue import load_genotype

TABLE = {"name": "x", "seed": 1, "data": {"name": "digits"}, "list": [{"a": 1}]}

# A forked child is all that is needed here: it locks, says so, and waits.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def hold(path: Path, connection: Connection) -> None:
    """Life of another process that works on the run."""
    with open_run(path).locked():
        connection.send("locked")
        connection.recv()


def work(path: Path, connection: Connection) -> None:
    """Life of a worker process that outlives its parent by a moment."""
    with open(path / "lock.workers", "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        connection.send("locked")
        time.sleep(0.5)


@contextmanager
def another_process(target: Callable[[Path, Connection], None], path: Path) -> Iterator[Any]:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(path, there), daemon=True)
    process.start()
    try:
        assert here.poll(20) and here.recv() == "locked"
        yield process
    finally:
        process.kill()
        process.join()


# --- made, opened


def test_what_was_asked_for_is_read_back(tmp_path: Path) -> None:
    made = create(tmp_path / "a" / "run", "train", TABLE, {"schema": 1})
    assert open_run(tmp_path / "a" / "run") == made
    assert (made.command, made.table, made.genotype) == ("train", TABLE, {"schema": 1})
    assert json.loads((made.path / "environment.json").read_text())["torch"]


def test_the_record_is_complete_or_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.json comes last: a folder with it can be resumed."""
    written = []
    original = nas.tensor_file.write_bytes

    def write(content: bytes, path: Path) -> None:
        written.append(path.name)
        original(content, path)

    monkeypatch.setattr("nas.tensor_file.write_bytes", write)
    create(tmp_path / "run", "run", TABLE)
    assert written == ["environment.json", "run.json"]


def test_what_was_left_when_it_was_stopped_while_it_was_made_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = nas.tensor_file.write_bytes

    def write(content: bytes, path: Path) -> None:
        path.with_name(path.name + ".part").write_bytes(content[:5])
        if path.name == "run.json":
            raise KeyboardInterrupt
        original(content, path)

    with monkeypatch.context() as patch:
        patch.setattr("nas.tensor_file.write_bytes", write)
        with pytest.raises(KeyboardInterrupt):
            create(tmp_path / "run", "run", TABLE)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"environment.json", "run.json.part"}
    create(tmp_path / "run", "run", TABLE)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"environment.json", "run.json"}


def test_full_disk_while_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(content: bytes, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nas.tensor_file.write_bytes", write)
    with pytest.raises(InputError, match="No space left"):
        create(tmp_path / "run", "run", TABLE)


def test_default_paths_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    first = default_path("x")
    first.mkdir(parents=True)
    second = default_path("x")
    assert second != first and second.parent == first.parent and second.name.startswith("x-")


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": "f"}) == {"a.b.c": 1, "a.d": [1, 2], "e": "f"}


# --- locked


def test_a_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    run = create(tmp_path / "run", "run", TABLE)
    with another_process(hold, run.path) as process:
        with pytest.raises(InputError, match=rf"in use by process {process.pid}\b"), run.locked():
            pytest.fail("two processes work on one run")
        # To be refused does not erase the owner's name.
        with pytest.raises(InputError, match=rf"in use by process {process.pid}\b"), run.locked():
            pytest.fail("two processes work on one run")


def test_the_lock_of_a_killed_process_is_void_at_once(tmp_path: Path) -> None:
    run = create(tmp_path / "run", "run", TABLE)
    with another_process(hold, run.path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        begin = time.monotonic()
        with run.locked():
            assert (run.path / "lock").read_text() == str(os.getpid())
        assert time.monotonic() - begin < 1
    with run.locked():
        pass


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    run = create(tmp_path / "run", "run", TABLE)
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with run.locked():
        pass


def test_workers_of_a_killed_run_are_waited_for(tmp_path: Path) -> None:
    run = create(tmp_path / "run", "run", TABLE)
    # Within the lock the worker may still be there, but it has let go of the run.
    with another_process(work, run.path), run.locked(), open(run.path / "lock.workers", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- tasks


def test_a_task_is_done_when_its_result_stands(tmp_path: Path) -> None:
    run = create(tmp_path / "run", "run", TABLE)
    assert run.result("train/x") is None
    with pytest.raises(InputError, match="train/x"):
        run.needed("train/x")
    run.finish("train/x", {"accuracy": 0.5}, 1.234)
    assert run.result("train/x") == run.needed("train/x") == {"accuracy": 0.5}
    assert json.loads((run.path / "train/x/timing.json").read_text()) == {"seconds": 1.23}


def test_what_is_missing_is_finished_by_the_command_that_began_it(tmp_path: Path) -> None:
    run = create(tmp_path / "run", "search", TABLE)
    with pytest.raises(InputError, match=f"nas search --resume {run.path}"):
        run.needed("analyse")


@pytest.mark.parametrize("failure", ["write", "replace"])
def test_finish_is_one_step(failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it breaks off, the task is done with its whole result or not done at all."""
    run = create(tmp_path / "run", "run", TABLE)
    names = []
    replace = os.replace

    class Broken:
        """``os`` on a disk that fails just before result.json would stand."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def replace(self, source: Path, target: Path) -> None:
            names.append(Path(target).name)
            if failure == "replace" and Path(target).name == "result.json":
                raise OSError("power failure")
            replace(source, target)

        def fsync(self, descriptor: int) -> None:
            if failure == "write" and names == ["timing.json"] and os.path.isfile(f"/proc/self/fd/{descriptor}"):
                raise OSError("power failure")
            os.fsync(descriptor)

    monkeypatch.setattr("nas.tensor_file.os", Broken())
    with pytest.raises(OSError, match="power failure"):
        run.finish("search", {"epochs": [1, 2, 3]}, 1.0)
    assert run.result("search") is None
    assert names[0] == "timing.json"
    monkeypatch.undo()
    run.finish("search", {"epochs": [1, 2, 3]}, 1.0)
    assert run.result("search") == {"epochs": [1, 2, 3]}
    assert sorted(path.name for path in (run.path / "search").iterdir()) == ["result.json", "timing.json"]


# --- metrics


def lines(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_restore_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"epoch": epoch, "loss": 1 / (epoch + 3), "b": {"x": 0.1}} for epoch in range(4)]
    with MetricsLog(tmp_path, "search") as metrics:
        metrics.restore([])
        for record in records:
            metrics.log(record)
    assert lines(tmp_path) == records
    # Killed while the fifth line was written; the checkpoint knows two epochs.
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 4, "lo')
    with MetricsLog(tmp_path, "search") as metrics:
        metrics.restore(records[:2])
        assert lines(tmp_path) == records[:2]
        metrics.log(records[2])
    assert lines(tmp_path) == records[:3]


def test_restore_writes_lines_that_were_lost(tmp_path: Path) -> None:
    """The checkpoint reaches the disk before the file of lines need to."""
    with MetricsLog(tmp_path, "search") as metrics:
        metrics.restore([{"epoch": 0, "loss": 0.5}])
    assert lines(tmp_path) == [{"epoch": 0, "loss": 0.5}]


def test_a_log_that_never_began_closes(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, "search"):
        pass
    assert not list(tmp_path.iterdir())


def recorded(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[int]]]:
    """What TensorBoard reads of a folder: the points of each number, and the steps of each picture."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, round(event.value, 4)) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [event.step for event in events.Images(tag)] for tag in tags["images"]}


def searched(epoch: int) -> dict[str, Any]:
    """A record of a search whose accurate cell changes in epoch 2 only."""
    genotype = load_genotype("arnas").to_data()
    if epoch < 2:
        genotype["cells"]["accurate"] = genotype["cells"]["robust"]
    weights = {"skip_connect": [0.5] * 5, "sep_conv_3x3": [0.5] * 5}
    return {"epoch": epoch, "gamma": epoch / 8, "free": {"robust": [1, 4]}, "genotype": genotype,
            "mixing_weights": {"robust": weights}}  # fmt: skip


def test_events_are_neither_doubled_nor_lost(tmp_path: Path) -> None:
    """Killed twice: before any checkpoint, and once when it knows two of three epochs."""
    for known, until in ((0, 1), (0, 3), (2, 4)):
        # A process that is killed does not close its log.
        metrics = MetricsLog(tmp_path, "search")
        metrics.restore([searched(epoch) for epoch in range(known)])
        for epoch in range(known, until):
            metrics.log(searched(epoch))
    scalars, images = recorded(tmp_path)
    assert scalars == {
        "search/gamma": [(epoch, epoch / 8) for epoch in range(4)],
        "search free/robust": [(epoch, 0.25) for epoch in range(4)],
    }
    assert images["search mixing weights/robust"] == [0, 1, 2, 3]
    # A cell is drawn when it is another than in the epoch before.
    assert images["search cell/accurate"] == [0, 2]
    assert images["search cell/robust"] == [0]


def test_an_epoch_is_shown_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    """A process that is killed loses nothing that its checkpoint may know, and TensorBoard follows a search."""
    with MetricsLog(tmp_path, "train") as metrics:
        metrics.restore([])
        for epoch in range(3):
            metrics.log({"epoch": epoch, "loss": 0.5})
            assert recorded(tmp_path)[0] == {"train/loss": [(one, 0.5) for one in range(epoch + 1)]}


def test_the_outcome_is_a_row_of_hyperparameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):
        log_outcome(tmp_path, {"seed": 3, "train.widths": [1, 2]}, {"worst case": 0.5, "natural": None})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert recorded(tmp_path)[0] == {"whole run/worst case": [(0, 0.5)]}
    metadata = EventAccumulator(str(tmp_path)).Reload().SummaryMetadata("_hparams_/session_start_info")
    assert b"train.widths" in metadata.plugin_data.content
