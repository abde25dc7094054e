"""adv-KIP: distilled images by robust kernel regression, their export, and training on them."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nas.attacks.pgd import Pgd
from nas.data.arrays import Arrays
from nas.data.digits import Digits
from nas.data.split import split
from nas.errors import Diverged, InputError
from nas.evaluation.robustness import Trial, evaluate
from nas.objective import Batch, Setting, State, TrainsOn
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training import adv_kip as adv_kip_module
from nas.training.adv_kip import CAVEAT, AdvKip, Distilled, sheet
from nas.training.loop import Training, train
from nas.training.neural_tangent_kernel import Regression, ReluKernel, centred
from nas.training.standard import Standard

ATTACK = Pgd(ThreatModel("linf", 0.08), steps=2)
QUICK = AdvKip(ATTACK, images=6, steps=6, target_images=20, kernel=ReluKernel(1), validate_every=2)
REGRESSION = Regression(ReluKernel(2), (0.4,), (0.3,), ridge=1e-4)


def _images(n, seed=0):
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _loss_and_gradient(method, support, x, y):
    support = support.clone().requires_grad_(True)
    loss = method.loss_of(
        REGRESSION, support, centred(torch.arange(6) % 3, 3), x, y, torch.Generator().manual_seed(0)
    )  # fmt: skip
    return loss.detach(), torch.autograd.grad(loss, support)[0]


def test_without_room_for_the_attack_it_is_kip():
    """Loss and gradient of half the mean squared error on clean images, in float64."""
    support, x, y = _images(6), _images(9, seed=1), torch.arange(9) % 3
    ours = _loss_and_gradient(AdvKip(Pgd(ThreatModel("linf", 0.0))), support, x, y)
    point = support.clone().requires_grad_(True)
    predictions = REGRESSION(x, point, centred(torch.arange(6) % 3, 3))
    loss = 0.5 * F.mse_loss(predictions, centred(y, 3))
    torch.testing.assert_close(ours, (loss.detach(), torch.autograd.grad(loss, point)[0]), rtol=1e-10, atol=1e-15)


def test_the_loss_is_that_on_images_attacked_for_the_regression_as_it_is():
    support, x, y = _images(6), _images(9, seed=1), torch.arange(9) % 3
    method = AdvKip(Pgd(ThreatModel("linf", 0.1)))
    loss, gradient = _loss_and_gradient(method, support, x, y)
    fitted = REGRESSION.fitted(support, centred(torch.arange(6) % 3, 3), method.temperature)
    x_adv = method.attack(fitted, x, y, generator=torch.Generator().manual_seed(0))
    assert 0.09 < (x_adv - x).abs().max() <= 0.1 + 1e-9
    fixed = _loss_and_gradient(AdvKip(Pgd(ThreatModel("linf", 0.0))), support, x_adv, y)
    torch.testing.assert_close((loss, gradient), fixed, rtol=1e-10, atol=1e-15)
    clean = _loss_and_gradient(AdvKip(Pgd(ThreatModel("linf", 0.0))), support, x, y)
    assert loss > 1.1 * clean[0]


@pytest.fixture(scope="module")
def digits():
    data = Digits()()
    return data, split(data.y_train, architecture=0.5, validation=0.1, seed=0)


@pytest.fixture(scope="module")
def on_digits(digits):
    """Kernel classifiers of a random subset, KIP and adv-KIP, 50 images each, from the same start."""
    data, parts = digits
    method = AdvKip(
        Pgd(ThreatModel("linf", 0.1), steps=5), images=50, steps=60, target_images=200, kernel=ReluKernel(1),
        learning_rate=0.02, validate_every=20,
    )  # fmt: skip
    kip = replace(method, attack=Pgd(ThreatModel("linf", 0.0), steps=1))
    found = {}
    for name, variant in {"subset": replace(method, steps=0), "kip": kip, "adv-kip": method}.items():
        distilled = variant.prepare(Setting(torch.nn.Identity(), data, parts, 0, 1, 64))
        regression = Regression(method.kernel, data.mean, data.std, method.ridge)
        fitted = regression.fitted(distilled.x.double() / 255, centred(distilled.y, 10), method.temperature)
        trials = {"pgd-20": Trial(Pgd(ThreatModel("linf", 0.1), steps=20, keep="best"))}
        found[name] = distilled, evaluate(fitted, data.x_test.float() / 255, data.y_test, trials, seed=0)
    return found


def test_a_subset_is_drawn_from_the_training_part_with_as_many_of_each_class(digits, on_digits):
    data, parts = digits
    subset = on_digits["subset"][0]
    rows = {row.numpy().tobytes() for row in data.x_train[parts.training]}
    assert all(row.numpy().tobytes() in rows for row in subset.x)
    assert subset.y.bincount().tolist() == [5] * 10


def test_the_distilled_set_withstands_where_kip_and_a_subset_do_not(on_digits):
    """On test images, PGD-20 on the regression, after rounding to 8 bit."""
    natural = {name: float(result.natural.double().mean()) for name, (_, result) in on_digits.items()}
    robust = {name: float(result.worst_case.double().mean()) for name, (_, result) in on_digits.items()}
    assert natural["kip"] > natural["subset"] + 0.05
    assert robust["adv-kip"] > robust["kip"] + 0.05
    assert robust["adv-kip"] > robust["subset"] + 0.15


def test_rounds_of_validation_choose_the_best(digits, tmp_path):
    data, parts = digits
    method = replace(QUICK, images=20, steps=10, learning_rate=5.0)  # far too high: it only gets worse
    setting = Setting(torch.nn.Identity(), data, parts, 0, 1, 64, tmp_path)
    distilled = method.prepare(setting)
    record = json.loads((tmp_path / "adv_kip.json").read_text())
    validations = record["kernel_regression"]["validations"]
    assert [entry["step"] for entry in validations] == [0, 2, 4, 6, 8, 10]
    best = max(validations, key=lambda entry: (entry["robust"], entry["natural"]))
    assert best["step"] == 0 and validations[-1]["robust"] < best["robust"]
    assert torch.equal(distilled.x, replace(method, steps=0).prepare(replace(setting, folder=None)).x)
    assert record["note"] == CAVEAT and "AutoAttack" in CAVEAT
    assert record["kernel_regression"]["rounded"]["robust"] == pytest.approx(best["robust"], abs=0.05)


def _prepared(method, data, parts, folder=None, seed=3):
    return method.prepare(Setting(torch.nn.Identity(), data, parts, seed, 1, 16, folder))


def test_the_images_are_exported(data, parts, tmp_path):
    distilled = _prepared(QUICK, data, parts, tmp_path)
    again = Arrays(str(tmp_path / "adv_kip.npz"))()
    assert torch.equal(again.x_train, distilled.x) and torch.equal(again.y_train, distilled.y)
    assert torch.equal(again.x_test, data.x_test) and torch.equal(again.y_test, data.y_test)
    exact = np.load(tmp_path / "adv_kip.npz")["distilled"]
    assert exact.dtype == np.float32 and exact.min() >= 0 and exact.max() <= 1
    assert np.abs(exact - distilled.x.numpy() / 255).max() <= 0.5 / 255 + 1e-6
    picture = Image.open(tmp_path / "adv_kip.png")
    assert picture.size == (2 * 9 * 4, 3 * 9 * 4)  # 3 classes of 2 images, 8x8 and a line, four times
    pixels = np.asarray(picture)[::4, ::4]
    for row, label in enumerate(range(3)):
        for column, image in enumerate(distilled.x[distilled.y == label][:, 0].numpy()):
            assert np.array_equal(pixels[9 * row : 9 * row + 8, 9 * column : 9 * column + 8, 1], image)


def test_sheets_of_many_and_of_coloured_images():
    x = torch.randint(256, (50, 3, 40, 36), dtype=torch.uint8)
    picture = Image.open(io.BytesIO(sheet(x, (torch.arange(50) >= 25).long())))
    assert picture.size == (20 * 37, 4 * 41)
    assert Image.open(io.BytesIO(sheet(x[:3, :2], torch.zeros(3, dtype=torch.int64)))).size == (3 * 37, 41)


def test_cut_off_it_goes_on_to_the_same_images(data, parts, tmp_path, monkeypatch):
    whole = _prepared(QUICK, data, parts)
    assert not torch.equal(whole.x, _prepared(QUICK, data, parts, seed=4).x)
    step, calls = adv_kip_module.weight_step, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(adv_kip_module, "weight_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        _prepared(QUICK, data, parts, tmp_path)
    resumed = _prepared(QUICK, data, parts, tmp_path)
    assert len(calls) == 5 + 3  # steps 0, 1, 2 were kept; 3, 4, 5 follow
    assert torch.equal(whole.x, resumed.x) and torch.equal(whole.y, resumed.y)
    assert torch.equal(_prepared(QUICK, data, parts, tmp_path).x, whole.x) and len(calls) == 8
    before = (tmp_path / "adv_kip.npz").read_bytes(), (tmp_path / "adv_kip.png").read_bytes()
    _prepared(QUICK, data, parts, tmp_path)
    assert before == ((tmp_path / "adv_kip.npz").read_bytes(), (tmp_path / "adv_kip.png").read_bytes())


def test_a_network_is_trained_on_the_distilled_images_alone(data, parts, network, tmp_path):
    method, model = QUICK, network()
    training = Training(epochs=4, batch_size=12, optimiser=Sgd(0.05))
    records = train(model, data, parts, method, training, validation_attack=ATTACK, seed=3)
    distilled = _prepared(method, data, parts)
    assert isinstance(distilled, TrainsOn)
    x, y = distilled.training_images()
    assert len(y) == len(parts.training) // 6 * 6 and torch.equal(x[:6], x[6:12])
    assert records[-1]["accuracy"] > 0.9
    assert records[-1]["validation_natural"] > 0.8  # of real images it never saw
    resumed, checkpoint = network(), tmp_path / "checkpoint.safetensors"

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(resumed, data, parts, method, training, validation_attack=ATTACK, seed=3, checkpoint=checkpoint, log=stop)
    assert records == train(
        resumed, data, parts, method, training, validation_attack=ATTACK, seed=3, checkpoint=checkpoint
    )
    for ours, theirs in zip(model.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_losses_of_the_network(network):
    x, y = _images(6), torch.arange(6) % 3
    batch = Batch(x, y, torch.arange(6))
    state = State(0, 0, 0.0, torch.Generator(), torch.Generator())
    model = network().double()
    loss, metrics = Distilled(x, y, 1)(model, batch, state)
    torch.testing.assert_close(loss, Standard()(network().double(), batch, state)[0], rtol=1e-12, atol=0)
    squared, _ = Distilled(x, y, 1, "mean_squared_error")(model, batch, state)
    wanted = (model(x) - F.one_hot(y, 3).double() + 1 / 3).square().mean() / 2
    torch.testing.assert_close(squared, wanted, rtol=1e-12, atol=0)
    assert 0 <= metrics["accuracy"] <= 1


def test_what_cannot_be_distilled_is_told(data, parts):
    for images in (2, 1000):
        with pytest.raises(InputError, match="between 3 and"):
            _prepared(replace(QUICK, images=images), data, parts)
    alike = replace(QUICK, ridge=1e-30, kernel=ReluKernel(0, 1.0, 0.0), images=48, steps=0)
    grey = replace(data, x_train=torch.full_like(data.x_train, 90))
    with pytest.raises(Diverged, match="raise ridge"):
        _prepared(alike, grey, parts)


@pytest.mark.parametrize(
    "settings",
    [
        {"images": 1},
        {"steps": -1},
        {"target_images": 0},
        {"validate_every": 0},
        {"learning_rate": 0.0},
        {"ridge": 0.0},
        {"temperature": -1.0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError, match="adv-KIP"):
        AdvKip(**settings)
