"""A PostgreSQL server of one's own, from the system's packages, for as long as a test or measurement takes."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def absent() -> str | None:
    """Why no server can be started and used here; None where one can."""
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed: pip install '.[postgres]'"
    if _programs() is None:
        return "no PostgreSQL server is installed (/usr/lib/postgresql/*/bin/initdb, or initdb in PATH)"
    if os.geteuid() == 0 and (_account() is None or shutil.which("setpriv") is None):
        return "a PostgreSQL server does not run as root, and there is no account 'postgres' or no setpriv to run it by"
    return None


@contextmanager
def server() -> Iterator[str]:
    """Start a server on a socket in a folder of its own, and stop it at the end; the address of an empty database."""
    programs = _programs()
    assert programs is not None, absent()
    # The path of a socket may have about a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))
    account = _account() if os.geteuid() == 0 else None
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid)
        folder.chmod(0o755)
    data = folder / "data"
    try:
        _run([programs / "initdb", "-D", data, "-U", "study", "--auth=trust", "--no-sync", "-E", "UTF8"], account)
        options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
        _run([programs / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start"], account)
        try:
            _run([programs / "createdb", "-h", folder, "-U", "study", "trials"], account)
            yield f"postgresql://study@/trials?host={folder}"
        finally:
            _run([programs / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"], account)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    if found:
        return found[-1].parent
    inpath = shutil.which("initdb")
    return Path(inpath).parent if inpath else None


def _account() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None


def _run(command: Sequence[object], account: pwd.struct_passwd | None) -> None:
    words = [str(word) for word in command]
    if account is not None:
        ids = [f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        words = ["setpriv", *ids, *words]
    done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/")
    if done.returncode:
        raise RuntimeError(f"{words[-1]}: {done.stderr.strip()}")
