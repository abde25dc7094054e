"""nas compare: contenders as the recipe says, alike in all else, one table of it, and the same after any crash."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import NAS, Outcome, nas, record, save_arrays, settings, toml

from nas.attacks.pgd import Pgd
from nas.defences.noise import ImageNoise, NoiseEnsemble
from nas.errors import InputError
from nas.evaluation.interval import wilson
from nas.evaluation.robustness import Trial
from nas.evaluation.suspicion import Check
from nas.model_file import load_model
from nas.report.comparison_table import ABSENT
from nas.report.comparison_verdict import comparison_verdict
from nas.threat_model import ThreatModel
from nas.training.loop import Training
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.trades import Trades
from runs.comparison import plan, read_genotype_of
from runs.contenders import Contender, merged
from runs.detecting import judge_detected
from runs.judging import Bench, judge
from runs.recipe import Recipe, build, read_table
from search_spaces.genotype import StageGenotype

COMPARISON = """
name = "small"
device = "cpu"

[data]
name = "arrays"
path = {path}
validation = 0.5

[threat_model]
epsilon = 0.08

[train]
epochs = 2
batch_size = 8
attack = {{ name = "pgd", steps = 2 }}
validation_attack = {{ name = "fgsm" }}
optimiser = {{ learning_rate = 0.05 }}

[compare]
genotype = {{ space = "plain", depths = [1], widths = [4] }}
seeds = [3, 1]
equal = "passes"

[[compare.contenders]]
name = "at"

[[compare.contenders]]
name = "none"
method = {{ name = "standard" }}

[[compare.contenders]]
name = "noisy"
method = {{ name = "gaussian_augmentation", draws = 2, noise = {{ sigma = 0.1 }} }}
certify = {{ sigma = 0.1, n0 = 10, n = 40, samples = 24 }}

[[compare.contenders]]
name = "guarded"
network = "none"
detect = {{ steps = 3, restarts = 2, squeezers = [{{ name = "bit_depth", bits = 2 }}, {{ name = "median_filter" }}] }}

[evaluate]
trials = [
    {{ name = "fgsm", attack = {{ name = "fgsm" }} }},
    {{ name = "pgd x 2", attack = {{ name = "pgd", steps = 2 }}, restarts = 2 }},
]
"""

TRAINED = ("at", "none", "noisy")


def comparison_recipe(folder: Path) -> Path:
    """A comparison of the user's own that takes seconds, on two classes of which brightness tells enough to learn."""
    draw = np.random.default_rng(0)
    images = {
        f"x_{part}": (draw.integers(0, 120, (96, 8, 8)) + 50 * (np.arange(96) % 2)[:, None, None]).astype(np.uint8)
        for part in ("train", "test")
    }
    path = folder / "small.toml"
    path.write_text(COMPARISON.format(path=toml(save_arrays(folder / "mine.npz", **images))), encoding="utf-8")
    return path


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return build(read_table(str(comparison_recipe(folder)), overrides))


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long and has no state."""

    def checks(*arguments: Any, **options: Any) -> list[Check]:
        return [Check("steady", "pass", ""), Check("doubtful", "warn", "a little")]

    patch.setattr("runs.judging.suspicions", checks)
    patch.setattr("runs.detecting.suspicions", checks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison that was never stopped."""
    folder = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        outcome = nas("compare", comparison_recipe(folder), "--out", folder / "run")
    assert outcome.status == 0, outcome.err
    return folder / "run"


