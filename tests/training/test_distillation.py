"""ARD and RSLAD: what they reduce to with teachers whose answers are known, and teachers that do not fit."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.attacks.fixed import Fixed
from nas.attacks.gradient import compared_with
from nas.attacks.losses import kl
from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.model_file import ModelSpec, save_model
from nas.objective import Batch, Setting, State
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.ard import Ard, DistilledByArd
from nas.training.auxiliary import WithAuxiliary
from nas.training.loop import Training, train
from nas.training.pgd_at import PgdAt
from nas.training.rslad import DistilledByRslad, Rslad
from nas.training.standard import Standard
from nas.training.teacher import Teacher, divergence
from runs.recipe import method_from
from search_spaces.genotype import StageGenotype

THREAT = ThreatModel("linf", 0.1)
ON_LABELS, ON_TEACHER = Pgd(THREAT, steps=2), Pgd(THREAT, steps=2, loss="kl")
MATCH = {"ard": (Ard, DistilledByArd, ON_LABELS), "rslad": (Rslad, DistilledByRslad, ON_TEACHER)}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _state(seed=0):
    return State(0, 0, 0.0, _generator(seed), _generator(seed + 100))


def _batch(n=12):
    x = torch.rand(n, 1, 8, 8, generator=_generator(1), dtype=torch.float64)
    return Batch(x, torch.arange(n) % 3, torch.arange(n))


class _Sure(nn.Module):
    """Knows the labels of a batch."""

    def __init__(self, y):
        super().__init__()
        self.y = y

    def forward(self, x):
        return 1000.0 * F.one_hot(self.y, 3).double()


def _distils(name, teacher, **settings):
    method, prepared, attack = MATCH[name]
    return prepared(method(**{"attack": attack, "teacher": "told apart", **settings}), Teacher(teacher))


def _loss_and_gradients(objective, model, batch, seed=0):
    loss, _ = objective(model, batch, _state(seed))
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


def _assert_same(first, second, tolerance=1e-10):
    torch.testing.assert_close(first[0], second[0], rtol=tolerance, atol=1e-14)
    for ours, theirs in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-13)


def _mixed(network, batch, share):
    """``share`` of PGD adversarial training and the rest of standard training: loss and gradients."""
    parts = [_loss_and_gradients(method, network().double(), batch) for method in (PgdAt(ON_LABELS), Standard())]
    weights = (share, 1 - share)
    loss = sum(weight * part[0] for weight, part in zip(weights, parts, strict=True))
    gradients = [share * a + (1 - share) * b for a, b in zip(parts[0][1], parts[1][1], strict=True)]
    return loss, gradients


@pytest.mark.parametrize("name", MATCH)
@pytest.mark.parametrize("alpha", [1.0, 0.75])
def test_a_sure_teacher_who_is_right_gives_adversarial_training(name, alpha, network):
    """KL from one-hot probabilities is the cross-entropy: in both losses, and in the attack of RSLAD."""
    batch = _batch()
    settings = {"temperature": 1.0} if name == "ard" else {}
    ours = _distils(name, _Sure(batch.y), alpha=alpha, **settings)
    _assert_same(_loss_and_gradients(ours, network().double(), batch), _mixed(network, batch, alpha), tolerance=1e-9)


def test_without_weight_on_the_teacher_ard_is_standard_training(network):
    batch = _batch()
    ours = _distils("ard", network(5).double(), alpha=0.0)
    _assert_same(
        _loss_and_gradients(ours, network().double(), batch),
        _loss_and_gradients(Standard(), network().double(), batch),
    )


@pytest.mark.parametrize("name", MATCH)
def test_a_network_that_is_its_own_teacher_has_nothing_to_learn_without_an_attack(name, network):
    """T0: epsilon 0; the student in eval mode, so that both see the same statistics."""
    attack = dataclasses.replace(MATCH[name][2], threat_model=ThreatModel("linf", 0.0))
    ours = _distils(name, network().double(), attack=attack, alpha=1.0)
    loss, gradients = _loss_and_gradients(ours, network().double().eval(), _batch())
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-11
    other, moved = _loss_and_gradients(_distils(name, network(5).double(), attack=attack), network().double(), _batch())
    assert float(other) > 1e-3 and max(float(gradient.abs().max()) for gradient in moved) > 1e-3


def test_the_divergence_is_that_of_the_teacher_from_the_student():
    """By hand; the other direction is another number."""
    student, teacher = (4 * torch.randn(7, 4, generator=_generator(seed), dtype=torch.float64) for seed in (0, 1))
    for temperature in (1.0, 5.0):
        p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
        by_hand = temperature**2 * (p * (p / q).log()).sum(1).mean()
        torch.testing.assert_close(divergence(student, teacher, temperature), by_hand)
        assert abs(float(by_hand - divergence(teacher, student, temperature))) > 1e-2 * float(by_hand)


def test_at_high_temperature_logits_are_matched():
    """t^2 KL -> half the variance of their differences over the classes (Hinton et al., section 2.1)."""
    student, teacher = (torch.randn(7, 4, generator=_generator(seed), dtype=torch.float64) for seed in (0, 1))
    matched = (student - teacher).var(1, correction=0).mean() / 2
    torch.testing.assert_close(divergence(student, teacher, 1e4), matched, rtol=1e-3, atol=0)


def test_ard_takes_the_teacher_at_clean_and_the_student_at_attacked_images(network):
    student, teacher, batch = network().double(), network(5).double().eval(), _batch()
    x_adv = ON_LABELS(student, batch.x, batch.y, generator=_state().attack_generator)
    loss, _ = _distils("ard", teacher, alpha=0.6, temperature=4.0)(student, batch, _state())
    expected = 0.6 * divergence(student(x_adv), teacher(batch.x), 4.0) + 0.4 * F.cross_entropy(
        student(batch.x), batch.y
    )
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    wrong = 0.6 * divergence(student(batch.x), teacher(batch.x), 4.0) + 0.4 * F.cross_entropy(student(x_adv), batch.y)
    assert abs(float((loss - wrong).detach())) > 1e-3


def test_rslad_attacks_the_divergence_from_the_teacher(network):
    """Steepest ascent by hand; neither the label nor the student's own clean answer enters."""
    student, teacher, batch = network().double(), network(5).double().eval(), _batch()
    wanted = teacher(batch.x).detach()
    x_adv = THREAT.random_start(batch.x, _state().attack_generator)
    with torch.enable_grad():
        for _ in range(2):
            point = x_adv.clone().requires_grad_(True)
            (slope,) = torch.autograd.grad(kl(student.eval()(point), batch.y, wanted).sum(), point)
            x_adv = THREAT.project(x_adv + ON_TEACHER.step * slope.sign(), batch.x)
    student.train()
    found = []
    recorded = _Recorded(ON_TEACHER, found)
    loss, _ = _distils("rslad", teacher, attack=recorded, alpha=0.7)(student, batch, _state())
    torch.testing.assert_close(found[0], x_adv, rtol=0, atol=1e-12)
    own = ON_TEACHER(student, batch.x, batch.y, generator=_state().attack_generator)
    assert float((found[0] - own).abs().max()) > 0.01
    expected = 0.7 * divergence(student(x_adv), wanted) + 0.3 * divergence(student(batch.x), wanted)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    relabelled = dataclasses.replace(batch, y=(batch.y + 1) % 3)
    again, _ = _distils("rslad", teacher, alpha=0.7)(network().double(), relabelled, _state())
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorded:
    attack: object
    found: list

    def __call__(self, model, x, y, *, generator):
        self.found.append(self.attack(model, x, y, generator=generator))
        return self.found[-1]


