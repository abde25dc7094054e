"""What each speed option of the search costs and saves: time of a step, the architecture found, the network trained.

    python -m benchmarks.approximations                       on digits, 3 seeds
    python -m benchmarks.approximations --data cifar10.npz    on cifar10-mini, too
    python -m benchmarks.approximations --quick               to see that it works; its numbers say nothing

Every setting is a shipped recipe with the lines of ``SETTINGS`` changed; what is not named is the recipe's. For each:

- the time of a search step relative to exact mode. Both are timed in the same round, one after another in one process;
  a round is some steps of every stage, weighted by the stages' epochs; the median over the rounds counts.
- Spearman's rank correlation of the final mixing weights (all edges and operations) with those of exact mode at the
  same seed; exact mode against itself at other seeds is what chance leaves.
- natural and worst-case robust accuracy of the found network, trained and attacked as the recipe says, over the seeds.

Results are kept in a JSON file, one entry a setting and seed, and are not computed again while the changed lines stay
the same; a run that is interrupted goes on from its last checkpoint. The table is written beside it, as Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.search.bilevel import Stage, search
from nas.tensor_file import write_text
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from runs.context import Context
from runs.directory import RunDirectory, create, open_run
from runs.recipe import Recipe, build, read_table
from runs.tasks import plan

FIRST_ORDER = "search.gradient={name='first_order'}"
ONE_STEP = "search.attack={name='pgd', steps=1}"
FGSM_RS = "search.attack={name='fgsm', random_start=true}"
REUSED = "search.reuse_perturbations=true"
SAMPLED = "search.relaxation={name='sampled_path'}"

SETTINGS: dict[str, tuple[str, ...]] = {
    "exact": (),
    "first order": (FIRST_ORDER,),
    "one attack step": (ONE_STEP,),
    "FGSM-RS": (FGSM_RS,),
    "reused perturbations": (FGSM_RS, REUSED),
    "partial channels 1/2": ("search.partial_channels=2",),
    "partial channels 1/4": ("search.partial_channels=4",),
    "sampled path": (SAMPLED,),
    "architecture every 2nd step": ("search.architecture_every=2",),
    "first order + bfloat16": (FIRST_ORDER, "search.precision='bfloat16'"),
    "first order + FGSM-RS": (FIRST_ORDER, FGSM_RS),
    "first order + reused perturbations": (FIRST_ORDER, FGSM_RS, REUSED),
    "first order + FGSM-RS + partial channels 1/2": (FIRST_ORDER, FGSM_RS, "search.partial_channels=2"),
    "fastest: first order + reused perturbations + sampled path": (FIRST_ORDER, FGSM_RS, REUSED, SAMPLED),
}
"""Named settings and the lines of the recipe that make them; exact mode is the unrolled gradient with the recipe's
attack."""

EXACT = ("search.gradient={name='unrolled'}", "workers=1", "baselines.random=0")
QUICK = (
    "search.stages=[{until=1}, {until=2, objectives=['natural', 'adversarial'], combine='min_norm'}]",
    "search.channels=4",
    "search.batch_size=128",
    "search.monitored=64",
    "train.parameters=8000",
    "train.epochs=1",
    "evaluate.trials=[{name='pgd-5', attack={name='pgd', steps=5}}]",
)
TASKS = ("search", "analyse", "train/searched", "evaluate/searched")

Results = dict[str, Any]


def main() -> None:
    """Measure what is asked for and not known yet; write results and table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 as .npz: measure cifar10-mini, too")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the timing")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--quick", action="store_true", help="tiny searches and trainings, into a file of their own")
    parser.add_argument("--out", type=Path, help="results file")
    arguments = parser.parse_args()
    folder = Path(__file__).parent / "results"
    out: Path = arguments.out or folder / f"approximations{'-quick' if arguments.quick else ''}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    results: Results = json.loads(out.read_text()) if out.exists() else {"timing": {}, "searches": {}}
    torch.set_num_threads(arguments.threads)
    seeds, rounds = (1, 1) if arguments.quick else (arguments.seeds, arguments.rounds)
    recipes = {"digits": [f"threads={arguments.threads}"]}
    if arguments.data is not None:
        recipes["cifar10-mini"] = [f"threads={arguments.threads}", f"data.path='{arguments.data.resolve()}'"]
    for name, local in recipes.items():
        common = [*EXACT, *(QUICK if arguments.quick else ()), *local]
        if arguments.quick and name == "cifar10-mini":
            common.append("data.train_limit=600")
        # Exact mode is what the others are compared with.
        settings = list(dict.fromkeys(["exact", *arguments.settings]))
        time_steps(results, out, name, settings, common, rounds, steps=4 if arguments.quick else 9)
        for seed, setting in itertools.product(range(seeds), settings):
            search_and_train(results, out, name, setting, common, seed)
    text = table(results)
    write_text(text, out.with_suffix(".md"))
    print(text)


