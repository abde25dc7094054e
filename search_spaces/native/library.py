"""The compiled kernels: built from ``edges.cpp`` by the system's C++ compiler at first use and kept in a cache.

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

SOURCE = Path(__file__).with_name("edges.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-w")


def library() -> ctypes.CDLL | None:
    """The kernels, or None where they cannot be had or are switched off."""
    return None if os.environ.get("DSARA_NATIVE") == "0" else _built()[0]


def why_not() -> str:
    """Why ``library`` is None; empty where it is not."""
    if os.environ.get("DSARA_NATIVE") == "0":
        return "switched off by DSARA_NATIVE=0"
    return _built()[1]


@lru_cache(maxsize=1)
def _built() -> tuple[ctypes.CDLL | None, str]:
    # torch's OpenMP runtime must be the one that is found: two of them would fight for the cores.
    import torch  # noqa: F401

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, f"no C++ compiler ('{compiler[0]}' does not run): install one, e.g. g++, or set CXX"
    key = hashlib.sha256(
        "\0".join([SOURCE.read_text(), *FLAGS, *compiler, version, platform.machine(), _processor()]).encode()
    ).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsara-nas"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"edges-{key}.lock"):
            path = folder / f"edges-{key}.so"
            if not path.exists():
                _compile(compiler, path)
    except OSError as error:
        return None, f"the kernels' cache {folder} cannot be written: {error}"
    except subprocess.CalledProcessError as error:
        return None, f"'{compiler[0]}' did not compile the kernels: {error.stderr.strip().splitlines()[:1]}"
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the kernels do not load: {error}"
    for name in ("edges_float", "edges_double"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_int]
    return loaded, ""


def _compile(compiler: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        result = Path(folder) / path.name
        subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(result)], capture_output=True, text=True, check=True)
        os.replace(result, path)


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
