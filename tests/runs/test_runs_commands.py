"""From a recipe to a report and on from there: every command, on one tiny run that really took place."""

from __future__ import annotations

import html
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, nas

from nas import plugins
from nas.data.digits import Digits
from nas.export.card import plain
from nas.export.package import export_model
from nas.model_file import load_model, weights_digest
from runs.directory import flatten, open_run
from runs.recipe import read_table
from runs.tasks import IN_METRICS_ONLY
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import read_genotype

NETWORKS = ("searched", "compressed", "random-1", "plain")
TASKS = (
    "search",
    "analyse",
    "compress",
    *(f"train/{name}" for name in NETWORKS if name != "compressed"),
    *(f"evaluate/{name}" for name in NETWORKS),
    "export",
    "report",
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the reloading of exports, the pictures of the report and the timing of networks, which take seconds."""
    monkeypatch.setattr("runs.exporting.check_exports", lambda *arguments: [])
    monkeypatch.setattr("nas.report.page.write_report", lambda results, path: path.write_text("report"))
    rows = {"before": RATE, "compressed": {**RATE, "speed": 0.5}}
    monkeypatch.setattr(
        "runs.context.throughput",
        lambda models, x: {"engines": {"eager": {"batches": {"1": {n: rows[n] for n in models}}}}},
    )


RATE = {"p50": 0.002, "p90": 0.003, "images_per_second": 500.0, "calls": 100, "speed": 1.0}


def folder_of(run: Path, network: str) -> Path:
    return run / ("compress" if network == "compressed" else f"train/{network}")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def commands_after(output: str) -> list[list[str]]:
    """The commands that a command's last words recommend, as argument lists."""
    lines = output.splitlines()
    return [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]


# --- what a run leaves


def test_a_run_leaves_what_it_promises_and_nothing_else(finished_run: Path) -> None:
    trained = ("metrics.jsonl", "checkpoint.safetensors", "model.json", "model.safetensors", "events")
    exported = ("genotype.json", "model.json", "model.safetensors", "network.py", "network.safetensors")
    exported += ("MODEL_CARD.md",)
    expected = {"run.json", "environment.json", "results.json", "report.html", "lock", "lock.workers"}
    expected |= {f"{task}/{name}" for task in TASKS for name in ("result.json", "timing.json")}
    expected |= {f"search/{name}" for name in ("metrics.jsonl", "checkpoint.safetensors", "genotype.json", "events")}
    expected |= {f"analyse/{kind}.svg" for kind in ("accurate", "reduction", "robust")}
    for network in NETWORKS:
        folder = folder_of(Path(), network)
        expected |= {str(folder / name) for name in trained}
        expected.add(f"evaluate/{network}/progress.safetensors")
    expected |= {f"{folder}/{name}" for folder in ("export", "export/compressed") for name in exported}
    expected |= {"compress/step.json", "report/throughput.json", "report/gallery.json", "report/events"}
    files = [path.relative_to(finished_run) for path in finished_run.rglob("*") if path.is_file()]
    found = {str(path.with_name("events") if path.name.startswith("events.") else path) for path in files}
    assert found == expected


def test_results_are_those_of_the_tasks(finished_run: Path) -> None:
    results, run = read(finished_run / "results.json"), open_run(finished_run)
    assert [model["name"] for model in results["models"]] == list(NETWORKS)
    for entry in results["models"]:
        name = entry["name"]
        trained, evaluated = read(folder_of(finished_run, name) / "result.json"), run.needed(f"evaluate/{name}")
        role = "random" if name == "random-1" else name
        assert entry == {"name": name, "role": role, **trained, **evaluated}
    assert results["recipe"] == flatten(run.table)
    assert results["genotype"] == read(finished_run / "search" / "genotype.json")
    assert results["models"][0]["genotype"] == results["genotype"]
    for file in results["export"]:
        assert (finished_run / file["file"]).is_file()
        assert file["difference"] is None or file["difference"] <= 1e-5
    assert results["threat_model"] == {"norm": "linf", "epsilon": read_table("digits")["threat_model"]["epsilon"]}
    assert results["data"]["digest"] == Digits()().digest


@pytest.mark.parametrize("network", NETWORKS)
def test_results_are_those_of_the_networks(finished_run: Path, network: str) -> None:
    """The saved weights, attacked by hand in one step, give the numbers of results.json."""
    results = read(finished_run / "results.json")
    entry = next(model for model in results["models"] if model["name"] == network)
    spec, model = load_model(folder_of(finished_run, network))
    assert entry["digest"] == weights_digest(model)
    assert entry["genotype"] == spec.genotype.to_data()
    assert entry["parameters"] == sum(parameter.numel() for parameter in spec.build().parameters())
    data = Digits()()
    x, y = (data.x_test.float() / 255).requires_grad_(True), data.y_test
    logits = model(x)
    right = logits.argmax(1) == y
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    x_adv = (x + results["threat_model"]["epsilon"] * gradient.sign()).clamp(0, 1).detach()
    survived = right & (model(x_adv).argmax(1) == y)
    assert entry["n"] == len(y)
    assert entry["natural"] == float(right.double().mean())
    assert entry["attacks"]["fgsm"] == pytest.approx(float(survived.double().mean()), abs=1.5 / len(y))
    assert entry["worst_case"] <= min(entry["attacks"].values()) <= entry["natural"]
    low, high = entry["interval"]
    assert low <= entry["worst_case"] <= high


def test_compression_keeps_the_share_it_was_asked_for(finished_run: Path) -> None:
    _, model = load_model(finished_run / "compress")
    masks = [buffer for name, buffer in model.named_buffers() if name.endswith(".mask")]
    kept = sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert kept == pytest.approx(read_table("digits")["compress"]["keep"], abs=1e-3)


@pytest.mark.parametrize("task", ["search", "compress", "train/searched", "train/random-1", "train/plain"])
def test_one_line_of_metrics_an_epoch(finished_run: Path, task: str) -> None:
    lines = (finished_run / task / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    result = read(finished_run / task / "result.json")
    assert [record["epoch"] for record in records] == list(range(2 if task == "search" else 1))
    if task == "search":
        records = [{key: record[key] for key in record if key not in IN_METRICS_ONLY} for record in records]
    assert records == result["epochs" if task == "search" else "training"]


def test_the_random_network_is_of_equal_size(finished_run: Path) -> None:
    models = {model["name"]: model for model in read(finished_run / "results.json")["models"]}
    assert models["random-1"]["parameters"] == pytest.approx(models["searched"]["parameters"], rel=0.3)
    assert models["random-1"]["genotype"] != models["searched"]["genotype"]


def test_report_is_one_page_with_everything(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    for name in NETWORKS:
        assert name in page
    assert 'src="http' not in page and "<link" not in page


def test_what_is_said_while_it_runs(finished_run: Path) -> None:
    outcome = nas("run", "--resume", finished_run)
    assert outcome.status == 0 and not outcome.err
    for task in TASKS:
        assert f"{task}: done before" in outcome.out
    models = read(finished_run / "results.json")["models"]
    for model in models:
        # In a pipe there is no width to keep to: no number may be cut.
        assert f"{model['parameters']:,}" in outcome.out and f"{model['worst_case']:.1%}" in outcome.out
    assert "…" not in outcome.out
    assert all(command[0] in ("open", "nas", "tensorboard") for command in commands_after(outcome.out))


def test_a_finished_run_is_left_alone_when_resumed(run_copy: Path) -> None:
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file() and "lock" not in path.name}
    results = nas("run", "--resume", run_copy, "--json").json()
    assert results == read(run_copy / "results.json")
    assert nas("run", "digits", "--resume", run_copy, *TINY).status == 0
    after = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file() and "lock" not in path.name}
    assert after == before


# --- commands on a finished run


def test_attack(run_copy: Path) -> None:
    models = {model["name"]: model for model in read(run_copy / "results.json")["models"]}
    found = nas("attack", run_copy, "--json").json()
    for key in ("digest", "n", "natural", "attacks", "worst_case", "interval", "attack_settings", "checks"):
        assert found[key] == models["searched"][key]
    assert read(next(run_copy.glob("attack-*/result.json"))) == found
    options = ["--attack", "fgsm", "--model", "plain"]
    told = nas("attack", run_copy, *options)
    assert told.status == 0 and f"{models['plain']['attacks']['fgsm']:.1%}" in told.out
    wider = nas("attack", run_copy, *options, "--epsilon", "0.5", "--json").json()
    assert wider["digest"] == models["plain"]["digest"] and "0.5" in wider["attack_settings"]["fgsm"]
    assert wider["attacks"]["fgsm"] < models["plain"]["attacks"]["fgsm"]
    # That of the run by its number, and another one.
    same, other = (nas("attack", run_copy, "--seed", seed, "--json").json() for seed in (found["seed"], 7))
    assert same == found and other["seed"] == 7
    assert {key: other[key] for key in ("digest", "n", "natural")} == {
        key: found[key] for key in ("digest", "n", "natural")
    }
    pages = [next(run_copy.glob(f"attack-*seed_{seed}/report.html")) for seed in (found["seed"], 7)]
    assert pages[0].read_text() != pages[1].read_text(), "other adversarial images"


def test_attacks_with_other_settings_do_not_answer_for_each_other(run_copy: Path) -> None:
    """Long settings differ only at their end; the masks of one must never be taken for those of the other."""
    options = ["attack", run_copy, "--model", "plain", "--attack", "pgd", "--json"]
    for setting in ("random_start=false", "loss='cross_entropy'", "keep='best'", "statistics='running'"):
        options += ["--set", setting]
    options += ["--set", "step_size=0.0100000001"]
    weak = nas(*options, "--set", "steps=1", "--restarts", "1").json()
    strong = nas(*options, "--set", "steps=9", "--restarts", "2").json()
    assert "PGD-1," in weak["attack_settings"]["pgd"] and "PGD-9," in strong["attack_settings"]["pgd"]
    assert strong["attacks"]["pgd"] < weak["attacks"]["pgd"]
    assert len(list(run_copy.glob("attack-*"))) == 2


def test_compress(run_copy: Path, quick: None) -> None:
    command = ["compress", run_copy, "--model", "plain", "--set", "keep=0.25", "--epochs", "1"]
    outcome = nas(*command)
    assert outcome.status == 0, outcome.err
    (folder,) = run_copy.glob("compress-*")
    plain = next(model for model in read(run_copy / "results.json")["models"] if model["name"] == "plain")
    assert read(folder / "result.json")["nonzero"] < plain["nonzero"]
    # What it recommends works as it stands.
    for recommended in commands_after(outcome.out):
        assert nas(*recommended[1:]).status == 0
    assert str(folder) in nas(*command).refusal


def test_compress_leaves_a_folder_with_other_work_alone(run_copy: Path) -> None:
    """A checkpoint of other settings in --out would silently become part of the result."""
    folder = run_copy / "train" / "plain"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "result.json").rename(run_copy / "away.json")
    del before[folder / "result.json"]
    assert nas("compress", run_copy, "--model", "plain", "--set", "keep=0.25", "--out", folder).refusal
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_compress_goes_on_where_it_was_stopped_while_it_made_its_folder(
    run_copy: Path, quick: None, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "compression.json.part").write_text("{")
    outcome = nas("compress", run_copy, "--model", "plain", "--keep", "0.5", "--epochs", 0, "--out", tmp_path / "new")
    assert outcome.status == 0, outcome.err
    assert not [*(tmp_path / "new").glob("*.part")]