def results_of(run: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


def contender(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in results["contenders"] if entry["name"] == name)


# --- what comes out


def test_the_table_holds_what_the_tasks_found(finished: Path) -> None:
    results = results_of(finished)
    assert [entry["name"] for entry in results["contenders"]] == ["at", "none", "noisy", "guarded"]
    for entry in results["contenders"]:
        assert [run["seed"] for run in entry["runs"]] == [3, 1]
        for run in entry["runs"]:
            found = json.loads((finished / f"evaluate/{entry['name']}-{run['seed']}/result.json").read_text())
            assert run["worst_case"] == found["worst_case"] <= min(found["attacks"].values())
            assert run["interval"] == list(wilson(round(found["worst_case"] * found["n"]), found["n"]))
        for key in ("natural", "worst_case"):
            values = [run[key] for run in entry["runs"]]
            assert entry[key] == {"mean": statistics.fmean(values), "deviation": statistics.stdev(values)}
        attacks = [run["attacks"]["pgd x 2"] for run in entry["runs"]]
        assert entry["attacks"]["pgd x 2"]["mean"] == pytest.approx(sum(attacks) / 2)
        assert entry["masking"] == {"verdict": "warn", "checks": {"doubtful": 2}}
        for end in (0, 1):
            assert entry["interval"][end] == pytest.approx(statistics.fmean(r["interval"][end] for r in entry["runs"]))


def test_markdown_page_and_terminal_say_the_same(finished: Path) -> None:
    results = results_of(finished)
    lines = (finished / "table.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, rows = table[0], {row[0]: dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert header[:7] == ["contender", "natural", "worst case", "95 % interval", "masking", "fgsm", "pgd x 2"]
    assert header[-4:] == ["epochs", "passes", "seconds", "memory"]
    page = (finished / "report.html").read_text()
    for entry in results["contenders"]:
        row, worst = rows[entry["name"]], entry["worst_case"]
        assert row["worst case"] == f"{100 * worst['mean']:.1f} ± {100 * worst['deviation']:.1f}"
        assert row["masking"] == "▲ warn"
        mean, deviation = row["worst case"].split(" ± ")
        assert f'>{mean} <span class="interval">± {deviation}</span></td>' in page
    assert rows["guarded"]["seconds"] == ABSENT != rows["none"]["seconds"]
    assert rows["at"]["passes"] == "1.00"
    again = nas("report", finished)
    assert again.status == 0 and (finished / "report.html").read_text() == page
    assert nas("compare", "--resume", finished, "--json").json() == results
    shown = nas("compare", "--resume", finished).out
    assert all(row["worst case"] in shown for row in rows.values())
    assert all(line.removeprefix("* ") in shown for line in lines if line.startswith("* "))


def test_equal_passes(finished: Path) -> None:
    results = results_of(finished)
    first = contender(results, "at")["passes"]
    # PGD-2: two forwards and backwards for the attack, one of each for the weights.
    assert (first["forward"], first["backward"]) == (3, 3)
    images = 48 // 8 * 8  # of the training part, whole batches of 8
    assert first["total"] == 2 * images * 6
    for name in ("none", "noisy"):
        entry = contender(results, name)
        assert (entry["passes"]["forward"], entry["passes"]["backward"]) == (1, 1)
        assert entry["epochs"] == 6 == len(entry["runs"][0]["training"])
        assert entry["passes"]["relative"] == 1


def test_contenders_differ_in_their_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    contenders = "compare.contenders=[{name='one'}, {name='two', method={name='pgd_at'}}, {name='other', ema=0.5}]"
    both = settings(contenders, "compare.seeds=[0, 1]", "train.epochs=1")
    outcome = nas("compare", comparison_recipe(tmp_path), "--out", "run", *both)
    assert outcome.status == 0, outcome.err
    results = results_of(Path("run"))
    digests = {c["name"]: [run["digest"] for run in c["runs"]] for c in results["contenders"]}
    assert digests["one"] == digests["two"] != digests["other"]
    assert len(set(digests["one"])) == 2
    # One seed or two, another contender beside it or not: the network is the same.
    alone = settings("compare.contenders=[{name='one'}]", "compare.seeds=[1]", "train.epochs=1")
    assert nas("compare", comparison_recipe(tmp_path), "--out", "alone", *alone).status == 0
    only = results_of(Path("alone"))["contenders"][0]
    assert [run["digest"] for run in only["runs"]] == digests["one"][1:]
    assert only["natural"]["deviation"] is None


def test_a_contender_is_the_teacher_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)

    def digests(name: str, teacher: object) -> dict[str, list[str]]:
        # Temperature 1: the teacher's answers differ enough from one another to be told apart.
        ard = f"{{name='ard', method={{name='ard', teacher={toml(teacher)}, temperature=1.0}}}}"
        changes = settings(f"compare.contenders=[{{name='at'}}, {ard}]", "train.epochs=1")
        outcome = nas("compare", comparison_recipe(tmp_path), "--out", name, *changes)
        assert outcome.status == 0, outcome.err
        return {c["name"]: [run["digest"] for run in c["runs"]] for c in results_of(Path(name))["contenders"]}

    taught = digests("taught", "at")
    assert taught["ard"][0] != taught["at"][0]
    # Each seed learns from the network of its own seed.
    for index, seed in enumerate((3, 1)):
        fixed = digests(f"fixed-{seed}", Path(f"taught/train/at-{seed}").resolve())
        assert [a == b for a, b in zip(fixed["ard"], taught["ard"], strict=True)] == [i == index for i in range(2)]


def test_compressed_networks_are_compared_with_those_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    rate = {"p50": 0.002, "p90": 0.003, "images_per_second": 500.0, "calls": 100}

    def timed(models: dict[str, Any], x: Any) -> dict[str, Any]:
        speeds = {name: {**rate, "speed": 1.0 - 0.25 * i} for i, name in enumerate(models)}
        return {"engines": {"eager": {"batches": {"1": speeds}}}}

    monkeypatch.setattr("runs.context.throughput", timed)
    step = "{name='magnitude', keep=0.5}"
    contenders = [
        "{name='at'}",
        f"{{name='half', network='at', compress={{steps=[{step}], fine_tune={{epochs=1}}}}}}",
        "{name='tenth', network='at', compress={name='magnitude', keep=0.1, fine_tune={epochs=0}}}",
        "{name='none', network='at', compress={name='arlst', keep=0.1}}",
    ]
    options = settings(f"compare.contenders=[{', '.join(contenders)}]", "train.epochs=2", "compare.equal='nothing'")
    options += settings("compare.genotype.depths=[2]")
    outcome = nas("compare", comparison_recipe(tmp_path), "--out", "run", *options)
    assert outcome.status == 0, outcome.err
    results = results_of(Path("run"))
    at, half, tenth, none = results["contenders"]
    # A method that finds nothing to do on the network says so, and the others go on.
    reason = none["runs"][0]["failed"]
    assert "classifier" in reason and reason in (Path("run") / "table.md").read_text()
    assert (at["epochs"], half["epochs"], tenth["epochs"]) == (2, 3, 2)
    assert at["nonzero"]["mean"] > half["nonzero"]["mean"] > tenth["nonzero"]["mean"]
    assert at["bytes"]["mean"] > half["bytes"]["mean"] > tenth["bytes"]["mean"]
    assert half["parameters"] == at["parameters"]
    for entry in (half, tenth):
        for run, parent in zip(entry["runs"], at["runs"], strict=True):
            assert run["digest"] != parent["digest"] and run["transfer"]["from"].keys() == {"at"}
    assert "transfer" not in at["runs"][0]
    lines = (Path("run") / "table.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    column = table[0].index("speed, 1 image")
    assert [row[column] for row in table[2:5]] == ["1.00 x", "0.75 x", "0.50 x"]
    assert "speed, 1 image" in nas("compare", "--resume", "run").out
    assert [one.get("compress") for one in results["contenders"]] == [None, ["magnitude"], ["magnitude"], ["arlst"]]
    page = (Path("run") / "report.html").read_text()
    assert "One network trained 1 way and compressed 3 ways" in page and "Worst-case accuracy by compression" in page
    assert "say whose networks" in nas(
        "compare", comparison_recipe(tmp_path), *settings(f"compare.contenders=[{{name='a', compress={step}}}]")
    ).refusal  # fmt: skip


def test_smoothing_is_certified(finished: Path) -> None:
    for run in contender(results_of(finished), "noisy")["runs"]:
        curve = run["certification"]["certified_accuracy"]
        assert curve == sorted(curve, reverse=True)
        assert run["certification"]["n"] == 24 and run["certification"]["radii"][8] == 0.1
    assert "certification" not in contender(results_of(finished), "at")["runs"][0]


def test_a_detector_uses_the_networks_it_is_said_to(finished: Path) -> None:
    results = results_of(finished)
    none, guarded = contender(results, "none"), contender(results, "guarded")
    assert [run["digest"] for run in guarded["runs"]] == [run["digest"] for run in none["runs"]]
    assert not (finished / "train" / "guarded-3").exists()
    assert set(guarded["attacks"]) == {*none["attacks"], "adaptive"}
    for run in guarded["runs"]:
        rows = run["detection"]["attacks"]
        assert run["worst_case"] <= run["attacks"]["adaptive"]
        assert all(row["successful"] <= row["n"] for row in rows.values())
    assert any("knows the detector" in line for line in results["verdict"])


# --- parts of it


def test_a_detector_that_refuses_nothing_or_everything(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    recipe = build(json.loads((finished / "run.json").read_text())["recipe"])
    assert recipe.compare is not None
    part = recipe.compare.contender("guarded", "test").detect
    assert part is not None
    data = recipe.data.source()
    _, model = load_model(finished / "train" / "none-3")
    bench = Bench(data.x_test.float() / 255, data.y_test, recipe.threat_model, seed=5, batch_size=40)
    legitimate = data.x_train[:20].float() / 255
    trials = {"pgd": Trial(Pgd(recipe.threat_model, steps=3)), "again": Trial(Pgd(recipe.threat_model, steps=1), 3)}
    ours = judge(bench, model, trials, finished.parent)
    monkeypatch.setattr("runs.detecting.threshold_at", lambda scores, rate: 2.0)
    open_ = judge_detected(bench, model, trials, part, legitimate)
    for name in trials:
        assert open_["attacks"][name] == ours["attacks"][name] < ours["natural"]
    assert open_["natural"] == ours["natural"]
    assert open_["detection"]["without"] == ours["worst_case"]
    assert open_["worst_case"] <= ours["worst_case"]
    monkeypatch.setattr("runs.detecting.threshold_at", lambda scores, rate: -1.0)
    closed = judge_detected(bench, model, trials, part, legitimate)
    assert closed["natural"] == closed["worst_case"] == 0 and closed["detection"]["false_positives"] == 1
    assert all(row["detected"] in (1, None) for row in closed["detection"]["attacks"].values())


def test_noise_that_was_trained_with_is_predicted_with(finished: Path) -> None:
    _, model = load_model(finished / "train" / "noisy-3")
    assert isinstance(model, NoiseEnsemble) and model.draws == 2 and model.noise == ImageNoise(0.1)
    _, model = load_model(finished / "train" / "at-3")
    assert not isinstance(model, NoiseEnsemble)


def test_tables_are_merged_and_names_replace() -> None:
    base = {"attack": {"name": "pgd", "steps": 3}, "optimiser": {"learning_rate": 0.1, "clip": 5.0}, "epochs": 3}
    changes = {"attack": {"steps": 5}, "optimiser": {"learning_rate": 0.2}, "method": {"name": "trades"}}
    assert merged(base, changes) == {
        "attack": {"name": "pgd", "steps": 5},
        "optimiser": {"learning_rate": 0.2, "clip": 5.0},
        "epochs": 3,
        "method": {"name": "trades"},
    }
    assert merged(base, {"attack": {"name": "fgsm"}})["attack"] == {"name": "fgsm"}
    assert base["attack"] == {"name": "pgd", "steps": 3}


def test_contenders_are_built_on_train(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        "compare.contenders.1={name='trades', method={name='trades', beta=2.0}, attack={steps=4}, ema=0.9}",
        "compare.contenders.3={name='rest', network='at'}",
        "compare.reference='trades'",
    )
    assert recipe.compare is not None
    threat_model = ThreatModel(epsilon=0.08)
    at, trades, _, rest = recipe.compare.contenders
    assert at.train.objective == PgdAt(Pgd(threat_model, steps=2))
    assert trades.train.objective == Trades(Pgd(threat_model, steps=4, loss="kl"), 2.0)
    assert trades.train.training == Training(2, 8, at.train.training.optimiser, ema=0.9)
    assert rest.train == at.train and not rest.trains
    assert recipe.compare.against == trades
    names = [task.name for task in plan(recipe)]
    assert "train/rest-3" not in names and "evaluate/rest-3" in names and names[-1] == "report"


def test_genotypes(tmp_path: Path, finished: Path) -> None:
    assert read_genotype_of(recipe_of(tmp_path)) == StageGenotype("plain", (1,), (4,))
    size = ["train.channels=2", "train.cells=4"]
    assert read_genotype_of(recipe_of(tmp_path, "compare.genotype='arnas'", *size)).space == "dsara"
    (tmp_path / "mine.json").write_text(json.dumps(StageGenotype("plain", (1, 1), (4, 8)).to_data()))
    found = read_genotype_of(recipe_of(tmp_path, f"compare.genotype='{tmp_path}/mine.json'", *size))
    assert found == StageGenotype("plain", (1, 1), (4, 8))
    # Another comparison's.
    assert read_genotype_of(recipe_of(tmp_path, f"compare.genotype='{finished}'", *size)).widths == (4,)
    assert nas("analyse", finished, "--json").json()[0]["genotype"]["widths"] == [4]


def test_a_searched_network_is_compared(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    options = settings(
        "train.channels=2",
        "train.cells=4",
        "compare.contenders=[{name='at'}, {name='none', method={name='standard'}}]",
        "train.auxiliary_weight=0.4",
        "compare.seeds=[0]",
        "train.epochs=1",
        "compare.equal='epochs'",
    )
    outcome = nas("compare", comparison_recipe(tmp_path), "--genotype", finished_run, "--out", "run", *options)
    assert outcome.status == 0, outcome.err
    searched = json.loads((finished_run / "search" / "genotype.json").read_text())
    assert results_of(Path("run"))["genotype"] == searched
    attacked = nas("attack", "run", "--model", "none-0", "--attack", "fgsm", "--json").json()
    assert attacked["worst_case"] == contender(results_of(Path("run")), "none")["attacks"]["fgsm"]["mean"]


def test_a_training_that_diverges_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    wild = "{name='wild', optimiser={learning_rate=1e30, clip=0.0}, certify={n=4, n0=4}}"
    options = settings(
        f"compare.contenders=[{{name='at'}}, {wild}]", "compare.seeds=[0]", "train.epochs=1", "compare.equal='epochs'"
    )
    outcome = nas("compare", comparison_recipe(tmp_path), "--out", "run", *options)
    assert outcome.status == 0, outcome.err
    results = results_of(Path("run"))
    failed = contender(results, "wild")
    assert "lower the learning rate" in failed["runs"][0]["failed"] and "worst_case" not in failed
    assert any(line.startswith("wild failed in 1 of 1 seeds") for line in results["verdict"])
    assert "failed, see below" in Path("run/table.md").read_text()
    assert "lower the learning rate" in Path("run/report.html").read_text()


def entry(name: str, values: list[float], verdict: str = "pass") -> dict[str, Any]:
    mean = statistics.fmean(values)
    return {
        "name": name,
        "runs": [{"worst_case": value} for value in values],
        "worst_case": {"mean": mean},
        "natural": {"mean": 0.9},
        "interval": [mean - 0.05, mean + 0.05],
        "masking": {"verdict": verdict, "checks": {"steps": 1} if verdict == "fail" else {}},
    }


def test_the_verdict_calls_noise_noise() -> None:
    contenders = [
        entry("base", [0.5, 0.52]),
        entry("better", [0.7, 0.72]),
        entry("worse", [0.3, 0.31], "fail"),
        entry("near", [0.56, 0.58]),
        # The means are far apart, but one seed is not.
        entry("uneven", [0.51, 0.95]),
    ]
    data = {"test": 360, "classes": ["0", "1", "2"]}
    lines = comparison_verdict({"contenders": contenders, "reference": "base", "data": data})
    assert lines[0] == "Reference: base, worst case 51.0%."
    assert lines[1].startswith("better (+20.0 points, natural +0.0) is more robust than base")
    assert lines[2].startswith("worse (-20.5 points") and "less robust" in lines[2]
    assert "near (+6.0" in lines[3] and "uneven (+22.0" in lines[3] and "not measurably" in lines[3]
    assert lines[4] == "Masking checks failed, robust accuracy may be overstated: worse (steps)."
    # Of many only the ends are named.
    many = [entry("base", [0.5, 0.52]), *(entry(f"n{i}", [0.5 + i / 1000, 0.51]) for i in range(9))]
    line = comparison_verdict({"contenders": many, "reference": "base", "data": data})[1]
    assert line.startswith("9 contenders, from n0 (-0.5 points, natural +0.0) to n8 (-0.1 points")


# --- stopped and resumed


class Stopped(Exception):
    """What happens to the process."""


STOPS = [
    # Where, at which call since the process began, before or after it.
    ("runs.metrics.MetricsLog.log", 2, False),
    ("nas.training.loop.write_tree", 3, True),
    ("runs.directory.RunDirectory.finish", 2, True),
    ("nas.evaluation.robustness.write_tree", 2, False),
    ("nas.evaluation.certification.votes", 2, True),
    ("nas.detection.feature_squeezing.joint_score", 4, True),
    ("runs.comparison.write_comparison_page", 1, True),
]


def comparable(run: Path) -> dict[str, Any]:
    """Every file of a run but what was measured, which depends on the moment."""
    files: dict[str, Any] = {n: b for n, b in record(run).items() if not n.endswith(("measured.json", "table.md"))}
    results = json.loads(files.pop("results.json"))
    results.pop("measured")
    return {**files, "results.json": results}


def test_stopped_everywhere_and_resumed(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    recipe, run = finished.parent / "small.toml", tmp_path / "run"

    def attempt() -> Outcome:
        return nas("compare", *(["--resume", run] if run.exists() else [recipe, "--out", run]))

    for target, calls, before in STOPS:
        function, count = pkgutil.resolve_name(target), 0

        def stopping(
            *arguments: Any, function: Any = function, calls: int = calls, before: bool = before, **options: Any
        ) -> Any:
            nonlocal count
            count += 1
            if before and count == calls:
                raise Stopped("stopped by the test")
            result = function(*arguments, **options)
            if count == calls:
                raise Stopped("stopped by the test")
            return result

        with monkeypatch.context() as patch:
            patch.setattr(target, stopping)
            outcome = attempt()
            assert outcome.status == 1 and "stopped by the test" in outcome.err, f"nothing stopped at {target}"
    outcome = attempt()
    assert outcome.status == 0, outcome.err
    assert comparable(run) == comparable(finished)


def test_seconds_of_an_interrupted_training_are_added_up(finished: Path) -> None:
    laps = json.loads((finished / "train/none-3/measured.json").read_text())["epochs"]
    assert list(laps) == [str(epoch) for epoch in range(6)]
    assert results_of(finished)["measured"]["none"]["seconds"][0] == pytest.approx(sum(laps.values()), abs=0.01)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kill -9")
def test_killed_with_workers_and_resumed(tmp_path: Path) -> None:
    recipe = comparison_recipe(tmp_path)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    longer = settings("workers=2", "train.epochs=4")
    whole = subprocess.run([NAS, "compare", recipe, "--out", tmp_path / "whole", *longer], env=environment, timeout=300)
    assert whole.returncode == 0
    run = tmp_path / "run"
    process = subprocess.Popen([NAS, "compare", recipe, "--out", run, *longer], env=environment)
    deadline = time.monotonic() + 120
    while not list(run.glob("train/*/checkpoint.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "results.json").exists()
    assert subprocess.run([NAS, "compare", "--resume", run], env=environment, timeout=300).returncode == 0
    assert comparable(run) == comparable(tmp_path / "whole")


# --- bad input


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("compare.contenders=[]", ["compare.contenders", "at least one"]),
        ("compare.contenders='at'", ["compare.contenders", "list"]),
        ("compare.contenders.0.name='none'", ["two contenders named 'none'"]),
        ("compare.contenders.0.name='a/b'", ["compare.contenders[0].name 'a/b'", "letters"]),
        ("compare.contenders.0={method={name='standard'}}", ["compare.contenders[0].name is missing"]),
        ("compare.contenders.1.epoch=3", ["'epoch'", "[compare.contenders[1]]", "did you mean 'epochs'?"]),
        ("compare.contenders.1.detec={}", ["did you mean 'detect'?"]),
        ("compare.contenders.1.channels=3", ["'channels'", "compare.contenders[1]"]),
        ("compare.contenders.1.method.name='standart'", ["did you mean 'standard'?"]),
        ("compare.contenders.1.method.beta=1", ["'beta'", "compare.contenders[1].method"]),
        ("compare.contenders.1.attack.steps=1", ["compare.contenders[1].attack", "takes none"]),
        ("compare.contenders.0.attack.stepz=1", ["compare.contenders[0].attack", "did you mean 'steps'?"]),
        ("compare.contenders.1.epochs=7", ["compare.contenders[1].epochs", "equal = 'passes'"]),
        ("compare.contenders.2.certify.sigma=0", ["compare.contenders[2].certify", "sigma"]),
        ("compare.contenders.2.certify.m=0", ["compare.contenders[2].certify", "'m'"]),
        ("compare.contenders.2.certify.samples=-1", ["samples"]),
        ("compare.contenders.3.detect.squeezers=[]", ["compare.contenders[3].detect.squeezers"]),
        ("compare.contenders.3.detect.squeezers.0.name='bit_dept'", ["squeezers[0]", "did you mean 'bit_depth'?"]),
        ("compare.contenders.3.detect.false_positive_rate=1", ["false_positive_rate"]),
        ("compare.contenders.3.network='non'", ["compare.contenders[3].network", "did you mean 'none'?"]),
        ("compare.contenders.0.network='none'", ["compare.contenders[0].network"]),
        ("compare.contenders.3.epochs=2", ["compare.contenders[3]", "'epochs' is about training"]),
        ("compare.seeds=[]", ["seeds"]),
        ("compare.seeds=[1, 1]", ["seeds", "once"]),
        ("compare.seeds=[-1]", ["seeds"]),
        ("compare.equal='time'", ["compare.equal", "passes"]),
        ("compare.reference='nobody'", ["reference", "nobody"]),
        ("compare.genotype={space='plain', depths=[1]}", ["widths"]),
        ("compare=3", ["compare must be a table"]),
        ("compare.contender=[]", ["'contender'", "[compare]", "did you mean 'contenders'?"]),
    ],
)
def test_comparison_that_cannot_be(recipe_path: Path, override: str, words: list[str]) -> None:
    message = nas("compare", recipe_path, "--out", "new", "--set", override).refusal
    assert not os.path.exists("new")
    for word in words:
        assert word in message, message


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return comparison_recipe(tmp_path)


def test_commands_and_recipes_that_do_not_fit(recipe_path: Path, finished: Path) -> None:
    assert "nas compare" in nas("run", recipe_path, "--out", "new").refusal
    assert "[compare]" in nas("compare", "digits", "--out", "new").refusal
    assert "resume it with that command" in nas("run", "--resume", finished).refusal
    assert not os.path.exists("new")


def test_a_recipe_without_search_or_comparison_is_refused(tmp_path: Path) -> None:
    path = comparison_recipe(tmp_path)
    text = path.read_text()
    path.write_text(text[: text.index("[compare]")] + text[text.index("[evaluate]") :])
    assert "compare" not in read_table(str(path)) and "search" not in read_table(str(path))
    for command in ("run", "search"):
        size = settings("train.cells=4", "train.channels=2")
        assert "has no [search] table" in nas(command, path, "--out", "new", *size).refusal
    assert not os.path.exists("new")


def test_a_genotype_that_cannot_be(recipe_path: Path) -> None:
    size = settings("train.channels=2", "train.cells=4")
    message = nas("compare", recipe_path, "--genotype", "arnass", "--out", "new", *size).refusal
    assert "no genotype 'arnass'" in message and "arnas" in message
    message = nas("compare", recipe_path, "--out", "new", *size, "--set", "compare.genotype=3").refusal
    assert "compare.genotype must be" in message
    # The size of a network of cells is the recipe's.
    assert "train.cells is missing" in nas("compare", recipe_path, "--genotype", "arnas", "--out", "new").refusal
    assert not os.path.exists("new")


def test_the_genotype_is_needed(tmp_path: Path) -> None:
    table = read_table(str(comparison_recipe(tmp_path)), ["train.channels=2", "train.cells=4"])
    del table["compare"]["genotype"]
    with pytest.raises(InputError, match="genotype is missing"):
        read_genotype_of(build(table))


def test_contenders_are_values() -> None:
    part = build(read_table("survey-grid")).compare
    assert part is not None and isinstance(part.contenders[0], Contender)
    assert part.contenders[0].train.objective == Standard()
    assert len(part.contenders) >= 6
