"""[train] activation: part of the trained network, of a contender, and what a transfer leaves of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_runs_comparison import comparison_recipe, make_quick, results_of
from tiny_runs import nas, settings, small_recipe, toml

from nas.activations.lossy import Lossy, lossy_maps
from nas.activations.sparta import Sparta
from nas.activations.transfer import activation_state, freeze_activation
from nas.errors import InputError
from nas.model_file import load_model
from runs.recipe import ActivationPart, Recipe, build, read_table


def _recipe(*changes: str) -> Recipe:
    return build(read_table("compare-activations", changes))


def test_the_shipped_recipe_compares_activations() -> None:
    recipe = _recipe()
    assert recipe.compare is not None
    parts = {contender.name: contender.train.activation for contender in recipe.compare.contenders}
    assert parts["relu"] is None
    assert parts["sparta"] == ActivationPart(Sparta())
    assert parts["sparta_frozen"] == ActivationPart(Sparta(), "sparta", True)
    assert parts["lossy_at"] == ActivationPart(Lossy(levels=8))
    needs = {contender.name: contender.needs for contender in recipe.compare.contenders}
    assert needs["sparta_frozen"] == ("sparta",)
    assert not any(needed for name, needed in needs.items() if name != "sparta_frozen")


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("{name='spartan'}", "did you mean 'sparta'"),
        ("{kind='dw'}", "train.activation.name is missing"),
        ("{name='sparta', kernels=3}", "did you mean 'kernel'"),
        ("{name='sparta', freezes=true}", "did you mean 'freeze'"),
        ("{name='sparta', freeze=true}", "transfer"),
        ("{name='sparta', transfer=3}", "train.activation.transfer"),
        ("{name='relu', transfer='here'}", "relu has no parameters"),
        ("'silu'", "must be a table"),
        ("{name='softplus', beta=0.0}", "train.activation: softplus needs"),
    ],
)
def test_a_wrong_activation_is_told(activation: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _recipe(f"train.activation={activation}")


@pytest.mark.slow
def test_contenders_differ_in_their_activation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)
    contenders = (
        "compare.contenders=[{name='plain'}, {name='relu', activation={name='relu'}},"
        "{name='sparta', activation={name='sparta'}},"
        "{name='frozen', activation={name='sparta', transfer='sparta', freeze=true}},"
        "{name='tuned', activation={name='sparta', transfer='sparta'}},"
        "{name='lossy', activation={name='lossy', kind='binary'}}]"
    )
    changes = settings(contenders, "train.epochs=2")
    outcome = nas("compare", comparison_recipe(tmp_path), "--out", "run", *changes)
    assert outcome.status == 0, outcome.err
    digests = {c["name"]: [run["digest"] for run in c["runs"]] for c in results_of(Path("run"))["contenders"]}
    assert digests["plain"] == digests["relu"]
    assert json.loads(Path("run/train/plain-3/model.json").read_text())["activation"] is None
    for seed in (3, 1):
        states = {
            name: activation_state(load_model(Path(f"run/train/{name}-{seed}"))[1])
            for name in ("sparta", "frozen", "tuned")
        }
        same = [torch.equal(states["frozen"][name], tensor) for name, tensor in states["sparta"].items()]
        assert len(same) == 3 and all(same)
        assert not all(torch.equal(states["tuned"][name], tensor) for name, tensor in states["sparta"].items())
        _, lossy = load_model(Path(f"run/train/lossy-{seed}"))
        assert [float(module.level) for module in lossy_maps(lossy)] == [1.0]
    assert len({*digests["sparta"], *digests["frozen"], *digests["tuned"]}) == 6


@pytest.mark.slow
def test_a_run_carries_its_activation_through_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, training, compression, judgement, export; and a later training that takes its gates."""
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe(tmp_path)
    sparta = "train.activation={name='sparta', kind='shared'}"
    outcome = nas("run", recipe, "--out", "first", *settings(sparta, "train.epochs=1"))
    assert outcome.status == 0, outcome.err
    for name in ("train/searched", "compress"):
        spec, model = load_model(Path("first") / name)
        assert spec.activation == Sparta(kind="shared")
        assert activation_state(model)
    export = {path.name for path in Path("first/export").iterdir()}
    assert {"model.safetensors", "network.py"} <= export
    taken = (
        f"train.activation={{name='sparta', kind='shared', transfer={toml(Path('first/train/searched'))}, freeze=true}}"
    )
    outcome = nas("run", recipe, "--out", "second", *settings(taken, "train.epochs=1", "seed=5"))
    assert outcome.status == 0, outcome.err
    one, other = (activation_state(load_model(Path(run) / "train/searched")[1]) for run in ("first", "second"))
    shared = one.keys() & other.keys()
    assert shared and all(torch.equal(one[name], other[name]) for name in shared)


def test_a_transfer_from_nowhere_is_told_before_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    absent = "train.activation={name='sparta', transfer='nowhere'}"
    assert "'nowhere' is neither" in nas("run", small_recipe(tmp_path), "--out", "run", *settings(absent)).refusal
    assert not Path("run/search/result.json").exists()


def test_freezing_is_about_the_activation_only() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
    freeze_activation(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
