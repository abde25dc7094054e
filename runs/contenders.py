"""The [compare] table of a recipe: what is trained several ways, and how each contender differs from [train]."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nas.detection.feature_squeezing import FeatureSqueezing
from nas.detection.squeezers import BitDepth, MedianFilter, NonLocalMeans
from nas.errors import InputError, nearest
from nas.evaluation.certification import Smoothing
from nas.training.loop import Training
from runs.compress_part import CompressPart
from runs.construct import check_keys, chosen, construct, mapping, name_of

if TYPE_CHECKING:
    from runs.recipe import TrainPart

Table = Mapping[str, Any]

SQUEEZERS: Mapping[str, type] = {
    "bit_depth": BitDepth,
    "median_filter": MedianFilter,
    "non_local_means": NonLocalMeans,
}

CHANGES = (
    "method",
    "attack",
    "validation_attack",
    "activation",
    "auxiliary_weight",
    "weight_perturbation",
    *(f.name for f in dataclasses.fields(Training)),
)
"""Keys of [train] that a contender may state for itself. Not the size: all train the same network."""


BESIDE = ("network", "compress", "certify", "detect")
"""Keys of a contender beside its name that are not about training."""


@dataclass(frozen=True)
class Certify:
    """Randomised smoothing of a contender's network. samples: test images that are certified; 0 means all."""

    smoothing: Smoothing
    samples: int = 0

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise InputError(f"samples must be at least 0 (0 = all test images), not {self.samples}")


@dataclass(frozen=True)
class Detect:
    """A detector before a contender's network, and the attack that knows it.

    false_positive_rate: share of the held-out training images that the threshold lets it refuse;  steps, restarts,
    score_weight: of the adaptive attack (``nas.detection.evasion.Evasion``).
    """

    squeezing: FeatureSqueezing
    false_positive_rate: float = 0.05
    steps: int = 100
    restarts: int = 10
    score_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.false_positive_rate < 1:
            raise InputError(f"false_positive_rate is at least 0 and below 1, not {self.false_positive_rate}")
        if self.steps < 1 or self.restarts < 1 or not self.score_weight >= 0:
            raise InputError("steps and restarts must be at least 1, score_weight at least 0")


