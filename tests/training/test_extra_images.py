"""Extra images: an exact share of every batch, steps counted on real images, right labels, and none of the test set."""

import dataclasses

import numpy as np
import pytest
import torch

from nas.attacks.fgsm import Fgsm
from nas.data.augmentation import Augmentation
from nas.errors import InputError
from nas.model_file import ModelSpec, load_model, save_model
from nas.optimisation import Sgd
from nas.threat_model import ThreatModel
from nas.training.extra_images import ExtraImages
from nas.training.free import Free
from nas.training.loop import Training, train
from nas.training.standard import Standard
from runs.recipe import build, read_table
from search_spaces.genotype import StageGenotype

ATTACK = Fgsm(ThreatModel("linf", 0.05))
TRAINING = Training(epochs=3, batch_size=10, optimiser=Sgd(0.05), augmentation=Augmentation())


@pytest.fixture
def file(tmp_path):
    """Writes arrays, by default 31 noisy images in three classes."""

    def write(n=31, **arrays):
        generator = np.random.default_rng(0)
        x = generator.integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)
        path = tmp_path / "extra.npz"
        np.savez(path, **(arrays or {"x": x, "y": np.arange(n) % 3}))
        return str(path)

    return write


class Listening(Standard):
    """Standard training that keeps the batches it saw."""

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def __call__(self, model, batch, state):
        self.seen.append((state.epoch, batch))
        return super().__call__(model, batch, state)


def _train(model, data, parts, objective, extra, training=TRAINING, **more):
    return train(model, data, parts, objective, training, validation_attack=ATTACK, seed=2, extra=extra, **more)


