"""The command ``nas analyse``: what architectures look like, and whether two populations of cells look different."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.errors import InputError
from runs.show import next_commands, out_console, stages_table, topology_comparison_table, topology_table
from search_spaces.genotype import AnyGenotype, Genotype

if TYPE_CHECKING:
    from nas.analysis.topology_comparison import Comparison
    from nas.model_file import ModelSpec

SHOWN = 4
"""Populations of up to so many architectures are also printed cell by cell."""
MOST_RANDOM = 2000


def analyse(
    what: Annotated[
        list[str],
        typer.Argument(
            help="Run directories, genotype files or published names; several are compared as a population."
        ),
    ],
    compare: Annotated[
        list[str] | None,
        typer.Option(help="More of the same, to set beside it; random:N for N random architectures of the same space."),
    ] = None,
    channels: Annotated[int, typer.Option(min=1, help="Base channels of the counted network.")] = 64,
    cells: Annotated[int, typer.Option(min=1, help="Cells of the counted network.")] = 20,
    size: Annotated[int, typer.Option(min=8, help="Height and width of the image.")] = 32,
    image_channels: Annotated[int, typer.Option(min=1, help="Channels of the image.")] = 3,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 10,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for a picture of each cell, and of populations.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="File for a row per architecture and cell.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random architectures and of the tests.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Width, depth, operations, parameters and MACs of architectures; are their accurate and robust cells different."""
    from nas.model_file import ModelSpec

    names, random_count = _named([*what, *(compare or [])])
    genotypes = [_genotype_of(name) for name in names]
    drawn = _drawn(names, genotypes, random_count, seed)
    # Where no population is asked for, the result is a list of architectures.
    as_population = len(what) > 1 or bool(drawn)
    comparisons = _compared(names, genotypes, drawn, seed) if as_population else ()
    rows = []
    for name, genotype in zip(names, genotypes, strict=True):
        mean, labels = (0.5,) * image_channels, tuple(str(i) for i in range(classes))
        spec = ModelSpec(genotype, channels, cells, (image_channels, size, size), labels, mean, mean)
        rows.append(_architecture_data(name, spec))
        if not as_json and (len(names) <= SHOWN or not as_population):
            _print_architecture(rows[-1], spec)
    if as_population and not as_json:
        topology_comparison_table([one.to_data() for one in comparisons], _repeated(names, genotypes))
    if csv_file is not None:
        _write_csv(rows, drawn, csv_file)
    if pictures is not None:
        _draw(names, genotypes, drawn, pictures, population=bool(comparisons))
    if as_json:
        print(json.dumps(_population_data(rows, genotypes, drawn, comparisons, seed) if as_population else rows))
    elif pictures is None and any(row["topology"] for row in rows):
        asked = [*what, *(part for name in compare or [] for part in ("--compare", name))]
        next_commands(
            ["nas", "analyse", *asked, *(["--seed", seed] if drawn and seed else []), "--pictures", "pictures"]
        )


def _architecture_data(name: str, spec: ModelSpec) -> dict[str, Any]:
    """What an architecture looks like and its network ``spec`` costs, as in the JSON."""
    from nas.analysis.complexity import complexity
    from nas.analysis.topology import differences, topology

    genotype = spec.genotype
    try:
        cost = complexity(spec)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    return {
        "name": name,
        "genotype": genotype.to_data(),
        "digest": genotype.digest,
        "topology": [cell.to_data() for cell in topology(genotype)],
        "differences": differences(genotype) if isinstance(genotype, Genotype) else {},
        "complexity": cost.to_data(),
    }


