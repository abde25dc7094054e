"""Where the trials of a study are kept: a journal file on a file system that all workers see, or PostgreSQL."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from nas.errors import InputError, check_schema
from runs.study_part import Direction

SCHEMA = 1
"""Version of what trials hold."""

JOURNAL = "journal.jsonl"
"""The file of a study's trials in its folder."""

TRIES = 5
"""Attempts to open a database: several processes that begin at once make its tables at once, and only one succeeds."""


class JournalLock:
    """A lock that the system releases when its holder dies, and that mends what the holder left half written.

    ``flock`` on a file beside the journal; over NFS, Linux makes of it a lock that all clients heed. Optuna's own locks
    outlive a killed process for half a minute, and a line it had begun makes the journal unreadable.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        self._file: Any = None

    def acquire(self) -> bool:
        """Wait for the lock; then cut off a last line without an end, which nobody has ever read as a record."""
        file = open(f"{self.journal}.lock", "a", encoding="utf-8")  # noqa: SIM115 - closed by release
        fcntl.flock(file, fcntl.LOCK_EX)
        self._file = file
        with open(self.journal, "rb+") as journal:
            size = journal.seek(0, os.SEEK_END)
            if size:
                journal.seek(size - 1)
                if journal.read(1) != b"\n":
                    journal.seek(0)
                    whole = journal.read().rfind(b"\n") + 1
                    journal.truncate(whole)
        return True

    def release(self) -> None:
        """Give the lock back."""
        file, self._file = self._file, None
        if file is None:
            raise RuntimeError("the lock is not held")
        file.close()


def open_storage(where: str) -> BaseStorage:
    """The storage at a path or a ``postgresql://`` address. Raises ``InputError`` where it cannot be had."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return _database(where) if "://" in where else _journal(Path(where))


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a database; a journal has none."""
    backend: Any = getattr(storage, "_backend", None)
    engine = getattr(backend, "engine", None)
    if engine is not None:
        backend.remove_session()
        engine.dispose()


def without_password(where: str) -> str:
    """The address as it may be written down: a password is asked of PGPASSWORD or ~/.pgpass, as everywhere."""
    scheme, separator, rest = where.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{host}" if at else where


def open_study(
    storage: BaseStorage, where: str, name: str, table: Mapping[str, Any], directions: Sequence[Direction]
) -> optuna.Study:
    """The study of that name and recipe, made if need be. Raises ``InputError`` if there is one of another recipe.

    The name under which it is stored ends with the digest of the recipe: to make it is one step, and processes that
    begin at the same moment get the same study, or two of different recipes, neither of which is harmed.
    """
    digest = recipe_digest(table)
    stored = f"{name}@{digest}"
    try:
        others = [one.study_name for one in storage.get_all_studies() if one.study_name.startswith(f"{name}@")]
        foreign = [other for other in others if other != stored]
        if foreign and stored not in others:
            raise InputError(
                f"{without_password(where)} holds a study '{name}' of another recipe ({foreign[0]}, this one has "
                f"{digest}): resume that one, or give this one another name by --set name=..."
            )
        if stored in others:
            study = optuna.load_study(storage=storage, study_name=stored)
        else:
            study = optuna.create_study(storage=storage, study_name=stored, directions=directions, load_if_exists=True)
        if "recipe" not in study.user_attrs:
            study.set_user_attr("recipe", json.loads(json.dumps(table)))
            study.set_user_attr("digest", digest)
            study.set_user_attr("schema", SCHEMA)
        check_schema(study.user_attrs.get("schema", SCHEMA), SCHEMA, f"the study in {without_password(where)}")
    except optuna.exceptions.StorageInternalError as error:
        close_storage(storage)
        raise _unreachable(where, error) from None
    except InputError:
        close_storage(storage)
        raise
    return study


def recipe_digest(table: Mapping[str, Any]) -> str:
    """Twelve digits that name a recipe, but for how many workers carry it out."""
    whole = {key: value for key, value in table.items() if key != "workers"}
    return hashlib.blake2b(json.dumps(whole, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with open(f"{path}.lock", "a", encoding="utf-8"):
            pass
        lock: Any = JournalLock(path)  # Optuna asks no more of one than to be acquired and released
        return JournalStorage(JournalFileBackend(str(path), lock))
    except OSError as error:
        raise InputError(f"cannot keep a study in {path}: {error.strerror}; choose another place") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise InputError(f"{path} is not the journal of a study: choose another file by --storage") from None


def _database(where: str) -> BaseStorage:
    scheme, _, rest = where.partition("://")
    if scheme not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise InputError(
            f"storage '{without_password(where)[:60]}' is not known: give a path or postgresql://USER@HOST/NAME"
        )
    if importlib.util.find_spec("psycopg") is None:
        raise InputError("studies in PostgreSQL need psycopg: pip install '.[postgres]'")
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(1, TRIES + 1):
        try:
            engine = {"connect_args": {"connect_timeout": 10}}
            return optuna.storages.get_storage(
                optuna.storages.RDBStorage(f"postgresql+psycopg://{rest}", engine_kwargs=engine)
            )
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ValueError) as error:
            if attempt == TRIES or ("already exists" not in str(error) and "duplicate key" not in str(error)):
                raise _unreachable(where, error) from None
            time.sleep(attempt)
    raise AssertionError("not reached")


def _unreachable(where: str, error: BaseException) -> InputError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join(str(getattr(cause, "orig", None) or cause).split())
    return InputError(f"cannot reach the storage {without_password(where)}: {reason[:200]}")
