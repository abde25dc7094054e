"""Reused perturbations: where an attack begins, what is kept, and that both follow the augmentation."""

import pytest
import torch
from torch import nn

from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.data.augmentation import Augmentation
from nas.data.batches import batches
from nas.errors import InputError
from nas.objective import Batch
from nas.search.perturbation_memory import PerturbationMemory, check_can_start
from nas.threat_model import ThreatModel

THREATS = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.7)]
AUGMENTATIONS = [Augmentation(), Augmentation(crop=2, flip=True), Augmentation(crop=1, flip=True, cutout=3)]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(n=12, channels=2, height=6, width=5):
    return torch.randint(0, 256, (n, channels, height, width), generator=_generator(4)).to(torch.uint8)


def _batch(images, augmentation=None, seed=0, rows=None):
    rows = torch.arange(len(images)) if rows is None else rows
    y = torch.arange(len(images)) % 3
    (batch,) = batches(
        images, y, rows, batch_size=len(rows), augmentation=augmentation,
        augmentation_generator=_generator(seed), trace=True,
    )  # fmt: skip
    return batch


def _model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(60, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_places_say_where_each_pixel_came_from(augmentation):
    """The image looked up at its places is the augmented image; tracing leaves the images as they were."""
    images = _images().clamp(min=1)
    batch = _batch(images, augmentation)
    (untraced,) = batches(
        images, batch.y, batch.indices, batch_size=12, augmentation=augmentation, augmentation_generator=_generator()
    )
    assert torch.equal(batch.x, untraced.x) and untraced.places is None
    flat = nn.functional.pad(images.flatten(2).float() / 255, (1, 0))
    looked_up = flat.gather(2, (batch.places + 1).flatten(1)[:, None].expand(-1, 2, -1)).view_as(batch.x)
    assert torch.equal(looked_up, batch.x)
    assert bool(((batch.places == -1) == (batch.x == 0).all(1)).all())


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_the_first_visit_is_an_attack_from_a_random_start(threat_model, augmentation):
    images, model = _images(), _model()
    batch = _batch(images, augmentation)
    attack = Fgsm(threat_model, random_start=True)
    with_memory = PerturbationMemory(images).attack(attack, model, batch, _generator(1))
    torch.testing.assert_close(with_memory, attack(model, batch.x, batch.y, generator=_generator(1)))


@pytest.mark.parametrize("threat_model", THREATS, ids=str)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids=str)
def test_starts_and_results_are_in_the_ball(threat_model, augmentation):
    """Through several visits under changing crops and flips, and for memories far outside."""
    images, model = _images(), _model()
    memory, attack = PerturbationMemory(images), Pgd(threat_model, steps=1)
    for visit in range(4):
        batch = _batch(images, augmentation, seed=visit)
        if visit == 3:
            memory.deltas *= 50
        for result in (
            memory.start(batch, threat_model, _generator(visit)),
            memory.attack(attack, model, batch, _generator(visit)),
        ):
            assert float(threat_model.distance(result, batch.x).max()) <= threat_model.epsilon + 1e-6
            assert float(result.min()) >= 0
            assert float(result.max()) <= 1
            assert bool(result.isfinite().all())


def test_the_second_visit_begins_where_the_first_ended():
    threat_model, images, model = ThreatModel("linf", 0.1), _images(), _model()
    memory, batch = PerturbationMemory(images), _batch(images)
    attacked = memory.attack(Pgd(threat_model, steps=2), model, batch, _generator(1))
    torch.testing.assert_close(memory.start(batch, threat_model, _generator(2)), attacked, rtol=0, atol=1e-4)
    once_more = memory.attack(Pgd(threat_model, steps=3, step_size=0.03), model, batch, _generator(3))
    attack = Pgd(threat_model, steps=3, step_size=0.03)
    longer = attack(model, batch.x, batch.y, generator=_generator(9), start=attacked)
    torch.testing.assert_close(once_more, longer, rtol=0, atol=1e-3)


def test_a_perturbation_moves_with_its_image():
    """Kept from one crop and flip, it is found again under another at the same pixels of the image."""
    threat_model = ThreatModel("linf", 0.5)
    images = torch.full((12, 2, 6, 5), 128, dtype=torch.uint8)
    augmentation, memory = Augmentation(crop=2, flip=True), PerturbationMemory(images)
    marks = 0.4 * torch.rand(12, 2, 30, generator=_generator(5)) - 0.2
    first, second = _batch(images, augmentation, seed=1), _batch(images, augmentation, seed=2)
    assert not torch.equal(first.places, second.places)

    def seen(batch):
        marked = nn.functional.pad(marks, (1, 0)).gather(2, (batch.places + 1).flatten(1)[:, None].expand(-1, 2, -1))
        return marked.view(batch.x.shape)

    memory.remember(first, seen(first))
    start = memory.start(second, threat_model, _generator(6))
    random = threat_model.random_start(second.x, _generator(6))
    held = torch.stack([torch.isin(second.places[i], first.places[i]) for i in range(12)]) & (second.places >= 0)
    held = held[:, None].expand_as(start)
    assert 0 < int(held.sum()) < held.numel()
    torch.testing.assert_close(start[held], (second.x + seen(second))[held], rtol=0, atol=1e-3)
    torch.testing.assert_close(start[~held], random[~held])


def test_only_the_images_of_the_batch_are_touched():
    images = _images()
    memory = PerturbationMemory(images)
    batch = _batch(images, rows=torch.tensor([7, 2, 5]))
    memory.remember(batch, torch.full_like(batch.x, 0.05))
    known = ~memory.deltas.isnan().flatten(1).any(1)
    assert known.nonzero().flatten().tolist() == [2, 5, 7]
    other = _batch(images, rows=torch.tensor([0, 2]))
    start = memory.start(other, ThreatModel("linf", 0.1), _generator())
    torch.testing.assert_close(start[1], (other.x[1] + 0.05).clamp(0, 1), rtol=0, atol=1e-4)


def test_the_stream_does_not_depend_on_what_is_known():
    images, states = _images(), []
    for fill in (False, True):
        memory, generator = PerturbationMemory(images), _generator()
        if fill:
            memory.deltas.zero_()
        memory.start(_batch(images), THREATS[1], generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_what_cannot_be_done_is_told():
    for attack in (Fgsm(), Pgd(random_start=False), object()):
        with pytest.raises(InputError, match="random start"):
            check_can_start(attack)
    check_can_start(Pgd())
    check_can_start(Fgsm(random_start=True))
    images = _images()
    untraced = Batch(images / 255.0, torch.zeros(12, dtype=torch.int64), torch.arange(12))
    with pytest.raises(ValueError, match="trace"):
        PerturbationMemory(images).start(untraced, THREATS[0], _generator())