def time_steps(
    results: Results, out: Path, name: str, settings: Sequence[str], common: Sequence[str], rounds: int, steps: int
) -> None:
    """Seconds of a step of every setting and of exact mode, measured in turns."""
    missing = []
    for setting in settings:
        key = f"{name} / {setting}"
        if results["timing"].get(key, {}).get("recipe") == [*common, *SETTINGS[setting]]:
            continue
        try:
            missing.append((setting, build(read_table(name, [*common, *SETTINGS[setting]]))))
        except InputError as refusal:
            results["timing"][key] = {"recipe": [*common, *SETTINGS[setting]], "refused": str(refusal)}
    if not missing:
        return
    exact = build(read_table(name, common))
    data: ImageData = exact.data.source()
    print(f"{name}: timing {len(missing)} settings in {rounds} rounds", flush=True)
    ratios: dict[str, list[float]] = {setting: [] for setting, _ in missing}
    for _ in range(rounds):
        yardstick = seconds_per_step(exact, data, steps)
        for setting, recipe in missing:
            seconds = yardstick if setting == "exact" else seconds_per_step(recipe, data, steps)
            ratios[setting].append(seconds / yardstick)
    for setting, _ in missing:
        results["timing"][f"{name} / {setting}"] = {
            "recipe": [*common, *SETTINGS[setting]],
            "relative": statistics.median(ratios[setting]),
            "rounds": ratios[setting],
            "exact_seconds_in_the_last_round": yardstick,
        }
    save(results, out)


def seconds_per_step(recipe: Recipe, data: ImageData, steps: int) -> float:
    """Mean seconds of a step: some steps of every stage, the first left out, weighted by the stages' epochs."""
    part, settings = recipe.search, recipe.search.settings
    parts = split(
        data.y_train, architecture=recipe.data.architecture, validation=recipe.data.validation, seed=recipe.general.seed
    )
    used = steps * settings.batch_size
    parts = dataclasses.replace(parts, weights=parts.weights[:used], architecture=parts.architecture[:used])
    steps = len(parts.weights) // settings.batch_size
    stages: list[Stage] = [dataclasses.replace(stage, until=i + 1) for i, stage in enumerate(settings.stages)]
    clock: list[float] = []
    search(
        recipe.space,
        data,
        parts,
        dataclasses.replace(settings, stages=tuple(stages), monitored=1),
        weight_objective=part.weight_objective,
        objectives={"natural": Standard(), "adversarial": PgdAt(part.attack)},
        attack=part.attack,
        seed=recipe.general.seed,
        tick=lambda progress: clock.append(time.perf_counter()),
    )
    begins = [0, *(stage.until for stage in settings.stages)]
    total = 0.0
    for index, (begin, end) in enumerate(itertools.pairwise(begins)):
        epoch = clock[index * steps : (index + 1) * steps]
        # Between the first and the last: an even number of steps has as many with an architecture step as without.
        total += (end - begin) * (epoch[-1] - epoch[0]) / (len(epoch) - 1)
    return total / settings.epochs


