"""Carries out the tasks of a run: in order, several at once in worker processes, skipping those already done."""

from __future__ import annotations

import ctypes
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from nas import plugins, ranks
from nas.errors import Failure, InputError, of_the_machine
from runs import comparison
from runs.context import Context, device_of, use_machine
from runs.directory import RunDirectory, open_run
from runs.progress import Observer
from runs.recipe import Recipe, build
from runs.tasks import Task, plan
from search_spaces.genotype import GenotypeError


class TaskFailed(Failure):
    """A task raised what it should not; the message holds its traceback."""


class WorkerDied(Failure):
    """A worker process ended without a word, as it does when the system is out of memory."""


def carry_out(run: RunDirectory, observer: Observer) -> None:
    """Do all tasks of ``run`` that are not done yet. Call it inside ``run.locked()``."""
    recipe = build(run.table)
    device_of(recipe.general.device)
    tasks = _plan(run, recipe)
    if ranks.world() > 1:
        _carry_out_together(run, recipe, tasks, observer)
        return
    pending = [task for task in tasks if run.result(task.name) is None]
    for task in tasks:
        if task not in pending:
            observer.finished(task.name, 0.0)
    if recipe.general.workers == 1 or len(pending) == 1:
        for task in pending:
            observer.started(task.name)
            seconds = _do(run, recipe, task, partial(observer.progressed, task.name))
            observer.finished(task.name, seconds)
        return
    _carry_out_in_workers(run, recipe.general.workers, pending, observer)


def _carry_out_together(run: RunDirectory, recipe: Recipe, tasks: list[Task], observer: Observer) -> None:
    """All processes of a data-parallel run go through the tasks, one by one."""
    pending: list[str] = ranks.first(lambda: [task.name for task in tasks if run.result(task.name) is None])
    for task in tasks:
        if task.name not in pending:
            observer.finished(task.name, 0.0)
            continue
        observer.started(task.name)
        work = partial(_do, run, recipe, task, partial(observer.progressed, task.name))
        observer.finished(task.name, work() if task.together else ranks.first(work))


def _plan(run: RunDirectory, recipe: Recipe) -> list[Task]:
    """What the command that began the run consists of."""
    return comparison.plan(recipe) if run.command == "compare" else plan(recipe, run.command)


def _do(run: RunDirectory, recipe: Recipe, task: Task, tick: Callable[[float], None]) -> float:
    """Carry out one task in this process; returns its seconds."""
    general = recipe.general
    beside = ranks.beside() if ranks.world() > 1 else 1 if task.alone else general.workers
    use_machine(general, beside)
    start = time.monotonic()
    result = task.work(Context(run, recipe, tick))
    seconds = time.monotonic() - start
    run.finish(task.name, result, seconds)
    return seconds


@dataclass
class _Worker:
    process: Any
    connection: Connection
    task: str | None = None


def _carry_out_in_workers(run: RunDirectory, count: int, pending: list[Task], observer: Observer) -> None:
    workers: list[_Worker] = []
    try:
        done = {task.name for task in _plan(run, build(run.table))} - {task.name for task in pending}
        waiting = list(pending)
        alone = {task.name for task in pending if task.alone}
        while waiting or any(worker.task for worker in workers):
            busy = sum(worker.task is not None for worker in workers)
            while len(workers) < min(count, busy + len(waiting)):
                # A worker needs seconds to start: before there is something for it to do.
                workers.append(_start_worker(run))
            for task in [task for task in waiting if set(task.needs) <= done]:
                worker = next((worker for worker in workers if worker.task is None), None)
                if worker is not None:
                    waiting.remove(task)
                    worker.task = task.name
                    try:
                        worker.connection.send(task.name)
                    except ConnectionError:
                        raise _death_of(worker) from None
                    observer.started(task.name)
            for connection in multiprocessing.connection.wait([worker.connection for worker in workers]):
                worker = next(worker for worker in workers if worker.connection is connection)
                finished = _hear(worker, observer)
                if finished is not None:
                    done.add(finished)
                    if finished in alone:
                        # The search leaves a large heap behind; the tasks that share the machine start without it.
                        worker.process.terminate()
                        workers.remove(worker)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()


def _start_worker(run: RunDirectory) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(there, str(run.path), os.getpid()), daemon=True)
    start_alone(process)
    there.close()
    return _Worker(process, here)


def start_alone(process: Any) -> None:
    """Start a process that does not import the program it is started from: a script would begin its work again."""
    with mock.patch.dict(sys.modules, {"__main__": ModuleType("__main__")}):
        process.start()


def _hear(worker: _Worker, observer: Observer) -> str | None:
    """Take one message of a worker; returns the task it finished, if it did. Raises what the task raised."""
    try:
        kind, value = worker.connection.recv()
    except (EOFError, ConnectionError):
        raise _death_of(worker) from None
    task = worker.task or ""
    if kind == "tick":
        observer.progressed(task, value)
        return None
    if kind == "done":
        observer.finished(task, value)
        worker.task = None
        return task
    if kind == "input error":
        raise InputError(value)
    if kind == "failure":
        raise Failure(f"task '{task}': {value}")
    raise TaskFailed(f"task '{task}' failed\n{value}")


def _death_of(worker: _Worker) -> WorkerDied:
    worker.process.join()
    what = f"the worker on task '{worker.task}'" if worker.task else "an idle worker"
    return WorkerDied(
        f"{what} died (exit code {worker.process.exitcode}); if memory ran out, lower workers or batch sizes; "
        "--resume continues the run"
    )


def _work(connection: Connection, path: str, parent: int) -> None:
    """Life of a worker process: receive a task's name, do it, report, until the parent is gone."""
    die_with(parent)
    # Ctrl-C reaches the whole group; the parent decides, workers just end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plugins.use_named()
    run = open_run(Path(path))
    with run.working():
        recipe = build(run.table)
        tasks = {task.name: task for task in _plan(run, recipe)}
        while True:
            try:
                name = connection.recv()
            except EOFError:
                return
            last = 0.0

            def tick(progress: float) -> None:
                nonlocal last
                if time.monotonic() - last > 0.2:
                    last = time.monotonic()
                    connection.send(("tick", progress))

            try:
                connection.send(("done", _do(run, recipe, tasks[name], tick)))
            except Exception as error:
                connection.send(told_of(error))


def told_of(error: Exception) -> tuple[str, str]:
    """What a worker says of the error it is handling: its kind, by which its parent raises it again, and the text."""
    known = of_the_machine(error) or error
    if isinstance(known, (InputError, GenotypeError)):
        return "input error", str(known)
    if isinstance(known, Failure):
        return "failure", str(known)
    return "error", traceback.format_exc()


def die_with(parent: int) -> None:
    """Make this process end when its parent does, even by kill -9: two writers on one run must never be."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
