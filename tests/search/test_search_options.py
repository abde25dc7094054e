"""Options that trade exactness for speed, in the loop: each resumes to the same bits and does what it says."""

from dataclasses import replace

import pytest
import torch

from nas import precision
from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import InputError
from nas.precision import check_bfloat16, in_bfloat16
from nas.search import bilevel
from nas.search.architecture_gradient import FirstOrder, Unrolled
from nas.search.bilevel import ArchitectureAdam, Search, Stage, search
from nas.search.perturbation_memory import PerturbationMemory
from nas.search.relaxation import Mixture, SampledPath
from nas.tensor_file import read_tree
from nas.threat_model import ThreatModel
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from search_spaces.cell_space import CellSpace
from search_spaces.dsara import SPACE as DSARA
from search_spaces.sampled import SampledSupernet
from search_spaces.supernet import Supernet

THREAT = ThreatModel("linf", 0.08)
ATTACK = Fgsm(THREAT, statistics="batch", random_start=True)
SMALL = CellSpace("dsara", ("max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"), DSARA.layout, nodes=2)


def _data():
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(60, 196, (2, 1, 8, 8), generator=generator)
    y = torch.arange(64) % 2
    x = (prototypes[y] + 30 * torch.randn(64, 1, 8, 8, generator=generator)).clamp(0, 255).to(torch.uint8)
    return ImageData("tiny", x, y, x[:2], y[:2], ("a", "b"))


DATA = _data()
PARTS = split(DATA.y_train, architecture=0.5, validation=0.0, seed=0)
BOTH = Stage(until=2, objectives=("natural", "adversarial"), combine="min_norm", adversarial_gradient_scale=0.1)
SETTINGS = Search(
    channels=4,
    cells=4,
    batch_size=8,
    stages=(Stage(until=1), BOTH),
    architecture=ArchitectureAdam(learning_rate=0.05),
    gradient=FirstOrder(),
    augmentation=Augmentation(crop=1, flip=True),
    monitored=16,
)
OPTIONS = {
    "sampled path": {"relaxation": SampledPath()},
    "sampled path, unrolled": {"relaxation": SampledPath(2.0, 1.0), "gradient": Unrolled()},
    "partial channels": {"partial_channels": 2},
    "reused perturbations": {"reuse_perturbations": True},
    "fewer architecture steps": {"architecture_every": 3},
    "bfloat16": {"precision": "bfloat16"},
    "all": {
        "relaxation": SampledPath(),
        "partial_channels": 4,
        "reuse_perturbations": True,
        "architecture_every": 2,
        "precision": "bfloat16",
    },
}


@pytest.fixture(autouse=True)
def _any_device(monkeypatch):
    """bfloat16 is emulated where the processor has none: slow, but the same function."""
    monkeypatch.setattr(bilevel, "check_bfloat16", lambda device: None)


def _search(settings=SETTINGS, attack=ATTACK, space=SMALL, **more):
    objectives = {"natural": Standard(), "adversarial": PgdAt(attack)}
    return search(
        space, DATA, PARTS, settings, weight_objective=PgdAt(attack), objectives=objectives, attack=attack, seed=0,
        **more,
    )  # fmt: skip


class Stopped(Exception):
    pass


def _stop_in_the_second_epoch(record):
    """Its log comes before its checkpoint: the search goes on from the first epoch's."""
    if record["epoch"] == 1:
        raise Stopped


@pytest.mark.parametrize("option", OPTIONS)
def test_it_resumes_to_the_same_bits(option, tmp_path):
    settings = replace(SETTINGS, **OPTIONS[option])
    whole = _search(settings, checkpoint=tmp_path / "whole.safetensors")
    with pytest.raises(Stopped):
        _search(settings, checkpoint=tmp_path / "c.safetensors", log=_stop_in_the_second_epoch)
    again = _search(settings, checkpoint=tmp_path / "c.safetensors")
    assert again.records == whole.records
    assert all(torch.equal(again.weights[kind], whole.weights[kind]) for kind in whole.weights)
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize("option", OPTIONS)
def test_it_is_another_search_than_without(option):
    """An option that is not passed on would change nothing."""
    exact = _search(replace(SETTINGS, gradient=OPTIONS[option].get("gradient", FirstOrder())))
    other = _search(replace(SETTINGS, **OPTIONS[option]))
    assert exact.records[0]["weight_loss"] != other.records[0]["weight_loss"] or option in (
        "reused perturbations",  # its first epoch is that of random starts
        "fewer architecture steps",
    )
    assert exact.records[1]["weight_loss"] != other.records[1]["weight_loss"]
    assert any(not torch.equal(exact.weights[kind], other.weights[kind]) for kind in exact.weights)