def _print_architecture(row: dict[str, Any], spec: ModelSpec) -> None:
    genotype, cost, shape = spec.genotype, row["complexity"], "x".join(map(str, spec.input_shape))
    chosen = ""
    if isinstance(genotype, Genotype):
        chosen = f"{spec.channels} channels, {genotype.layout.count(spec.cells)} cells, "
    out_console.print(
        f"{row['name']} ({row['digest']}): {cost['parameters']:,} parameters, {cost['macs'] / 1e6:,.1f} M MACs at "
        f"{chosen}{shape}",
        highlight=False,
        markup=False,
    )
    if isinstance(genotype, Genotype):
        topology_table(row["topology"])
    else:
        stages_table(genotype, cost["sections"])


def _named(arguments: Sequence[str]) -> tuple[list[str], int]:
    """The names among the arguments, and how many random architectures were asked for beside them."""
    names = [name for name in arguments if not name.startswith("random:")]
    counts = [name.removeprefix("random:") for name in arguments if name.startswith("random:")]
    if not names:
        raise InputError("random architectures are those of a space: name an architecture to compare them with (arnas)")
    if len(counts) > 1:
        raise InputError("random:N is given more than once: give it once")
    if counts and not (re.fullmatch("[0-9]{1,4}", counts[0]) and 1 <= int(counts[0]) <= MOST_RANDOM):
        raise InputError(f"random:{counts[0]} is not a number of architectures: give random:1 to random:{MOST_RANDOM}")
    name, times = Counter(str(Path(name)) for name in names).most_common(1)[0]
    if times > 1:
        raise InputError(f"{name} is named {times} times: an architecture counts once")
    return names, int(counts[0]) if counts else 0


def _genotype_of(name: str) -> AnyGenotype:
    from runs.context import found_genotype
    from runs.directory import open_run
    from search_spaces.catalogue import load_genotype, space_of

    if Path(name).is_dir():
        genotype = found_genotype(open_run(Path(name)))
        space_of(genotype)
        return genotype
    return load_genotype(name)


def _drawn(names: Sequence[str], genotypes: Sequence[AnyGenotype], count: int, seed: int) -> list[Genotype]:
    """``count`` architectures drawn uniformly from the space of the first of ``genotypes``."""
    from nas.randomness import generator
    from search_spaces.catalogue import space_of
    from search_spaces.cell_space import CellSpace

    if not count:
        return []
    space = space_of(genotypes[0])
    if not isinstance(space, CellSpace):
        raise InputError(f"{names[0]} is of space '{space.name}', which has no cells to draw at random")
    stream = generator(seed, "random topology")
    return [space.random(stream) for _ in range(count)]


def _compared(
    names: Sequence[str], genotypes: Sequence[AnyGenotype], drawn: Sequence[Genotype], seed: int
) -> tuple[Comparison, ...]:
    """The comparisons that these architectures allow. Raises ``InputError`` where they are no population of cells."""
    from nas.analysis.topology_comparison import compare_populations

    cells: list[Genotype] = []
    for name, genotype in zip(names, genotypes, strict=True):
        if not isinstance(genotype, Genotype):
            raise InputError(
                f"{name} is a network of stages, without cells to compare: nas analyse A --compare B sets it "
                "beside others"
            )
        if genotype.space != genotypes[0].space:
            raise InputError(
                f"{name} is of space '{genotype.space}' and {names[0]} of space '{genotypes[0].space}': compare "
                "architectures of one space, or set one beside the other: nas analyse A --compare B"
            )
        cells.append(genotype)
    return compare_populations(cells, drawn, seed)


def _population_data(
    rows: list[dict[str, Any]],
    genotypes: Sequence[AnyGenotype],
    drawn: Sequence[Genotype],
    comparisons: Sequence[Comparison],
    seed: int,
) -> dict[str, Any]:
    from nas.analysis.cell_distance import genotype_distances
    from nas.analysis.topology import STATISTICS

    cells = [genotype for genotype in genotypes if isinstance(genotype, Genotype)]
    return {
        "architectures": rows,
        "distances": genotype_distances(cells).round(6).tolist(),
        "random": [genotype.to_data()["cells"] for genotype in drawn],
        "seed": seed,
        "statistics": dict(STATISTICS),
        "comparisons": [comparison.to_data() for comparison in comparisons],
        "notes": _repeated([row["name"] for row in rows], genotypes),
    }