def test_compress_into_another_folder(run_copy: Path, quick: None, tmp_path: Path) -> None:
    command = ["compress", run_copy, "--model", "plain", "--set", "keep=1"]
    result = nas(*command, "--out", tmp_path / "new", "--json").json()
    plain = next(model for model in read(run_copy / "results.json")["models"] if model["name"] == "plain")
    assert result["nonzero"] == plain["nonzero"] and result["role"] == "compressed"
    _, model = load_model(tmp_path / "new")
    assert weights_digest(model) == result["digest"]
    for recommended in commands_after(nas(*command, "--out", tmp_path / "my folder").out):
        assert nas(*recommended[1:]).status == 0


def test_compress_by_several_methods_in_order(run_copy: Path, quick: None) -> None:
    command = ["compress", run_copy, "--model", "plain", "--method", "magnitude,magnitude"]
    assert "each method once" in nas(*command).refusal
    assert (
        "no layer that ARLST may replace" in nas("compress", run_copy, "--model", "plain", "--method", "arlst").refusal
    )
    assert not [*run_copy.glob("compress-*")]
    outcome = nas("compress", run_copy, "--model", "plain", "--keep", "0.5", "--epochs", 0)
    assert outcome.status == 0, outcome.err
    assert "no speed-up (0.50 times as fast as before)" in outcome.out
    (folder,) = run_copy.glob("compress-*")
    result = read(folder / "result.json")
    assert result["training"] == [] and result["transfer"]["from"].keys() == {"the network before"}
    assert read(folder / "throughput.json")["engines"]["eager"]["batches"]["1"]["compressed"]["speed"] == 0.5


