"""A run begun: everything that could be wrong with it is looked at before its directory is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nas.errors import InputError
from runs.comparison import read_genotype_of
from runs.context import device_of
from runs.directory import RunDirectory, create, default_path
from runs.recipe import build, check_size
from runs.tasks import recomputes_within
from search_spaces.genotype import AnyGenotype, Genotype
from search_spaces.native import library

STUDY = "study width-depth"
OTHERS = {"compare": "compare", "study": STUDY}
"""Which command a recipe without a search is for, by the table it has."""


def command_for(table: Mapping[str, Any]) -> str:
    """The command that a recipe is for."""
    for key in OTHERS:
        if key in table:
            return OTHERS[key]
    if "search" in table:
        return "run"
    raise InputError(
        f"recipe '{table['name']}' has no search, comparison or study: nas train with --genotype is for it"
    )


Say = Callable[[str], None]


def begin(
    command: str,
    table: dict[str, Any],
    genotype: AnyGenotype | None = None,
    out: Path | None = None,
    *,
    memory_budget: float | None = None,
    say: Say = lambda line: None,
) -> RunDirectory:
    """The directory of a new run by the recipe ``table``.

    command: "run", "search", "train", "compare" or "study width-depth".
    genotype: what is trained, of "train". memory_budget: GiB that the search may use. say: gets notes, a line each.
    Raises ``InputError`` for anything that is wrong; nothing has been written then.
    """
    recipe = build(table)
    device_of(recipe.general.device)
    if command == "compare":
        genotype = read_genotype_of(recipe)
    elif command == STUDY:
        from runs.study import plan  # Optuna takes a second to import

        plan(recipe)
    elif command in ("run", "search") and "search" not in table:
        other = next((f"nas {way} {recipe.general.name}" for key, way in OTHERS.items() if key in table), "nas train")
        raise InputError(f"recipe '{recipe.general.name}' has no [search] table: {other} is what it is for")
    if isinstance(genotype, Genotype):
        check_size("train", genotype.layout, recipe.train.cells, recipe.train.channels or 1)
    _prepare_kernels(say)
    if memory_budget is not None and recomputes_within(recipe, memory_budget, say):
        table["search"]["recompute_cells"] = True
    data = None if genotype is None else genotype.to_data()
    return create(out or default_path(recipe.general.name), command, table, data)


def _prepare_kernels(say: Say) -> None:
    """Compile the CPU's kernels where that was not done before, and say so; or say why they cannot be had."""
    if not library.is_compiled():
        say("compiling the kernels for this processor, once (about 15 s)")
    if reason := library.why_not():
        say(f"note: without its kernels a search on the CPU is several times slower: {reason}")
