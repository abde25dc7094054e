"""Tasks in worker processes: in order, side by side, and never left alone when one of them fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nas.errors import Diverged, Failure, InputError
from runs import pipeline
from runs.context import Context
from runs.directory import RunDirectory, create
from runs.recipe import read_table
from runs.tasks import Task
from search_spaces.genotype import GenotypeError

# Workers are forked here, not spawned: that spares their imports, and a scripted plan needs no pickling.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

Script = Callable[..., RunDirectory]


class Heard:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.progress: list[tuple[str, float]] = []

    def started(self, task: str) -> None:
        self.events.append(("started", task))

    def progressed(self, task: str, progress: float) -> None:
        self.progress.append((task, progress))

    def finished(self, task: str, seconds: float) -> None:
        self.events.append(("finished" if seconds else "before", task))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Makes a run whose tasks are those given, with so many forked workers."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(pipeline.multiprocessing, "get_context", lambda kind: fork)

    def write(workers: int, *tasks: Task) -> RunDirectory:
        monkeypatch.setattr(pipeline, "plan", lambda recipe, command: list(tasks))
        return create(tmp_path / "run", "run", read_table("digits", [f"workers={workers}"]))

    return write


def leaving_marks(name: str, needs: tuple[str, ...], seconds: float) -> Task:
    """A task that writes down when it began, what was done by then, and its process."""

    def work(context: Context) -> dict[str, Any]:
        done = [task for task in needs if context.run.result(task) is not None]
        begin = time.monotonic()
        context.tick(0.5)
        time.sleep(seconds)
        return {"begin": begin, "end": time.monotonic(), "needed": done, "pid": os.getpid()}

    return Task(name, needs, work)


def failing(name: str, act: Callable[[], object]) -> Task:
    """A task that does this at once."""

    def work(context: Context) -> dict[str, Any]:
        act()
        return {}

    return Task(name, (), work)


def raising(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def sleeping(name: str) -> Task:
    """A task of five minutes, which nobody waits for; first it leaves its process id."""

    def work(context: Context) -> dict[str, Any]:
        (context.run.folder(name) / "pid").write_text(str(os.getpid()))
        time.sleep(300)
        return {}

    return Task(name, (), work)


def waiting_for(path: Path, act: Callable[[], object]) -> Callable[[], object]:
    """``act`` once ``path`` is there."""

    def wait() -> None:
        deadline = time.monotonic() + 120  # a busy machine starts workers slowly
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        act()

    return wait


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


DIAMOND = (
    leaving_marks("a", (), 0.05),
    leaving_marks("slow", ("a",), 0.3),
    leaving_marks("quick", ("a",), 0.05),
    leaving_marks("after quick", ("quick",), 0.05),
    leaving_marks("alone", (), 0.05),
    leaving_marks("last", ("slow", "after quick", "alone"), 0.01),
)


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_tasks_run_only_after_their_needs(script: Script, workers: int) -> None:
    run, heard = script(workers, *DIAMOND), Heard()
    pipeline.carry_out(run, heard)
    results = {task.name: run.needed(task.name) for task in DIAMOND}
    for task in DIAMOND:
        assert results[task.name]["needed"] == list(task.needs)
        for need in task.needs:
            assert results[need]["end"] <= results[task.name]["begin"]
        assert heard.events.index(("started", task.name)) < heard.events.index(("finished", task.name))
        assert heard.events.count(("finished", task.name)) == 1
    assert {name for name, _ in heard.progress} == set(results)
    processes = {result["pid"] for result in results.values()}
    if workers == 1:
        assert processes == {os.getpid()}
    else:
        assert os.getpid() not in processes and len(processes) <= min(workers, len(DIAMOND))
        # Side by side: nobody waits for the slow one who does not need it.
        assert results["after quick"]["end"] < results["slow"]["end"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_done_is_not_done_again(script: Script, workers: int) -> None:
    run, heard = script(workers, *DIAMOND), Heard()
    for name in ("a", "slow", "alone"):
        run.finish(name, {"end": 0.0, "old": True}, 1.0)
    pipeline.carry_out(run, heard)
    assert {name for event, name in heard.events if event == "before"} == {"a", "slow", "alone"}
    assert {name for event, name in heard.events if event == "finished"} == {"quick", "after quick", "last"}
    assert run.needed("slow")["old"] and "pid" in run.needed("last")
    again = Heard()
    pipeline.carry_out(run, again)
    assert {event for event, _ in again.events} == {"before"}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (InputError("the file is bad"), InputError, ["the file is bad"]),
        (GenotypeError("node 2 is bad"), (InputError, GenotypeError), ["node 2 is bad"]),
        (Diverged("the loss is nan"), Failure, ["the loss is nan"]),
        (ZeroDivisionError("by zero"), pipeline.TaskFailed, ["bad", "Traceback", "ZeroDivisionError: by zero"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_reaches_the_caller_and_ends_the_others(
    script: Script, tmp_path: Path, error: Exception, kind: Any, words: list[str]
) -> None:
    mark = tmp_path / "run" / "long" / "pid"
    run = script(2, sleeping("long"), failing("bad", waiting_for(mark, raising(error))))
    begin = time.monotonic()
    with pytest.raises(kind) as raised:
        pipeline.carry_out(run, Heard())
    assert time.monotonic() - begin < 20
    for word in words:
        assert word in str(raised.value)
    if kind is not pipeline.TaskFailed:
        assert "Traceback" not in str(raised.value)
    assert not alive(int(mark.read_text()))
    assert run.result("long") is None and run.result("bad") is None
    # Nobody holds the run any more.
    with run.locked():
        pass


def test_an_error_in_one_process_is_the_error(script: Script) -> None:
    run = script(1, failing("bad", raising(ZeroDivisionError("by zero"))))
    with pytest.raises(ZeroDivisionError):
        pipeline.carry_out(run, Heard())


@pytest.mark.parametrize(
    ("act", "code"),
    [(partial(os._exit, 7), "7"), (lambda: os.kill(os.getpid(), signal.SIGKILL), "-9")],
    ids=["exit", "kill"],
)
def test_a_worker_that_dies_is_missed(script: Script, tmp_path: Path, act: Callable[[], object], code: str) -> None:
    mark = tmp_path / "run" / "long" / "pid"
    run = script(2, sleeping("long"), failing("bad", waiting_for(mark, act)))
    with pytest.raises(pipeline.WorkerDied, match=rf"'bad'.*exit code {code}\b"):
        pipeline.carry_out(run, Heard())
    assert not alive(int(mark.read_text()))


def test_a_worker_that_dies_before_it_listens_is_missed(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its task lies unread in the pipe, which the system reports in another way than an end of file."""
    monkeypatch.setattr(pipeline, "_work", lambda connection, path, parent: (time.sleep(0.3), os._exit(3)))
    run = script(2, *DIAMOND)
    with pytest.raises(pipeline.WorkerDied, match=r"exit code 3\b"):
        pipeline.carry_out(run, Heard())


