"""The search loop on a tiny problem: stages, records, resuming, seeds."""

import copy
from dataclasses import replace

import pytest
import torch

from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import Diverged, InputError
from nas.optimisation import Sgd
from nas.search import bilevel
from nas.search.architecture_gradient import FirstOrder, Unrolled
from nas.search.bilevel import ArchitectureAdam, Search, Stage, search
from nas.tensor_file import read_tree
from nas.threat_model import ThreatModel
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.trades import Trades
from search_spaces.cell_space import CellSpace
from search_spaces.dsara import SPACE as DSARA
from search_spaces.genotype import genotype_from_data

ATTACK = Pgd(ThreatModel("linf", 0.08), steps=1, statistics="batch")
OBJECTIVES = {"natural": Standard(), "adversarial": PgdAt(ATTACK)}
BOTH = ("natural", "adversarial")

SMALL = CellSpace("dsara", ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"), DSARA.layout, nodes=2)
"""The layout of DSARA with smaller cells: the loop is the same, a step costs a third."""


def _data():
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(60, 196, (2, 1, 8, 8), generator=generator)
    y = torch.arange(72) % 2
    x = (prototypes[y] + 30 * torch.randn(72, 1, 8, 8, generator=generator)).clamp(0, 255).to(torch.uint8)
    return ImageData("tiny", x[:64], y[:64], x[64:], y[64:], ("a", "b"))


DATA = _data()
PARTS = split(DATA.y_train, architecture=0.5, validation=0.0, seed=0)

STAGES = (Stage(until=2), Stage(until=4, objectives=BOTH, combine="min_norm", adversarial_gradient_scale=0.1))
SETTINGS = Search(
    channels=2,
    cells=4,
    batch_size=16,
    stages=STAGES,
    weights=Sgd(0.05, final_learning_rate=0.001),
    architecture=ArchitectureAdam(learning_rate=0.05),
    gradient=FirstOrder(),
    augmentation=Augmentation(crop=1, flip=True),
    monitored=20,
)


def _search(settings=SETTINGS, space=SMALL, data=DATA, parts=PARTS, seed=0, **more):
    objectives = more.pop("objectives", OBJECTIVES)
    weight_objective = more.pop("weight_objective", PgdAt(ATTACK))
    given = {"weight_objective": weight_objective, "objectives": objectives, "attack": ATTACK, "seed": seed}
    return search(space, data, parts, settings, **given, **more)


@pytest.fixture(scope="module")
def whole():
    """One uninterrupted search, for all tests to compare with."""
    return _search()


def test_stages_switch_and_gamma_belongs_to_min_norm(whole):
    assert [record["stage"] for record in whole.records] == ["adversarial"] * 2 + ["natural+adversarial"] * 2
    assert ["gamma" in record for record in whole.records] == [False, False, True, True]
    assert all(0 <= record["gamma"] <= 1 for record in whole.records[2:])
    assert ["natural_loss" in record for record in whole.records] == [False, False, True, True]
    assert all("adversarial_loss" in record for record in whole.records)


def test_records_hold_what_is_promised(whole):
    kinds = list(SMALL.layout.kinds)
    for epoch, record in enumerate(whole.records):
        assert record["epoch"] == epoch
        for name in ("weight_loss", "adversarial_loss"):
            assert record[name] > 0
        for name in ("weight_accuracy", "natural_accuracy", "robust_accuracy"):
            assert 0 <= record[name] <= 1
        assert record["robust_accuracy"] <= record["natural_accuracy"]
        assert record["natural_accuracy"] * 20 == pytest.approx(round(record["natural_accuracy"] * 20)), "20 judged"
        assert list(record["alpha_entropy"]) == list(record["parameter_free_edges"]) == kinds
        assert all(0 < value <= 1 for value in record["alpha_entropy"].values())
        assert all(0 <= free <= total == 4 for free, total in record["parameter_free_edges"].values())
        SMALL.check(genotype_from_data(record["genotype"]))
        assert isinstance(record["warnings"], list)
    assert whole.records[-1]["genotype"] == whole.genotype.to_data()
    assert whole.genotype == SMALL.discretise(whole.weights)
    assert whole.warnings == [warning for record in whole.records for warning in record["warnings"]]
    assert {kind: tuple(table.shape) for kind, table in whole.weights.items()} == dict.fromkeys(kinds, (5, 4))
    for table in whole.weights.values():
        torch.testing.assert_close(table.sum(1), torch.ones(5))
    entropies = [sum(record["alpha_entropy"].values()) for record in whole.records]
    assert entropies[-1] < entropies[0], "the architecture is being decided"


class Stopped(Exception):
    pass


def _stop_at(epoch):
    def log(record):
        if record["epoch"] == epoch:
            raise Stopped

    return log


def test_a_stopped_search_resumes_to_the_same_bits(whole, tmp_path):
    """Stopped in each stage by an error out of ``log``; the global random stream plays no part."""
    path, histories = tmp_path / "checkpoint.safetensors", []
    for epoch in (1, 3):
        torch.manual_seed(epoch)
        with pytest.raises(Stopped):
            _search(checkpoint=path, log=_stop_at(epoch), history=lambda records: histories.append(len(records)))
    logged = []
    again = _search(checkpoint=path, log=logged.append, history=lambda records: histories.append(len(records)))
    assert histories == [0, 1, 3]
    assert logged == whole.records[3:]
    assert again.records == whole.records
    assert again.genotype == whole.genotype
    assert all(torch.equal(again.weights[kind], whole.weights[kind]) for kind in whole.weights)
    finished = _search(checkpoint=path)
    assert finished.records == whole.records
    assert all(torch.equal(finished.weights[kind], whole.weights[kind]) for kind in whole.weights)


def test_other_seeds_give_other_searches():
    settings = replace(SETTINGS, stages=(Stage(until=1),))
    first, again, other = (_search(settings, seed=seed) for seed in (0, 0, 1))
    assert first.records == again.records
    assert first.records[0]["weight_loss"] != other.records[0]["weight_loss"]
    assert all(torch.equal(first.weights[kind], again.weights[kind]) for kind in first.weights)
    assert not any(torch.equal(first.weights[kind], other.weights[kind]) for kind in first.weights)


def test_progress_is_told():
    shares = []
    _search(replace(SETTINGS, stages=(Stage(until=2),)), tick=shares.append)
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_two_stage_unrolled_search_over_dsara():
    """The real space and gradient, two epochs: everything finite, weights and architecture moved."""
    settings = replace(
        SETTINGS, gradient=Unrolled(), stages=(Stage(until=1), replace(STAGES[1], until=2)), batch_size=32
    )
    result = _search(settings, DSARA)
    assert len(result.records) == 2
    assert "gamma" in result.records[1]
    DSARA.check(result.genotype)
    assert all(float(table.std()) > 1e-3 for table in result.weights.values())


def _one_step(settings, monkeypatch, **more):
    """The architecture gradient Adam was handed in the first step, and the gradients it was made of."""
    seen = {"steps": []}

    class Listening:
        def __call__(self, supernet, weight_loss, objectives, step, mean):
            gradients = FirstOrder()(supernet, weight_loss, objectives, step, mean)
            seen.setdefault("gradients", gradients)
            seen["steps"].append(step)
            seen["tracking"] = [m.track_running_stats for m in supernet.modules() if hasattr(m, "running_mean")]
            return gradients

    class Adam(torch.optim.Adam):
        def step(self, closure=None):
            seen.setdefault("direction", torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]))
            return super().step(closure)

    monkeypatch.setattr(bilevel.torch.optim, "Adam", Adam)
    seen["result"] = _search(replace(settings, gradient=Listening()), **more)
    return seen


