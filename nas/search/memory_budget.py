"""What memory a search needs, found out before it begins, and how it fits what there is."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nas import plugins
from nas.data.image_data import ImageData
from nas.data.split import Split
from nas.errors import InputError
from nas.objective import Attack, Objective
from nas.search.bilevel import Search, search
from search_spaces.cell_space import CellSpace

GIB = 2**30


@dataclass(frozen=True)
class DryRun:
    """One step of every stage of a search, carried out in a process of its own to see what memory it takes."""

    space: CellSpace
    data: ImageData
    split: Split
    weight_objective: Objective
    objectives: Mapping[str, Objective]
    attack: Attack
    device: str
    threads: int

    def peak(self, settings: Search) -> float:
        """GiB: on a CPU of the whole process with all images, on a GPU of the tensors."""
        context = multiprocessing.get_context("spawn")
        few = self._reduced(settings.batch_size)
        stages = tuple(dataclasses.replace(stage, until=i + 1) for i, stage in enumerate(settings.stages))
        short = dataclasses.replace(settings, stages=stages, monitored=settings.batch_size)
        with context.Pool(1, plugins.use_named) as pool:
            measured = pool.apply(_peak, (few, short))
        # Of the images only few went along; of the memory of perturbations (float16) as many.
        missing = self.data.x_train.numel() - few.data.x_train.numel()
        missing += self.data.x_test.numel() - few.data.x_test.numel()
        if settings.reuse_perturbations:
            missing += 2 * (self.data.x_train.numel() - few.data.x_train.numel())
        return measured + missing / GIB

    def _reduced(self, batch_size: int) -> DryRun:
        """The same with the images of one batch of each part."""
        weights, architecture = self.split.weights[:batch_size], self.split.architecture[:batch_size]
        rows = torch.cat([weights, architecture])
        data = dataclasses.replace(
            self.data,
            x_train=self.data.x_train[rows],
            y_train=self.data.y_train[rows],
            x_test=self.data.x_test[:1],
            y_test=self.data.y_test[:1],
        )
        parts = Split(torch.arange(len(weights)), torch.arange(len(weights), len(rows)), torch.arange(0))
        return dataclasses.replace(self, data=data, split=parts)


def _peak(run: DryRun, settings: Search) -> float:
    torch.set_num_threads(run.threads)
    search(
        run.space,
        run.data.to(torch.device(run.device)),
        run.split,
        settings,
        weight_objective=run.weight_objective,
        objectives=run.objectives,
        attack=run.attack,
        seed=0,
    )
    if run.device == "cuda":
        return torch.cuda.max_memory_reserved() / GIB
    if sys.platform == "linux":
        # Unlike getrusage, not that of the parent this process was forked from.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def fit(
    settings: Search, budget: float, peak: Callable[[Search], float], say: Callable[[str], None] = lambda line: None
) -> Search:
    """``settings``, with recomputation if they need it to stay within ``budget`` GiB.

    peak: GiB that settings need, such as ``DryRun.peak``. Smaller batches are tried first, so that what cannot fit is
    never carried out. Raises ``InputError`` with the batch size that would fit.
    """
    if not budget > 0:
        raise InputError(f"the memory budget must be above 0 GiB, not {budget}")
    needed = base = slope = math.inf
    for recomputing in (False, True):
        if recomputing < settings.recompute_cells:
            continue
        candidate = dataclasses.replace(settings, recompute_cells=recomputing)
        base, slope = _law(candidate, peak)
        needed = base + slope * settings.batch_size
        if needed <= budget:
            needed = peak(candidate)
        how = ", cells recomputed" if recomputing else ""
        say(f"a step of the search needs {needed:.2f} GiB of memory{how}; the budget is {budget:g} GiB")
        if needed <= budget:
            return candidate
    fitting = math.floor((budget - base) / slope / 4 + 1e-6) * 4 if slope > 0 else 0
    remedy = f"search.batch_size = {fitting} fits" if fitting >= 4 else "lower search.channels or search.cells"
    raise InputError(
        f"the search does not fit {budget:g} GiB: a step needs {needed:.2f} GiB even if cells are recomputed; {remedy}"
    )


def _law(settings: Search, peak: Callable[[Search], float]) -> tuple[float, float]:
    """Memory as base + slope * batch size, from two smaller batches (multiples of 4, as the kernels like them)."""
    small = max(4, settings.batch_size // 16 * 4)
    sizes = (small, 2 * small)
    first, second = (peak(dataclasses.replace(settings, batch_size=size)) for size in sizes)
    slope = max(0.0, (second - first) / small)
    return first - slope * small, slope
