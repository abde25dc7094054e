"""TOML to objects: every key checked, every default where the dataclass says it, one clear line for every mistake."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from nas import plugins
from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.compression.magnitude import MagnitudePruning
from nas.errors import InputError
from nas.search.architecture_gradient import FirstOrder, Unrolled
from nas.search.bilevel import Search, Stage
from nas.search.relaxation import Mixture, SampledPath
from nas.threat_model import ThreatModel
from nas.training.loop import Training
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.trades import Trades
from runs.compress_part import CompressPart
from runs.construct import construct
from runs.directory import RunDirectory, check_same_recipe
from runs.recipe import (
    SEARCH_ATTACK,
    Baselines,
    DataPart,
    EvaluatePart,
    General,
    Recipe,
    build,
    read_table,
    shipped,
)

MINIMAL: dict[str, Any] = {
    "name": "minimal",
    "data": {"name": "digits"},
    "search": {},
    "train": {"channels": 4, "cells": 4},
    "evaluate": {"trials": [{"name": "fgsm", "attack": {"name": "fgsm"}}]},
}


def digits(*overrides: str) -> Recipe:
    return build(read_table("digits", overrides))


def minimal(**changes: Any) -> Recipe:
    return build(json.loads(json.dumps(MINIMAL)) | changes)


def refusal(*overrides: str) -> str:
    """What is said of the digits recipe with ``overrides``."""
    with pytest.raises(InputError) as raised:
        digits(*overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


# --- shipped recipes


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_builds_without_its_data(name: str) -> None:
    recipe = build(read_table(name))
    assert recipe.general.name == name
    assert recipe.evaluate.trials and recipe.search.settings.epochs > 0


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_begins_with_a_line_that_says_what_it_is(name: str) -> None:
    first = shipped()[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


def test_only_the_call_of_the_source_needs_the_files() -> None:
    recipe = digits("data={name='arrays', path='nowhere/no.npz'}")
    with pytest.raises(InputError, match=r"nowhere/no\.npz"):
        recipe.data.source()


@pytest.mark.parametrize("name", [name for name in plugins.available("data") if name not in ("arrays", "folder")])
def test_data_sets_that_are_not_there_build(name: str) -> None:
    assert digits(f"data={{name='{name}'}}").data.source == plugins.load("data", name)()


# --- construct


@dataclass(frozen=True)
class Inner:
    """A part."""

    size: int = 3


@dataclass(frozen=True)
class Outer:
    """A whole."""

    count: int
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"
    names: tuple[str, ...] = ()
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)
    parts: tuple[Inner, ...] = ()
    flag: bool = False

    def __post_init__(self) -> None:
        if self.count < 0:
            raise InputError(f"count must be at least 0, not {self.count}")


def test_construct_takes_what_the_dataclass_says() -> None:
    table = {"count": 1, "rate": 2, "names": ["x"], "limit": 4, "inner": {"size": 5}, "parts": [{"size": 6}, {}]}
    assert construct(Outer, table, "here") == Outer(1, 2.0, "a", ("x",), 4, Inner(5), (Inner(6), Inner()))
    assert isinstance(construct(Outer, table, "here").rate, float)
    assert construct(Outer, {"count": 1}, "here") == Outer(1)
    assert construct(Outer, {}, "here", count=7) == Outer(7)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, ["here.count", "missing"]),
        ({"count": 1, "raet": 2}, ["'raet'", "[here]", "did you mean 'rate'?"]),
        ({"count": 1, "inner": {"sice": 2}}, ["'sice'", "[here.inner]", "did you mean 'size'?"]),
        ({"count": 1, "parts": [{}, {"sise": 2}]}, ["'sise'", "here.parts[1]", "did you mean 'size'?"]),
        ({"count": "1"}, ["here.count", '"1"', "int"]),
        ({"count": True}, ["here.count", "true", "int"]),
        ({"count": 1.5}, ["here.count", "1.5", "int"]),
        ({"count": 1.0}, ["here.count", "1.0", "int"]),
        ({"count": {"a": 1}}, ["here.count", "int"]),
        ({"count": [1]}, ["here.count", "int"]),
        ({"count": None}, ["here.count", "int"]),
        ({"count": 1, "rate": "fast"}, ["here.rate", "float"]),
        ({"count": 1, "rate": True}, ["here.rate", "float"]),
        ({"count": 1, "kind": "c"}, ["here.kind", "'a' or 'b'"]),
        ({"count": 1, "names": "x"}, ["here.names", "tuple[str, ...]"]),
        ({"count": 1, "names": [1]}, ["here.names", "str"]),
        ({"count": 1, "limit": "x"}, ["here.limit", "int | None"]),
        ({"count": 1, "inner": 3}, ["here.inner", "table", "number"]),
        ({"count": 1, "inner": [3]}, ["here.inner", "table", "list"]),
        ({"count": 1, "parts": {"size": 1}}, ["here.parts", "list of tables"]),
        ({"count": 1, "parts": [3]}, ["here.parts[0]", "table", "number"]),
        ({"count": 1, "flag": 1}, ["here.flag", "bool"]),
        ({"count": -1}, ["here", "count must be at least 0, not -1"]),
        ([1], ["here", "table", "list"]),
    ],
)
def test_construct_names_key_and_remedy(table: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        construct(Outer, table, "here")
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_fields_that_are_given_are_not_keys() -> None:
    with pytest.raises(InputError, match="unknown key 'count'"):
        construct(Outer, {"count": 2}, "here", count=1)


# --- unknown keys, at every level of a recipe


@pytest.mark.parametrize(
    ("override", "key", "place", "suggestion"),
    [
        ("sed=1", "sed", "the recipe", "seed"),
        ("serach.channels=1", "serach", "the recipe", "search"),
        ("data.validaton=0.1", "validaton", "data", "validation"),
        ("threat_model.epslon=0.1", "epslon", "threat_model", "epsilon"),
        ("space.sectoins=['a']", "sectoins", "space", "sections"),
        ("search.chanels=3", "chanels", "search", "channels"),
        ("search.gradient.radus=1", "radus", "search.gradient", "radius"),
        ("search.attack.step=3", "step", "search.attack", "steps"),
        ("search.weights.learnin_rate=1", "learnin_rate", "search.weights", "learning_rate"),
        ("search.architecture.beta=[0.5, 0.9]", "beta", "search.architecture", "betas"),
        ("search.augmentation.cutuot=1", "cutuot", "search.augmentation", "cutout"),
        ("search.stages.1.untill=9", "untill", "search.stages[1]", "until"),
        ("search.method={name='trades', bta=1}", "bta", "search.method", "beta"),
        ("train.chanels=3", "chanels", "train", "channels"),
        ("train.epoch=3", "epoch", "train", "epochs"),
        ("train.optimiser.momentun=0", "momentun", "train.optimiser", "momentum"),
        ("train.augmentation.filp=true", "filp", "train.augmentation", "flip"),
        ("train.method={name='trades', bta=1}", "bta", "train.method", "beta"),
        ("train.attack.stesp=3", "stesp", "train.attack", "steps"),
        ("train.validation_attack={name='pgd', lss='kl'}", "lss", "train.validation_attack", "loss"),
        ("compress.kep=0.5", "kep", "compress", "keep"),
        ("compress.fine_tune.epoch=1", "epoch", "compress.fine_tune", "epochs"),
        ("baselines.randon=1", "randon", "baselines", "random"),
        ("evaluate.batchsize=1", "batchsize", "evaluate", "batch_size"),
        ("evaluate.trials.0.restart=2", "restart", "evaluate.trials[0]", "restarts"),
        ("evaluate.trials.1.attack.step=2", "step", "evaluate.trials[1].attack", "steps"),
    ],
)
def test_unknown_key_suggests_the_nearest(override: str, key: str, place: str, suggestion: str) -> None:
    message = refusal(override)
    assert f"'{key}'" in message and place in message
    assert f"did you mean '{suggestion}'?" in message


def test_misspelt_size_of_the_trained_network_suggests_it_too() -> None:
    """These keys are taken out before the rest of [train] is checked: they must be suggested all the same."""
    assert "did you mean 'cells'?" in refusal("train.cels=3")
    assert "did you mean 'auxiliary_weight'?" in refusal("train.auxilary_weight=0.4")
    assert "did you mean 'validation_attack'?" in refusal("train.validation_atack={name='fgsm'}")
    assert "did you mean 'gradient'?" in refusal("search.gradiant={name='unrolled'}")
    assert "did you mean 'architecture'?" in refusal("data.architectur=0.5")
    assert "did you mean 'fine_tune'?" in refusal("compress.finetune={epochs=1}")
    assert "did you mean 'trials'?" in refusal("evaluate.trails=[]")


def test_unknown_key_where_there_is_none_to_suggest() -> None:
    message = refusal("train.method={name='standard', beta=6}")
    assert "'beta'" in message and "[train.method]" in message


# --- wrong types and values


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epochs='30'", ["train.epochs", "int"]),
        ("train.epochs=true", ["train.epochs", "int"]),
        ("train.epochs=3.5", ["train.epochs", "int"]),
        ("train.epochs=[3]", ["train.epochs", "int"]),
        ("train.epochs={a=3}", ["train.epochs", "int"]),
        ("train.channels='x'", ["train.channels", "int"]),
        ("train.optimiser.learning_rate='fast'", ["train.optimiser.learning_rate", "float"]),
        ("train.optimiser.learning_rate=true", ["train.optimiser.learning_rate", "float"]),
        ("train.auxiliary_weight='x'", ["train.auxiliary_weight", "number"]),
        ("train.auxiliary_weight=true", ["train.auxiliary_weight", "number"]),
        ("train.augmentation.flip=1", ["train.augmentation.flip", "bool"]),
        ("train.optimiser=5", ["train.optimiser", "table", "number"]),
        ("train.optimiser=[5]", ["train.optimiser", "table", "list"]),
        ("train=3", ["train", "table", "number"]),
        ("data=[1]", ["data", "table", "list"]),
        ("threat_model='linf'", ["threat_model", "table", "text"]),
        ("threat_model.norm=2", ["threat_model.norm", "str"]),
        ("search.stages=5", ["search.stages", "list of tables"]),
        ("search.stages=[5]", ["search.stages[0]", "table"]),
        ("search.stages.0.objectives='natural'", ["search.stages[0].objectives", "tuple[str, ...]"]),
        ("search.stages.0.combine='mean'", ["search.stages[0].combine", "'sum' or 'min_norm'"]),
        ("search.architecture.betas=[0.5]", ["search.architecture.betas", "float"]),
        ("compress.keep='half'", ["compress.keep", "float"]),
        ("compress.fine_tune.epochs=0.5", ["compress.fine_tune.epochs", "int"]),
        ("baselines.plain_widths=['a']", ["baselines.plain_widths", "int"]),
        ("evaluate.trials={}", ["evaluate.trials", "list"]),
        ("evaluate.trials=[]", ["evaluate.trials", "at least one"]),
        ("evaluate.trials=[5]", ["evaluate.trials[0]", "table"]),
        ("evaluate.trials.0.restarts='2'", ["evaluate.trials[0].restarts", "int"]),
        ("seed='1'", ["seed", "int"]),
        ("seed=2020-01-01", ["seed", "int"]),
        ("name=5", ["name", "str"]),
        ("device=0", ["device", "str"]),
    ],
)
def test_wrong_type_names_key_and_type(override: str, words: list[str]) -> None:
    message = refusal(override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-1", ["seed"]),
        ("device='tpu'", ["device", "'cpu', 'cuda' or 'auto'"]),
        ("workers=0", ["workers", "at least 1"]),
        ("name='a/b'", ["name", "letters"]),
        ("threat_model.epsilon=-0.1", ["epsilon", "at least 0"]),
        ("threat_model.norm='l3'", ["did you mean 'l2'?"]),
        ("search.cells=1", ["search", "1 cells are too few", "at least 4"]),
        ("train.cells=1", ["train", "1 cells are too few", "at least 4"]),
        ("search.channels=0", ["search", "channels must be at least 1"]),
        ("search.stages.0.until=0", ["search.stages[0]", "at least one epoch"]),
        ("search.stages.0.until=999", ["search", "rise from stage to stage"]),
        ("search.stages=[]", ["search", "stages"]),
        ("train.epochs=0", ["train", "epochs", "at least 1"]),
        ("train.auxiliary_weight=-1", ["train.auxiliary_weight", "at least 0"]),
        ("train.channels=0", ["train", "channels"]),
        ("compress.keep=0", ["keep", "above 0 and at most 1"]),
        ("compress.keep=1.5", ["keep", "above 0 and at most 1"]),
        ("compress.fine_tune.epochs=-1", ["epochs", "at least 0"]),
        ("baselines.tolerance=0.0", ["baselines", "tolerance"]),
        ("space.ratio=[1]", ["space", "ratio"]),
        ("space.sections=[]", ["space", "section"]),
        ("evaluate.trials.0.restarts=0", ["evaluate.trials[0]", "restarts", "at least 1"]),
        ("evaluate.trials.1.name='fgsm'", ["evaluate.trials[1]", "two trials named 'fgsm'"]),
        ("train.method.name='trade'", ["training method 'trade'", "did you mean 'trades'?"]),
        ("train.attack.name='pdg'", ["attack 'pdg'", "did you mean 'pgd'?"]),
        ("compress.name='magnitud'", ["compression method", "did you mean 'magnitude'?"]),
        ("data.name='cifar'", ["data set 'cifar'", "did you mean 'cifar10'?"]),
        ("space.name='dart'", ["space 'dart'", "did you mean 'darts'?"]),
        ("search.gradient.name='first'", ["search.gradient 'first'", "did you mean 'first_order'?"]),
        ("search.attack.loss='cross'", ["attack loss 'cross'", "did you mean 'cross_entropy'?"]),
    ],
)
def test_impossible_value_says_what_is_possible(override: str, words: list[str]) -> None:
    message = refusal("train.parameters=0", "train.channels=4", override)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["baselines.plain_depths=[1]", "baselines.plain_widths=[4, 8]"], ["baselines", "depths", "widths"]),
        (["baselines.plain_depths=[0, 1]", "baselines.plain_widths=[4, 8]"], ["baselines", "at least 1"]),
        (["evaluate.batch_size=0"], ["evaluate", "batch_size", "at least 1"]),
        (["data.validation=1.5"], ["validation", "1.5"]),
        (["data.validation=0.0"], ["validation", "above 0"]),
        (["data.architecture=0.0"], ["architecture", "above 0"]),
        (["search.stages.0.objectives=['adverserial']"], ["did you mean 'adversarial'?"]),
        (["train.parameters=-4", "train.channels=4"], ["train", "parameters"]),
    ],
)
def test_what_can_be_known_before_the_first_task_is_refused_before_it(overrides: list[str], words: list[str]) -> None:
    """Not after a search of an hour."""
    message = refusal(*overrides)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data.name=5", "data.name"),
        ("space={name=5}", "space.name"),
        ("train.method={name=true}", "train.method.name"),
        ("compress={name=[1]}", "compress.name"),
        ("evaluate.trials=[{name=5, attack={name='fgsm'}}]", "evaluate.trials[0].name"),
    ],
)
def test_a_name_of_the_wrong_type_is_not_called_missing(override: str, place: str) -> None:
    message = refusal(override)
    assert place in message and "missing" not in message and "text" in message


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data={}", "data.name"),
        ("data={name='arrays'}", "data.path"),
        ("train.method={}", "train.method.name"),
        ("search.gradient={}", "search.gradient.name"),
        ("search.stages=[{objectives=['natural']}]", "search.stages[0].until"),
        ("train={channels=4}", "train.cells"),
        ("compress={}", "compress.name"),
        ("evaluate={}", "evaluate.trials"),
        ("evaluate.trials=[{attack={name='fgsm'}}]", "evaluate.trials[0].name"),
        ("evaluate.trials=[{name='x', attack={}}]", "evaluate.trials[0].attack.name"),
        ("evaluate.trials=[{name='x'}]", "evaluate.trials[0].attack"),
    ],
)
def test_missing_key_is_named(override: str, place: str) -> None:
    message = refusal(override)
    assert place in message
    assert "NoneType" not in message


@pytest.mark.parametrize("part", ["data", "train", "evaluate"])
def test_missing_table_is_named(part: str) -> None:
    table = {key: value for key, value in MINIMAL.items() if key != part}
    with pytest.raises(InputError, match=rf"\[{part}\]"):
        build(table)


def test_missing_name_is_the_file_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = shipped()["digits"].read_text(encoding="utf-8")
    path.write_text("\n".join(line for line in text.splitlines() if line != 'name = "digits"'), encoding="utf-8")
    # The tables' own "name" keys look the same: put them back from the shipped recipe.
    table = tomllib.loads(text)
    table.pop("name")
    assert read_table(str(path))["name"] == "mine"
    with pytest.raises(InputError, match=r"recipe\.name is missing"):
        build(table)


# --- files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a = = 1", ["not TOML", "line 1"]),
        (b"\xff\xfe", ["not TOML"]),
        (b"seed = 1\nseed = 2", ["not TOML"]),
        (b"seed = " + b"[" * 5000, ["not TOML"]),
        (b"seed = " + b"1" * 5000, ["not TOML"]),
    ],
    ids=["syntax", "not text", "twice", "deep", "long number"],
)
def test_file_that_is_no_recipe(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        read_table(str(path))
    message = str(raised.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_no_such_recipe_suggests_a_shipped_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'digits'"):
        read_table("digit")
    with pytest.raises(InputError, match="no recipe"):
        read_table(str(tmp_path))


# --- --set


def test_overrides_reach_every_place() -> None:
    recipe = digits(
        "search.stages.0.until=3",
        "search.stages.1.adversarial_gradient_scale=0.25",
        "evaluate.trials.1.attack.steps=7",
        "train.method={name = 'trades', beta = 2}",
        "data.validation = 0.2",
        "search.architecture.betas.0=0.25",
        "search.architecture.betas=[0.5, 0.75]",
        "seed=7",
    )
    first, second = recipe.search.settings.stages
    assert first == Stage(until=3) and second.adversarial_gradient_scale == 0.25
    assert list(recipe.evaluate.trials.values())[1].attack.steps == 7
    assert recipe.train.objective.beta == 2.0
    assert recipe.data.validation == 0.2
    assert recipe.search.settings.architecture.betas == (0.5, 0.75)
    assert recipe.general.seed == 7
    assert recipe.table["search"]["stages"][0]["until"] == 3


def test_seed_option_and_last_override_win() -> None:
    assert read_table("digits", [], 5)["seed"] == 5
    assert read_table("digits", ["seed=6", "seed=7"])["seed"] == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("linf", "linf"),
        ("'linf'", "linf"),
        ('"a b"', "a b"),
        ("true", True),
        ("3", 3),
        ("3e-2", 0.03),
        ("[1, 2]", [1, 2]),
        ("{a = 1}", {"a": 1}),
        ("/a/b=c#d", "/a/b=c#d"),
        ("../x y.npz", "../x y.npz"),
        ("", ""),
    ],
)
def test_override_values_are_toml_and_text_where_they_are_not(text: str, value: Any) -> None:
    assert read_table("digits", [f"data.path={text}"])["data"]["path"] == value


def test_overrides_leave_the_shipped_recipe_alone() -> None:
    before = read_table("digits")
    read_table("digits", ["search.stages.0.until=1", "data.name='mnist'"])
    assert read_table("digits") == before


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nonsense", ["--set nonsense", "key=value"]),
        ("=3", ["key=value"]),
        ("search..channels=3", ["key=value"]),
        (".search=3", ["key=value"]),
        ("search.=3", ["key=value"]),
        ("search.stages.9.until=3", ["search.stages.9.until", "'9'", "list of 2"]),
        ("search.stages.-1.until=3", ["'-1'", "list of 2"]),
        ("search.stages.first.until=3", ["'first'", "list of 2"]),
        ("search.stages.2={until=99}", ["'2'", "list of 2"]),
        ("search.channels.x=3", ["'channels'", "value, not a table"]),
        ("seed=" + "1" * 5000, ["seed"]),
        ("seed=" + "[" * 5000, ["seed"]),
        ("seed=1\nworkers=9", ["seed"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_bad_override(override: str, words: list[str]) -> None:
    message = refusal(override)
    assert len(message) < 300
    for word in words:
        assert word in message


# --- defaults stand in one place


def test_defaults_are_those_of_the_dataclasses() -> None:
    recipe = minimal()
    threat_model = ThreatModel()
    assert recipe.general == General("minimal")
    assert recipe.data == DataPart(plugins.load("data", "digits")())
    assert recipe.threat_model == threat_model
    assert recipe.search.settings == Search()
    # The one exception, for its reason see there.
    search_attack = Pgd(threat_model, **SEARCH_ATTACK)
    assert recipe.search.weight_objective == PgdAt(search_attack) and recipe.search.attack == search_attack
    assert recipe.train.training == Training()
    assert recipe.train.objective == PgdAt(Pgd(threat_model))
    assert recipe.train.validation_attack == Pgd(threat_model)
    assert recipe.train.auxiliary_weight == 0
    assert recipe.compress is None
    assert recipe.baselines == Baselines() and recipe.baselines.plain is None
    assert recipe.evaluate.batch_size == EvaluatePart({}).batch_size
    assert [trial.restarts for trial in recipe.evaluate.trials.values()] == [1]


def test_a_part_of_a_table_keeps_the_other_defaults() -> None:
    search = minimal(search={"channels": 5, "gradient": {"name": "first_order"}}).search.settings
    assert search == dataclasses.replace(Search(), channels=5, gradient=FirstOrder())
    search = minimal(search={"gradient": {"name": "unrolled", "radius": 0.5}}).search.settings
    assert search.gradient == Unrolled(radius=0.5)
    training = minimal(train={"channels": 4, "cells": 4, "epochs": 2}).train.training
    assert training == dataclasses.replace(Training(), epochs=2)


def test_the_space_keeps_its_layout_but_for_what_is_said() -> None:
    default = minimal().space
    assert minimal(space={"name": "dsara"}).space == default
    changed = minimal(space={"name": "dsara", "ratio": [1, 1, 3]}).space
    assert changed.layout.ratio == (1, 1, 3) and changed.layout.sections == default.layout.sections
    assert changed.operations == default.operations


def compression(table: dict[str, Any], epochs: int = 30) -> CompressPart:
    training = {"channels": 4, "cells": 4, "epochs": epochs, "optimiser": {"learning_rate": 0.4}}
    part = minimal(train=training, compress=table).compress
    assert part is not None
    return part


def test_fine_tuning_is_a_quarter_of_the_training_unless_stated() -> None:
    (step,) = compression({"name": "magnitude"}).steps
    assert (step.fine_tuning.epochs, step.fine_tuning.optimiser.learning_rate) == (7, 0.1)
    (step,) = compression({"name": "magnitude", "fine_tune": {"epochs": 3}}).steps
    assert (step.fine_tuning.epochs, step.fine_tuning.optimiser.learning_rate) == (3, 0.1)
    (step,) = compression({"name": "magnitude", "fine_tune": {"epochs": 0}}).steps
    assert step.epochs == 0
    method = {"name": "trades", "beta": 2.0}
    (step,) = compression({"name": "magnitude", "fine_tune": {"method": method}}).steps
    assert isinstance(step.objective, Trades) and step.objective.beta == 2


def test_steps_of_a_compression_in_order() -> None:
    steps = [{"name": "magnitude", "keep": 0.5}, {"name": "magnitude", "keep": 0.25, "fine_tune": {"epochs": 2}}]
    first, second = compression({"steps": steps, "fine_tune": {"epochs": 5, "learning_rate": 0.2}}).steps
    assert (first.method, first.epochs) == (MagnitudePruning(0.5), 5)
    assert (second.method, second.epochs) == (MagnitudePruning(0.25), 2)
    assert first.training.optimiser.learning_rate == second.training.optimiser.learning_rate == 0.2
    for wrong, words in [
        ({"steps": []}, "at least one table"),
        ({"steps": steps, "keep": 0.5}, "'keep' stands beside steps"),
        ({"steps": [{"name": "magnitude", "kep": 1}]}, "did you mean 'keep'"),
        ({"steps": [{"keep": 1}]}, "name is missing"),
    ]:
        with pytest.raises(InputError, match=words):
            compression(wrong)


# --- attacks and methods


def test_every_attack_gets_the_threat_model_of_the_recipe() -> None:
    recipe = digits("threat_model={norm='l2', epsilon=0.5}")
    threat_model = ThreatModel("l2", 0.5)
    attacks = [trial.attack for trial in recipe.evaluate.trials.values()]
    attacks += [recipe.search.attack, recipe.search.weight_objective.attack]
    attacks += [recipe.train.objective.attack, recipe.train.validation_attack]
    assert {attack.threat_model for attack in attacks} == {threat_model}
    assert "'threat_model'" in refusal("train.attack.threat_model={epsilon=1}")


def test_trades_attacks_by_divergence_unless_the_recipe_says_otherwise() -> None:
    trades = digits("train.method={name='trades'}", "train.attack={name='pgd', steps=9}")
    assert isinstance(trades.train.objective, Trades)
    assert trades.train.objective.attack.loss == "kl"
    assert trades.train.objective.attack.steps == 9
    # What judges is not what trains.
    assert trades.train.validation_attack.loss == "cross_entropy"
    assert {trial.attack.loss for trial in trades.evaluate.trials.values()} == {"cross_entropy", "margin"}
    stated = digits("train.method={name='trades'}", "train.attack.loss='margin'")
    assert stated.train.objective.attack.loss == "margin"
    # One step from the clean images has no divergence to climb.
    with pytest.raises(InputError, match="random start"):
        digits("train.method={name='trades'}", "train.attack={name='fgsm'}")
    assert digits("train.method={name='pgd_at'}").train.objective.attack.loss == "cross_entropy"


def test_trades_in_the_search_is_judged_by_cross_entropy() -> None:
    search = digits("search.method={name='trades'}").search
    assert search.weight_objective.attack.loss == "kl"
    assert search.attack.loss == "cross_entropy"


def test_a_method_without_attack_needs_none() -> None:
    assert digits("train.method={name='standard'}").train.objective == Standard()


# --- one run, one recipe


def run_of(table: dict[str, Any]) -> RunDirectory:
    return RunDirectory(Path("a-run"), "run", json.loads(json.dumps(table)), None)


def test_the_same_recipe_is_the_same() -> None:
    check_same_recipe(run_of(read_table("digits")), read_table("digits"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["seed=3"], ["seed is 0 there and 3 here"]),
        (["train.epochs=3", "seed=3", "data.validation=0.25"], ["data.validation", "0.25"]),
        (["search.attack.loss='kl'"], ["search.attack.loss", "absent", "'kl'"]),
        (["search.stages.0.until=3"], ["search.stages"]),
        (["compress={name='magnitude'}"], ["compress.keep", "absent"]),
    ],
)
def test_the_first_difference_is_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        check_same_recipe(run_of(read_table("digits")), read_table("digits", overrides))
    message = str(raised.value)
    assert "a-run" in message and "another recipe" in message
    for word in words:
        assert word in message


def test_a_difference_within_a_list_is_named_and_short() -> None:
    run = run_of(read_table("digits", ["search.stages.0.until=2"]))
    with pytest.raises(InputError, match=r"search\.stages\.0\.until is 2 there and 3 here"):
        check_same_recipe(run, read_table("digits", ["search.stages.0.until=3"]))


def test_a_date_is_a_difference_and_not_a_crash() -> None:
    with pytest.raises(InputError, match="seed"):
        check_same_recipe(run_of(read_table("digits")), read_table("digits", ["seed=2020-01-01"]))


# --- options of the search that trade exactness for speed


def test_every_speed_option_is_reached_from_a_recipe() -> None:
    settings = digits(
        "search.gradient={name='first_order'}",
        "search.attack={name='fgsm', random_start=true}",
        "search.relaxation={name='sampled_path', first_temperature=5.0}",
        "search.partial_channels=4",
        "search.reuse_perturbations=true",
        "search.architecture_every=2",
        "search.precision='bfloat16'",
    ).search
    assert settings.settings.relaxation == SampledPath(first_temperature=5.0)
    assert settings.settings.partial_channels == 4 and settings.settings.reuse_perturbations
    assert settings.settings.architecture_every == 2 and settings.settings.precision == "bfloat16"
    assert settings.attack == Fgsm(ThreatModel("linf", 0.1), statistics="batch", random_start=True)
    assert settings.attack.step == pytest.approx(0.125)
    exact = digits().search.settings
    assert (exact.relaxation, exact.partial_channels, exact.reuse_perturbations) == (Mixture(), 1, False)
    assert (exact.architecture_every, exact.precision) == (1, "float32")


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["search.relaxation={name='sampled'}"], ["search.relaxation", "sampled_path"]),
        (["search.relaxation={name='sampled_path', temperature=1.0}"], ["unknown key 'temperature'"]),
        (["search.relaxation={name='sampled_path', last_temperature=0.0}"], ["search.relaxation", "above 0"]),
        (["search.relaxation={first_temperature=1.0}"], ["search.relaxation.name is missing"]),
        (["search.partial_channels=3"], ["partial_channels = 3", "channels = 8"]),
        (["search.reuse_perturbations=true", "search.attack={name='fgsm'}"], ["search.attack", "random_start = true"]),
        (["search.precision='bfloat16'"], ["finite_difference", "first_order"]),
        (["search.precision='float16'"], ["search.precision", "bfloat16"]),
        (["search.architecture_every=0"], ["search: architecture_every"]),
        (["search.partial_chanels=2"], ["did you mean 'partial_channels'?"]),
    ],
)
def test_speed_options_are_checked_before_anything_runs(overrides: list[str], words: list[str]) -> None:
    message = refusal(*overrides)
    for word in words:
        assert word in message, message
