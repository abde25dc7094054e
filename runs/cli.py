"""The command ``nas``."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nas import ranks
from nas.errors import Failure, InputError, nearest, of_the_machine
from runs.cli_analyse import analyse
from runs.cli_finished import attack, compress, export, report
from runs.cli_launch import launch
from runs.cli_start import doctor, new, welcome
from runs.cli_study import study
from runs.directory import RunDirectory, program_version
from runs.show import (
    comparison_table,
    error_console,
    models_table,
    next_commands,
    out_console,
    topology_table,
)
from search_spaces.genotype import AnyGenotype, Genotype, GenotypeError

app = typer.Typer(
    help="Search, analyse, train, compress, attack and export adversarially robust architectures.",
    invoke_without_command=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A shipped recipe (nas list recipes) or a TOML file.")
]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the recipe: section.key=value.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write; by default runs/<name>-<time>.")]
Seed = Annotated[int | None, typer.Option(help="Seed, instead of the recipe's.")]
MemoryBudget = Annotated[
    float | None,
    typer.Option(
        metavar="GIB",
        help="Memory the search may use: a step is tried first, and cells are recomputed if they must be.",
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="On a GPU, only algorithms that give the same bits each time; slower."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


# Typer moved its copy of click's exceptions between versions; this is their common ancestor in all of them.
UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> None:
    """Entry point: exit status 0 done, 2 the input is wrong (one line, no traceback), 1 anything else."""
    before = {number: signal.signal(number, _stop) for number in STOPPED_BY}
    try:
        ranks.begin()
        if not ranks.leads():
            out_console.quiet = True
        app(standalone_mode=False)
    except (InputError, GenotypeError) as error:
        _complain(error)
        sys.exit(2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Stopped as stopped:
        _complain(Failure(f"{STOPPED_BY[stopped.number]}; --resume continues the run"))
        sys.exit(128 + stopped.number)
    except Failure as error:
        _complain(error)
        sys.exit(1)
    except (OSError, MemoryError, RuntimeError) as error:
        known = of_the_machine(error)
        if known is None:
            raise
        _complain(known)
        sys.exit(2 if isinstance(known, InputError) else 1)
    except UsageProblem as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if not message:  # no command: the help has been shown
            sys.exit(0)
        _complain(InputError(message))
        sys.exit(2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        ranks.end()


STOPPED_BY = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
"""Ctrl-C; a scheduler or ``kill``."""


class Stopped(BaseException):
    """Somebody wants this process to end. Not a KeyboardInterrupt, which typer takes for success."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = signal.Signals(number)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def _complain(error: Exception) -> None:
    """One line; of a data-parallel run, only the first process tells what all know."""
    if ranks.leads() or isinstance(error, ranks.Lost):
        text = str(error) if isinstance(error, Failure) else " ".join(str(error).splitlines())
        error_console.print(f"nas: {text}", style="red", markup=False, highlight=False)


