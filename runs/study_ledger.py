"""The ledger of a study: trials claimed, renewed, finished and taken over by workers anywhere, each counted once.

A trial of Optuna's is one attempt at one ``key`` (a configuration and a seed, or a configuration with all its seeds).
Optuna claims trials atomically only if they were enqueued, and its heartbeats exist only for databases and go by the
clocks of several machines; so one protocol serves both storages. It needs of a storage only that trials are numbered in
the order in which they are made, that who makes a trial then reads all made before, and that a trial that ended cannot
be changed. Journal (every operation is a line, appended under a lock) and database (numbers are given under a lock on
the study) both hold to it.

A trial *stands* while it runs, and when it is complete, pruned, or failed for a reason of its own (training diverged).

**Claim.** A worker makes a running trial that has the key from its first moment, then reads all trials. If one of a
lower number stands for the same key, it gives its own up (FAIL, "taken"). Of two trials of one key, the one of the
higher number was made when the other could be read: it gives up, unless the other has ended without result. So at most
one that stands goes on, and the lowest always does: some worker makes progress.

**Sampled keys** are known only after the trial is made: it is given its key, then all trials are read, and it gives
up if *any* other that stands has this key. Of two such, the one that was given its key later sees the other. Of a
sampled and a claimed one: if the claimed one has the lower number, it was there to be read and the sampled one gives
up; if it has the higher, then either it was made after the other had its key and gives up, or before and is read by the
other, which gives up. Both may give up: a sampler then draws again, nothing is lost.

**Loss.** The worker of a trial counts up its ``beat``. Who sees, by its own monotonic clock, the same beat for a grace
period (no clocks are compared), or whose own machine no longer has the worker's process, ends the trial (FAIL, "lost");
its key is then open again. A worker that was only asleep finds that its trial has ended when it next renews it, which
it does before it goes on after a pause, and stops; its result can no longer be told, since a trial that ended cannot be
changed. So a key is never complete twice. What it wrote into the trial's folder meanwhile is what its successor writes:
all files are replaced as a whole and depend on nothing but the recipe.

Nothing is lost: a study is over only when every key is settled by a trial that stands and does not run.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from runs.study_storage import close_storage

T = TypeVar("T")

GRACE = 4.0
"""Heartbeats after which a worker that gave none has lost its trial."""

TASK = "task"
"""The attribute of a trial that says what it is: its key, its configuration, who works on it."""

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)


class Abandoned(Exception):
    """The trial is another worker's now: stop working on it."""


def _machine() -> str:
    """What tells apart machines, their starts, and containers that number processes for themselves."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return " ".join(parts)


def _born(pid: int) -> str | None:
    """When a process of this machine began, "" where that cannot be known; None if there is none of that number."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


