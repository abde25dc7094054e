"""kill -9 at random moments: does everything go on, to the result of what was never stopped?

    python -m benchmarks.crashes --kills 100

Searches, whole runs (training, compression, evaluation, export), compressions and attacks of a finished run, and
studies, all small and on digits, are started, killed with all their processes, started again by the command that
resumes them, and killed again, a few times each, until all kills are used up. Each is then finished and compared, file
by file and byte by byte, with one that ran through; of a study, trial by trial. Counted are files that differ, files
cut off, records lost or doubled, and commands that could not go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nas.tensor_file import write_text

RESULTS = Path(__file__).with_name("results")
IN_A_ROW = 5
"""Kills of one thing before it is finished and compared."""

VOLATILE = {
    "timing.json",
    "throughput.json",
    "report.html",
    "MODEL_CARD.md",
    "environment.json",
    "lock",
    "lock.workers",
}
"""Files that hold times or tell of the machine."""

SMALL = [
    "search.channels=2", "search.cells=4", "search.batch_size=128", "search.monitored=32", "search.attack.steps=1",
    "search.gradient={name='first_order'}", "search.stages.0.until=6", "search.stages.1.until=20",
    "data.validation=0.6",
    "train.parameters=0", "train.channels=3", "train.epochs=5", "train.batch_size=32", "train.attack.steps=1",
    "train.ema=0.9", "train.validation_attack={name='pgd', steps=1}", "baselines.random=1", "baselines.tolerance=0.5",
    "baselines.plain_depths=[1, 1]", "baselines.plain_widths=[4, 8]",
    "evaluate.trials=[{name='fgsm', attack={name='fgsm'}}, {name='pgd', attack={name='pgd', steps=10}, restarts=4}]",
]  # fmt: skip
STUDY = [
    "study.depths=[[1], [1], [1, 2]]", "study.widths=[[4], [4, 8], [8]]", "study.draw=4", "study.seeds=[0, 1]",
    "train.epochs=3",
]  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """Something that is killed.  begin, resume: commands, of the folder it writes (no resume: ``begin`` goes on)."""

    name: str
    begin: Callable[[Path], list[str]]
    resume: Callable[[Path], list[str]]
    same: Callable[[Path, Path], list[str]]


def settings(items: list[str]) -> list[str]:
    return [part for item in items for part in ("--set", item)]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in VOLATILE and not path.name.startswith(("events.", "job-"))
    }


def same_files(folder: Path, whole: Path) -> list[str]:
    """What differs between what was killed and what was not; a result that names its folder is compared without."""
    one, other = files(folder), files(whole)
    wrong = []
    for name in sorted(one.keys() | other.keys()):
        if name.endswith(".part"):
            wrong.append(f"{name}: cut off")
        elif name not in one or name not in other:
            wrong.append(f"{name}: only in one")
        elif one[name] != other[name] and _nameless(one[name]) != _nameless(other[name]):
            wrong.append(f"{name}: differs")
    return wrong


def _nameless(content: bytes) -> Any:
    try:
        found = json.loads(content)
    except ValueError:
        return content
    return {key: value for key, value in found.items() if key != "name"} if isinstance(found, dict) else found


def same_study(folder: Path, whole: Path) -> list[str]:
    """Trials lost, doubled, or with other results."""

    def trials(path: Path) -> list[tuple[str, int, float, float]]:
        found = json.loads((path / "results.json").read_text())["observations"]
        rows = [entry["observation"] for entry in found]
        return sorted((row["configuration"], row["seed"], row["natural"], row["robust"]) for row in rows)

    one, other = trials(folder), trials(whole)
    lost, more = Counter(other) - Counter(one), Counter(one) - Counter(other)
    return [f"lost {row}" for row in lost] + [f"doubled or other {row}" for row in more]


def subjects(finished: Path) -> list[Subject]:
    """What is killed; ``finished`` is a run that compressions and attacks work on."""

    def copied(folder: Path) -> Path:
        """Compressions and attacks write into a run: each its own copy."""
        if not folder.exists():
            shutil.copytree(finished, folder)
        return folder

    return [
        Subject(
            "search",
            lambda folder: ["search", "digits", "--out", str(folder), *settings(SMALL)],
            lambda folder: ["search", "--resume", str(folder)],
            same_files,
        ),
        Subject(
            "run",
            lambda folder: ["run", "digits", "--out", str(folder), *settings(SMALL)],
            lambda folder: ["run", "--resume", str(folder)],
            same_files,
        ),
        Subject(
            "compress",
            lambda folder: [
                "compress", str(copied(folder)), "--method", "cstar,magnitude", "--epochs", "8",
                *settings(["cstar.epochs=12", "cstar.keep=0.5", "magnitude.keep=0.5"]),
            ],
            lambda folder: [],
            same_files,
        ),
        Subject(
            "attack",
            lambda folder: ["attack", str(copied(folder)), "--suite", "quick"],
            lambda folder: [],
            same_files,
        ),
        Subject(
            "study",
            lambda folder: ["study", "width-depth", "study-digits", "--out", str(folder), *settings(STUDY)],
            lambda folder: ["study", "width-depth", "--resume", str(folder)],
            same_study,
        ),
    ]  # fmt: skip


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "runs", *arguments], stdout=said, stderr=said, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def finish(arguments: list[str], log: Path) -> None:
    """Carry out a command to its end."""
    if start(arguments, log).wait() != 0:
        raise RuntimeError(f"nas {' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")


def wait_for_work(process: subprocess.Popen[bytes], folder: Path, since: float) -> None:
    """Until ``process``, started at ``since`` (of the wall clock), has written a file in ``folder``, or has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # a file that is gone again
            if any(path.stat().st_mtime > since for path in folder.rglob("*")):
                return
        time.sleep(0.02)