def test_values_that_change_nothing_change_no_bit():
    exact = _search()
    stated = {"relaxation": Mixture(), "partial_channels": 1, "architecture_every": 1, "precision": "float32"}
    same = _search(replace(SETTINGS, **stated, reuse_perturbations=False))
    assert same.records == exact.records


def test_one_sample_serves_the_whole_step(monkeypatch):
    """The passes of a step (attacks, architecture gradient, weights) see one sample, those of the next another."""
    seen, alpha_steps = [], []

    class Adam(torch.optim.Adam):
        def step(self, closure=None):
            alpha_steps.append(len(seen))
            return super().step(closure)

    forward = SampledSupernet.forward

    def listening(self, x):
        if self.training or any(module.training for module in self.modules()):
            seen.append(tuple(sample.choice for sample in self.samples.values()))
        return forward(self, x)

    monkeypatch.setattr(bilevel.torch.optim, "Adam", Adam)
    monkeypatch.setattr(SampledSupernet, "forward", listening)
    once = Pgd(THREAT, steps=1)  # running statistics: its passes are made in eval mode
    settings = replace(SETTINGS, stages=(Stage(until=1),), relaxation=SampledPath(1.0, 1.0), gradient=Unrolled())
    _search(settings, attack=once)
    assert len(alpha_steps) == 4
    per_step = len(seen) // 4
    steps = [set(seen[i * per_step : (i + 1) * per_step]) for i in range(4)]
    assert per_step == 5, "virtual step, objective, two differences, weights"
    assert [len(step) for step in steps] == [1] * 4
    assert len(set.union(*steps)) == 4


def test_the_temperature_falls_over_the_search(monkeypatch):
    drawn = []
    draw = SampledSupernet.draw

    def listening(self, generator, temperature):
        drawn.append(temperature)
        draw(self, generator, temperature)

    monkeypatch.setattr(SampledSupernet, "draw", listening)
    _search(replace(SETTINGS, relaxation=SampledPath(5.0, 1.0)))
    assert drawn == pytest.approx([5 - 0.5 * i for i in range(8)])


def test_after_an_epoch_the_most_likely_path_is_judged(monkeypatch):
    judged = []
    record = bilevel._epoch_record

    def listening(space, supernet, *more):
        judged.append(all(supernet.samples[k].choice == tuple(a.argmax(1).tolist()) for k, a in supernet.alpha.items()))
        return record(space, supernet, *more)

    monkeypatch.setattr(bilevel, "_epoch_record", listening)
    _search(replace(SETTINGS, relaxation=SampledPath()))
    assert judged == [True, True]


def test_architecture_steps_are_taken_every_nth_step_and_their_means_are_of_them(monkeypatch):
    """4 steps an epoch, every third: the first and the last."""
    taken = []
    step = bilevel._architecture_step

    def listening(*args):
        taken.append((args[4][0].state.step, step(*args)))
        return taken[-1][1]

    monkeypatch.setattr(bilevel, "_architecture_step", listening)
    result = _search(replace(SETTINGS, architecture_every=3))
    assert [number for number, _ in taken] == [0, 3, 4, 7]
    for epoch in (0, 1):
        mean = sum(values["adversarial_loss"] for _, values in taken[2 * epoch : 2 * epoch + 2]) / 2
        assert result.records[epoch]["adversarial_loss"] == pytest.approx(mean)


def test_perturbations_of_every_attacked_image_are_in_the_checkpoint(tmp_path):
    """4 batches of 8 cover both halves of 32 images; the loop attacks from the memory from the second epoch on."""
    settings = replace(SETTINGS, reuse_perturbations=True, augmentation=Augmentation())
    _search(settings, checkpoint=tmp_path / "c.safetensors")
    deltas = read_tree(tmp_path / "c.safetensors")["perturbations"]
    assert deltas.shape == DATA.x_train.shape
    assert deltas.dtype == torch.float16
    assert bool(deltas.isfinite().all())
    assert 0.05 < float(deltas.abs().max()) <= 0.0801
    _search(SETTINGS, checkpoint=tmp_path / "without.safetensors")
    assert "perturbations" not in read_tree(tmp_path / "without.safetensors")


