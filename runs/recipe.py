"""Recipes: TOML in, objects out. Nothing below ``runs`` sees a recipe, only the objects."""

from __future__ import annotations

import copy
import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from nas import plugins
from nas.activations.activation import Activation
from nas.activations.relu import Relu
from nas.errors import InputError, nearest
from nas.evaluation.robustness import Trial
from nas.objective import Attack, Gradients, Objective, Prepares
from nas.search.architecture_gradient import FirstOrder, Unrolled
from nas.search.bilevel import Search
from nas.search.perturbation_memory import check_can_start
from nas.search.relaxation import Mixture, SampledPath
from nas.shards import Shards
from nas.threat_model import ThreatModel
from nas.training.extra_images import ExtraImages
from nas.training.loop import Training
from nas.training.weight_perturbation import WeightPerturbation
from runs.compress_part import CompressPart, Makers, compress_from
from runs.construct import check_keys, chosen, construct, mapping, name_of
from runs.contenders import ComparePart, compare_from
from runs.contenders import Makers as ContenderMakers
from runs.study_part import StudyPart, study_from
from search_spaces.catalogue import load_genotype, published, spaces
from search_spaces.cell_space import CellSpace
from search_spaces.genotype import Genotype, StageGenotype
from search_spaces.layout import Layout

Table = Mapping[str, Any]


@dataclass(frozen=True)
class General:
    """Top of a recipe.

    device: "cpu", "cuda" or "auto" (cuda if there is one). workers: tasks carried out at once, each in its own
    process. threads: CPU threads; the search uses all, other tasks share them among the workers. Results depend on the
    number of threads in their last bits, so it belongs to the recipe. shards: parts that batches are cut into; they can
    be dealt out to as many processes by torchrun, or to fewer. deterministic: on a GPU, only algorithms that give the
    same bits each time, which are slower; on the CPU they always do.
    """

    name: str
    seed: int = 0
    device: str = "auto"
    workers: int = 1
    threads: int = 1
    shards: int = 1
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda", "auto"):
            raise InputError(f"device must be 'cpu', 'cuda' or 'auto', not '{self.device}'")
        if self.workers < 1 or self.threads < 1:
            raise InputError("workers and threads must be at least 1")
        Shards(self.shards)
        if not 0 <= self.seed < 2**63:
            raise InputError("seed must be an integer from 0 to 2^63 - 1")
        if not 0 < len(self.name) <= 100 or not all(c.isalnum() or c in "-_" for c in self.name):
            raise InputError(f"name '{self.name[:40]}' may consist of up to 100 letters, digits, '-' and '_' only")


@dataclass(frozen=True)
class DataPart:
    """Where the images come from and how the training images are shared out.

    validation: share held out to choose checkpoints; architecture: share of the rest the architecture learns on.
    extra: images that networks, but not a search, are trained on besides.
    """

    source: Any
    architecture: float = 0.5
    validation: float = 0.1
    extra: ExtraImages | None = None

    def __post_init__(self) -> None:
        if not 0 < self.architecture < 1 or not 0 < self.validation < 1:
            raise InputError(
                "architecture and validation are shares above 0 and below 1, "
                f"not {self.architecture} and {self.validation}"
            )


@dataclass(frozen=True)
class SearchPart:
    """The search: its settings, what the weights minimise, and the attack of the adversarial objective."""

    settings: Search
    weight_objective: Objective
    attack: Attack


@dataclass(frozen=True)
class ActivationPart:
    """The activation of a network and what its parameters begin with.

    transfer: the folder of a network, a file of parameters or, in a comparison, a contender above, to take them from.
    freeze: they are not trained.
    """

    activation: Activation
    transfer: str = ""
    freeze: bool = False

    def __post_init__(self) -> None:
        if self.freeze and not self.transfer:
            raise InputError("freeze = true keeps the parameters of another network: name it by transfer = 'FOLDER'")


