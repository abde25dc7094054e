"""The weight loop: resumes to the same bits, keeps the best validated weights, never looks at the test set."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.data.image_data import ImageData
from nas.data.split import split
from nas.errors import Diverged, InputError
from nas.optimisation import Sgd
from nas.tensor_file import read_tree
from nas.threat_model import ThreatModel
from nas.training import loop
from nas.training.auxiliary import WithAuxiliary
from nas.training.loop import Training, Validation, train, validate
from nas.training.pgd_at import PgdAt
from nas.training.standard import Standard
from nas.training.trades import Trades

THREAT = ThreatModel("linf", 0.08)
ATTACK = Pgd(THREAT, steps=2)
METHODS = {
    "standard": Standard(),
    "pgd_at": PgdAt(ATTACK),
    "trades with auxiliary head": WithAuxiliary(Trades(Pgd(THREAT, steps=1, loss="kl")), 0.4),
}


def _training(**settings):
    defaults = {"epochs": 4, "batch_size": 20, "augmentation": Augmentation(crop=1, flip=True, cutout=2)}
    return Training(**{**defaults, "optimiser": Sgd(0.05), **settings})


def _train(model, data, parts, objective=METHODS["standard"], training=None, seed=0, **more):
    return train(model, data, parts, objective, training or _training(), validation_attack=ATTACK, seed=seed, **more)


def _same(first, second):
    states = first.state_dict(), second.state_dict()
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Stopped(Exception):
    pass


def _stop_at(epoch):
    def log(record):
        if record["epoch"] == epoch:
            raise Stopped

    return log


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_training_resumes_to_the_same_bits(method, ema, data, parts, network, tmp_path):
    """Stopped in the second and again in the last epoch, by an error out of ``log``."""
    objective, training = METHODS[method], _training(ema=ema)
    whole = network(auxiliary=True)
    expected = _train(whole, data, parts, objective, training)
    assert not _same(whole, network(auxiliary=True)), "the training did something"
    path, histories = tmp_path / "checkpoint.safetensors", []
    for epoch in (1, 3):
        torch.manual_seed(epoch)  # the global stream plays no part
        with pytest.raises(Stopped):
            _train(
                network(auxiliary=True), data, parts, objective, training,
                checkpoint=path, log=_stop_at(epoch), history=lambda records: histories.append(copy.deepcopy(records)),
            )  # fmt: skip
    resumed = network(seed=7, auxiliary=True)  # other weights: those of the checkpoint count
    logged = []
    records = _train(
        resumed, data, parts, objective, training,
        checkpoint=path, log=logged.append, history=lambda records: histories.append(copy.deepcopy(records)),
    )  # fmt: skip
    assert records == expected
    assert _same(resumed, whole)
    assert histories == [[], expected[:1], expected[:3]]
    assert logged == expected[3:]
    finished = network(seed=8, auxiliary=True)
    assert _train(finished, data, parts, objective, training, checkpoint=path) == expected
    assert _same(finished, whole), "calling a finished training again gives its result"


def test_training_is_a_function_of_its_seed(data, parts, network):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(models))
        model = network()
        _train(model, data, parts, METHODS["pgd_at"], seed=seed)
        models.append(model)
    assert _same(models[0], models[1])
    assert not _same(models[0], models[2])


def test_training_learns(data, parts, network):
    model = network()
    records = _train(model, data, parts, training=_training(epochs=8, augmentation=Augmentation()))
    assert records[-1]["loss"] < 0.5 * records[0]["loss"]
    assert max(record["validation_natural"] for record in records) > 0.9
    assert [record["epoch"] for record in records] == list(range(8))


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_trains_nearly_the_same_network(method, data, parts, network, monkeypatch):
    monkeypatch.setattr("nas.precision.check_bfloat16", lambda device: None)  # emulated where there is none
    begun, exact, rounded = (network(auxiliary=True) for _ in range(3))
    _train(exact, data, parts, METHODS[method], _training(ema=0.5))
    records = _train(rounded, data, parts, METHODS[method], _training(ema=0.5, precision="bfloat16"))
    start, one, other = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (begun, exact, rounded))
    assert not torch.equal(one, other), "it is another precision"
    assert torch.cosine_similarity(one - start, other - start, 0).item() > 0.9
    assert all(value.dtype == torch.float32 for value in rounded.parameters()) and records[-1]["loss"] > 0


def test_bfloat16_is_refused_where_there_is_none(data, parts, network, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    with pytest.raises(InputError, match="no bfloat16 arithmetic: use precision = 'float32'"):
        _train(network(), data, parts, training=_training(precision="bfloat16"))


def test_the_average_is_the_exponential_moving_average(data, parts, network):
    """Followed by hand after every step; integer buffers have to pass through it as well."""
    decay, states = 0.9, []
    model = network()
    training = _training(epochs=1, ema=decay, batch_size=8)
    _train(
        model, data, parts, training=training, tick=lambda progress: states.append(copy.deepcopy(model.state_dict()))
    )
    assert len(states) == 6
    average = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            mixed = decay * average[name] + (1 - decay) * value
            average[name] = mixed if value.is_floating_point() else mixed.to(value.dtype)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(model.classifier.weight, states[-1]["classifier.weight"])


def _scripted(monkeypatch, results):
    """Replace the validation by given (natural, robust) accuracies."""
    script = iter(results)
    monkeypatch.setattr(loop, "validate", lambda *arguments: Validation(*next(script)))


@pytest.mark.parametrize(
    ("results", "best"),
    [
        ([(0.9, 0.2), (0.5, 0.5), (0.9, 0.4), (0.8, 0.1)], 1),  # robust accuracy decides, not natural
        ([(0.5, 0.5), (0.7, 0.5), (0.6, 0.5), (0.9, 0.4)], 1),  # then natural
        ([(0.5, 0.5), (0.7, 0.5), (0.7, 0.5), (0.7, 0.2)], 2),  # then the later epoch
        ([(0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)], 3),
        ([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3), (0.4, 0.4)], 3),
        ([(0.4, 0.4), (0.3, 0.3), (0.2, 0.2), (0.1, 0.1)], 0),
    ],
)
@pytest.mark.parametrize("stop", [None, 2])
def test_the_best_validated_weights_are_kept(results, best, stop, data, parts, network, monkeypatch, tmp_path):
    model, states, more = network(), [], {}

    def log(record):
        states[record["epoch"] :] = [copy.deepcopy(model.state_dict())]

    if stop is not None:
        more["checkpoint"] = tmp_path / "checkpoint.safetensors"
        _scripted(monkeypatch, results)

        def log_and_stop(record):
            log(record)
            _stop_at(stop)(record)

        with pytest.raises(Stopped):
            _train(model, data, parts, log=log_and_stop, **more)
    _scripted(monkeypatch, results[stop or 0 :])
    records = _train(model, data, parts, log=log, **more)
    assert [record["validation_robust"] for record in records] == [robust for _, robust in results]
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[best][name])


def test_validation_every_few_epochs_and_always_at_the_end(data, parts, network, monkeypatch):
    _scripted(monkeypatch, [(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)])
    records = _train(network(), data, parts, training=_training(epochs=5, validate_every=2))
    assert ["validation_robust" in record for record in records] == [False, True, False, True, True]


def test_validation_counts_samples_that_are_right_and_stay_right(data, parts, network):
    model = network()
    _train(model, data, parts, training=_training(epochs=12, augmentation=Augmentation()))
    with torch.no_grad():
        model.classifier.bias[0] += 4  # makes mistakes in favour of class 0
    model.train()
    before = copy.deepcopy(model.state_dict())
    result = validate(model, data, parts.validation, ATTACK, seed=3, batch_size=7)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    x, y = data.x_train[parts.validation].float() / 255, data.y_train[parts.validation]
    assert result.natural == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert 0 < result.robust < result.natural

    class Shift:
        """Turns exactly the images of class 0 into zeros."""

        def __call__(self, model, x, y, *, generator):
            assert not model.training
            return torch.where((y == 0).view(-1, 1, 1, 1), torch.zeros_like(x), x)

    right = model(x).argmax(1) == y
    stays = right & (model(Shift()(model, x, y, generator=None)).argmax(1) == y)
    found = validate(model, data, parts.validation, Shift(), seed=0, batch_size=7)
    assert found.robust == pytest.approx(float(stays.double().mean()))
    assert found == validate(model, data, parts.validation, Shift(), seed=5, batch_size=1000)

    class Heals:
        """Gives each image the pixels of one of its class that is read right."""

        def __call__(self, model, x, y, *, generator):
            rights = {int(label): image for image, label in zip(*(part[right] for part in given), strict=True)}
            return torch.stack([rights[int(label)] for label in y])

    given = x, y
    assert validate(model, data, parts.validation, Heals(), seed=0, batch_size=7).robust == found.natural < 1


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_is_validated_is_what_is_kept(ema, data, parts, network, monkeypatch):
    """With an average, the average."""
    model, judged = network(), []
    monkeypatch.setattr(
        loop, "validate", lambda *arguments: judged.append(copy.deepcopy(arguments[0])) or Validation(0.5, 0.5)
    )
    _train(model, data, parts, training=_training(ema=ema))
    assert len(judged) == 4
    assert _same(judged[-1], model)


class _Guarded(ImageData):
    """Data whose test images must not be looked at once ``armed``."""

    armed = False

    def __getattribute__(self, name):
        if name in ("x_test", "y_test") and object.__getattribute__(self, "armed"):
            raise AssertionError(f"{name} was looked at")
        return super().__getattribute__(name)


def test_the_test_set_is_never_looked_at(data, parts, network):
    guarded = _Guarded(data.name, data.x_train, data.y_train, data.x_test, data.y_test, data.classes)
    object.__setattr__(guarded, "armed", True)
    with pytest.raises(AssertionError):
        _ = guarded.x_test
    ours, theirs = network(), network()
    records = _train(ours, guarded, parts, METHODS["pgd_at"])
    assert records == _train(theirs, data, parts, METHODS["pgd_at"])
    assert _same(ours, theirs)


def test_validation_images_are_not_trained_on(data, parts, network):
    """The objective sees each training row once per epoch (but for the last short batch) and no other row."""
    seen = []

    class Listening:
        def __call__(self, model, batch, state):
            seen.append((state.epoch, state.step, state.progress, batch.indices.tolist()))
            return Standard()(model, batch, state)

    _train(network(), data, parts, Listening(), _training(epochs=2, batch_size=10))
    assert [step for _, step, _, _ in seen] == list(range(len(seen)))
    assert [progress for _, _, progress, _ in seen] == pytest.approx([i / len(seen) for i in range(len(seen))])
    for epoch in range(2):
        rows = [row for e, _, _, indices in seen for row in indices if e == epoch]
        assert len(rows) == len(set(rows)) == len(parts.training) // 10 * 10
        assert set(rows) <= set(parts.training.tolist())
        assert not set(rows) & set(parts.validation.tolist())
    assert seen[0][3] != seen[len(seen) // 2][3], "each epoch has its own order"


class _Poisoned:
    """Standard training whose loss stops being a number in epoch 1."""

    def __init__(self, value):
        self.value = value

    def __call__(self, model, batch, state):
        loss, metrics = Standard()(model, batch, state)
        return (loss * self.value if state.epoch == 1 else loss), metrics


class _NoSlope:
    """Standard training with a finite loss that has no gradient in the last step of epoch 1."""

    def __call__(self, model, batch, state):
        loss, metrics = Standard()(model, batch, state)
        if state.epoch == 1 and state.progress >= (2 - 1 / 2) / 4:
            loss = loss + (next(model.parameters()).sum() * 0).sqrt()
        return loss, metrics


def test_a_gradient_that_is_no_number_is_caught_before_an_epoch_of_it_is_kept(data, parts, network, tmp_path):
    path, model = tmp_path / "checkpoint.safetensors", network()
    with pytest.raises(Diverged, match=r"norm of the gradient is nan at step 2 of 2 of epoch 1.*holds epoch 0"):
        _train(model, data, parts, _NoSlope(), checkpoint=path)
    tree = read_tree(path)
    assert [record["epoch"] for record in tree["records"]] == [0]
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tree["model"].values())
    kept = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(kept, tree["best"], rtol=0, atol=0)


@pytest.mark.parametrize("look", [1, 50])
def test_a_loss_is_looked_at_within_an_epoch(look, data, parts, network, monkeypatch):
    """An epoch may take hours: what has gone wrong is not trained to its end."""
    steps = []

    class Counted(_Poisoned):
        def __call__(self, model, batch, state):
            steps.append(state.step)
            return super().__call__(model, batch, state)

    monkeypatch.setattr(loop, "LOOK_EVERY", look)
    with pytest.raises(Diverged, match="step 1 of 2 of epoch 1"):
        _train(network(), data, parts, Counted(float("nan")))
    assert len(steps) == 2 + (1 if look == 1 else 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_divergence_is_told_and_the_last_good_epoch_stays(value, data, parts, network, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Diverged, match="learning rate"):
        _train(network(), data, parts, _Poisoned(value), checkpoint=path)
    tree = read_tree(path)
    assert [record["epoch"] for record in tree["records"]] == [0]
    assert all(bool(torch.isfinite(tensor.float()).all()) for tensor in tree["model"].values())
    model, whole = network(), network()
    _train(model, data, parts, checkpoint=path)  # goes on with a sound objective
    _train(whole, data, parts)
    assert _same(model, whole)


def test_frozen_parameters_are_not_trained(data, parts, network):
    model = network()
    model.features[0].requires_grad_(False)
    before = model.features[0].weight.clone()
    _train(model, data, parts)
    assert torch.equal(model.features[0].weight, before)
    assert not model.features[0].weight.requires_grad


def test_one_step_of_the_loop_by_hand(data, parts, network):
    """A single batch of all training rows: the loop's step is the textbook's."""
    n = len(parts.training)
    sgd = Sgd(0.1, momentum=0.9, weight_decay=0.01, clip=0.0, schedule="constant")
    ours, theirs = network(), network()
    training = Training(epochs=1, batch_size=n, optimiser=sgd)
    _train(ours, data, parts, training=training)
    x, y = data.x_train[parts.training].float() / 255, data.y_train[parts.training]
    loss = F.cross_entropy(theirs.train()(x), y)
    gradients = torch.autograd.grad(loss, list(theirs.parameters()))
    for parameter, gradient, found in zip(theirs.parameters(), gradients, ours.parameters(), strict=True):
        expected = parameter.detach() - 0.1 * (gradient + 0.01 * parameter.detach())
        torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-6)


def test_without_validation_images_no_checkpoint_can_be_chosen(data, network):
    parts = split(data.y_train, architecture=0.5, validation=0.0, seed=0)
    with pytest.raises(InputError, match="validation"):
        _train(network(), data, parts)


def test_wrong_settings_are_refused():
    for settings in ({"epochs": 0}, {"batch_size": 1}, {"validate_every": 0}, {"ema": 1.0}, {"ema": -0.1}):
        with pytest.raises(InputError):
            Training(**settings)


def test_the_model_may_be_any_module(data, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    records = _train(model, data, parts, METHODS["pgd_at"])
    assert records[-1]["loss"] < records[0]["loss"]