def tortured(subject: Subject, kills: int, place: Path, draw: random.Random) -> dict[str, Any]:
    """Kill ``subject`` so often; what was found."""
    whole, log = place / f"{subject.name}-whole", place / f"{subject.name}.log"
    arguments, since = subject.begin(whole), time.time()
    process = start(arguments, log)
    wait_for_work(process, whole, since)
    starting = time.time() - since
    if process.wait() != 0:
        raise RuntimeError(f"nas {' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")
    working = time.time() - since - starting
    done, rounds, wrong, where = 0, 0, [], Counter[str]()
    while done < kills:
        folder, ended = place / f"{subject.name}-{rounds}", False
        rounds += 1
        for _ in range(min(IN_A_ROW, kills - done)):
            arguments, since = _next(subject, folder), time.time()
            process = start(arguments, log)
            if early := draw.random() < 0.1:  # while it starts; else at any moment of its work
                pause = draw.uniform(0.0, starting)
            else:
                wait_for_work(process, folder, since)
                pause = draw.uniform(0.0, 0.7 * working)
            try:
                process.wait(timeout=pause)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                done += 1
                where["imports" if early else _working_on(folder)] += 1
                continue
            ended = process.returncode == 0
            if not ended:
                wrong.append(f"could not go on: {log.read_text()[-300:]}")
            break
        try:
            if not ended:
                finish(_next(subject, folder), log)
            wrong += subject.same(folder, whole)
        except RuntimeError as error:
            wrong.append(str(error)[-300:])
        shutil.rmtree(folder, ignore_errors=True)
    seconds = {"to start": round(starting, 1), "of work": round(working, 1)}
    return {"kills": done, "finished": rounds, "wrong": wrong, "killed in": dict(where), "seconds": seconds}


def _next(subject: Subject, folder: Path) -> list[str]:
    """The command that begins, or goes on with, what ``folder`` holds."""
    again = subject.resume(folder)
    return again if again and (folder / "run.json").exists() else subject.begin(folder)


def _working_on(folder: Path) -> str:
    """The task whose files were written last; "its own files": of none."""
    written = [path for path in folder.rglob("*") if path.is_file() and path.name not in VOLATILE]
    if not written:
        return "its own files"
    last = max(written, key=lambda path: path.stat().st_mtime_ns)
    return last.relative_to(folder).parts[0] if len(last.relative_to(folder).parts) > 1 else "its own files"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="write benchmarks/results/crashes.json and .md")
    given = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        finish(["run", "digits", "--out", str(place / "finished"), *settings(SMALL)], place / "finished.log")
        known = subjects(place / "finished")
        for number, subject in enumerate(known):
            share = given.kills // len(known) + (number < given.kills % len(known))
            found[subject.name] = tortured(subject, share, place, random.Random(f"{given.seed} {subject.name}"))
            print(subject.name, found[subject.name], flush=True)
    lines = ["| killed | times | finished and compared | found wrong | in |", "|---|---:|---:|---:|---|"]
    for name, row in found.items():
        tasks = ", ".join(f"{task} {count}" for task, count in sorted(row["killed in"].items()))
        lines.append(f"| {name} | {row['kills']} | {row['finished']} | {len(row['wrong'])} | {tasks} |")
    print("\n".join(lines))
    if given.keep:
        write_text("\n".join(lines) + "\n", RESULTS / "crashes.md")
        write_text(json.dumps(found, indent=1) + "\n", RESULTS / "crashes.json")
    sys.exit(any(row["wrong"] for row in found.values()))


if __name__ == "__main__":
    main()