@pytest.mark.parametrize("place", ["nas.evaluation.robustness.write_tree", "runs.context.Context.throughput"])
def test_a_compression_that_was_stopped_goes_on(
    place: str, run_copy: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compress", run_copy, "--model", "plain", "--epochs", "2", "--json"]
    whole = nas(*command).json()
    (folder,) = run_copy.glob("compress-*")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("events.")}
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *arguments: 1 / 0)
        assert nas(*command).status == 1
    assert nas(*command).json() == whole
    assert "finished" in nas(*command).refusal
    after = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("events.")}
    assert after == before


def test_export(run_copy: Path, tmp_path: Path) -> None:
    files = nas("export", run_copy, "--model", "compressed", "--out", tmp_path / "mine", "--json").json()
    assert {file["format"] for file in files} == {"json", "safetensors", "py"}
    for file in files:
        assert (tmp_path / "mine" / file["file"]).is_file()
    assert load_genotype(str(tmp_path / "mine" / "genotype.json")) == read_genotype(run_copy / "search/genotype.json")


def test_export_of_the_card_alone(run_copy: Path, tmp_path: Path) -> None:
    outcome = nas("export", run_copy, "--to", "card", "--out", tmp_path / "mine")
    assert outcome.status == 0 and [path.name for path in (tmp_path / "mine").iterdir()] == ["MODEL_CARD.md"]
    card = (tmp_path / "mine" / "MODEL_CARD.md").read_text()
    (searched,) = [model for model in read(run_copy / "results.json")["models"] if model["name"] == "searched"]
    for said in (searched["digest"], f"{searched['worst_case']:.1%}", *searched["attacks"], "nas export RUN"):
        assert plain(said) in card or str(said) in card
    assert str(run_copy) not in card and "Time: search" in card