def _repeated(names: Sequence[str], genotypes: Sequence[AnyGenotype]) -> list[str]:
    """Architectures that are there more than once: independent searches may agree, copies must not count."""
    groups: dict[str, list[str]] = {}
    for name, genotype in zip(names, genotypes, strict=True):
        groups.setdefault(genotype.digest, []).append(name)
    return [
        f"note: {' and '.join(group)} are the same architecture: name it once unless independent searches found it"
        for group in groups.values()
        if len(group) > 1
    ]


def _write_csv(rows: Sequence[dict[str, Any]], drawn: Sequence[Genotype], path: Path) -> None:
    """A row for each kind of cell of each architecture: size, statistics, and how often each operation occurs."""
    from nas.analysis.topology import STATISTICS, CellTopology, topology
    from nas.tensor_file import write_text
    from search_spaces.genotype import genotype_from_data

    found: list[tuple[dict[str, Any], CellTopology]] = []
    for row in rows:
        size = {key: row["complexity"][key] for key in ("parameters", "macs")}
        about = {"name": row["name"], "digest": row["digest"], **size}
        found += [(about, cell) for cell in topology(genotype_from_data(row["genotype"]))]
    for number, genotype in enumerate(drawn, start=1):
        about = {"name": f"random-{number}", "digest": genotype.digest}
        found += [(about, cell) for cell in topology(genotype)]
    operations = sorted({operation for _, cell in found for operation in cell.operations})
    stream = io.StringIO()
    writer = csv.DictWriter(
        stream,
        ["name", "digest", "parameters", "macs", "kind", *STATISTICS, *operations],
        restval="",
        lineterminator="\n",
    )
    writer.writeheader()
    for about, cell in found:
        counts = {operation: cell.operations.get(operation, 0) for operation in operations}
        writer.writerow({**about, "kind": cell.kind, **cell.statistics, **counts})
    try:
        write_text(stream.getvalue(), path)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}") from None


def _draw(
    names: Sequence[str],
    genotypes: Sequence[AnyGenotype],
    drawn: Sequence[Genotype],
    folder: Path,
    *,
    population: bool,
) -> None:
    """A picture of each cell of each named architecture, and one of the populations."""
    import numpy as np

    from nas.analysis.drawing import draw_cell
    from nas.analysis.topology_comparison import normal_kinds, statistics_of
    from nas.analysis.topology_picture import draw_populations
    from nas.tensor_file import write_text
    from runs.directory import make_folder

    architectures = {
        label: genotype
        for label, genotype in zip(_labels(names, genotypes), genotypes, strict=True)
        if isinstance(genotype, Genotype)
    }
    if architectures:
        make_folder(folder)
    for label, genotype in architectures.items():
        for kind, cell in genotype.cells:
            write_text(draw_cell(cell, f"{label}: {kind} cell"), folder / f"{label}-{kind}.svg")
    if population:
        kinds = normal_kinds(next(iter(architectures.values())))
        values = {kind: statistics_of([one.cell[kind] for one in architectures.values()]) for kind in kinds}
        if drawn:
            values["random"] = np.concatenate([statistics_of([one.cell[kind] for one in drawn]) for kind in kinds])
        draw_populations(values, folder / "topology.svg")


def _labels(names: Sequence[str], genotypes: Sequence[AnyGenotype]) -> list[str]:
    """A short name for each architecture, with its place behind it where files of different folders share one."""
    stems = [Path(name).stem for name in names]
    return [
        stem if stems.count(stem) == 1 else f"{stem}-{genotype.digest}-{place}"
        for place, (stem, genotype) in enumerate(zip(stems, genotypes, strict=True), start=1)
    ]