@pytest.mark.parametrize("combine", ["sum", "min_norm"])
@pytest.mark.parametrize("names", [BOTH, BOTH[::-1]])
def test_gradients_are_scaled_then_combined(names, combine, monkeypatch):
    """The scale belongs to "adversarial" wherever it stands; gamma is the weight of the first objective."""
    stage = Stage(until=1, objectives=names, combine=combine, adversarial_gradient_scale=0.3)
    seen = _one_step(replace(SETTINGS, stages=(stage,), batch_size=32), monkeypatch)
    u1, u2 = (g * (0.3 if name == "adversarial" else 1.0) for name, g in zip(names, seen["gradients"], strict=True))
    expected = u1 + u2
    if combine == "min_norm":
        gamma = float(((u2 - u1) @ u2 / (u2 - u1).square().sum()).clamp(0, 1))
        assert seen["result"].records[0]["gamma"] == pytest.approx(gamma, abs=1e-5)
        expected = gamma * u1 + (1 - gamma) * u2
    torch.testing.assert_close(seen["direction"], expected, rtol=1e-4, atol=1e-8)
    assert not any(seen["tracking"]), "batch statistics are not recorded meanwhile"


def test_the_virtual_step_is_that_of_the_weight_optimiser(monkeypatch):
    """Its rate follows the schedule, its buffers are those of SGD: none at first."""
    seen = _one_step(replace(SETTINGS, stages=(Stage(until=2),)), monkeypatch)
    steps = seen["steps"]
    assert [step.learning_rate for step in steps] == pytest.approx([SETTINGS.weights.rate(i / 4) for i in range(4)])
    assert {(step.momentum, step.weight_decay) for step in steps} == {(0.9, SETTINGS.weights.weight_decay)}
    assert all(buffer is None for buffer in steps[0].buffers)
    assert all(buffer is not None and float(buffer.abs().max()) >= 0 for buffer in steps[1].buffers)