@dataclass(frozen=True)
class TrainPart:
    """Training a discovered network: its size, the method, and the attack that judges checkpoints.

    cells and either channels, the base channels, or parameters, the size for which the channels are chosen.
    weight_perturbation: gamma of adversarial weight perturbation, 0 for none. activation: what stands in the place of
    the activations of the network's space (ReLU), None for these.
    """

    training: Training
    objective: Objective
    auxiliary_weight: float
    validation_attack: Attack
    cells: int
    channels: int = 0
    parameters: int = 0
    weight_perturbation: float = 0.0
    activation: ActivationPart | None = None

    def __post_init__(self) -> None:
        if self.weight_perturbation:
            WeightPerturbation(self.objective, self.weight_perturbation)
        if min(self.channels, self.parameters) < 0 or (self.channels > 0) == (self.parameters > 0):
            raise InputError(
                "give either channels or parameters (the size for which channels are chosen) above 0, the other "
                f"left out or 0; channels is {self.channels}, parameters {self.parameters}"
            )


@dataclass(frozen=True)
class Baselines:
    """What the searched network is compared with, trained and attacked alike.

    random: number of random cell networks of equal size; tolerance: largest relative difference in parameters.
    plain_depths, plain_widths: stages of a plain convolutional network, empty for none.
    published: names of published genotypes of cells; equal: what the channels of their networks are chosen for, so that
    it comes nearest to the searched network's: "parameters", "macs" or, for two networks of each, both.
    """

    random: int = 3
    tolerance: float = 0.05
    plain_depths: tuple[int, ...] = ()
    plain_widths: tuple[int, ...] = ()
    published: tuple[str, ...] = ()
    equal: tuple[Literal["parameters", "macs"], ...] = ("parameters",)

    def __post_init__(self) -> None:
        if self.random < 0 or not 0 < self.tolerance < 1:
            raise InputError("random must be at least 0, tolerance between 0 and 1")
        if not self.equal or len(set(self.equal)) < len(self.equal) or len(set(self.published)) < len(self.published):
            raise InputError("published names each genotype once, equal at least one of 'parameters' and 'macs'")
        for name in self.published:
            self.genotype(name)
        _ = self.plain

    def genotype(self, name: str) -> Genotype:
        """The published genotype of cells called ``name``."""
        cells = [known for known in published() if isinstance(load_genotype(known), Genotype)]
        if name not in cells:
            what = "has a size of its own" if name in published() else "is not a published genotype"
            raise InputError(f"published: '{name}' {what}: name genotypes of cells ({', '.join(cells)})")
        found = load_genotype(name)
        assert isinstance(found, Genotype)
        return found

    @property
    def networks(self) -> dict[str, tuple[str, str]]:
        """The networks of published genotypes: by name, the genotype and what they equal the searched network in."""
        return {f"{name}-equal-{what}": (name, what) for name in self.published for what in self.equal}

    @property
    def plain(self) -> StageGenotype | None:
        """The plain network, if there is one."""
        if not self.plain_depths and not self.plain_widths:
            return None
        try:
            return StageGenotype("plain", self.plain_depths, self.plain_widths)
        except ValueError as error:
            raise InputError(f"plain_depths and plain_widths: {error}") from None


@dataclass(frozen=True)
class EvaluatePart:
    """The attacks of the final evaluation on the test set."""

    trials: Mapping[str, Trial]
    batch_size: int = 512

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class Recipe:
    """A recipe as objects. table: the plain tables it came from, overrides included."""

    general: General
    data: DataPart
    threat_model: ThreatModel
    space: CellSpace
    search: SearchPart
    train: TrainPart
    compress: CompressPart | None
    baselines: Baselines
    evaluate: EvaluatePart
    table: Table = field(repr=False)
    compare: ComparePart | None = None
    study: StudyPart | None = None


