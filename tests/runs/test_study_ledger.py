"""The ledger of a study: every key is settled once, whatever becomes of workers; on both kinds of storage."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from benchmarks import postgres_server
from nas.errors import InputError
from runs.study_ledger import Abandoned, Claim, Ledger, key_of
from runs.study_storage import JournalLock, open_storage, open_study, without_password

Open = Callable[..., Ledger]


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    if reason := postgres_server.absent():
        pytest.skip(reason)
    with postgres_server.server() as url:
        yield url


NAMES = itertools.count()


@pytest.fixture(params=["journal", "postgresql"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens one study, each time as another process would."""
    where = str(tmp_path / "journal") if request.param == "journal" else request.getfixturevalue("database")
    name = f"study{next(NAMES)}"

    ledgers: list[Ledger] = []

    def ledger(**more: Any) -> Ledger:
        ledgers.append(Ledger(open_study(open_storage(where), where, name, {"name": name}, ["maximize"]), **more))
        return ledgers[-1]

    yield ledger
    for one in ledgers:
        one.close()


def states(ledger: Ledger) -> list[str]:
    return [trial.state.name for trial in ledger.trials()]


def test_only_one_of_two_gets_a_key(opened: Open) -> None:
    one, other = opened(), opened()
    claim = one.claim("a", {})
    assert claim is not None and other.claim("a", {}) is None
    assert other.open(["a", "b"]) == ["b"]
    claim.finish([0.25])
    assert other.claim("a", {}) is None
    assert Counter(states(other)) == {"COMPLETE": 1, "FAIL": 2}


def test_the_lower_number_wins_whoever_looks_first(opened: Open) -> None:
    """Two trials made before either of the two workers looked, as in a race."""
    ledger, key = opened(), "a"
    first, second = opened(), opened()
    race = threading.Barrier(2)
    made, read = first.storage.create_new_trial, first.trials

    def together(*arguments: object) -> int:
        number = made(*arguments)  # type: ignore[arg-type]
        race.wait(10)
        return number

    first.storage.create_new_trial = together  # type: ignore[method-assign, assignment]
    won: list[Claim | None] = []
    thread = threading.Thread(target=lambda: won.append(first.claim(key, {})))
    thread.start()
    while not read():
        time.sleep(0.01)
    assert second.claim(key, {}) is None
    race.wait(10)
    thread.join()
    assert won[0] is not None
    assert states(ledger) == ["RUNNING", "FAIL"]


def test_a_silent_worker_loses_its_trial_and_cannot_finish_it(opened: Open) -> None:
    clock = Clock()
    asleep, awake = opened(heartbeat=10), opened(heartbeat=10, clock=clock)
    lost = asleep.claim("a", {})
    assert lost is not None
    assert awake.reap() == 0
    clock.now = 39.0
    assert awake.reap() == 0
    clock.now = 41.0
    assert awake.reap() == 1
    claim = awake.claim("a", {})
    assert claim is not None
    with pytest.raises(Abandoned):
        lost.finish([0.1])
    claim.finish([0.2])
    complete = [trial for trial in awake.trials() if trial.state == TrialState.COMPLETE]
    assert [trial.values for trial in complete] == [[0.2]]


def test_signs_of_life_keep_a_trial(opened: Open) -> None:
    clock = Clock()
    worker, watcher = opened(heartbeat=0.02), opened(heartbeat=10, clock=clock)
    claim = worker.claim("a", {})
    assert claim is not None
    with claim:
        for now in (0.0, 41.0, 82.0):
            clock.now = now
            assert watcher.reap() == 0
            before = watcher.trials()[0].user_attrs.get("beat", 0)
            deadline = time.monotonic() + 10
            while watcher.trials()[0].user_attrs.get("beat", 0) == before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    # Once it is over, they end.
    assert watcher.reap() == 0
    clock.now = 164.0
    assert watcher.reap() == 1


def test_after_a_pause_a_worker_asks_before_it_goes_on(opened: Open) -> None:
    clock = Clock()
    sleeper, other = opened(heartbeat=10, clock=clock), opened()
    claim = sleeper.claim("a", {})
    assert claim is not None
    other.end(claim.trial, "lost")
    claim.check()  # nothing was heard of it yet
    clock.now = 21.0
    with pytest.raises(Abandoned):
        claim.check()


def test_a_dead_process_of_this_machine_is_known_at_once(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, watcher = opened(), opened()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "getpid", lambda: process.pid)
    assert worker.claim("a", {}) is not None
    monkeypatch.undo()
    assert watcher.reap() == 0
    process.kill()
    process.communicate()
    assert watcher.reap() == 1 and watcher.open(["a"]) == ["a"]