def test_weights_learn_from_their_part_and_the_architecture_from_the_other():
    rows = {"weights": [], "held out": []}

    class Listening:
        def __init__(self, name):
            self.name = name

        def __call__(self, model, batch, state):
            rows[self.name] += batch.indices.tolist()
            return Standard()(model, batch, state)

    _search(
        replace(SETTINGS, stages=(Stage(until=1, objectives=("natural",)),)),
        objectives={"natural": Listening("held out")},
        weight_objective=Listening("weights"),
    )
    assert set(rows["weights"]) == set(PARTS.weights.tolist())
    assert set(rows["held out"]) == set(PARTS.architecture.tolist())


def test_one_attack_a_batch_serves_all_evaluations():
    """The unrolled gradient evaluates the weight loss several times, on the same adversarial images."""
    calls = []

    class Counting:
        def __call__(self, model, x, y, *, generator):
            calls.append(x.shape[0])
            return ATTACK(model, x, y, generator=generator)

    settings = replace(SETTINGS, gradient=Unrolled(), stages=(Stage(until=1, objectives=BOTH, combine="min_norm"),))
    _search(settings, objectives={**OBJECTIVES, "adversarial": PgdAt(Counting())}, weight_objective=PgdAt(Counting()))
    assert calls == [16] * 4, "two batches, each attacked once for the weights and once for the architecture"


def test_trades_can_be_what_the_weights_minimise():
    trades = Trades(replace(ATTACK, loss="kl"))
    result = _search(replace(SETTINGS, stages=(Stage(until=1),)), weight_objective=trades)
    assert result.records[0]["weight_loss"] > 0


@pytest.mark.parametrize("where", ["weights", "architecture"])
def test_divergence_is_told(where, tmp_path):
    class Poisoned:
        def __call__(self, model, batch, state):
            loss, metrics = Standard()(model, batch, state)
            return loss * (float("nan") if state.epoch == 1 else 1.0), metrics

    more = {"weight_objective": Poisoned()} if where == "weights" else {"objectives": {"adversarial": Poisoned()}}
    with pytest.raises(Diverged, match=r"at step 1 of \d+ of epoch 1.*learning_rate"):
        _search(replace(SETTINGS, stages=(Stage(until=3),)), checkpoint=tmp_path / "c.safetensors", **more)


