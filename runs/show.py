"""What the command line prints: tables of networks and cells, and the next useful commands."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nas.analysis.throughput import speed_lines
from nas.report.comparison_table import columns as comparison_columns
from search_spaces.genotype import StageGenotype

if TYPE_CHECKING:
    from runs.study_record import Candidate

out_console = Console(soft_wrap=True)
error_console = Console(stderr=True, soft_wrap=True)


def next_commands(*commands: Sequence[object]) -> None:
    """Say how to go on: commands as lists of arguments."""
    out_console.print("next:", style="bold")
    for command in commands:
        out_console.print(f"  {shlex.join(map(str, command))}", markup=False, highlight=False)


def models_table(models: list[dict[str, Any]]) -> None:
    """Size, natural and worst-case accuracy of each network; the single attacks are in the report."""
    columns = ("network", "parameters", "non-zero", "MACs", "natural", "worst case", "95 % interval")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "network" else "right"
    for model in models:
        low, high = model["interval"]
        table.add_row(
            model["name"],
            f"{model['parameters']:,}",
            f"{model['nonzero']:,}",
            f"{model['macs'] / 1e6:.2f} M",
            f"{model['natural']:.1%}",
            f"{model['worst_case']:.1%}",
            f"{low:.1%} {high:.1%}",
        )
    _print_whole(table)


def throughput_table(result: Mapping[str, Any]) -> None:
    """Latency and images per second of networks, and whether any is faster than the first."""
    columns = ("network", "engine", "batch", "latency p50", "p90", "images/s", "speed")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for engine, found in result["engines"].items():
        for batch, rows in found["batches"].items():
            for name, row in rows.items():
                latency = [f"{1e3 * row[key]:.2f} ms" for key in ("p50", "p90")]
                table.add_row(
                    name, engine, batch, *latency, f"{row['images_per_second']:,.0f}", f"{row['speed']:.2f} x"
                )
    _print_whole(table)
    for line in speed_lines(result):
        out_console.print(line, highlight=False, markup=False)


def comparison_table(results: Mapping[str, Any]) -> None:
    """The contenders of a comparison: accuracies, cost; the single attacks are in the report."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = [column for column in comparison_columns(results) if not column.attack]
    for column in columns:
        table.add_column(column.title, no_wrap=True, justify="right" if column.number else "left")
    for contender in results["contenders"]:
        table.add_row(*(escape(column.text(results, contender)) for column in columns))
    _print_whole(table)


def study_table(ranked: Sequence[Candidate], count: int) -> None:
    """The best configurations of a study; count: of all."""
    from runs.study_record import shape  # needs scipy's statistics, which other commands do not

    columns = ("configuration", "parameters", "MACs", "seeds", "natural", "worst case", "95 % interval")
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "configuration" else "right"
    for one in ranked:
        table.add_row(
            escape(shape(one.first)),
            f"{one.first.parameters:,}",
            f"{one.first.macs / 1e6:.2f} M",
            str(len(one.seeds)),
            f"{one.natural:.1%}",
            f"{one.robust:.1%}",
            f"{one.low:.1%} {one.high:.1%}",
        )
    _print_whole(table)
    if count > len(ranked):
        out_console.print(f"the best {len(ranked)} of {count} configurations", highlight=False)


def _print_whole(table: Table) -> None:
    """Print ``table`` as wide as it is: cells that are cut off would say less than lines that are too long."""
    table.width = out_console.measure(table, options=out_console.options.update(max_width=1000)).maximum
    out_console.print(table)


def stages_table(genotype: StageGenotype, sections: list[dict[str, Any]]) -> None:
    """Depth and width of each stage of a network, and what it costs; "-" where costs are not known by stage."""
    table = Table("stage", "depth", "width", "parameters", "M MACs", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    costs = {section["name"]: section for section in sections}
    for number, (depth, width) in enumerate(zip(genotype.depths, genotype.widths, strict=True), start=1):
        cost = costs.get(f"stage {number}")
        shown = (f"{cost['parameters']:,}", f"{cost['macs'] / 1e6:,.1f}") if cost else ("-", "-")
        table.add_row(str(number), str(depth), str(width), *shown)
    out_console.print(table)


def topology_table(cells: list[dict[str, Any]]) -> None:
    """Depth, width and operations of each kind of cell."""
    table = Table(
        "cell", "depth", "from inputs", "antichain", "operations", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for cell in cells:
        operations = ", ".join(f"{count} {name}" for name, count in cell["operations"].items())
        from_inputs = f"{cell['input_edges']} of {cell['edges']}"
        table.add_row(cell["kind"], str(cell["depth"]), from_inputs, str(cell["antichain"]), operations)
    out_console.print(table)


def topology_comparison_table(comparisons: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """Means of each statistic by population, differences with intervals and corrected p-values; what they say."""
    if comparisons:
        _statistics_table(comparisons)
        tests = "; ".join(f"{_versus(one)} p = {one['p']:.2g}" for one in comparisons)
        out_console.print(f"whole cells (energy distance, permutation test): {tests}", highlight=False, markup=False)
    else:
        out_console.print(
            "all sections have cells of one kind: --compare random:200 sets them beside random ones", highlight=False
        )
    for line in [*(one["verdict"] for one in comparisons), *notes]:
        out_console.print(line, highlight=False, markup=False)


def _statistics_table(comparisons: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("statistic", no_wrap=True)
    # Random cells of different kinds are drawn alike: one column for all of them.
    means: dict[str, list[list[float]]] = {}
    for one in comparisons:
        for side in ("first", "second"):
            means.setdefault(one[side], []).append([row[side] for row in one["statistics"]])
    populations = sorted(means, key=lambda name: name == "random")
    for column in populations:
        table.add_column(column, justify="right", no_wrap=True)
    for one in comparisons:
        table.add_column(_versus(one), justify="right", no_wrap=True)
        table.add_column("p (Holm)", justify="right", no_wrap=True)
    for index, row in enumerate(comparisons[0]["statistics"]):
        texts = [f"{statistics.fmean(part[index] for part in means[name]):.2f}" for name in populations]
        for one in comparisons:
            found = one["statistics"][index]
            interval = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
            texts += [f"{found['difference']:+.2f}{interval}", f"{found['p_holm']:.2g}"]
        table.add_row(row["statistic"], *texts)
    _print_whole(table)


def _versus(comparison: Mapping[str, Any]) -> str:
    return f"{comparison['first']} - {comparison['second']}"