def test_what_an_attack_compares_with_is_forgotten_afterwards(network):
    model, teacher, batch = network().double(), network(5).double().eval(), _batch()
    before = ON_TEACHER(model, batch.x, batch.y, generator=_generator())
    keys, names = set(vars(model)), [name for name, _ in model.named_modules()]
    with compared_with(model, teacher):
        assert [name for name, _ in model.named_modules()] == names
        within = ON_TEACHER(model, batch.x, batch.y, generator=_generator())
    assert set(vars(model)) == keys
    assert torch.equal(before, ON_TEACHER(model, batch.x, batch.y, generator=_generator()))
    assert not torch.equal(before, within)


@pytest.mark.parametrize("name", MATCH)
def test_an_objective_computes_and_changes_nothing_else(name, network):
    """The student as in the contract of all methods, and the teacher: in eval mode, without gradients."""
    student, teacher, batch = network().double(), network(5).double(), _batch()
    teacher.train()
    ours = _distils(name, teacher, alpha=0.5)
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    weights, streams = [p.detach().clone() for p in student.parameters()], torch.get_rng_state()
    loss, metrics = ours(student, batch, _state())
    torch.autograd.grad(loss, list(student.parameters()))
    assert not any(module.training for module in teacher.modules())
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(module.training for module in student.modules())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    assert all(torch.equal(p, weight) for p, weight in zip(student.parameters(), weights, strict=True))
    assert torch.equal(torch.get_rng_state(), streams)
    assert "accuracy" in metrics and all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    x_adv = torch.rand(batch.x.shape, generator=_generator(3), dtype=torch.float64)
    fixed = [_loss_and_gradients(_distils(name, teacher, attack=Fixed(x_adv)), network().double(), batch) for _ in "ab"]
    _assert_same(*fixed, tolerance=0)