def test_with_a_memory_one_step_attacks_grow_stronger():
    """On a fixed network, five visits of one small step reach a higher loss than one visit."""
    torch.manual_seed(0)
    model = DSARA.supernet(channels=2, cells=4, input_shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.3,)).eval()
    (batch,) = bilevel.batches(DATA.x_train, DATA.y_train, torch.arange(64), batch_size=64, trace=True)
    memory, attack = PerturbationMemory(DATA.x_train), Pgd(THREAT, steps=1, step_size=0.02)
    losses = []
    for visit in range(5):
        x_adv = memory.attack(attack, model, batch, torch.Generator().manual_seed(visit))
        losses.append(float(torch.nn.functional.cross_entropy(model(x_adv).detach(), batch.y)))
    assert losses == sorted(losses)
    assert losses[-1] > losses[0]


def test_bfloat16_is_near_float32():
    """Logits, and the directions of the gradients of images, weights and architecture, which stay float32."""
    torch.manual_seed(0)
    supernet = DSARA.supernet(channels=4, cells=4, input_shape=(1, 8, 8), classes=2, mean=(0.5,), std=(0.3,))
    x = (DATA.x_train.float() / 255).requires_grad_()
    results = []
    for forward in (supernet.forward, in_bfloat16(supernet.forward)):
        logits = forward(x)
        loss = torch.nn.functional.cross_entropy(logits, DATA.y_train)
        parts = [[x], supernet.weight_parameters(), supernet.architecture_parameters()]
        gradients = torch.autograd.grad(loss, [p for part in parts for p in part])
        flat = [torch.cat([g.flatten() for g in gradients[:1]])]
        count = len(parts[1])
        flat += [torch.cat([g.flatten() for g in part]) for part in (gradients[1 : 1 + count], gradients[1 + count :])]
        results.append([logits.flatten().detach(), *flat])
    for exact, rounded in zip(*results, strict=True):
        assert rounded.dtype == torch.float32
        assert not torch.equal(exact, rounded)
        assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.97
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"partial_channels": 0}, "partial_channels = 0"),
        ({"partial_channels": 3}, "divide channels = 4"),
        ({"architecture_every": 0}, "architecture_every"),
        ({"precision": "bfloat16", "gradient": Unrolled()}, "first_order"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(InputError, match=words) as raised:
        replace(SETTINGS, **settings)
    assert "\n" not in str(raised.value)


def test_the_exact_mixed_derivative_may_be_taken_in_bfloat16():
    settings = replace(SETTINGS, gradient=Unrolled("exact"), precision="bfloat16", stages=(Stage(until=1),))
    assert len(_search(settings).records) == 1


@pytest.mark.parametrize("wrong", [(0.0, 0.0), (1.0, 2.0), (1.0, 0.0), (float("inf"), 1.0), (float("nan"), 1.0)])
def test_temperatures_must_fall_and_stay_above_0(wrong):
    with pytest.raises(InputError, match="temperature"):
        SampledPath(*wrong)


@pytest.mark.parametrize("attack", [Fgsm(THREAT), Pgd(THREAT, random_start=False)])
def test_perturbations_are_reused_by_attacks_with_a_random_start_only(attack):
    with pytest.raises(InputError, match="reuse_perturbations"):
        _search(replace(SETTINGS, reuse_perturbations=True), attack=attack)


def test_bfloat16_is_refused_where_the_device_has_none(monkeypatch):
    monkeypatch.setattr(precision.torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(precision.torch.cpu, "_is_amx_tile_supported", lambda: False)
    for device in ("cpu", "meta"):
        with pytest.raises(InputError, match="float32"):
            check_bfloat16(torch.device(device))
    monkeypatch.setattr(bilevel, "check_bfloat16", check_bfloat16)
    with pytest.raises(InputError, match="bfloat16"):
        _search(replace(SETTINGS, precision="bfloat16"))
    monkeypatch.setattr(precision.torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    check_bfloat16(torch.device("cpu"))


def test_options_reach_the_supernet():
    torch.manual_seed(0)
    made = bilevel._supernet(SMALL, DATA, replace(SETTINGS, relaxation=SampledPath(), partial_channels=2), 0)
    assert isinstance(made, SampledSupernet)
    assert made.cells[0].passing == 2
    assert type(bilevel._supernet(SMALL, DATA, SETTINGS, 0)) is Supernet
