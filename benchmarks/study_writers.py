"""Many writers on one storage of a study, some of them killed: is a trial lost or doubled, and how many do they finish?

    python -m benchmarks.study_writers                        8 writers, 600 s on a journal file and 600 s on PostgreSQL
    python -m benchmarks.study_writers --writers 4 --seconds 20

A writer does what a worker of ``nas study`` does with the ledger, without the training in between: it ends what the
dead have left, claims the next open trial, waits a moment, tells its result, and writes down that it did. One of them,
drawn at random, is killed (SIGKILL) every few seconds and another started. At the end each trial that a writer wrote
down must be complete in the storage with the result it told (none lost), and no key complete twice (none doubled).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from benchmarks.postgres_server import absent, server
from benchmarks.study_driver import CONFIGURATION, RECIPE, RESULT
from nas.tensor_file import write_text
from runs.study_ledger import Abandoned, Ledger, key_of
from runs.study_storage import open_storage, open_study

KEYS = 1_000_000
"""More trials than will be finished."""


def _ledger(where: str) -> Ledger:
    return Ledger(open_study(open_storage(where), where, "writers", RECIPE, ["maximize"]), heartbeat=5.0)


def _write(where: str, log: str, seed: int, end: float) -> None:
    """Finish trials until ``end`` (of the wall clock), and write each down once it is told."""
    draw, turn = random.Random(seed), 0
    ledger, told = _ledger(where), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with contextlib.suppress(Abandoned):
        while time.time() < end:
            trials = ledger.trials()
            ledger.reap(trials)
            standing = ledger.standing(trials)
            first = len(standing) - 64  # keys settle nearly in order: those before need no look
            near = (f"{number:06d}" for number in range(max(0, first), KEYS))
            free = [key for _, key in zip(range(8), (key for key in near if key not in standing), strict=False)]
            claim = ledger.claim(free[turn % len(free)], CONFIGURATION)
            if claim is None:
                turn += 1
                continue
            with claim:
                value = draw.random()
                time.sleep(0.02 * value)
                claim.finish([value], results=[RESULT])
            os.write(told, f"{claim.key} {value!r}\n".encode())
    ledger.close()


def measure(where: str, writers: int, seconds: float, pause: float, folder: Path) -> dict[str, Any]:
    """Let writers write; what was lost or doubled. pause: seconds between two kills, about."""
    draw, context = random.Random(0), multiprocessing.get_context("spawn")
    _ledger(where).close()
    end, count, kills = time.time() + seconds, 0, 0

    def another() -> multiprocessing.process.BaseProcess:
        nonlocal count
        count += 1
        process = context.Process(target=_write, args=(where, str(folder / f"{count}.log"), count, end))
        process.start()
        return process

    working = [another() for _ in range(writers)]
    while (rest := end - time.time()) > 0:
        time.sleep(min(rest, draw.uniform(0.5, 1.5) * pause))
        if time.time() < end - pause:
            number = draw.randrange(writers)
            os.kill(working[number].pid or 0, signal.SIGKILL)
            working[number].join()
            working[number] = another()
            kills += 1
    for process in working:
        process.join()
    failed = [process.exitcode for process in working if process.exitcode]
    ledger = _ledger(where)
    trials = ledger.trials()
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    doubled = sum(count - 1 for count in Counter(map(key_of, complete)).values())
    kept = {key_of(trial): trial.value for trial in complete}
    told = [line.split() for log in folder.glob("*.log") for line in log.read_text().splitlines()]
    lost = sum(kept.get(key) != float(value) for key, value in told)
    ledger.close()
    reasons = Counter(
        trial.user_attrs.get("reason", "?").split(":")[0] for trial in trials if trial.state == TrialState.FAIL
    )
    return {
        "writers": writers, "seconds": seconds, "kills": kills, "failed": failed, "complete": len(complete),
        "told": len(told), "lost": lost, "doubled": doubled, "given up to another": reasons.pop("taken", 0),
        "of the killed": reasons.pop("lost", 0), "other": dict(reasons),
        "a second": round(len(complete) / seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Write on both storages and keep what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=600.0, help="on each storage")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds between two kills, about")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "study_writers.json")
    given = parser.parse_args()
    found: dict[str, Any] = {"machine": {"platform": platform.platform(), "cores": os.cpu_count()}}
    found["optuna"] = optuna.__version__
    amount = given.writers, given.seconds, given.pause
    with tempfile.TemporaryDirectory() as folder:
        found["journal"] = measure(str(Path(folder) / "journal.jsonl"), *amount, Path(folder))
    if (reason := absent()) is not None:
        found["postgresql"] = {"absent": reason}
    else:
        with server() as url, tempfile.TemporaryDirectory() as folder:
            found["postgresql"] = measure(url, *amount, Path(folder))
    write_text(json.dumps(found, indent=1) + "\n", given.out)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
