"""What this machine can do: what it is, what is installed, which data are there, and how long each recipe takes."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nas.data.image_data import ImageData
from nas.errors import InputError
from runs.directory import program_version, usable_cores
from runs.estimate import Estimate, estimate
from runs.recipe import Recipe, build, read_table
from search_spaces.native import library

EXTRAS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "postgres": ("psycopg",)}
"""Optional parts of the installation, and what they consist of."""

KNOWN = {
    "Cifar10": ((3, 32, 32), 10, 50_000, 10_000),
    "Cifar100": ((3, 32, 32), 100, 50_000, 10_000),
    "FashionMnist": ((1, 28, 28), 10, 60_000, 10_000),
    "Mnist": ((1, 28, 28), 10, 60_000, 10_000),
    "Stl10": ((3, 96, 96), 10, 5_000, 8_000),
    "Svhn": ((3, 32, 32), 10, 73_257, 26_032),
}
"""Image, classes, training and test images of sets that can be downloaded, to time recipes without them."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was found, and what to do where that is not as it should be."""

    name: str
    found: str
    remedy: str = ""


def examine(folder: Path) -> Iterator[Finding]:
    """The machine and the installation. folder: where runs are kept."""
    python, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    yield Finding("program", f"dsara-nas {program_version()}, python {python}, torch {torch.__version__}, {system}")
    yield Finding("processor", f"{usable_cores()} cores, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("GPU", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB")
    else:
        yield Finding("GPU", "none that torch can use: recipes with device = 'auto' run on the CPU")
    yield _memory()
    yield _disk(folder)
    if reason := library.why_not():
        yield Finding("kernels", "none: a search on this CPU is several times slower", reason)
    else:
        yield Finding("kernels", "compiled for this processor")
    for extra, modules in EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        remedy = f"pip install 'dsara-nas[{extra}]'" if missing else ""
        yield Finding(f"extra '{extra}'", f"not installed: {', '.join(missing)}" if missing else "installed", remedy)


def _memory() -> Finding:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    few = "searches may need nas search --memory-budget GIB" if total < 6 * 2**30 else ""
    return Finding("memory", f"{total / 2**30:.1f} GiB", few)


def _disk(folder: Path) -> Finding:
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    remedy = ""
    if not os.access(place, os.W_OK):
        remedy = f"{place} cannot be written to: name another folder by --out"
    elif free < 2**30:
        remedy = "make room, or name a folder elsewhere by --out"
    return Finding("disk", f"{free / 2**30:.1f} GiB free in {place}", remedy)


@dataclass(frozen=True)
class Timing:
    """How long a recipe takes here, or why that is not known; and what is to be known of its data."""

    recipe: str
    command: str
    estimate: Estimate | None
    note: str = ""


def time_recipe(name: str) -> Timing:
    """How long the recipe ``name``, or the file, takes on this machine. Nothing is downloaded."""
    recipe = build(read_table(name))
    command = f"nas {command_of(recipe)} {name}"
    try:
        data, note = _data(recipe)
        return Timing(name, command, estimate(recipe, data), note)
    except InputError as error:
        return Timing(name, command, None, str(error))


def command_of(recipe: Recipe) -> str:
    """What carries a recipe out."""
    if recipe.compare is not None:
        return "compare"
    if recipe.study is not None:
        return "study width-depth"
    return "run" if "search" in recipe.table else "train"


def _data(recipe: Recipe) -> tuple[ImageData, str]:
    """The data set of a recipe, or noise of its size where it would have to be downloaded first."""
    source = recipe.data.source
    known = KNOWN.get(type(source).__name__)
    if known is None:
        return source(), ""
    try:
        return dataclasses.replace(source, download=False)(), ""
    except InputError:
        shape, classes, train, test = known
        generator = torch.Generator().manual_seed(0)
        x_train, x_test = (
            torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator) for count in (train, test)
        )
        labels = [torch.arange(count) % classes for count in (train, test)]
        names = tuple(map(str, range(classes)))
        data = ImageData("noise", x_train, labels[0], x_test, labels[1], names)
        limited = data.limited(source.train_limit, source.test_limit, source.seed)
        return limited, f"its data are not in {source.root}: downloaded first, which is not counted"
