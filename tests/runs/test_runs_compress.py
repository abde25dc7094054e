"""Compression as a recipe describes it: steps in order, training that leads up to a plan, an objective of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from nas import plugins
from nas.compression.magnitude import MagnitudePruning
from nas.compression.plan import Plan
from nas.data.split import split
from nas.errors import InputError
from nas.model_file import load_model
from nas.objective import Batch, Metrics, Objective, Setting, State
from runs.cli_finished import compression_settings
from runs.context import Context
from runs.directory import RunDirectory, create
from runs.finished import networks_of
from runs.networks import compress_into, model_result, to_train
from runs.recipe import build, read_table
from search_spaces.genotype import StageGenotype

SEEN: list[Any] = []


@dataclass(frozen=True)
class Pulled:
    """Draws all weights to a copy of themselves, which the steered network carries."""

    objective: Objective

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        loss, metrics = self.objective(model, batch, state)
        SEEN.append(("steering", state.progress))
        return loss + 0 * model.get_buffer("anchor").sum(), metrics


@dataclass(frozen=True)
class Recovery:
    objective: Objective
    parent: nn.Module

    def __call__(self, model: nn.Module, batch: Batch, state: State) -> tuple[Tensor, Metrics]:
        assert not any(parameter.requires_grad for parameter in self.parent.parameters()) and not self.parent.training
        SEEN.append(("recovery", state.progress))
        return self.objective(model, batch, state)


@dataclass(frozen=True)
class Led:
    """A compression that training leads up to and that is fine-tuned by an objective of its own."""

    retrains: ClassVar[bool] = True

    keep: float = 0.5
    epochs: int = 2

    def steered(self, model: nn.Module) -> nn.Module:
        (copy,) = [Plan("magnitude", ()).apply(model)]
        copy.register_buffer("anchor", torch.ones(3))
        return copy

    def steering(self, objective: Objective) -> Objective:
        return Pulled(objective)

    def released(self, steered: nn.Module) -> nn.Module:
        (copy,) = [Plan("magnitude", ()).apply(steered)]
        del copy.anchor
        return copy

    def recovery(self, objective: Objective, parent: nn.Module) -> Objective:
        return Recovery(objective, parent)

    def plan(self, model: nn.Module, setting: Setting | None = None) -> Plan:
        assert setting is not None and len(setting.data.y_train) and not model.training
        SEEN.append(("plan", hasattr(model, "anchor"), setting.seed))
        (copy,) = [Plan("magnitude", ()).apply(model)]
        return MagnitudePruning(self.keep).plan(copy)


def known_as(monkeypatch: pytest.MonkeyPatch, **methods: type) -> None:
    """Make compression methods known by name."""
    available = plugins.available

    def known(folder: str) -> dict[str, Any]:
        return {**available(folder), **(methods if folder == "compression" else {})}

    monkeypatch.setattr(plugins, "available", known)


@pytest.fixture
def led(monkeypatch: pytest.MonkeyPatch) -> None:
    known_as(monkeypatch, led=Led)
    SEEN.clear()


def context_of(folder: Path, *overrides: str) -> Context:
    """A run whose plain network of few weights is trained."""
    table = read_table("digits", ["train.epochs=1", "train.attack.steps=1", "data.train_limit=200", *overrides])
    table["data"].pop("train_limit")
    recipe = build(table)
    run: RunDirectory = create(folder, "run", table)
    context = Context(run, recipe, lambda progress: None)
    data = context.data
    context.__dict__["data"] = data
    parts = split(data.y_train, architecture=0.5, validation=0.1, seed=0)
    few = {name: part[:60] for name, part in vars(parts).items()}
    context.__dict__["split"] = type(parts)(**few)
    spec, model, _ = to_train(context, StageGenotype("plain", (1, 1), (4, 6)), "plain")
    model_result(spec, model, run.folder("train/plain"), [])
    return context


def compressed(context: Context, folder: Path) -> dict[str, Any]:
    assert context.recipe.compress is not None
    return compress_into(context, context.recipe.compress, context.run.path / "train" / "plain", folder)


def test_steering_plan_and_recovery_in_their_order(led: None, tmp_path: Path) -> None:
    context = context_of(tmp_path / "run", "compress={name='led', fine_tune={epochs=1}}")
    result = compressed(context, tmp_path / "new")
    kinds = [entry[0] for entry in SEEN]
    order = ["steering", "plan", "recovery"]
    assert kinds == sorted(kinds, key=order.index) and set(kinds) == set(order)
    assert next(entry for entry in SEEN if entry[0] == "plan")[1] is True
    assert len(result["steering"]) == 2 and len(result["training"]) == 1
    # Only the last epoch is judged, so that its weights, which the plan is made for, are the ones kept.
    assert ["validation_robust" in record for record in result["steering"]] == [False, True]
    spec, model = load_model(tmp_path / "new")
    assert [plan.method for plan in spec.plans] == ["magnitude"]
    assert not any("anchor" in name for name in model.state_dict())


def test_steering_changes_the_weights_that_are_cut(led: None, tmp_path: Path) -> None:
    context = context_of(tmp_path / "run", "compress={name='led', epochs=0, fine_tune={epochs=0}}")
    compressed(context, tmp_path / "without")
    assert SEEN[0][:2] == ("plan", False) and len(SEEN) == 1
    context = context_of(tmp_path / "again", "compress={name='led', fine_tune={epochs=0}}")
    compressed(context, tmp_path / "with")
    _, one = load_model(tmp_path / "without")
    _, other = load_model(tmp_path / "with")
    assert not torch.equal(one.get_parameter("classifier.weight"), other.get_parameter("classifier.weight"))
    _, dense = load_model(tmp_path / "run" / "train" / "plain")
    assert torch.equal(one.get_parameter("classifier.weight"), dense.get_parameter("classifier.weight"))


def test_steps_follow_each_other_and_a_finished_one_is_not_done_again(led: None, tmp_path: Path) -> None:
    steps = "compress={steps=[{name='magnitude', keep=0.5}, {name='led', keep=0.25}], fine_tune={epochs=1}}"
    context = context_of(tmp_path / "run", steps)
    result = compressed(context, tmp_path / "new")
    spec, model = load_model(tmp_path / "new")
    assert [plan.method for plan in spec.plans] == ["magnitude", "magnitude"]
    assert [entry["method"] for entry in result["plan"]] == ["magnitude"] * 2 * (len(result["plan"]) // 2)
    middle = tmp_path / "new" / "1-magnitude"
    assert load_model(middle)[0].plans == spec.plans[:1]
    weights = model.get_submodule("features.3").weight  # type: ignore[union-attr]
    assert int((weights != 0).sum()) == round(0.25 * weights.numel())
    changed = (middle / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "new" / "step.json").unlink()
    for name in ("checkpoint.safetensors", "model.json", "model.safetensors"):
        (tmp_path / "new" / name).unlink()
    assert compressed(context, tmp_path / "new") == result
    assert (middle / "model.safetensors").stat().st_mtime_ns == changed
    assert networks_of(tmp_path) == ["new", "plain"]


def test_fine_tuning_learns_from_the_network_before(tmp_path: Path) -> None:
    method = "{name='rslad', teacher='parent'}"
    context = context_of(tmp_path / "run", f"compress={{name='magnitude', fine_tune={{epochs=1, method={method}}}}}")
    (record,) = compressed(context, tmp_path / "new")["training"]
    assert record["natural_divergence"] > 0


def test_an_ensemble_cannot_be_led(led: None, tmp_path: Path) -> None:
    overrides = [
        "train.method={name='self_ensemble', draws=2}",
        "train.auxiliary_weight=0.0",
        "compress={name='led', fine_tune={epochs=0}}",
    ]
    context = context_of(tmp_path / "run", *overrides)
    with pytest.raises(InputError, match="set its epochs to 0"):
        compressed(context, tmp_path / "new")


def test_the_lines_of_a_recipe_that_the_command_line_stands_for() -> None:
    assert compression_settings("magnitude", 0.25, ["keep=0.5"], 3) == [
        'compress={name="magnitude"}',
        "compress.keep=0.5",
        "compress.keep=0.25",
        "compress.fine_tune.epochs=3",
    ]
    with pytest.raises(InputError, match="each method once"):
        compression_settings("magnitude,magnitude", None, None, None)


def test_keep_goes_to_the_method_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Without:
        retrains: ClassVar[bool] = False

    known_as(monkeypatch, led=Led, fold=Without)
    lines = compression_settings("magnitude, fold", 0.25, ["magnitude.keep=1.0"], 2)
    assert lines == [
        'compress={steps=[{name="magnitude"}, {name="fold"}]}',
        "compress.steps.0.keep=1.0",
        "compress.steps.0.keep=0.25",
        "compress.fine_tune.epochs=2",
    ]
    with pytest.raises(InputError, match="magnitude and led takes it"):
        compression_settings("magnitude,led", 0.25, None, None)
    with pytest.raises(InputError, match=r"say whose setting it is: magnitude\.keep=1"):
        compression_settings("magnitude,fold", None, ["keep=1"], None)
    # Fine-tuning of all is about the methods that are fine-tuned after.
    part = build(read_table("digits", lines)).compress
    assert part is not None and [step.epochs for step in part.steps] == [2, 0]
