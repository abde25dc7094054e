"""C++ kernels, compiled by the system's compiler at first use for the processor at hand, and kept in a cache.

Without a compiler everything runs on torch's own operations, to the same numbers and several times slower;
``why_not`` then says why. DSARA_NATIVE=0 switches the kernels off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from filelock import FileLock

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-w")
EDGES = Path(__file__).with_name("edges.cpp")


def load(source: Path) -> ctypes.CDLL | None:
    """The compiled ``source``, or None where it cannot be had or kernels are switched off."""
    return None if os.environ.get("DSARA_NATIVE") == "0" else _built(source)[0]


def library() -> ctypes.CDLL | None:
    """The kernels of cells."""
    return load(EDGES)


def why_not() -> str:
    """Why ``library`` is None; empty where it is not."""
    if os.environ.get("DSARA_NATIVE") == "0":
        return "switched off by DSARA_NATIVE=0"
    return _built(EDGES)[1]


def is_compiled() -> bool:
    """Whether ``library`` answers at once."""
    if os.environ.get("DSARA_NATIVE") == "0":
        return True
    place = _place(EDGES)
    return isinstance(place, str) or place[1].exists()


def _place(source: Path) -> tuple[list[str], Path] | str:
    """The compiler and where its product lies; or why there is no compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return f"no C++ compiler ('{compiler[0]}' does not run): install one, e.g. g++, or set CXX"
    known = [source.read_text(), *FLAGS, *compiler, version, platform.machine(), _processor()]
    key = hashlib.sha256("\0".join(known).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsara-nas"
    return compiler, folder / f"{source.stem}-{key}.so"


@lru_cache(maxsize=8)
def _built(source: Path) -> tuple[ctypes.CDLL | None, str]:
    # torch's OpenMP runtime must be the one that is found: two of them would fight for the cores.
    import torch  # noqa: F401

    place = _place(source)
    if isinstance(place, str):
        return None, place
    compiler, path = place
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _compile(compiler, source, path)
    except OSError as error:
        return None, f"the kernels' cache {path.parent} cannot be written: {error}"
    except subprocess.CalledProcessError as error:
        return None, f"'{compiler[0]}' did not compile {source.name}: {error.stderr.strip().splitlines()[:1]}"
    try:
        return ctypes.CDLL(str(path)), ""
    except OSError as error:
        return None, f"the kernels do not load: {error}"


def _compile(compiler: list[str], source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        result = Path(folder) / path.name
        command = [*compiler, *FLAGS, str(source), "-o", str(result)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(result, path)  # whole or not at all


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
