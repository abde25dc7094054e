"""What a training method may ask of the loop beyond a loss: gradients, preparation, memory, replays, images."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.objective import Setting
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.loop import Training, train
from nas.training.standard import Standard

ATTACK = Pgd(ThreatModel("linf", 0.08), steps=1)
TRAINING = Training(epochs=3, batch_size=20, optimiser=Sgd(0.05), augmentation=Augmentation())


def _train(model, data, parts, objective, **more):
    return train(model, data, parts, objective, TRAINING, validation_attack=ATTACK, seed=4, **more)


def _weights(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


class Stopped(Exception):
    pass


def _stop_at(epoch):
    def log(record):
        if record["epoch"] == epoch:
            raise Stopped

    return log


@dataclass(frozen=True)
class OwnGradients(Standard):
    """The gradient of the loss by hand, times ``factor``."""

    factor: float = 1.0

    def gradients(self, model, batch, state, parameters):
        loss, metrics = self(model, batch, state)
        found = torch.autograd.grad(loss, parameters)
        return loss.detach(), [self.factor * gradient for gradient in found], metrics


def test_gradients_of_a_method_are_those_that_are_stepped_along(data, parts, network):
    plain, same, none = network(), network(), network()
    first = _weights(none)
    frozen = [parameter.clone() for parameter in none.parameters()]
    _train(plain, data, parts, Standard())
    _train(same, data, parts, OwnGradients())
    assert torch.equal(_weights(plain), _weights(same)) and not torch.equal(_weights(plain), first)
    train(
        none, data, parts, OwnGradients(0.0), Training(epochs=1, batch_size=20, optimiser=Sgd(0.05, weight_decay=0)),
        validation_attack=ATTACK, seed=4,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(frozen, none.parameters(), strict=True))


@dataclass
class Drifting:
    """Prepared; weighs the loss by a number that grows from step to step."""

    settings: list = field(default_factory=list)
    weight: float = 1.0

    def prepare(self, setting):
        self.settings.append(setting)
        return Drift()


class Drift:
    """What ``Drifting`` prepares: its weight has to be remembered."""

    def __init__(self):
        self.weight = torch.ones(())

    def __call__(self, model, batch, state):
        self.weight = self.weight * 1.05
        return self.weight * F.cross_entropy(model(batch.x), batch.y), {"weight": self.weight}

    def tree(self):
        return {"weight": self.weight}

    def restore(self, tree):
        self.weight = tree["weight"]


def test_a_prepared_method_knows_its_setting_and_remembers(data, parts, network, tmp_path):
    method, whole = Drifting(), network()
    records = _train(whole, data, parts, method)
    (setting,) = method.settings
    assert isinstance(setting, Setting)
    assert setting.model is whole and setting.seed == 4 and setting.epochs == 3 and setting.folder is None
    assert records[2]["weight"] > records[1]["weight"] > records[0]["weight"] > 1

    resumed, checkpoint = network(), tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stopped):
        # The log is told before the checkpoint is written: the epoch that stops is not in it.
        _train(resumed, data, parts, Drifting(), checkpoint=checkpoint, log=_stop_at(2))
    again = Drifting()
    assert _train(resumed, data, parts, again, checkpoint=checkpoint) == records
    assert again.settings[0].folder == tmp_path
    assert torch.equal(_weights(whole), _weights(resumed))


@dataclass(frozen=True)
class Seen(Standard):
    """Remembers which rows it saw."""

    replays: int = 3
    rows: list = field(default_factory=list)
    steps: list = field(default_factory=list)

    def __call__(self, model, batch, state):
        self.rows.append(batch.indices.tolist())
        self.steps.append((state.step, state.progress))
        return super().__call__(model, batch, state)


def test_batches_are_replayed_in_a_row(data, parts, network):
    method = Seen()
    _train(network(), data, parts, method)
    batches = 3 * (len(parts.training) // 20)
    assert len(method.rows) == 3 * batches
    for first in range(0, len(method.rows), 3):
        assert method.rows[first] == method.rows[first + 1] == method.rows[first + 2]
    assert method.rows[0] != method.rows[3]
    assert [step for step, _ in method.steps] == list(range(3 * batches))
    shares = [progress for _, progress in method.steps]
    assert shares == sorted(shares) and shares[0] == 0 and 1 - shares[-1] == pytest.approx(1 / (3 * batches))


@dataclass(frozen=True)
class OwnImages(Seen):
    """Trains on grey images, all of class 1."""

    replays: int = 1
    images: list = field(default_factory=list)

    def training_images(self):
        return torch.full((47, 1, 8, 8), 100, dtype=torch.uint8), torch.ones(47, dtype=torch.int64)

    def __call__(self, model, batch, state):
        self.images.append(batch.x)
        assert bool((batch.y == 1).all())
        return super().__call__(model, batch, state)


def test_a_method_may_bring_its_own_images(data, parts, network):
    method = OwnImages()
    records = _train(network(), data, parts, method)
    assert bool((torch.cat(method.images) == 100 / 255).all())
    assert len(method.images) == 3 * (47 // 20) and sorted({row for rows in method.rows for row in rows}) == list(
        range(47)
    )
    # Validation is on images of the data set, which are not all of class 1.
    assert records[-1]["accuracy"] == 1 and records[-1]["validation_natural"] < 1


@dataclass(frozen=True)
class FromZero(Standard):
    """Begins with all weights 0."""

    like: object = None

    def initial_weights(self):
        return {name: torch.zeros_like(value) for name, value in self.like.state_dict().items()}


def test_a_method_may_begin_from_other_weights(data, parts, network, tmp_path):
    """At the start only: a training that is gone on with has weights of its own. The average begins there, too."""
    model, method = network(), FromZero(network())
    still = Training(epochs=1, batch_size=20, optimiser=Sgd(1e-12, weight_decay=0.0), ema=0.5)
    train(model, data, parts, method, still, validation_attack=ATTACK, seed=4)
    assert all(float(parameter.detach().abs().max()) < 1e-9 for parameter in model.parameters())

    whole, resumed, checkpoint = network(), network(1), tmp_path / "checkpoint.safetensors"
    method = FromZero(network(2).train())
    records = _train(whole, data, parts, method)
    with pytest.raises(Stopped):
        _train(resumed, data, parts, method, checkpoint=checkpoint, log=_stop_at(2))
    assert _train(resumed, data, parts, method, checkpoint=checkpoint) == records
    assert torch.equal(_weights(whole), _weights(resumed))