@dataclass(frozen=True)
class Contender:
    """One way to train the network, and what is judged beside the attacks.

    network: whose networks these are: its own name, or another contender's, which are then not trained again.
    compress: how that other contender's networks are compressed, which makes them its own.
    teacher: the contender whose network of the same seed it learns from, where its method names one as teacher.
    transfer: the one whose network of the same seed its activation is taken from, where that names one.
    """

    name: str
    network: str
    train: TrainPart
    teacher: str | None = None
    transfer: str | None = None
    compress: CompressPart | None = None
    certify: Certify | None = None
    detect: Detect | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The contenders whose networks have to be trained before."""
        return tuple(dict.fromkeys(name for name in (self.teacher, self.transfer) if name is not None))

    @property
    def trains(self) -> bool:
        """Whether it trains networks of its own from the beginning."""
        return self.network == self.name

    @property
    def folder(self) -> str:
        """Whose networks are judged, by the name their folders begin with."""
        return self.network if self.compress is None else self.name


@dataclass(frozen=True)
class ComparePart:
    """A comparison of ways to train one architecture.

    genotype: a published name, a file, a run directory or the genotype itself; what `nas compare` read it as stands in
    the record of the run. seeds: every contender is trained and judged once for each; a seed stands for the same
    initial weights, split and order of the images in all contenders.
    equal: what all spend alike: "epochs"; "passes" of the network, forwards and backwards, to as many as the first
    contender's, by more or fewer epochs; or "nothing". reference: the contender that the others are set against, the
    first unless stated.
    """

    contenders: tuple[Contender, ...]
    genotype: Any = None
    seeds: tuple[int, ...] = (0, 1, 2)
    equal: Literal["epochs", "passes", "nothing"] = "epochs"
    reference: str = ""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not all(0 <= s < 2**63 for s in self.seeds):
            raise InputError(f"seeds must be at least one number of at least 0, each once, not {list(self.seeds)}")
        if self.reference:
            self.contender(self.reference, "reference")

    def contender(self, name: str, where: str) -> Contender:
        """The contender of that name. Raises ``InputError``."""
        for contender in self.contenders:
            if contender.name == name:
                return contender
        raise InputError(f"{where}: no contender '{name}': {nearest(name, [c.name for c in self.contenders])}")

    @property
    def against(self) -> Contender:
        """The contender that the others are set against."""
        return self.contender(self.reference, "reference") if self.reference else self.contenders[0]


@dataclass(frozen=True)
class Makers:
    """How a recipe makes what a contender states, at a place that mistakes are reported for.

    train: the training of a table;  compress: the compression of a table, of networks trained as another one says.
    """

    train: Callable[[Table, str], TrainPart]
    compress: Callable[[object, Table, TrainPart, str], CompressPart]


def compare_from(table: object, train_table: object, makers: Makers) -> ComparePart:
    """The comparison that [compare] describes, on the base of [train]."""
    entries = dict(mapping(table, "compare"))
    tables = entries.pop("contenders", None)
    if not isinstance(tables, list) or not tables:
        raise InputError("compare.contenders must be a list of at least one table, each with a name")
    contenders: list[Contender] = []
    training: dict[str, Table] = {}
    for index, item in enumerate(tables):
        where = f"compare.contenders[{index}]"
        contender = _contender(item, where, mapping(train_table, "train"), makers, contenders, training)
        if any(contender.name == other.name for other in contenders):
            raise InputError(f"{where}: there are two contenders named '{contender.name}'")
        contenders.append(contender)
    part: ComparePart = construct(ComparePart, entries, "compare", ("contenders",), contenders=tuple(contenders))
    if part.equal != "nothing":
        for index, item in enumerate(tables[1:], start=1):
            if "epochs" in item and item["epochs"] != contenders[0].train.training.epochs:
                raise InputError(
                    f"compare.contenders[{index}].epochs: equal = '{part.equal}' decides them; leave it out, or say "
                    "equal = 'nothing'"
                )
    return part


def _contender(
    item: object, where: str, base: Table, makers: Makers, before: list[Contender], training: dict[str, Table]
) -> Contender:
    """A contender; training: the tables that those before are trained by, to which its own is added."""
    entries = dict(mapping(item, where))
    name = name_of(entries, where)
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise InputError(f"{where}.name '{name[:40]}' may consist of letters, digits, '-' and '_' only")
    beside = {key: entries.pop(key) for key in BESIDE if key in entries}
    check_keys(entries, CHANGES, where, ("name", *BESIDE))
    network = beside.get("network", name)
    if "network" in beside:
        own = [other for other in before if other.trains]
        if not any(other.name == network for other in own):
            hint = nearest(str(network), [other.name for other in own])
            raise InputError(f"{where}.network: no contender '{network}' trains a network above this one: {hint}")
        if entries:
            raise InputError(
                f"{where}: '{next(iter(entries))}' is about training, but it uses the network of '{network}'"
            )
    part = next((other.train for other in before if other.name == network), None)
    if part is None:
        training[name] = merged(base, entries)
        part = makers.train(training[name], where)
    if "attack" in entries and not hasattr(part.objective, "attack"):
        raise InputError(f"{where}.attack: its training method takes none; leave it out")
    compress = None
    if "compress" in beside:
        if "network" not in beside:
            raise InputError(f"{where}.compress: say whose networks by network = one of the contenders above")
        compress = makers.compress(beside["compress"], training[network], part, f"{where}.compress")
    trained = {other.name for other in before if other.trains}
    teacher = getattr(part.objective, "teacher", None)
    transfer = part.activation.transfer if part.activation is not None else None
    return Contender(
        name,
        network,
        part,
        teacher if teacher in trained else None,
        transfer if transfer in trained else None,
        compress,
        _certify(beside["certify"], f"{where}.certify") if "certify" in beside else None,
        _detect(beside["detect"], f"{where}.detect") if "detect" in beside else None,
    )


def merged(base: Table, changes: Table) -> dict[str, Any]:
    """``base`` with ``changes``, table by table; one that states a name is of another kind and replaces the old one."""
    both = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping) and "name" not in value:
            both[key] = merged(base[key], value)
        else:
            both[key] = value
    return both


def _certify(table: object, where: str) -> Certify:
    entries = dict(mapping(table, where))
    samples = {"samples": entries.pop("samples")} if "samples" in entries else {}
    smoothing = construct(Smoothing, entries, where, ("samples",))
    part: Certify = construct(Certify, samples, where, smoothing=smoothing)
    return part


def _detect(table: object, where: str) -> Detect:
    entries = dict(mapping(table, where))
    squeezing = FeatureSqueezing()
    if "squeezers" in entries:
        tables = entries.pop("squeezers")
        if not isinstance(tables, list) or not tables:
            raise InputError(f"{where}.squeezers must be a list of at least one table, each with a name")
        kinds = enumerate(tables)
        squeezing = FeatureSqueezing(tuple(chosen(item, f"{where}.squeezers[{i}]", SQUEEZERS) for i, item in kinds))
    part: Detect = construct(Detect, entries, where, ("squeezers",), squeezing=squeezing)
    return part
