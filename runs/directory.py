"""The run directory: the record of a run, from which it continues after any crash and is read without the program.

run.json          what was asked for: command, recipe tables, genotype if one was given
environment.json  what it ran on
<task>/           one folder a task: metrics.jsonl, TensorBoard events, checkpoint, and result.json, which is
                  written last: a task is done if and only if it has one
results.json      everything found, once all tasks are done;  report.html: the same to look at
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from nas import plugins, ranks
from nas.errors import InputError, check_schema
from nas.tensor_file import write_text
from search_spaces.native.library import why_not

SCHEMA, RESULTS_SCHEMA = 1, 1
"""Versions of run.json and of results.json."""


@dataclass(frozen=True)
class RunDirectory:
    """A run directory that exists and whose run.json has been read."""

    path: Path
    command: str
    table: Mapping[str, Any]
    genotype: Mapping[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether all that it was begun for is done."""
        return (self.path / ("analyse/result.json" if self.command == "search" else "results.json")).exists()

    @property
    def continuing(self) -> list[str]:
        """The command that goes on with it."""
        return ["nas", *self.command.split(), "--resume", str(self.path)]

    def folder(self, task: str) -> Path:
        """The folder of a task, made if need be."""
        folder = self.path / task
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def result(self, task: str) -> dict[str, Any] | None:
        """What a task found, or None while it is not done."""
        path = self.path / task / "result.json"
        return read_json(path) if path.exists() else None

    def needed(self, task: str) -> dict[str, Any]:
        """What a task found; it must be done."""
        result = self.result(task)
        if result is None:
            raise InputError(
                f"{self.path} has no finished task '{task}' yet: nas {self.command} --resume {self.path} finishes it"
            )
        return result

    def finish(self, task: str, result: Mapping[str, Any], seconds: float) -> None:
        """Record what a task found; from now on it is done."""
        folder = self.folder(task)
        write_json({"seconds": round(seconds, 2)}, folder / "timing.json")
        write_json(result, folder / "result.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it, no other run works on this directory. Raises ``InputError`` if one does."""
        with ExitStack() as held:
            ranks.first(lambda: self._lock(held))
            if not ranks.leads():
                held.enter_context(self.working())
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within it, a process works for the one that has locked this run, which no other locks until it ends."""
        with open(self.path / "lock.workers", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def _lock(self, held: ExitStack) -> None:
        try:
            file = held.enter_context(open(self.path / "lock", "a+", encoding="utf-8"))  # noqa: SIM115 - entered here
        except OSError as error:
            raise InputError(f"cannot write to {self.path}: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"{self.path} is in use by process {file.read().strip() or 'unknown'}: wait for it or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        # A killed run's workers may need a moment to follow it; until then they could still write.
        with open(self.path / "lock.workers", "a", encoding="utf-8") as workers:
            _wait_for_lock(workers, self.path)
        # Released again: the workers of this process hold it, shared, while they live.


def create(
    path: Path, command: str, table: Mapping[str, Any], genotype: Mapping[str, Any] | None = None
) -> RunDirectory:
    """A new run directory. Raises ``InputError`` if it cannot be made or is not empty."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if holds_work(path, "environment.json", "environment.json.part", "run.json.part"):
            way = f", or continue it with --resume {path}" if (path / "run.json").is_file() else ""
            raise InputError(f"{path} is not empty: choose another --out{way}")
        write_json(environment(), path / "environment.json")
        write_json({"schema": SCHEMA, "command": command, "recipe": table, "genotype": genotype}, path / "run.json")
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; choose another folder with --out") from None
    return RunDirectory(path, command, table, genotype)


def holds_work(folder: Path, *beginnings: str) -> bool:
    """Whether there is more in ``folder`` than ``beginnings``: files that a command killed as it began may leave."""
    return any(path.name not in beginnings for path in folder.iterdir())


def open_run(path: Path) -> RunDirectory:
    """An existing run directory. Raises ``InputError`` if it is not one."""
    if not (path / "run.json").is_file():
        raise InputError(f"{path} is not a run directory (it has no run.json)")
    data = read_json(path / "run.json")
    if not isinstance(data, dict) or not isinstance(data.get("recipe"), dict):
        raise InputError(f"{path / 'run.json'} does not describe a run (no recipe of schema version {SCHEMA} in it)")
    check_schema(data.get("schema"), SCHEMA, path / "run.json")
    return RunDirectory(path, str(data.get("command")), data["recipe"], data.get("genotype"))


def check_same_recipe(run: RunDirectory, table: Mapping[str, Any]) -> None:
    """Raise ``InputError`` naming the first difference between a run's recipe and ``table``."""
    stored, given = flatten(run.table), flatten(json.loads(json.dumps(table, default=str)))
    for key in sorted(stored.keys() | given.keys()):
        if stored.get(key) != given.get(key):
            raise InputError(
                f"{run.path} is a run of another recipe: {key} is {stored.get(key, 'absent')!r} there and "
                f"{given.get(key, 'absent')!r} here; resume it without naming a recipe, or start anew"
            )


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables and lists of tables as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def default_path(name: str) -> Path:
    """runs/<name>-<time>, or with a number behind it if that exists."""
    stem = Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    path, number = stem, 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}"), number + 1
    return path


def environment() -> dict[str, str]:
    """What a result may depend on."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "program": program_version(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_cores": str(os.cpu_count()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": cuda,
        "native_kernels": why_not() or "yes",
        **{f"plug-in {name}": digest for name, digest in plugins.own().items()},
    }


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def program_version() -> str:
    """The installed version of this distribution."""
    try:
        return version("dsara-nas")
    except PackageNotFoundError:
        return "not installed"


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises ``InputError`` for anything that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error})") from None


def write_json(value: Any, path: Path) -> None:
    """Write JSON so that the file is either the old or the new one."""
    write_text(json.dumps(value, indent=1) + "\n", path)


def _wait_for_lock(file: Any, path: Path, seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InputError(f"workers of an earlier process still write to {path}: stop them first") from None
            time.sleep(0.05)


def make_folder(path: Path) -> None:
    """Make a folder the user named. Raises ``InputError`` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None