def shipped() -> dict[str, Path]:
    """The recipes that come with the program, by name."""
    folder = Path(str(resources.files("runs").joinpath("recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_table(name_or_path: str, overrides: Sequence[str] = (), seed: int | None = None) -> dict[str, Any]:
    """The tables of a shipped recipe or a file, after ``--set key=value`` overrides."""
    path = shipped().get(name_or_path)
    if path is None:
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(
                f"no recipe '{name_or_path}': give a file or a shipped recipe; {nearest(name_or_path, shipped())}"
            )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read recipe {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    table.setdefault("name", path.stem)
    if seed is not None:
        table["seed"] = seed
    for override in overrides:
        override_key(table, override)
    return table


def build(table: Table) -> Recipe:
    """The objects a recipe's tables describe. Raises ``InputError`` for the first thing that is wrong."""
    parts = (
        "data",
        "threat_model",
        "space",
        "search",
        "train",
        "compress",
        "baselines",
        "evaluate",
        "compare",
        "study",
    )
    general_fields = [f.name for f in dataclasses.fields(General)]
    check_keys(table, [*general_fields, *parts], "")
    for required in ("data", "train", "evaluate"):
        if required not in table:
            raise InputError(f"the recipe has no [{required}] table")
    general = construct(General, {key: table[key] for key in general_fields if key in table}, "recipe")
    threat_model = construct(ThreatModel, table.get("threat_model", {}), "threat_model")
    compared = mapping(table["compare"], "compare") if "compare" in table else {}
    train_table = mapping(table["train"], "train")
    if isinstance(compared.get("genotype"), Mapping) and "depths" in compared["genotype"]:
        # The size that [train] states for networks of cells has no meaning then.
        train_table = {key: value for key, value in train_table.items() if key != "parameters"} | HOLDS_ITS_SIZE
    if "study" in table:
        train_table = {**HOLDS_ITS_SIZE, **train_table}
    train = _train(train_table, threat_model)
    space = _space(table.get("space", {"name": "dsara"}))
    search = _search(table.get("search", {}), threat_model)
    if "search" in table:
        check_size("search", space.layout, search.settings.cells, search.settings.channels)
        check_size("train", space.layout, train.cells, train.channels or 1)
    return Recipe(
        general=general,
        data=_data(table["data"]),
        threat_model=threat_model,
        space=space,
        search=search,
        train=train,
        compress=compression_from(table["compress"], train_table, train.training, threat_model, "compress")
        if "compress" in table
        else None,
        baselines=construct(Baselines, table.get("baselines", {}), "baselines"),
        evaluate=_evaluate(table["evaluate"], threat_model),
        compare=compare_from(
            compared,
            train_table,
            ContenderMakers(
                train=lambda changed, where: _train(changed, threat_model, where),
                compress=lambda changed, trained, part, where: compression_from(
                    changed, trained, part.training, threat_model, where
                ),
            ),
        )
        if "compare" in table
        else None,
        study=study_from(table["study"]) if "study" in table else None,
        table=copy.deepcopy(dict(table)),
    )


def check_size(where: str, layout: Layout, cells: int, channels: int) -> None:
    """Raise ``InputError`` where a network of ``cells`` cells cannot have ``layout``."""
    try:
        layout.place(cells, channels)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None


SEARCH_OBJECTIVES = ("natural", "adversarial")
"""What a stage of the search may minimise over the architecture."""

SEARCH_ATTACK = {"statistics": "batch"}
"""What an attack in the search uses unless the recipe states otherwise. The supernet changes too fast for its running
statistics: on digits (8 epochs, PGD-3, seed 0) a search that attacks with batch statistics ends at 79.1 % robust and
97.9 % natural accuracy of the supernet, with running ones at 76.4 % and 98.6 % (PGD-20, 512 images). The released ARNAS
code uses batch statistics, too."""


def attack_from(
    table: object, where: str, threat_model: ThreatModel, defaults: Mapping[str, str] | None = None
) -> Attack:
    """The attack a table names; ``defaults`` fill fields the attack has and the table does not state."""
    entries = dict(mapping(table, where))
    cls = plugins.load("attacks", name_of(entries, where))
    fields = {f.name for f in dataclasses.fields(cls)}
    entries = {**{key: value for key, value in (defaults or {}).items() if key in fields}, **entries}
    attack: Attack = construct(cls, entries, where, ("name",), threat_model=threat_model)
    return attack


def method_from(
    table: object,
    where: str,
    attack_table: object,
    attack_where: str,
    threat_model: ThreatModel,
    attack_defaults: Mapping[str, str] | None = None,
) -> Objective:
    """The training method a table names, given its attack if it takes one.

    A method that declares an ``inner_attack`` trains on that one and no other; any other method on the attack named, or
    PGD where none is.
    """
    entries = dict(mapping(table, where))
    name = name_of(entries, where)
    cls = plugins.load("training", name)
    given: dict[str, Any] = {}
    if "attack" in {f.name for f in dataclasses.fields(cls)}:
        defaults = dict(attack_defaults or {})
        if hasattr(cls, "inner_loss"):
            defaults["loss"] = cls.inner_loss
        own = getattr(cls, "inner_attack", "")
        attack_table = mapping(attack_table, attack_where) or {"name": own or "pgd"}
        if own and attack_table.get("name", own) != own:
            raise InputError(
                f"{where}: '{name}' trains on the attack '{own}', but {attack_where}.name is "
                f"'{attack_table['name']}': write '{own}' there, or choose the method 'pgd_at'"
            )
        given["attack"] = attack_from(attack_table, attack_where, threat_model, defaults)
    if "threat_model" in {f.name for f in dataclasses.fields(cls)}:
        given["threat_model"] = threat_model
    objective: Objective = construct(cls, entries, where, ("name",), **given)
    return objective


def _data(table: object) -> DataPart:
    entries = dict(mapping(table, "data"))
    shares = {key: entries.pop(key) for key in ("architecture", "validation") if key in entries}
    extra = construct(ExtraImages, entries.pop("extra"), "data.extra") if "extra" in entries else None
    source = construct(
        plugins.load("data", name_of(entries, "data")), entries, "data", ("name", "architecture", "validation", "extra")
    )
    return construct(DataPart, shares, "data", source=source, extra=extra)


def _space(table: object) -> CellSpace:
    entries = dict(mapping(table, "space"))
    name = name_of(entries, "space")
    space = spaces().get(name)
    if not isinstance(space, CellSpace):
        cell_spaces = [key for key, value in spaces().items() if isinstance(value, CellSpace)]
        raise InputError(f"no cell space '{name}' to search: {nearest(name, cell_spaces)}")
    try:
        if entries:
            defaults = space.layout.to_data()
            layout = construct(Layout, {**defaults, **entries}, "space", ("name",))
            space = dataclasses.replace(space, layout=layout)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"space: {error}") from None
    return space


def _search(table: object, threat_model: ThreatModel) -> SearchPart:
    entries = dict(mapping(table, "search"))
    attack_table = entries.pop("attack", {"name": "pgd"})
    method_table = entries.pop("method", {"name": "pgd_at"})
    parts = {
        "gradient": chosen(entries.pop("gradient", {"name": "unrolled"}), "search.gradient", GRADIENTS),
        "relaxation": chosen(entries.pop("relaxation", {"name": "mixture"}), "search.relaxation", RELAXATIONS),
    }
    settings = construct(Search, entries, "search", ("attack", "method", *parts), **parts)
    for index, stage in enumerate(settings.stages):
        for name in stage.objectives:
            if name not in SEARCH_OBJECTIVES:
                hint = nearest(name, SEARCH_OBJECTIVES)
                raise InputError(f"search.stages[{index}].objectives: unknown objective '{name}': {hint}")
    attack = attack_from(attack_table, "search.attack", threat_model, SEARCH_ATTACK)
    if settings.reuse_perturbations:
        check_can_start(attack, "search.attack")
    weight_objective = method_from(
        method_table, "search.method", attack_table, "search.attack", threat_model, SEARCH_ATTACK
    )
    if isinstance(weight_objective, Prepares):
        raise InputError("search.method: this method prepares itself for a found network: choose it as train.method")
    return SearchPart(
        settings=settings,
        weight_objective=weight_objective,
        attack=attack,
    )


GRADIENTS: Mapping[str, type] = {"first_order": FirstOrder, "unrolled": Unrolled}
RELAXATIONS: Mapping[str, type] = {"mixture": Mixture, "sampled_path": SampledPath}


SIZES = ("channels", "cells", "parameters", "weight_perturbation")
TRAIN_KEYS = ("attack", "method", "validation_attack", "auxiliary_weight", "activation", *SIZES)
"""Keys of [train] beside those of the training loop."""


def _train(table: object, threat_model: ThreatModel, where: str = "train") -> TrainPart:
    entries = dict(mapping(table, where))
    attack_table = entries.pop("attack", {})
    method_table = entries.pop("method", {"name": "pgd_at"})
    validation_table = entries.pop("validation_attack", {"name": "pgd", "steps": 10})
    auxiliary_weight = entries.pop("auxiliary_weight", 0.0)
    if isinstance(auxiliary_weight, bool) or not isinstance(auxiliary_weight, int | float) or auxiliary_weight < 0:
        raise InputError(f"{where}.auxiliary_weight must be a number of at least 0, not {auxiliary_weight!r}")
    size = {key: entries.pop(key) for key in SIZES if key in entries}
    activation = _activation(entries.pop("activation"), f"{where}.activation") if "activation" in entries else None
    objective = method_from(method_table, f"{where}.method", attack_table, f"{where}.attack", threat_model)
    if auxiliary_weight and isinstance(objective, Gradients):
        raise InputError(
            f"{where}.auxiliary_weight = {auxiliary_weight}: {type(objective).__name__} has gradients of its own, and "
            "an auxiliary head cannot join in: set it to 0"
        )
    return construct(
        TrainPart,
        size,
        where,
        training=construct(Training, entries, where, TRAIN_KEYS),
        objective=objective,
        auxiliary_weight=float(auxiliary_weight),
        validation_attack=attack_from(validation_table, f"{where}.validation_attack", threat_model),
        activation=activation,
    )


def _activation(table: object, where: str) -> ActivationPart | None:
    """None for ReLU, so that stating it changes nothing."""
    entries = dict(mapping(table, where))
    beside = {key: entries.pop(key) for key in ("transfer", "freeze") if key in entries}
    cls = plugins.load("activations", name_of(entries, where))
    activation = construct(cls, entries, where, ("name", "transfer", "freeze"))
    part: ActivationPart = construct(ActivationPart, beside, where, activation=activation)
    if isinstance(activation, Relu):
        if beside:
            raise InputError(f"{where}: relu has no parameters: leave out '{next(iter(beside))}'")
        return None
    return part


HOLDS_ITS_SIZE = {"cells": 1, "channels": 1}
"""Stands for the size of a network whose genotype holds it."""


def compression_from(
    table: object, train_table: Table, training: Training, threat_model: ThreatModel, where: str
) -> CompressPart:
    """The compression that a table describes, of a network that was trained as ``train_table`` says."""
    attack_table = mapping(train_table.get("attack", {}), "train.attack") or {"name": "pgd"}
    makers = Makers(
        attack=lambda: attack_from(attack_table, "train.attack", threat_model),
        objective=lambda table, at: method_from(table, at, attack_table, "train.attack", threat_model),
    )
    return compress_from(table, training, where, makers)


def _evaluate(table: object, threat_model: ThreatModel) -> EvaluatePart:
    entries = dict(mapping(table, "evaluate"))
    trial_tables = entries.pop("trials", None)
    if not isinstance(trial_tables, list) or not trial_tables:
        raise InputError("evaluate.trials must be a list of at least one table, each with an attack")
    trials: dict[str, Trial] = {}
    for index, item in enumerate(trial_tables):
        where = f"evaluate.trials[{index}]"
        trial = dict(mapping(item, where))
        label = name_of(trial, where)
        check_keys(trial, ("attack", "restarts"), where)
        if label in trials:
            raise InputError(f"{where}: there are two trials named '{label}'")
        if "attack" not in trial:
            raise InputError(f"{where}.attack is missing: write attack = {{ name = ... }}")
        attack = attack_from(trial.pop("attack"), f"{where}.attack", threat_model)
        trials[label] = construct(Trial, trial, where, attack=attack)
    return construct(EvaluatePart, entries, "evaluate", ("trials",), trials=trials)


def override_key(table: dict[str, Any], override: str) -> None:
    """Apply ``section.key=value``; the value is TOML, and text where it is not."""
    key, separator, text = override.partition("=")
    if not separator:
        raise InputError(f"--set {override}: write key=value, e.g. --set search.channels=8")
    value: Any = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
        if parsed.keys() == {"value"}:
            value = parsed["value"]
    except (ValueError, RecursionError):
        pass
    set_key(table, key.strip(), value)


def set_key(table: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at the dotted ``key`` of nested tables, made where missing; numbers are places in lists."""
    path = key.split(".")
    if not all(path):
        raise InputError(f"--set {key}: write key=value, e.g. --set search.channels=8")
    target: Any = table
    for name in path[:-1]:
        if isinstance(target, list):
            if not name.isdigit() or int(name) >= len(target):
                raise InputError(f"--set {key}: '{name}' is not an entry of that list of {len(target)}")
            target = target[int(name)]
        else:
            target = target.setdefault(name, {})
        if not isinstance(target, dict | list):
            raise InputError(f"--set {key}: '{name}' is a value, not a table")
    if isinstance(target, list):
        if not path[-1].isdigit() or int(path[-1]) >= len(target):
            raise InputError(f"--set {key}: '{path[-1]}' is not an entry of that list of {len(target)}")
        target[int(path[-1])] = value
    else:
        target[path[-1]] = value