def test_a_teacher_answers_once_for_a_batch(network):
    teacher, calls = network().double(), []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    answers, x = Teacher(teacher), _batch().x
    first = answers(x)
    assert answers(x) is first and len(calls) == 1
    torch.testing.assert_close(answers(x.clone()), first)
    assert len(calls) == 2 and not first.requires_grad
    student, batch = network(1).double(), _batch()
    calls.clear()
    _distils("rslad", teacher)(student, batch, _state())
    assert len(calls) == 1


SPEC = ModelSpec(StageGenotype("plain", (1,), (4,)), 0, 0, (1, 8, 8), ("a", "b", "c"), (0.5,), (0.25,))


def _saved(folder, **changes):
    torch.manual_seed(7)
    spec = dataclasses.replace(SPEC, **changes)
    folder.mkdir(parents=True)
    save_model(spec, spec.build(), folder)
    return str(folder)


def _setting(network, data, parts):
    return Setting(network(), data, parts, 0, 2, 16)


@pytest.mark.parametrize("name", MATCH)
def test_training_with_a_teacher_from_its_folder_resumes_to_the_same_weights(name, network, data, parts, tmp_path):
    method = MATCH[name][0](MATCH[name][2], teacher=_saved(tmp_path / "teacher"))
    training = Training(epochs=3, batch_size=16, optimiser=Sgd(0.05))

    def run(model, objective=method, **more):
        return train(model, data, parts, objective, training, validation_attack=ON_LABELS, seed=1, **more)

    whole, other = network(), network()
    records = run(whole)
    assert records[-1]["divergence"] < records[0]["divergence"]

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(other, checkpoint=tmp_path / "checkpoint", log=stop)
    assert run(other, checkpoint=tmp_path / "checkpoint") == records
    pairs = zip(whole.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)

    with_head = network(auxiliary=True)
    assert "auxiliary_loss" in run(with_head, WithAuxiliary(method, 0.4))[-1]


def test_teachers_that_do_not_fit_are_refused(network, data, parts, tmp_path):
    setting = _setting(network, data, parts)
    _saved(tmp_path / "run" / "train" / "searched")
    wide = _saved(tmp_path / "wide", input_shape=(1, 9, 8))
    more = _saved(tmp_path / "more", classes=("a", "b", "c", "d"))
    named = _saved(tmp_path / "named", classes=("a", "c", "b"))
    for folder, told in (
        (str(tmp_path / "nowhere"), "no model.json"),
        (str(tmp_path / "run"), "did you mean '.*run/train/searched'"), (wide, r"\(1, 9, 8\)"),
        (more, "4 of them"), (named, "'c' for 'b'"),
    ):  # fmt: skip
        for method in (Ard(teacher=folder), Rslad(teacher=folder)):
            with pytest.raises(InputError, match=told):
                method.prepare(setting)
    for settings in ({"alpha": 1.5}, {"alpha": float("nan")}, {"temperature": 0.0}):
        with pytest.raises(InputError):
            Ard(teacher=wide, **settings)
    with pytest.raises(InputError):
        Rslad(teacher=wide, alpha=-0.1)
    for name in MATCH:
        with pytest.raises(InputError, match=r"train\.method\.teacher is missing"):
            method_from({"name": name}, "train.method", {}, "train.attack", THREAT)
        told = method_from({"name": name, "teacher": wide}, "train.method", {}, "train.attack", THREAT)
        assert told.attack == Pgd(THREAT, loss="kl" if name == "rslad" else "cross_entropy")
