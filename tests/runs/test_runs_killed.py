"""kill -9 at any moment: the workers go too, the run can go on at once, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import NAS, differences, record, settings, small_recipe

LONGER = settings(
    "search.stages.1.until=12",
    "train.epochs=12",
    "train.ema=0.9",
    "compress.fine_tune.epochs=8",
    "baselines={random=1, tolerance=0.5, plain_depths=[1, 1], plain_widths=[4, 8]}",
    "evaluate.trials.1.restarts=10",
)
KILLS = 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    """``nas ARGUMENTS`` in a real process; what it says goes to a file."""
    log = open(folder / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - the process writes on
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with log:
        return subprocess.Popen([NAS, *map(str, arguments)], stdout=log, stderr=log, text=True, env=environment)


def finish(process: subprocess.Popen[str], folder: Path) -> None:
    assert process.wait(timeout=600) == 0, (folder / "log.txt").read_text()


def workers_of(parent: int) -> set[tuple[int, str]]:
    """Worker processes of ``parent``, by number and time of birth, so that a number used again is another."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            identity = born(int(entry.name))
            if identity is not None and identity[0] == parent and "spawn_main" in command_of(int(entry.name)):
                found.add((int(entry.name), identity[1]))
    return found


def born(pid: int) -> tuple[int, str] | None:
    """Parent and time of birth of a process; None once it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), fields[19])


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(workers: set[tuple[int, str]]) -> set[int]:
    return {pid for pid, birth in workers if (identity := born(pid)) is not None and identity[1] == birth}


def test_killed_five_times(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    options = [*LONGER, *settings("workers=2")]
    begin = time.monotonic()
    finish(start(tmp_path, "run", recipe, "--out", tmp_path / "uninterrupted", *options), tmp_path)
    seconds = time.monotonic() - begin

    run, draw = tmp_path / "run", random.Random(0)
    kills, orphans = 0, set()
    while kills < KILLS:
        begun = (run / "run.json").exists()
        process = start(tmp_path, "run", *(["--resume", run] if begun else [recipe, "--out", run, *options]))
        # From the start of the program, its imports included, to well into its work.
        moment = time.monotonic() + draw.uniform(0.1, 0.35) * seconds
        seen: set[tuple[int, str]] = set()
        while time.monotonic() < moment and process.poll() is None:
            seen |= workers_of(process.pid)
            time.sleep(0.02)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        orphans |= seen
        if not (run / "run.json").exists():
            for path in run.glob("*"):
                path.unlink()
    # On a machine whose speed changes it may be over a little before the last.
    assert kills >= KILLS - 1, (tmp_path / "log.txt").read_text()
    # Nothing was waited for between a kill and the next start.
    process = start(tmp_path, "run", "--resume", run)
    deadline = time.monotonic() + 30
    while alive(orphans):
        assert time.monotonic() < deadline, f"workers outlive their parent: {alive(orphans)}"
        time.sleep(0.05)
    finish(process, tmp_path)
    assert len(orphans) >= 3, "the kills came before any work"
    assert differences(run, tmp_path / "uninterrupted") == []


def test_workers_die_with_their_parent_at_once(tmp_path: Path) -> None:
    """Once a worker works, the system itself ends it; it never writes another byte."""
    run = tmp_path / "run"
    process = start(tmp_path, "run", small_recipe(tmp_path), "--out", run, *LONGER, *settings("workers=2"))
    deadline = time.monotonic() + 120
    while len(workers := workers_of(process.pid)) < 2 or not (run / "train/plain/checkpoint.safetensors").exists():
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 2
    while alive(workers):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # Their lock is gone with them: the next process begins without waiting.
    with open(run / "lock.workers", "a") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_number_of_workers_does_not_change_the_results(tmp_path: Path) -> None:
    """With one thread a task, who does it and when is nothing to what comes out."""
    recipe = small_recipe(tmp_path)
    for workers in (1, 3):
        process = start(tmp_path, "run", recipe, "--out", tmp_path / str(workers), *settings(f"workers={workers}"))
        finish(process, tmp_path)
    # The number itself stands in the recipe, of which these two files hold a copy.
    assert set(differences(tmp_path / "1", tmp_path / "3")) == {"results.json", "run.json"}
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("1", "3"))
    assert one["recipe"].pop("workers") == 1 and other["recipe"].pop("workers") == 3
    assert one == other


def test_compression_killed_five_times(tmp_path: Path) -> None:
    """Steering, plan, fine-tuning, the next method, the attack: each may be interrupted."""
    run = tmp_path / "run"
    finish(start(tmp_path, "run", small_recipe(tmp_path), "--out", run), tmp_path)

    def begin(out: Path) -> subprocess.Popen[str]:
        steering = settings("cstar.epochs=60", "cstar.keep=0.5", "magnitude.keep=0.5")
        return start(tmp_path, "compress", run, "--method", "cstar,magnitude", *steering, "--epochs", 40, "--out", out)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    before = time.monotonic()
    finish(begin(whole), tmp_path)
    seconds = time.monotonic() - before
    draw, kills = random.Random(1), 0
    while kills < KILLS:
        process = begin(killed)
        try:
            process.wait(timeout=draw.uniform(0.3, 0.6) * seconds)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 2, (tmp_path / "log.txt").read_text()
    if not (killed / "result.json").exists():
        finish(begin(killed), tmp_path)
    one, other = record(killed), record(whole)
    # A result names its folder.
    results = [json.loads(files.pop("result.json")) | {"name": ""} for files in (one, other)]
    assert results[0] == results[1]
    assert one == other and "model.safetensors" in one and "1-cstar/model.safetensors" in one
