"""Wrong input through the real command line: exit status 2, one line, no traceback, and nothing left half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import NAS, SMALL, TINY, nas, save_arrays, toml

from runs.directory import open_run
from search_spaces.catalogue import load_genotype


def refused_before_any_task(*arguments: object) -> str:
    """The refusal of a command that would have made a run in ./new, which it must not."""
    message = nas(*arguments, "--out", "new").refusal
    assert not os.path.exists("new")
    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- recipes


@pytest.mark.parametrize("command", ["run", "search"])
def test_unknown_recipe(command: str) -> None:
    assert "did you mean 'digits'?" in refused_before_any_task(command, "digit")


def test_no_recipe_at_all() -> None:
    assert "name a recipe" in refused_before_any_task("run")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.chanels=3", ["'chanels'", "[search]", "did you mean 'channels'?"]),
        ("train.epochs='3'", ["train.epochs", "int"]),
        ("nonsense", ["--set nonsense", "key=value"]),
        ("compress.keep=0", ["keep", "above 0"]),
        ("compress.keep=1.01", ["keep", "at most 1"]),
        ("threat_model.epsilon=-0.1", ["epsilon", "at least 0"]),
        ("train.attack.name='pdg'", ["did you mean 'pgd'?"]),
        ("train.method.name='trade'", ["did you mean 'trades'?"]),
        ("compress.name='magnitud'", ["did you mean 'magnitude'?"]),
        ("data.name='cifar'", ["did you mean 'cifar10'?"]),
        ("search.cells=2", ["search", "too few", "at least 4"]),
        ("train.cells=2", ["train", "too few", "at least 4"]),
        ("seed=-1", ["seed"]),
        ("baselines.plain_depths=[1, 1, 1]", ["plain_depths"]),
        ("evaluate.batch_size=0", ["evaluate", "batch_size"]),
        ("data.validation=1.5", ["validation"]),
        ("a\nb=1", ["unknown key"]),
    ],
)
def test_recipe_that_cannot_be(override: str, words: list[str]) -> None:
    message = refused_before_any_task("run", "digits", *TINY, "--set", override)
    for word in words:
        assert word in message


def test_method_option_of_train() -> None:
    assert "did you mean 'trades'?" in refused_before_any_task(
        "train", "digits", "--genotype", "arnas", "--method", "trade"
    )


def test_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch, run_copy: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no usable GPU" in refused_before_any_task("run", "digits", "--set", "device='cuda'")
    # The run was made on another machine; "--set device=cpu" would be a setting of the attack here.
    record = json.loads((run_copy / "run.json").read_text())
    record["recipe"]["device"] = "cuda"
    (run_copy / "run.json").write_text(json.dumps(record))
    for command in (["attack", run_copy], ["run", "--resume", run_copy]):
        message = nas(*command).refusal
        assert "no usable GPU" in message


# --- data: seen when the first task runs


def bad_arrays(folder: Path) -> list[tuple[Path, str]]:
    """Files, and a word that their refusal must hold."""
    x = np.zeros((96, 8, 8), np.uint8)
    pickled = np.array([{"a": 1}] * 96, dtype=object)
    text = folder / "text.npz"
    text.write_text("not an archive")
    short = save_arrays(folder / "short.npz")
    short.write_bytes(short.read_bytes()[:-700])
    return [
        (folder / "missing.npz", "no such file"),
        (save_arrays(folder / "count.npz", x_train=x[:40]), "40 images but y_train has 96"),
        (save_arrays(folder / "flat.npz", x_train=x.reshape(96, 64)), "shape (96, 64)"),
        (save_arrays(folder / "sizes.npz", x_test=np.zeros((96, 9, 9), np.uint8)), "one shape"),
        (save_arrays(folder / "tiny.npz", x_train=x[:, :4, :4], x_test=x[:, :4, :4]), "4x4"),
        (save_arrays(folder / "float.npz", x_train=x.astype("float32")), "float32"),
        (save_arrays(folder / "label.npz", y_test=np.full(96, 7)), "y_test has labels 7..7"),
        (save_arrays(folder / "negative.npz", y_train=np.full(96, -1)), "negative label"),
        (save_arrays(folder / "object images.npz", x_train=pickled), "x_train cannot be read"),
        (save_arrays(folder / "object labels.npz", y_train=pickled), "y_train cannot be read"),
        (save_arrays(folder / "one class.npz", y_train=np.zeros(96, int), y_test=np.zeros(96, int)), "class"),
        (text, "cannot be read"),
        (short, "short.npz"),
    ]


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    for number, (path, words) in enumerate(bad_arrays(tmp_path)):
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(SMALL.format(path=toml(path)), encoding="utf-8")
        out = tmp_path / f"run-{number}"
        message = nas("run", recipe, "--out", out).refusal
        assert str(path) in message and words in message, path
        # The run is there, for the file can be mended, but no task is done.
        assert not list(out.rglob("result.json"))


def test_a_run_goes_on_when_its_data_is_mended(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(SMALL.format(path=toml(tmp_path / "late.npz")), encoding="utf-8")
    assert "no such file" in nas("search", recipe, "--out", "run").refusal
    save_arrays(tmp_path / "late.npz")
    assert nas("search", "--resume", "run", "--json").json()["schema"] == 1


def test_data_error_in_a_worker_process(tmp_path: Path) -> None:
    """The default of the shipped recipes is more than one worker: the message must come through."""
    path = save_arrays(tmp_path / "label.npz", y_test=np.full(96, 7))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(SMALL.format(path=toml(path)), encoding="utf-8")
    message = nas("run", recipe, "--out", "run", "--set", "workers=2").refusal
    assert "y_test has labels 7..7" in message


# --- genotypes


def genotype(change: Callable[[dict[str, Any]], object]) -> str:
    data = load_genotype("arnas").to_data()
    change(data)
    return json.dumps(data)


def first_node(data: dict[str, Any]) -> Any:
    return next(iter(data["cells"].values()))[0]


BAD_GENOTYPES = {
    "cycle": (genotype(lambda data: first_node(data).__setitem__(0, ["skip_connect", 5])), "cycle"),
    "operation": (genotype(lambda data: first_node(data).__setitem__(0, ["conv_9x9", 0])), "conv_9x9"),
    "schema": (genotype(lambda data: data.update(schema=2)), "schema version 2"),
    "space": (genotype(lambda data: data.update(space="mars")), "mars"),
    "surplus": (genotype(lambda data: data.update(color="red")), "'color'"),
    "kind": (genotype(lambda data: data["cells"].popitem()), "cells of kind"),
    "broken": ('{"schema": 1,', "not JSON"),
    "empty": ("", "not JSON"),
    "list": ("[]", "JSON object"),
    "deep": ("[" * 100_000, "not JSON"),
    "long": ('{"schema": ' + "1" * 6000 + "}", "not JSON"),
}


@pytest.mark.parametrize("case", BAD_GENOTYPES)
def test_genotype_that_is_none(case: str, tmp_path: Path) -> None:
    text, word = BAD_GENOTYPES[case]
    path = tmp_path / f"{case}.json"
    path.write_text(text, encoding="utf-8")
    for message in (nas("analyse", path).refusal, refused_before_any_task("train", "digits", "--genotype", path)):
        assert str(path) in message and word in message


@pytest.mark.parametrize("name", ["nowhere.json", "arnass", "."])
def test_genotype_that_is_not_there(name: str) -> None:
    assert "genotype" in refused_before_any_task("train", "digits", "--genotype", name)
    assert "run directory" in nas("analyse", name).refusal or "genotype" in nas("analyse", name).refusal


def test_binary_genotype(tmp_path: Path) -> None:
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused_before_any_task("train", "digits", "--genotype", path)
    assert "not a text file" in nas("analyse", path).refusal


def test_genotype_with_more_sections_than_the_recipe_has_cells(tmp_path: Path) -> None:
    def more(data: dict[str, Any]) -> None:
        sections = data["layout"]["sections"]
        data["layout"] |= {"sections": [sections[0]] * 5 + sections[1:], "ratio": [1] * (4 + len(sections))}

    path = tmp_path / "long.json"
    path.write_text(genotype(more), encoding="utf-8")
    assert "too few" in nas("train", "digits", "--genotype", path, *TINY, "--out", "new").refusal
    assert not os.path.exists("new")


def test_train_without_genotype() -> None:
    assert "--genotype" in refused_before_any_task("train", "digits")


@pytest.mark.parametrize(
    "options",
    [
        ["--cells", "2"],
        ["--cells", "-1"],
        ["--channels", "0"],
        ["--size", "0"],
        ["--size", "-3"],
        ["--image-channels", "0"],
        ["--classes", "0"],
        ["--classes", "-3"],
        ["--compare", "nothing"],
        ["--pictures", "/proc/pictures"],
    ],
    ids=" ".join,
)
def test_analysis_that_cannot_be(options: list[str]) -> None:
    assert nas("analyse", "arnas", *options).refusal


# --- resuming


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    assert "not a run directory" in nas("run", "--resume", tmp_path).refusal
    assert "not a run directory" in nas("run", "--resume", tmp_path / "nowhere").refusal


def test_resume_of_another_recipe(finished_run: Path) -> None:
    before = contents(finished_run)
    message = nas("run", "digits", "--resume", finished_run, *TINY, "--seed", "3").refusal
    assert "seed is 0 there and 3 here" in message
    message = nas("run", "digits", "--resume", finished_run, *TINY, "--set", "train.method.name='trades'").refusal
    assert "train.method.name" in message
    assert contents(finished_run) == before


def test_resume_that_contradicts_itself(finished_run: Path) -> None:
    assert "'nas run'" in nas("search", "--resume", finished_run).refusal
    assert "'nas run'" in nas("train", "--resume", finished_run).refusal
    assert "--out" in nas("run", "--resume", finished_run, "--out", "new").refusal
    assert "--set" in nas("run", "--resume", finished_run, "--set", "seed=1").refusal
    assert "--seed" in nas("run", "--resume", finished_run, "--seed", "1").refusal
    assert "--memory-budget" in nas("run", "--resume", finished_run, "--memory-budget", "8").refusal


def test_resume_with_another_genotype(recipe_file: Path) -> None:
    """Silently going on with the old one would be worse than stopping."""
    genotype = load_genotype("arnas").to_data()
    Path("first.json").write_text(json.dumps(genotype))
    first_node(genotype)[0] = ["sep_conv_3x3", 0]
    Path("other.json").write_text(json.dumps(genotype))
    (recipe_file.parent / "mine.npz").rename("away.npz")
    assert "no such file" in nas("train", recipe_file, "--genotype", "first.json", "--out", "run").refusal
    assert "genotype" in nas("train", "--resume", "run", "--genotype", "other.json").refusal


@pytest.mark.parametrize(
    ("text", "word"),
    [("{", "not JSON"), ("[]", "schema"), ('{"schema": 2, "recipe": {}}', "schema"), ('{"schema": 1}', "schema")],
)
def test_damaged_record_of_a_run(text: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    for command in ("run --resume", "attack", "compress", "export", "report", "analyse"):
        assert word in nas(*command.split(), tmp_path).refusal


def test_damaged_result_of_a_task(run_copy: Path) -> None:
    (run_copy / "search" / "result.json").write_text("{}")
    assert "search/result.json" in nas("analyse", run_copy).refusal
    (run_copy / "search" / "result.json").write_text("{")
    assert "search/result.json" in nas("analyse", run_copy).refusal


# --- where to write


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """Below a file and in /proc not even root can make a folder."""
    file = tmp_path / "file"
    file.write_text("here")
    for path in (file / "x", file, Path("/proc/x")):
        message = nas("run", "digits", "--out", path).refusal
        assert str(path) in message and "cannot write" in message
    assert file.read_text() == "here"


def test_folder_that_is_in_use(tmp_path: Path, finished_run: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not touch")
    message = nas("run", "digits", "--out", mine).refusal
    assert str(mine) in message and "not empty" in message
    # Only a run can be continued.
    assert "--resume" not in message
    assert os.listdir(mine) == ["thesis.txt"]
    before = contents(finished_run)
    assert "--resume" in nas("run", "digits", "--out", finished_run).refusal
    assert contents(finished_run) == before


def test_run_that_is_in_use(run_copy: Path) -> None:
    with open_run(run_copy).locked():
        before = contents(run_copy)
        for command in (["run", "--resume"], ["attack"], ["compress"], ["export"]):
            assert f"in use by process {os.getpid()}" in nas(*command, run_copy).refusal
        assert contents(run_copy) == before


def test_run_that_cannot_be_locked(run_copy: Path) -> None:
    """As on a disk one may only read; a folder in place of the lock stops root too."""
    (run_copy / "lock").unlink(missing_ok=True)
    (run_copy / "lock").mkdir()
    for command in (["run", "--resume"], ["attack"], ["export"]):
        assert str(run_copy) in nas(*command, run_copy).refusal


# --- commands on a finished run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("attack RUN --attack pdg", ["did you mean 'pgd'?"]),
        ("attack RUN --attack pgd --set step=3", ["'step'", "did you mean 'steps'?"]),
        ("attack RUN --attack pgd --set steps=0", ["steps", "at least 1"]),
        ("attack RUN --attack pgd --set steps=2.5", ["steps", "int"]),
        ("attack RUN --attack pgd --set steps", ["--set steps", "key=value"]),
        ("attack RUN --attack pgd --restarts 0", ["restarts", "at least 1"]),
        ("attack RUN --epsilon -0.1", ["epsilon", "at least 0"]),
        ("attack RUN --epsilon nan", ["epsilon"]),
        ("attack RUN --set steps=3", ["--attack"]),
        ("attack RUN --restarts 3", ["--attack"]),
        ("attack RUN --model serched", ["did you mean 'searched'?"]),
        ("compress RUN --method magnitud", ["did you mean 'magnitude'?"]),
        ("compress RUN --set keep=0", ["keep", "above 0"]),
        ("compress RUN --set kep=0.5", ["'kep'", "did you mean 'keep'?"]),
        ("compress RUN --epochs -1", ["epochs", "at least 0"]),
        ("compress RUN --model serched", ["did you mean 'searched'?"]),
        ("compress RUN --out /proc/x", ["/proc/x", "cannot write"]),
        ("export RUN --to onx", ["'onx'"]),
        ("export RUN --channels 8", ["--channels", "architecture"]),
        ("export arnsa", ["no genotype 'arnsa'"]),
        ("export arnas --to onnx", ["'onnx'", "train"]),
        ("export arnas --cells 2", ["2 cells", "at least 4"]),
        ("export RUN --to json,onx", ["'onx'"]),
        ("export RUN --to=", ["format"]),
        ("export RUN --model serched", ["did you mean 'searched'?"]),
        ("export RUN --out /proc/x", ["/proc/x", "cannot write"]),
    ],
)
def test_work_on_a_run_that_cannot_be(arguments: str, words: list[str], run_copy: Path) -> None:
    before = contents(run_copy)
    folders = sorted(path for path in run_copy.rglob("*") if path.is_dir())
    message = nas(*[run_copy if word == "RUN" else word for word in arguments.split()]).refusal
    for word in words:
        assert word in message
    after = contents(run_copy)
    assert {**after, "lock": b"", "lock.workers": b""} == {**before, "lock": b"", "lock.workers": b""}
    assert sorted(path for path in run_copy.rglob("*") if path.is_dir()) == folders


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def exchange(path: Path) -> None:
    shutil.copy(path.parents[1] / "plain" / path.name, path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated weights": ("model.safetensors", truncate, "damaged"),
    "foreign weights": ("model.safetensors", exchange, "another network"),
    "text for weights": ("model.safetensors", lambda path: path.write_text("hello"), "damaged"),
    "empty weights": ("model.safetensors", lambda path: path.write_bytes(b""), "damaged"),
    "no weights": ("model.safetensors", lambda path: path.unlink(), "does not exist"),
    "broken description": ("model.json", lambda path: path.write_text("{"), "not JSON"),
    "empty description": ("model.json", lambda path: path.write_text("{}"), "schema"),
    "foreign description": ("model.json", exchange, "another network"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_network(damage: str, run_copy: Path) -> None:
    name, harm, word = DAMAGES[damage]
    path = run_copy / "train" / "searched" / name
    harm(path)
    for command in ("attack", "export", "compress"):
        message = nas(command, run_copy).refusal
        assert str(path.parent) in message and word in message


def test_network_that_is_not_trained(recipe_file: Path) -> None:
    """A search has no networks, an unfinished run no report."""
    (recipe_file.parent / "mine.npz").rename("away.npz")
    nas("search", recipe_file, "--out", "run")
    for command in ("attack", "compress", "export"):
        assert "searched" in nas(command, "run").refusal
    assert "nas search --resume run" in nas("analyse", "run").refusal
    nas("run", recipe_file, "--out", "other")
    assert "nas run --resume other" in nas("report", "other").refusal


# --- the command line itself


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["rum"], "rum"),
        (["run", "digits", "--sed", "3"], "--sed"),
        (["run", "digits", "--seed", "three"], "--seed"),
        (["run", "digits", "--seed"], "--seed"),
        (["run", "digits", "mnist"], "mnist"),
        (["attack"], "RUN"),
        (["list"], "what"),
        (["list", "atacks"], "did you mean 'attacks'?"),
        (["list", "a\nb"], "known"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_that_is_none(arguments: list[str], word: str) -> None:
    assert word.lower() in nas(*arguments).refusal.lower()


# --- real processes


@pytest.mark.slow
def test_refusals_of_real_processes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    commands = {
        "did you mean 'digits'?": ["run", "digit"],
        "cannot write": ["run", "digits", "--out", str(tmp_path / "file" / "run")],
    }
    # Side by side: most of their time is the start of Python.
    processes = {
        words: subprocess.Popen([NAS, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words, command in commands.items()
    }
    for words, process in processes.items():
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, ""), err
        assert err.startswith("nas: ") and err.count("\n") == 1 and words in err


# --- memory


def test_a_search_larger_than_the_memory_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.search.memory_budget.DryRun.peak", lambda run, settings: 0.1 * settings.batch_size)
    out = tmp_path / "run"
    outcome = nas("search", "digits", *TINY, "--set", "search.batch_size=64", "--memory-budget", "4", "--out", out)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].endswith("a step needs 6.40 GiB even if cells are recomputed; "
                                                 "search.batch_size = 40 fits")  # fmt: skip
    assert not out.exists()
    assert "above 0" in nas("search", "digits", *TINY, "--memory-budget", "-1").refusal


# --- attacks


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--suite", "standart"], "did you mean 'standard'"),
        (["--suite", "quick", "--attack", "pgd"], "--suite brings its own attacks"),
        (["--attack", "pgd", "--epsilon", "-1"], "epsilon"),
        (["--attack", "pgd", "--norm", "l3"], "l3"),
        (["--suite", "quick", "--data", "digits"], "from outside"),
    ],
)
def test_attacks_on_a_run_that_cannot_be(finished_run: Path, options: list[str], says: str) -> None:
    before = {name: content for name, content in contents(finished_run).items() if name != "lock"}
    assert says in nas("attack", finished_run, *options).refusal
    assert {name: content for name, content in contents(finished_run).items() if name != "lock"} == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["no_such_module:build", "--suite", "quick"], "--data"),
        (["no_such_module:build", "--data", "digits"], "--suite or --attack"),
        (["no_such_module:build", "--data", "digits", "--suite", "quick"], "cannot import"),
        (["nothing.pt2", "--data", "digits", "--suite", "quick"], "no file"),
        (["torch.nn:Identity", "--data", "digits", "--suite", "quick"], "logits [N, classes] are needed"),
    ],
)
def test_networks_from_outside_that_cannot_be(tmp_path: Path, options: list[str], says: str) -> None:
    assert says in nas("attack", *options, "--out", tmp_path / "out").refusal