@pytest.mark.parametrize(("share", "added"), [(0.7, 7), (0.25, 2), (0.1, 1)])
def test_every_batch_has_its_share_and_an_epoch_its_steps(share, added, data, parts, network, file):
    listening = Listening()
    _train(network(), data, parts, listening, ExtraImages(file(), share))
    steps = len(parts.training) // 10
    assert len(listening.seen) == 3 * steps
    x, y = ExtraImages(file(), share)(data, parts)
    for _, batch in listening.seen:
        extra = batch.indices >= len(data.y_train)
        assert int(extra.sum()) == added and len(batch.y) == 10
        rows = batch.indices[extra] - len(data.y_train)
        assert torch.equal(batch.y[extra], y[rows]) and torch.equal(batch.x[extra], x[rows].float() / 255)
        rows = batch.indices[~extra]
        assert torch.equal(batch.y[~extra], data.y_train[rows]) and set(rows.tolist()) <= set(parts.training.tolist())
        assert torch.equal(batch.x[~extra], data.x_train[rows].float() / 255)
    for epoch in range(3):
        rows = torch.cat([batch.indices for e, batch in listening.seen if e == epoch])
        real, others = rows[rows < len(data.y_train)], rows[rows >= len(data.y_train)]
        assert len(real.unique()) == len(real), "no image of the data set is seen twice in an epoch"
        counts = torch.bincount(others - len(data.y_train), minlength=31)
        assert int(counts.max()) - int(counts.min()) <= 1, "all extra images are seen before one is seen again"
    orders = [[b.indices.tolist() for e, b in listening.seen if e == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_labels_of_generated_images_are_learnt_from(data, parts, network, file):
    """Told by images of one grey that the file calls class 2."""
    grey = np.full((40, 8, 8), 5, dtype=np.uint8)
    model, plain = network(), network()
    extra = ExtraImages(file(image=grey, label=np.full(40, 2)), 0.5)
    training = dataclasses.replace(TRAINING, epochs=8)
    _train(model, data, parts, Standard(), extra, training)
    _train(plain, data, parts, Standard(), None, training)
    picture = torch.full((1, 1, 8, 8), 5 / 255)
    shares = [float(each.eval()(picture).softmax(1)[0, 2].detach()) for each in (model, plain)]
    assert shares[0] > 0.9 > shares[1]


def test_a_finished_network_gives_the_labels(data, parts, network, file, tmp_path):
    spec = ModelSpec(StageGenotype("plain", (1,), (4,)), 0, 0, (1, 8, 8), ("a", "b", "c"), (0.5,), (0.25,))
    torch.manual_seed(1)
    (tmp_path / "network").mkdir()
    teacher = spec.build().eval()
    with torch.no_grad():
        random = torch.rand(200, 1, 8, 8)
        teacher.classifier.weight.mul_(50)
        teacher.classifier.bias.sub_(teacher(random).mean(0))  # no class above the others
    save_model(spec, teacher, tmp_path / "network")
    images = np.random.default_rng(1).integers(0, 256, (600, 8, 8), dtype=np.uint8)
    path, streams = file(x=images), torch.get_rng_state()  # without labels
    x, y = ExtraImages(path, labelled_by=str(tmp_path / "network"))(data, parts)
    assert torch.equal(streams, torch.get_rng_state())
    _, model = load_model(tmp_path / "network")
    assert torch.equal(y, model(x.float() / 255).argmax(1)) and len(y.unique()) > 1
    with pytest.raises(InputError, match=r"labels extra images.*no model.json"):
        ExtraImages(path, labelled_by=str(tmp_path))(data, parts)
    with pytest.raises(InputError, match="lacks y"):
        ExtraImages(path)(data, parts)


def test_no_image_of_the_test_set_is_trained_on_and_none_of_the_validation(data, parts, network, file):
    images = np.concatenate([data.x_train[:20].numpy(), np.zeros((1, 1, 8, 8), dtype=np.uint8)])
    held_out = set(parts.validation.tolist()) & set(range(20))
    assert held_out
    x, y = ExtraImages(file(x=images, y=np.arange(21) % 3))(data, parts)
    kept = [row for row in range(21) if row not in held_out]
    assert torch.equal(x, torch.from_numpy(images)[kept]) and y.tolist() == [row % 3 for row in kept]
    leak = np.concatenate([images, data.x_test[4:6].numpy()])
    path = file(x=leak, y=np.zeros(23, dtype=np.int64))
    with pytest.raises(InputError, match=r"2 of the images of x are in the test set.*row 21"):
        _train(network(), data, parts, Standard(), ExtraImages(path))


def test_a_training_that_was_cut_off_ends_with_the_same_bits(data, parts, network, file, tmp_path):
    extra, whole, again = ExtraImages(file(), 0.4), network(), network()
    records = _train(whole, data, parts, Free(ThreatModel("linf", 0.05), 2), extra)

    def stop(record):
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.safetensors"
    for log in (stop, None):
        more = {"checkpoint": checkpoint} | ({"log": log} if log else {})
        try:
            assert _train(again, data, parts, Free(ThreatModel("linf", 0.05), 2), extra, **more) == records
        except KeyboardInterrupt:
            assert log
    for ours, theirs in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("arrays", "settings", "said"),
    [
        ({"x": np.zeros((4, 16, 16), np.uint8), "y": np.zeros(4, int)}, {}, "one shape"),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(3, int)}, {}, "4 images in x but 3 labels in y"),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.full(4, 3)}, {}, "number them alike"),
        ({"x": np.zeros((4, 8, 8)), "y": np.zeros(4, int)}, {}, "uint8"),
        ({"pictures": np.zeros((4, 8, 8), np.uint8)}, {}, r"lacks x, y \(found: pictures\)"),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(4, int)}, {"share": 0.96}, "leave none of one kind"),
        ({"x": np.zeros((4, 8, 8), np.uint8), "y": np.zeros(4, int)}, {"share": 0.04}, "leave none of one kind"),
    ],
)
def test_what_does_not_fit_is_told(arrays, settings, said, data, parts, network, file):
    with pytest.raises(InputError, match=said):
        _train(network(), data, parts, Standard(), ExtraImages(file(**arrays), **settings))


def test_more_that_does_not_fit(data, parts, network, file, tmp_path):
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="share"):
            ExtraImages("x.npz", share)
    with pytest.raises(InputError, match="no such file"):
        ExtraImages(str(tmp_path / "none.npz"))(data, parts)
    few = dataclasses.replace(TRAINING, batch_size=100)
    with pytest.raises(InputError, match="but it has"):
        _train(network(), data, parts, Standard(), ExtraImages(file(), 0.1), few)

    class OwnImages(Standard):
        def training_images(self):
            return data.x_train, data.y_train

    with pytest.raises(InputError, match="images of its own"):
        _train(network(), data, parts, OwnImages(), ExtraImages(file()))


def test_a_recipe_names_them():
    changes = ["data.extra.path='generated.npz'", "data.extra.share=0.3"]
    assert build(read_table("digits", changes)).data.extra == ExtraImages("generated.npz", 0.3)
    assert build(read_table("digits")).data.extra is None
    with pytest.raises(InputError, match="share"):
        build(read_table("digits", [*changes, "data.extra.share=2"]))
    with pytest.raises(InputError, match=r"data\.extra\.path is missing"):
        build(read_table("digits", ["data.extra.share=0.3"]))