@app.callback()
def start(
    context: typer.Context,
    own: Annotated[
        list[Path] | None,
        typer.Option("--plugins", metavar="FOLDER", help="Plug-ins of your own: FOLDER/training/mine.py, ..."),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Find network architectures that stay accurate under attack; train, shrink, attack and export them."""
    from nas import plugins

    plugins.use(*own or ())
    command = context.invoked_subcommand
    if ranks.world() > 1 and command not in ("run", "search", "train", "compare"):
        raise InputError(f"torchrun shares out nas run, search, train and compare: start nas {command or ''} by itself")
    if version:
        print(program_version())
    elif command is None:
        welcome()


@app.command()
def run(
    recipe: RecipeArgument = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory.")] = None,
    set_: Set = None,
    out: Out = None,
    seed: Seed = None,
    memory_budget: MemoryBudget = None,
    deterministic: Deterministic = False,
    as_json: Json = False,
) -> None:
    """Search, analyse, train, compress, attack and export: the whole way from a recipe to a report."""
    _start("run", recipe, resume, set_, out, seed, as_json, deterministic, memory_budget=memory_budget)


@app.command()
def search(
    recipe: RecipeArgument = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory.")] = None,
    set_: Set = None,
    out: Out = None,
    seed: Seed = None,
    memory_budget: MemoryBudget = None,
    deterministic: Deterministic = False,
    as_json: Json = False,
) -> None:
    """Search only; ends with genotype.json and the commands that go on from it."""
    _start("search", recipe, resume, set_, out, seed, as_json, deterministic, memory_budget=memory_budget)


@app.command()
def train(
    recipe: RecipeArgument = None,
    genotype: Annotated[str | None, typer.Option(help="A genotype file or a published name.")] = None,
    method: Annotated[str | None, typer.Option(help="Training method, instead of the recipe's.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory.")] = None,
    set_: Set = None,
    out: Out = None,
    seed: Seed = None,
    deterministic: Deterministic = False,
    as_json: Json = False,
) -> None:
    """Train, attack and export one given architecture."""
    overrides = [*(set_ or []), *([f"train.method.name={json.dumps(method)}"] if method else [])]
    if resume is None and genotype is None:
        raise InputError("nas train needs --genotype: a file or a published name (nas list genotypes)")
    from search_spaces.catalogue import load_genotype

    loaded = load_genotype(genotype) if genotype is not None else None
    _start("train", recipe, resume, overrides, out, seed, as_json, deterministic, loaded)


@app.command()
def compare(
    recipe: RecipeArgument = None,
    genotype: Annotated[
        str | None, typer.Option(help="A genotype file, a published name or a run, instead of the recipe's.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run directory.")] = None,
    set_: Set = None,
    out: Out = None,
    seed: Seed = None,
    deterministic: Deterministic = False,
    as_json: Json = False,
) -> None:
    """Train one architecture several ways, attack every result alike, and set them side by side in one table."""
    overrides = [*(set_ or []), *([f"compare.genotype={json.dumps(genotype)}"] if genotype else [])]
    _start("compare", recipe, resume, overrides, out, seed, as_json, deterministic)


def _start(
    command: str,
    recipe: str | None,
    resume: Path | None,
    overrides: list[str] | None,
    out: Path | None,
    seed: int | None,
    as_json: bool,
    deterministic: bool = False,
    genotype: AnyGenotype | None = None,
    memory_budget: float | None = None,
) -> None:
    """Create or continue a run, carry it out, and say what came of it."""
    from runs.directory import check_same_recipe, open_run
    from runs.pipeline import carry_out
    from runs.progress import observer
    from runs.recipe import read_table

    overrides = [*(overrides or []), *(["deterministic=true"] if deterministic else [])]
    table = read_table(recipe, overrides, seed) if recipe is not None else None
    data = genotype.to_data() if genotype is not None else None
    if resume is not None:
        if out is not None:
            raise InputError("--out and --resume exclude each other: a resumed run stays where it is")
        if memory_budget is not None:
            raise InputError("--memory-budget is for the start of a run: a resumed one goes on as it was begun")
        directory = open_run(resume)
        if directory.command != command:
            raise InputError(f"{resume} was begun by 'nas {directory.command}': resume it with that command")
        if table is None and (overrides or seed is not None):
            raise InputError("--set, --seed and --deterministic need the recipe's name when a run is resumed")
        if table is not None:
            check_same_recipe(directory, table)
        if data is not None and data != directory.genotype:
            raise InputError(f"{resume} is a run of another genotype: resume it without --genotype, or start anew")
    elif table is None:
        raise InputError(f"name a recipe (nas list recipes) or a run to continue: nas {command} digits")
    else:
        directory = _begun(command, table, genotype, out, memory_budget)
    progress_console = error_console if as_json else out_console
    if not as_json:
        out_console.print(f"{directory.path}", markup=False, highlight=False)
    with directory.locked(), observer(progress_console) as watching:
        carry_out(directory, watching)
    if not ranks.leads():
        return
    again = [recipe or directory.table["name"], *(f"--set={item}" for item in overrides)]
    _conclude(directory, as_json, again + ([f"--seed={seed}"] if seed is not None else []))


def _begun(
    command: str, table: dict[str, Any], genotype: AnyGenotype | None, out: Path | None, memory_budget: float | None
) -> RunDirectory:
    """The directory of a new run; of a data-parallel one, the first process makes it."""
    from runs.directory import open_run
    from runs.launch import begin
    from runs.recipe import build

    if ranks.world() > 1:
        table.setdefault("shards", ranks.world())
        build(table)  # in all of them: whether the shards can be dealt out

    def made() -> str:
        return str(begin(command, table, genotype, out, memory_budget=memory_budget, say=_note).path)

    return open_run(Path(ranks.first(made)))


def _note(line: str) -> None:
    error_console.print(line, markup=False, highlight=False)


def _conclude(directory: Any, as_json: bool, recipe: list[str]) -> None:
    """Print what a finished run found and the next useful commands. recipe: the arguments that name it."""
    path = directory.path
    if directory.command == "search":
        from nas.report.doubts import collapsed

        genotype = path / "search" / "genotype.json"
        if as_json:
            print(genotype.read_text(encoding="utf-8"))
            return
        topology_table(directory.needed("analyse")["topology"])
        for line in collapsed(directory.needed("search")["epochs"]):
            out_console.print(line, markup=False, highlight=False)
        next_commands(["nas", "analyse", genotype], ["nas", "train", *recipe, "--genotype", genotype])
        return
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(results))
        return
    if directory.command == "compare":
        comparison_table(results)
    else:
        models_table(results["models"])
    for line in results["verdict"]:
        out_console.print(line, markup=False, highlight=False)
    if directory.command == "compare":
        first = results["contenders"][0]
        model = f"{first['network']}-{results['seeds'][0]}"
        next_commands(["open", path / "report.html"], ["nas", "attack", path, "--model", model, "--suite", "standard"])
        return
    next_commands(
        ["open", path / "report.html"],
        ["nas", "attack", path, "--attack", "pgd", "--set", "steps=100"],
        ["tensorboard", "--logdir", path],
    )


@app.command(name="list")
def list_(
    what: Annotated[
        str,
        typer.Argument(help="spaces, methods, attacks, compressors, activations, data, recipes, genotypes or runs."),
    ],
    as_json: Json = False,
) -> None:
    """What there is, one line each."""
    from nas import plugins
    from runs.recipe import shipped
    from search_spaces import catalogue

    folders = {
        "methods": "training",
        "attacks": "attacks",
        "compressors": "compression",
        "data": "data",
        "activations": "activations",
    }
    if what in folders:
        rows = {name: plugins.summary(plugin) for name, plugin in plugins.available(folders[what]).items()}
    elif what == "spaces":
        rows = {name: _module_summary(name) for name in catalogue.spaces()}
    elif what == "recipes":
        rows = {name: _header(path) for name, path in shipped().items()}
    elif what == "genotypes":
        rows = {name: _shape(catalogue.load_genotype(name)) for name in catalogue.published()}
    elif what == "runs":
        rows = _runs(Path("runs"))
    else:
        known = [*folders, "spaces", "recipes", "genotypes", "runs"]
        raise InputError(f"nothing is listed under '{what}': {nearest(what, known)}")
    if as_json:
        print(json.dumps(rows))
        return
    width = max(map(len, rows), default=0) + 1
    for name, text in rows.items():
        out_console.print(f"{name:<{width}} {text}", markup=False, highlight=False)


def _shape(genotype: AnyGenotype) -> str:
    """Its space and, of a network of stages, its size."""
    if isinstance(genotype, Genotype):
        return f"space {genotype.space}"
    depths, widths = ("-".join(map(str, numbers)) for numbers in (genotype.depths, genotype.widths))
    options = "".join(f", {name} {value}" for name, value in genotype.options)
    return f"space {genotype.space}, depths {depths}, widths {widths}{options}"


def _module_summary(name: str) -> str:
    import importlib

    return (importlib.import_module(f"search_spaces.{name}").__doc__ or "").strip().splitlines()[0]


def _header(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip()


def _runs(folder: Path) -> dict[str, str]:
    from runs.directory import open_run

    rows = {}
    for path in sorted(folder.glob("*/run.json")):
        try:
            run = open_run(path.parent)
        except InputError as error:
            rows[path.parent.name] = str(error)
            continue
        rows[path.parent.name] = "finished" if run.finished else f"unfinished: {shlex.join(run.continuing)}"
    return rows


for _command in (analyse, compress, attack, export, report, launch, doctor, new):
    app.command()(_command)
app.add_typer(study, name="study")


if __name__ == "__main__":
    main()