@dataclass
class Ledger:
    """The trials of one study.  heartbeat: seconds between signs of life;  say: hears of trials taken over."""

    study: optuna.Study
    heartbeat: float = 60.0
    say: Callable[[str], None] = lambda line: None
    clock: Callable[[], float] = time.monotonic
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    _ended: int = 0
    _settled: dict[str, FrozenTrial] = field(default_factory=dict)

    @property
    def storage(self) -> BaseStorage:
        """Of the study."""
        return self.study._storage

    @property
    def grace(self) -> float:
        """Seconds without a sign of life after which a trial is lost."""
        return GRACE * self.heartbeat

    @property
    def owner(self) -> dict[str, Any]:
        """This process, as trials name it."""
        pid = os.getpid()
        return {"machine": _machine(), "pid": pid, "born": _born(pid)}

    def close(self) -> None:
        """Close the storage."""
        close_storage(self.storage)

    def trials(self) -> list[FrozenTrial]:
        """All trials in the order of their numbers; look at them only."""
        return self.insist(lambda: self.storage.get_all_trials(self.study._study_id, deepcopy=False))

    def standing(self, trials: Sequence[FrozenTrial] | None = None) -> dict[str, FrozenTrial]:
        """The trial that stands for each key that has one: the lowest of them, as all but one give up."""
        recent = self._recent(self.trials() if trials is None else trials)
        found = dict(self._settled)
        for trial in recent:
            key = key_of(trial)
            if key is not None and stands(trial):
                found.setdefault(key, trial)
        return found

    def _recent(self, trials: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """``trials`` without those at their beginning that have all ended, which are looked at once and for all."""
        while self._ended < len(trials) and trials[self._ended].state.is_finished():
            trial = trials[self._ended]
            key = key_of(trial)
            if key is not None and settled(trial):
                self._settled.setdefault(key, trial)
            self._ended += 1
        return trials[self._ended :]

    def open(self, keys: Iterable[str], trials: Sequence[FrozenTrial] | None = None) -> list[str]:
        """Those of ``keys`` that nobody works on or has settled."""
        standing = self.standing(trials)
        return [key for key in keys if key not in standing]

    def claim(
        self,
        key: str,
        configuration: Mapping[str, Any],
        params: Mapping[str, Any] | None = None,
        distributions: Mapping[str, BaseDistribution] | None = None,
    ) -> Claim | None:
        """A trial of ``key`` that only this worker has, or None where another was quicker."""
        # One attribute, not several: in a database each is a question and an answer.
        attributes = {TASK: {"key": key, "configuration": dict(configuration), "owner": self.owner}}
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(params or {}),
            distributions=dict(distributions or {}),
            user_attrs=attributes,
        )
        trial = self.insist(lambda: self.storage.create_new_trial(self.study._study_id, template))
        # The own one has not ended: whatever has settled a key before all that runs is of a lower number.
        before = itertools.takewhile(lambda other: other._trial_id != trial, self._recent(self.trials()))
        if any(key_of(other) == key and stands(other) for other in before) or key in self._settled:
            self.end(trial, "taken")
            return None
        return Claim(self, trial, key)

    def begin(self) -> int:
        """A running trial without a key yet, for a sampler to fill."""
        template = create_trial(state=TrialState.RUNNING, user_attrs={TASK: {"owner": self.owner}})
        return self.insist(lambda: self.storage.create_new_trial(self.study._study_id, template))

    def name(self, trial: int, key: str, configuration: Mapping[str, Any]) -> Claim | FrozenTrial | None:
        """Give the trial of a sampler its key: the claim; or the trial that has settled this key before; or None.

        Without a claim, the trial is still to be ended.
        """
        task = {"key": key, "configuration": dict(configuration), "owner": self.owner}
        self.insist(lambda: self.storage.set_trial_user_attr(trial, TASK, task))
        others = [t for t in self.trials() if t._trial_id != trial and key_of(t) == key and stands(t)]
        settled = next((other for other in others if other.state == TrialState.COMPLETE), None)
        if others:
            return settled
        return Claim(self, trial, key)

    def end(self, trial: int, reason: str) -> None:
        """End a trial without result; its key is open again. Of no effect on one that has ended."""
        try:
            self.storage.set_trial_user_attr(trial, "reason", reason)
            self.storage.set_trial_state_values(trial, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass

    def reap(self, trials: Sequence[FrozenTrial] | None = None) -> int:
        """End the trials whose workers are gone; returns how many."""
        count, now = 0, self.clock()
        recent = self._recent(self.trials() if trials is None else trials)
        running = [trial for trial in recent if trial.state == TrialState.RUNNING]
        here = _machine() if running else ""
        for trial in running:
            owner, beat = trial.user_attrs.get(TASK, {}).get("owner"), int(trial.user_attrs.get("beat", 0))
            gone = owner is not None and owner["machine"] == here and _born(owner["pid"]) != owner["born"]
            seen = self._beats.get(trial._trial_id)
            if seen is None or seen[0] != beat:
                self._beats[trial._trial_id] = (beat, now)
            if gone or (seen is not None and seen[0] == beat and now - seen[1] > self.grace):
                why = "its process is gone" if gone else f"it gave no sign of life for {self.grace:.0f} s"
                self.say(f"trial {trial.number} ({key_of(trial) or 'not begun'}) is taken over: {why}")
                self.end(trial._trial_id, f"lost: {why}")
                count += 1
        self._beats = {t._trial_id: self._beats[t._trial_id] for t in running if t._trial_id in self._beats}
        return count

    def insist(self, action: Callable[[], T]) -> T:
        """What ``action`` returns, tried again while the storage cannot be reached, for as long as a trial is kept."""
        end = self.clock() + self.grace
        while True:
            try:
                return action()
            except StorageInternalError:
                if self.clock() > end:
                    raise
                time.sleep(min(1.0, self.heartbeat))


class Claim:
    """A trial that this worker has. Within it, a thread gives signs of life.

    The worker calls ``check`` as it goes; it raises ``Abandoned`` once the trial is another's.
    """

    def __init__(self, ledger: Ledger, trial: int, key: str) -> None:
        self.ledger, self.trial, self.key = ledger, trial, key
        self._beat = 0
        self._renewed = ledger.clock()
        self._lost = False
        self._over = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Raise ``Abandoned`` if the trial is lost; after a pause, ask before going on."""
        if self._lost:
            raise Abandoned(self.key)
        if self.ledger.clock() - self._renewed > self.ledger.grace / 2:
            self.ask()

    def ask(self) -> None:
        """Give a sign of life now; raise ``Abandoned`` if the trial is lost."""
        self.ledger.insist(self._renew)
        if self._lost:
            raise Abandoned(self.key)

    def note(self, name: str, value: Any) -> None:
        """Keep something with the trial."""
        self._told(lambda: self.ledger.storage.set_trial_user_attr(self.trial, name, value))

    def report(self, step: int, value: float) -> bool:
        """Tell how good the trial is after ``step``; whether the study's pruner would stop it."""
        storage, study = self.ledger.storage, self.ledger.study
        self._told(lambda: storage.set_trial_intermediate_value(self.trial, step, value))
        return study.pruner.prune(study, self.ledger.insist(lambda: storage.get_trial(self.trial)))

    def finish(self, values: Sequence[float], **attributes: Any) -> None:
        """The trial is complete, with what was found."""
        self._end(TrialState.COMPLETE, values, attributes)

    def prune(self, values: Sequence[float], **attributes: Any) -> None:
        """The trial was stopped; values: where it stood."""
        self._end(TrialState.PRUNED, values, attributes)

    def fail(self, reason: str) -> None:
        """The trial cannot be done, by anyone."""
        self._end(TrialState.FAIL, None, {"failed": reason})

    def _end(self, state: TrialState, values: Sequence[float] | None, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            self.note(name, value)
        self._told(lambda: self.ledger.storage.set_trial_state_values(self.trial, state, values))

    def _told(self, action: Callable[[], object]) -> None:
        self.check()
        try:
            self.ledger.insist(action)
        except UpdateFinishedTrialError:
            # The connection may have broken after the storage had done it: then the end is our own.
            self._lost = True
            raise Abandoned(self.key) from None

    def _renew(self) -> None:
        with self._one_at_a_time:
            self._beat += 1
            try:
                self.ledger.storage.set_trial_user_attr(self.trial, "beat", self._beat)
                self._renewed = self.ledger.clock()
            except UpdateFinishedTrialError:
                self._lost = True

    def _live(self) -> None:
        while not self._over.wait(self.ledger.heartbeat) and not self._lost:
            try:
                self._renew()
            except StorageInternalError:
                continue  # for a while; ``check`` insists


def key_of(trial: FrozenTrial) -> str | None:
    """What a trial is an attempt at; None before its sampler has drawn."""
    key: str | None = trial.user_attrs.get(TASK, {}).get("key")
    return key


def configuration_of(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial was claimed for."""
    found: dict[str, Any] = trial.user_attrs[TASK]["configuration"]
    return found


def stands(trial: FrozenTrial) -> bool:
    """Whether a trial runs or has settled its key."""
    return trial.state == TrialState.RUNNING or settled(trial)


def settled(trial: FrozenTrial) -> bool:
    """Whether a trial has settled its key, for good or by a failure of its own."""
    return trial.state in ENDED or (trial.state == TrialState.FAIL and "failed" in trial.user_attrs)
