"""Where the commands of many runs are carried out: on this machine, by Slurm, by Ray. Each is an engine of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.errors import InputError, nearest

POLL = 0.1
"""Seconds between looks at jobs on this machine."""

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """``nas ARGUMENTS`` to be carried out once; log: the file for what it says. All paths are absolute."""

    name: str
    arguments: tuple[str, ...]
    log: Path

    @property
    def command(self) -> list[str]:
        """As the system starts it, in the environment of this program."""
        return [sys.executable, "-m", "runs", *self.arguments]

    def __call__(self) -> int:
        """Carry it out here and now; the exit status."""
        with open(self.log, "a", encoding="utf-8") as log:
            return subprocess.run(self.command, stdout=log, stderr=log, check=False).returncode

    def note(self, error: object) -> None:
        """Add to its log what its launcher says of it."""
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{error}\n")

    def checkpoint(self) -> Any:
        """What submitit queues again after a preemption or at the time limit: the same, which resumes."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


CarryOut = Callable[[Sequence[Job]], Iterator[tuple[Job, int]]]
"""Carries out jobs: each with its exit status, as they end."""

Launcher = Callable[[Path, int, Options], CarryOut]
"""(a folder for files of its own, how many jobs at once, options) -> how to carry jobs out."""


def local(folder: Path, at_once: int, options: Options) -> CarryOut:
    """Processes on this machine. They end with this one."""
    if options:
        raise InputError(f"the local launcher has no options, but {', '.join(options)} was given")

    def carry_out(jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        waiting, running = list(jobs), dict[Any, Job]()
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    with open(job.log, "a", encoding="utf-8") as log:
                        running[subprocess.Popen(job.command, stdout=log, stderr=log)] = job
                for process in [process for process in running if process.poll() is not None]:
                    yield running.pop(process), process.returncode
                time.sleep(POLL)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()

    return carry_out


def slurm(folder: Path, at_once: int, options: Options) -> CarryOut:
    """An array of Slurm jobs, through submitit. They go on when this process ends.

    options: of ``submitit.AutoExecutor.update_parameters`` (slurm_partition, timeout_min, gpus_per_node, ...), and
    cluster: "local" for submitit's processes on this machine. A job that is preempted or reaches its time limit is
    queued again, and resumes.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("--launcher slurm needs submitit: pip install 'dsara-nas[slurm]'") from None
    asked = {"timeout_min": 24 * 60, **options}
    cluster = asked.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
        executor.update_parameters(name="nas", slurm_array_parallelism=at_once, **asked)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise InputError(f"--launcher slurm: {str(error).splitlines()[0]}") from None

    def carry_out(jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
        known = {id(one): job for one, job in zip(submitted, jobs, strict=True)}
        for one in submitit.helpers.as_completed(submitted, poll_frequency=10 if cluster == "slurm" else POLL):
            job, failed = known[id(one)], one.exception()
            if failed is not None:
                job.note(failed)
            yield job, 1 if failed is not None else one.result()

    return carry_out


def ray(folder: Path, at_once: int, options: Options) -> CarryOut:
    """Tasks of a Ray cluster. They end with this process.

    options: address (of a cluster; without one a Ray is started on this machine), num_cpus and num_gpus of each job.
    """
    # Ray would report its use to its makers, and wait for minutes where there is no network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray as engine
    except ImportError:
        raise InputError("--launcher ray needs Ray: pip install 'dsara-nas[ray]'") from None
    asked = {"num_cpus": 1, **options}
    address = asked.pop("address", None)
    known = ("address", "num_cpus", "num_gpus")
    if unknown := set(asked) - set(known):
        raise InputError(f"unknown option '{min(unknown)}' of ray: {nearest(min(unknown), known)}")

    def carry_out(jobs: Sequence[Job]) -> Iterator[tuple[Job, int]]:
        own: dict[str, Any] = {"include_dashboard": False} if address is None else {}
        try:
            engine.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"--launcher ray: {str(error).splitlines()[0]}") from None
        try:
            start = engine.remote(Job.__call__).options(**asked, max_retries=2)
            waiting, running = list(jobs), dict[Any, Job]()
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[start.remote(job)] = job
                (done, *_), _ = engine.wait(list(running))
                job = running.pop(done)
                try:
                    status = engine.get(done)
                except engine.exceptions.RayError as error:
                    job.note(error)
                    status = 1
                yield job, status
        finally:
            engine.shutdown()

    return carry_out


LAUNCHERS: dict[str, Launcher] = {"local": local, "slurm": slurm, "ray": ray}


def last_line(log: Path) -> str:
    """What a job said last."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "it left no log"
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