def search_and_train(results: Results, out: Path, name: str, setting: str, common: Sequence[str], seed: int) -> None:
    """Search with ``setting``, train and attack what was found; keeps what the table needs."""
    key = f"{name} / {setting} / {seed}"
    lines = [*common, *SETTINGS[setting]]
    if results["searches"].get(key, {}).get("recipe") == lines:
        return
    table_ = read_table(name, lines, seed)
    try:
        recipe = build(table_)
    except InputError as refusal:
        results["searches"][key] = {"recipe": lines, "refused": str(refusal)}
        return
    print(key, flush=True)
    path = out.parent / f"{out.stem}-runs" / key.replace(" / ", "-").replace("/", "of").replace(" ", "_")
    run = open_run(path) if (path / "run.json").exists() else create(path, "run", table_)
    if run.table != json.loads(json.dumps(table_)):
        shutil.rmtree(path)
        run = create(path, "run", table_)
    carry_out(run, recipe)
    found, trained = run.needed("search"), run.needed("train/searched")
    judged = run.needed("evaluate/searched")
    seconds = json.loads((path / "search" / "timing.json").read_text())["seconds"]
    results["searches"][key] = {
        "recipe": lines,
        "mixing_weights": {
            kind: [[round(value, 5) for value in row] for row in table]
            for kind, table in found["mixing_weights"].items()
        },
        "genotype": found["genotype"],
        "parameters": trained["parameters"],
        "natural": judged["natural"],
        "worst_case": judged["worst_case"],
        "images": judged["n"],
        "search_seconds": seconds,
    }
    save(results, out)
    shutil.rmtree(path)


def carry_out(run: RunDirectory, recipe: Recipe) -> None:
    """Search, training and attacks, in this process."""
    for task in plan(recipe, run.command):
        if task.name in TASKS and run.result(task.name) is None:
            begin = time.monotonic()
            result = task.work(Context(run, recipe, lambda progress: None))
            run.finish(task.name, result, time.monotonic() - begin)


def save(results: Results, out: Path) -> None:
    """Replace the results file."""
    write_text(json.dumps(results) + "\n", out)


def ranks_agree(first: Results, second: Results) -> float:
    """Spearman's rank correlation of two searches' mixing weights."""
    flat = [
        torch.cat([torch.tensor(table) for table in entry["mixing_weights"].values()]).flatten().tolist()
        for entry in (first, second)
    ]
    return float(spearmanr(*flat).statistic)


def table(results: Results) -> str:
    """The results as Markdown, one table a recipe."""
    searches = {key: entry for key, entry in results["searches"].items() if "refused" not in entry}
    lines = []
    for name in dict.fromkeys(key.split(" / ")[0] for key in results["timing"]):
        exact = {key.split(" / ")[2]: e for key, e in searches.items() if key.startswith(f"{name} / exact / ")}
        floor = [ranks_agree(a, b) for a, b in itertools.combinations(exact.values(), 2)]
        chance = f"{statistics.mean(floor):.2f}" if floor else "-"
        lines += [f"## {name}", "", f"Rank correlation of exact mode with exact mode at another seed: {chance}.", ""]
        lines.append("| setting | step, relative | rank correlation | natural | worst case | seeds |")
        lines.append("|---|---|---|---|---|---|")
        for setting in SETTINGS:
            timed = results["timing"].get(f"{name} / {setting}")
            if timed is None:
                continue
            if "refused" in timed:
                lines.append(f"| {setting} | refused: {timed['refused']} | | | | |")
                continue
            prefix = f"{name} / {setting} / "
            entries = {key.removeprefix(prefix): e for key, e in searches.items() if key.startswith(prefix)}
            agreement = [ranks_agree(e, exact[seed]) for seed, e in entries.items() if seed in exact]
            lines.append(
                f"| {setting} | {timed['relative']:.2f} | {_spread(agreement, 1, 2)} | "
                f"{_spread([e['natural'] for e in entries.values()], 100, 1)} % | "
                f"{_spread([e['worst_case'] for e in entries.values()], 100, 1)} % | {len(entries)} |"
            )
        lines.append("")
    return "\n".join(lines)


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    """Mean and standard deviation."""
    if not values:
        return "-"
    mean = f"{scale * statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {scale * statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