@pytest.mark.parametrize("where", ["weight", "architecture"])
def test_a_gradient_that_is_no_number_is_told_though_the_loss_is_one(where, tmp_path):
    class NoSlope:
        def __call__(self, model, batch, state):
            loss, metrics = Standard()(model, batch, state)
            own = model.weight_parameters() if where == "weight" else model.architecture_parameters()
            return (loss + (own[0].sum() * 0).sqrt() if state.epoch == 1 else loss), metrics

    more = {"weight_objective": NoSlope()} if where == "weight" else {"objectives": {"adversarial": NoSlope()}}
    path = tmp_path / "c.safetensors"
    with pytest.raises(Diverged, match=f"step 1 of .*{where}_gradient_norm = nan"):
        _search(replace(SETTINGS, stages=(Stage(until=3),)), checkpoint=path, **more)
    tree = read_tree(path)
    assert len(tree["records"]) == 1
    assert all(bool(tensor.isfinite().all()) for tensor in tree["supernet"].values() if tensor.is_floating_point())


def test_the_test_set_is_never_looked_at():
    class Guarded(ImageData):
        armed = False

        def __getattribute__(self, name):
            if name in ("x_test", "y_test") and object.__getattribute__(self, "armed"):
                raise AssertionError(f"{name} was looked at")
            return super().__getattribute__(name)

    data = Guarded(DATA.name, DATA.x_train, DATA.y_train, DATA.x_test, DATA.y_test, DATA.classes)
    object.__setattr__(data, "armed", True)
    assert len(_search(replace(SETTINGS, stages=(Stage(until=1),)), data=data).records) == 1


def test_the_global_stream_and_the_data_are_left_alone():
    before, images = torch.get_rng_state(), copy.deepcopy(DATA.x_train)
    _search(replace(SETTINGS, stages=(Stage(until=1),)))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(DATA.x_train, images)


def test_both_parts_of_the_images_are_needed():
    parts = split(DATA.y_train, architecture=0.0, validation=0.0, seed=0)
    with pytest.raises(InputError, match="architecture"):
        _search(parts=parts)


def test_wrong_settings_are_refused():
    for settings in (
        {"until": 0},
        {"until": 1, "objectives": ()},
        {"until": 1, "objectives": ("natural", "natural")},
        {"until": 1, "combine": "min_norm"},
        {"until": 1, "adversarial_gradient_scale": 0.0},
        {"until": 1, "adversarial_gradient_scale": float("nan")},
    ):
        with pytest.raises(InputError):
            Stage(**settings)
    for settings in (
        {"stages": ()},
        {"stages": (Stage(until=2), Stage(until=2))},
        {"stages": (Stage(until=3), Stage(until=2))},
        {"batch_size": 1},
        {"monitored": 0},
    ):
        with pytest.raises(InputError):
            Search(**settings)
    for settings in ({"learning_rate": 0.0}, {"weight_decay": -1.0}, {"betas": (0.5, 1.0)}):
        with pytest.raises(InputError):
            ArchitectureAdam(**settings)
    with pytest.raises(InputError, match="unknown search objective"):
        _search(replace(SETTINGS, stages=(Stage(until=1, objectives=("robust",)),)))
    with pytest.raises(InputError, match="cells"):
        _search(replace(SETTINGS, cells=2))


def test_stage_of_an_epoch():
    settings = Search(stages=(Stage(until=20), Stage(until=50, objectives=BOTH, combine="min_norm")))
    assert settings.epochs == 50
    stages = [settings.stages.index(settings.stage_of(epoch)) for epoch in range(50)]
    assert stages == [0] * 20 + [1] * 30