def test_a_worker_that_dies_with_nothing_to_do_is_missed(script: Script) -> None:
    """As when memory runs out for another's sake; the message must not name a task that nobody was on."""
    quick = failing("quick", lambda: threading.Timer(0.2, os._exit, (5,)).start())
    run = script(2, quick, sleeping("long"))
    with pytest.raises(pipeline.WorkerDied, match=r"exit code 5\b") as raised:
        pipeline.carry_out(run, Heard())
    assert "'?'" not in str(raised.value)
    assert run.result("quick") == {}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as at a terminal: what a shell starts in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_the_workers(script: Script, tmp_path: Path, interruptible: None) -> None:
    marks = [tmp_path / "run" / name / "pid" for name in ("long", "other")]
    run = script(2, sleeping("long"), sleeping("other"))
    main, heard = threading.main_thread().ident, Heard()
    assert main is not None

    def interrupt() -> None:
        for mark in marks:
            waiting_for(mark, lambda: None)()
        # Once it says so, the process has forked all its workers: an exception raised meanwhile would be lost.
        while ("started", "other") not in heard.events:
            time.sleep(0.01)
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        pipeline.carry_out(run, heard)
    thread.join()
    assert not any(alive(int(mark.read_text())) for mark in marks)


def test_the_real_plan_is_in_order() -> None:
    """Whatever the recipe and command: a task needs only tasks that come before it."""
    from runs.recipe import build
    from runs.tasks import plan

    for overrides in ([], ["baselines.random=0"], ["baselines={random=2}"]):
        recipe = build(read_table("digits", overrides))
        for command in ("run", "search", "train"):
            names: list[str] = []
            for task in plan(recipe, command):
                assert set(task.needs) <= set(names)
                names.append(task.name)
            assert len(set(names)) == len(names)
            assert (names[-1] == "report") == (command != "search")