def test_a_file_that_is_not_the_network_fails_the_export(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tampered(spec, model, folder, formats):  # type: ignore[no-untyped-def]
        written = export_model(spec, model, folder, formats)
        weights = load_file(folder / "network.safetensors")
        weights["classifier.bias"][0] += 0.01
        save_file(weights, folder / "network.safetensors")
        return written

    monkeypatch.setattr("runs.exporting.export_model", tampered)
    outcome = nas("export", run_copy, "--to", "py", "--out", tmp_path / "mine")
    assert outcome.status == 1 and len(outcome.err.strip().splitlines()) == 1
    assert "network.py gives logits that differ from the model's by" in outcome.err
    assert not (tmp_path / "mine" / "MODEL_CARD.md").exists()


def test_report_again(run_copy: Path) -> None:
    (run_copy / "report.html").write_text("damaged")
    outcome = nas("report", run_copy)
    assert outcome.status == 0 and str(run_copy / "report.html") in outcome.out
    page = html.unescape((run_copy / "report.html").read_text(encoding="utf-8"))
    for line in read(run_copy / "results.json")["verdict"]:
        assert line.split(":")[0] in page


def test_analyse(finished_run: Path, tmp_path: Path) -> None:
    mine, published = nas(
        "analyse", finished_run, "--compare", "arnas", "--cells", "4", "--channels", "3", "--json"
    ).json()
    assert mine["genotype"] == read(finished_run / "search" / "genotype.json")
    analysis = read(finished_run / "analyse" / "result.json")
    assert mine["topology"] == analysis["topology"]
    assert published["digest"] == load_genotype("arnas").digest
    told = nas("analyse", finished_run / "search/genotype.json", "--cells", "4", "--pictures", tmp_path / "pictures")
    assert told.status == 0 and mine["digest"] in told.out
    assert len(list((tmp_path / "pictures").glob("*.svg"))) == 3


# --- lists


@pytest.mark.parametrize("topic", ["spaces", "methods", "attacks", "compressors", "data", "recipes", "genotypes"])
def test_lists(topic: str) -> None:
    rows = nas("list", topic, "--json").json()
    assert rows and all(isinstance(text, str) and text for text in rows.values())
    told = nas("list", topic)
    assert told.status == 0 and all(name in told.out and text in told.out for name, text in rows.items())
    folders = {"methods": "training", "attacks": "attacks", "compressors": "compression", "data": "data"}
    if topic in folders:
        assert set(rows) == set(plugins.available(folders[topic]))


def test_list_of_runs(finished_run: Path, recipe_file: Path, working_directory: Path) -> None:
    """What it recommends for an unfinished run must work: each was begun by its own command."""
    assert nas("list", "runs", "--json").json() == {}
    runs = working_directory / "runs"
    runs.mkdir()
    (runs / "done").symlink_to(finished_run)
    (recipe_file.parent / "mine.npz").rename("away.npz")
    nas("search", recipe_file, "--out", "runs/search")
    nas("train", recipe_file, "--genotype", "arnas", "--out", "runs/train")
    # This one has been analysed, but it is far from finished.
    (runs / "half" / "analyse").mkdir(parents=True)
    (runs / "half" / "analyse" / "result.json").write_text("{}")
    (runs / "half" / "run.json").write_bytes((finished_run / "run.json").read_bytes())
    rows = nas("list", "runs", "--json").json()
    assert rows["done"] == "finished"
    for name, command in (("search", "search"), ("train", "train"), ("half", "run")):
        assert rows[name].startswith("unfinished") and f"nas {command} --resume runs/{name}" in rows[name]


# --- search, then train


def test_search_then_train_by_the_commands_it_prints(recipe_file: Path, quick: None, tmp_path: Path) -> None:
    outcome = nas("search", recipe_file, "--out", "[found]/my run", "--set", "train.epochs=2")
    assert outcome.status == 0, outcome.err
    # rich takes square brackets for markup, the shell takes a blank for an end.
    assert outcome.out.splitlines()[0] == "[found]/my run"
    genotype = read_genotype(tmp_path / "[found]/my run/search/genotype.json")
    analyse, train = commands_after(outcome.out)
    assert analyse[:2] == ["nas", "analyse"] and train[:2] == ["nas", "train"]
    assert genotype.digest in nas(*analyse[1:]).out
    trained = nas(*train[1:], "--out", "trained")
    assert trained.status == 0, trained.err
    results = read(tmp_path / "trained" / "results.json")
    names = [model["name"] for model in results["models"]]
    assert names[0] == "searched" and set(names) <= {"searched", "compressed"}
    assert ("Train, compress" in nas("train", "--help").out) == ("compressed" in names)
    assert results["genotype"] == genotype.to_data()
    # The setting of the search is one of the recipe, and goes on to the training.
    assert len(results["models"][0]["training"]) == 2
    _, attack, _ = commands_after(trained.out)
    assert nas(*attack[1:], "--set", "steps=1").status == 0


def test_search_as_json(recipe_file: Path, tmp_path: Path) -> None:
    data = nas("search", recipe_file, "--json", "--seed", "4").json()
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("small-")
    assert data == read(run / "search" / "genotype.json") and read(run / "run.json")["recipe"]["seed"] == 4
    assert not (run / "train").exists()
    assert "search" in nas("report", run).refusal and "finishes" not in nas("report", run).refusal


def test_train_with_another_method(recipe_file: Path, quick: None, tmp_path: Path) -> None:
    genotype = tmp_path / "plain.json"
    genotype.write_text(json.dumps({"schema": 1, "space": "plain", "depths": [1, 1], "widths": [4, 8]}))
    options = ["--genotype", genotype, "--method", "trades", "--set", "train.epochs=1", "--json"]
    results = nas("train", recipe_file, *options).json()
    assert results["recipe"]["train.method.name"] == "trades"
    assert results["genotype"]["depths"] == [1, 1]
    assert "divergence" in results["models"][0]["training"][0]


def test_a_memory_budget_is_met_by_recomputing_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice is in the run's recipe, so that it goes on in the same way; the search itself stays the same."""

    def peak(run: object, settings: Any) -> float:
        return (1 if settings.recompute_cells else 3) * settings.batch_size / 128

    monkeypatch.setattr("nas.search.memory_budget.DryRun.peak", peak)
    outcome = nas("search", "digits", *TINY, "--memory-budget", "1.5", "--out", tmp_path / "small")
    assert outcome.status == 0, outcome.err
    assert "cells recomputed; the budget is 1.5 GiB" in outcome.err
    assert nas("search", "digits", *TINY, "--out", tmp_path / "plain").status == 0
    small, plain = (open_run(tmp_path / name) for name in ("small", "plain"))
    assert small.table["search"]["recompute_cells"] is True
    assert "recompute_cells" not in plain.table["search"]
    assert small.needed("search") == plain.needed("search")


# --- networks attacked by suites, and networks from outside


def test_a_suite_judges_a_network_of_a_run(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    result = nas("attack", run, "--suite", "quick", "--samples", "40", "--json").json()
    assert result["suite"] == "quick" and result["n"] == 40
    assert list(result["attacks"]) == ["fgsm", "pgd-20", "pgd-20-margin"]
    assert sum(row["n"] for row in result["per_class"]) == 40
    (page,) = run.glob("attack-suite-quick*/report.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") % 3 == 0
    assert "search by queries" in text
    again = nas("attack", run, "--suite", "quick", "--samples", "40", "--json", "--out", tmp_path / "again").json()
    assert again == result


def test_a_network_from_outside_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\n\ndef tiny():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    options = ["--data", "digits", "--attack", "pgd", "--set", "steps=5", "--epsilon", "0.1", "--samples", "30"]
    result = nas("attack", "my_models:tiny", *options, "--out", "judged", "--json").json()
    assert result["name"] == "my_models:tiny" and result["n"] == 30
    assert result["threat_model"] == {"norm": "linf", "epsilon": 0.1}
    assert result["attack_settings"]["pgd"].startswith("PGD-5, linf 0.1")
    assert (tmp_path / "judged" / "report.html").exists()