def test_a_process_number_that_is_used_again_is_another_process(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("when a process began is known on Linux only")
    worker, watcher = opened(), opened()
    monkeypatch.setattr("runs.study_ledger._born", lambda pid: "1")
    assert worker.claim("a", {}) is not None
    monkeypatch.undo()
    assert watcher.reap() == 1


def test_a_sampled_key_is_left_to_whoever_has_it(opened: Open) -> None:
    sampler, claimer = opened(), opened()
    trial = sampler.begin()
    claim = claimer.claim("a", {})
    assert claim is not None
    assert sampler.name(trial, "a", {}) is None
    claim.finish([0.5])
    settled = sampler.name(trial, "a", {})
    assert settled is not None and not isinstance(settled, Claim) and settled.values == [0.5]
    assert isinstance(sampler.name(trial, "b", {}), Claim)
    assert claimer.claim("b", {}) is None


def test_a_failure_of_its_own_settles_a_key(opened: Open) -> None:
    ledger = opened()
    claim = ledger.claim("a", {})
    assert claim is not None
    claim.fail("the loss is not a number")
    assert ledger.open(["a"]) == []
    stopped = ledger.claim("b", {})
    assert stopped is not None
    ledger.end(stopped.trial, "stopped")
    assert ledger.open(["a", "b"]) == ["b"]


def test_every_key_is_settled_once_by_workers_that_fall_silent(opened: Open) -> None:
    """Six workers; each falls silent, for ever or for a while, with a trial. No key is lost, none done twice."""
    keys = [f"k{i}" for i in range(24)]
    errors: list[BaseException] = []

    def life(number: int) -> None:
        try:
            draw, ledger = random.Random(number), opened(heartbeat=0.05)
            deaths = 2
            while True:
                ledger.reap()
                free = ledger.open(keys)
                if not free:
                    if not any(t.state == TrialState.RUNNING for t in ledger.standing().values()):
                        return
                    time.sleep(0.02)
                    continue
                claim = ledger.claim(free[0], {})
                if claim is None:
                    continue
                fate = draw.random() if deaths else 1.0
                if fate < 0.2:
                    deaths -= 1  # it is never heard of again
                    continue
                if fate < 0.35:
                    deaths -= 1
                    time.sleep(0.5)  # longer than the grace period: another one has it by now, or it is still ours
                    with contextlib.suppress(Abandoned):
                        claim.finish([0.0])
                    continue
                with claim:
                    time.sleep(draw.uniform(0, 0.02))
                    claim.finish([1.0])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=life, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    ledger = opened()
    complete = Counter(key_of(trial) for trial in ledger.trials() if trial.state == TrialState.COMPLETE)
    assert complete == Counter(keys)
    assert not any(trial.state == TrialState.RUNNING for trial in ledger.trials())
    assert any(str(trial.user_attrs.get("reason")).startswith("lost") for trial in ledger.trials())


def test_half_a_line_of_a_killed_writer_is_mended(tmp_path: Path) -> None:
    where = tmp_path / "journal"
    ledger = Ledger(open_study(open_storage(str(where)), str(where), "s", {}, ["maximize"]))
    assert ledger.claim("a", {}) is not None
    with where.open("ab") as file:
        file.write(b'{"op_code":4,"worker_id":"x","stud')
    assert ledger.claim("b", {}) is not None
    again = Ledger(open_study(open_storage(str(where)), str(where), "s", {}, ["maximize"]))
    assert again.open(["a", "b", "c"]) == ["c"]


def test_the_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.touch()
    code = (
        f"from runs.study_storage import JournalLock; from pathlib import Path; import time\n"
        f"lock = JournalLock(Path({str(journal)!r})); lock.acquire(); print('held', flush=True); time.sleep(20)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    got = threading.Event()

    def wait() -> None:
        lock = JournalLock(journal)
        lock.acquire()
        got.set()
        lock.release()

    threading.Thread(target=wait, daemon=True).start()
    assert not got.wait(0.2)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert got.wait(5)


def test_a_study_of_another_recipe_is_refused(opened: Open, tmp_path: Path) -> None:
    where = str(tmp_path / "other")
    open_study(open_storage(where), where, "s", {"name": "s", "workers": 1}, ["maximize"])
    open_study(open_storage(where), where, "s", {"name": "s", "workers": 4}, ["maximize"])
    open_study(open_storage(where), where, "t", {"name": "t"}, ["maximize"])
    with pytest.raises(InputError, match=r"study 's' of another recipe"):
        open_study(open_storage(where), where, "s", {"name": "s", "train": {"epochs": 2}}, ["maximize"])


@pytest.mark.parametrize(
    "where, message",
    [
        (
            "postgresql://nobody:secret@127.0.0.1:1/none",
            r"cannot reach the storage postgresql://nobody@127.0.0.1:1/none: .+",
        ),
        ("mysql://nobody@host/none", "is not known: give a path or postgresql://"),
        ("/proc/none/journal", "cannot keep a study in /proc/none/journal"),
    ],
)
def test_storage_that_cannot_be_had(where: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_storage(where)
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_file_that_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a journal\nat all\n")
    with pytest.raises(InputError, match="is not the journal of a study"):
        open_storage(str(path))


def test_passwords_are_not_written_down() -> None:
    assert without_password("postgresql://me:p%40ss@host:5/db?x=1") == "postgresql://me@host:5/db?x=1"
    assert without_password("postgresql://me@/db?host=/tmp/x") == "postgresql://me@/db?host=/tmp/x"
    assert without_password("a/journal") == "a/journal"
