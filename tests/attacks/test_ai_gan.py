"""AI-GAN learns to hit the class it is told, leaves the model alone meanwhile, and is the same after a file."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from nas.attacks.ai_gan import AiGan, load
from nas.attacks.targeted import TargetedPgd, success_matrix
from nas.errors import InputError
from nas.tensor_file import write_tree
from nas.threat_model import ThreatModel

QUICK = {"epochs": 2, "attacker_steps": 2, "batch_size": 16, "width": 4}


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _stripes(n=96, shape=(1, 9, 12), noise=0.05):
    """Four classes: a bright band at one of four places, in white noise. Returns images and labels."""
    y = torch.arange(n) % 4
    x = 0.3 + noise * torch.randn(n, *shape, generator=_generator(3))
    for label in range(4):
        x[y == label, :, :, 3 * label : 3 * label + 3] += 0.3
    return x.clamp(0, 1), y


class _Templates(nn.Module):
    """Classifies ``_stripes`` by the brightness of the four places, with batch normalisation and dropout in it."""

    def __init__(self, channels=1):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.4)
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return self.scale * self.dropout(self.norm(x)).mean((1, 2)).unflatten(1, (4, 3)).mean(2)


def _fit(settings=None, model=None, seed=0, shape=(1, 9, 12), **more):
    x, y = _stripes(shape=shape)
    attack = AiGan(ThreatModel("linf", 0.25), **{**QUICK, **(settings or {})})
    return attack.fit(model or _Templates(shape[0]).eval(), x, y, generator=_generator(seed), **more)


@pytest.fixture(scope="module")
def fitted():
    records = []
    attack = _fit({"epochs": 10, "width": 8, "learning_rate": 3e-3}, log=records.append)
    return attack, records


def test_one_pass_hits_every_class_from_every_other(fitted):
    attack, records = fitted
    model, (x, y) = _Templates().eval(), _stripes(noise=0.06)
    matrix = success_matrix(attack, model, x, y, 4, generator=_generator())
    assert bool(matrix.diagonal().isnan().all())
    assert float(matrix.nanmean()) > 0.9
    assert float(matrix[~matrix.isnan()].min()) > 0.6
    noise = dataclasses.replace(attack, network=_fit({"epochs": 1, "learning_rate": 1e-9}).network)
    assert float(success_matrix(noise, model, x, y, 4, generator=_generator()).nanmean()) < 0.2, "untrained"
    assert [record["epoch"] for record in records] == list(range(10))
    assert records[-1]["success"] > 0.9 > records[0]["success"]
    assert records[-1]["cross_entropy"] < records[0]["cross_entropy"]


def test_the_image_follows_the_target_it_is_given(fitted):
    attack, _ = fitted
    x, y = _stripes(40)
    for target in range(4):
        others = x[y != target]
        change = attack.generate(others, torch.full((30,), target)) - others
        assert bool((change.mean((1, 2)).unflatten(1, (4, 3)).mean(2).argmax(1) == target).all())


def test_an_untargeted_attack_takes_the_first_target_that_breaks_the_sample(fitted):
    attack, _ = fitted
    model, (x, y) = _Templates().eval(), _stripes(40)
    x[0], y[0] = x[1], y[2]  # misclassified from the start
    passes = []
    handle = model.register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0])))
    x_adv = attack(model, x, y, generator=_generator())
    handle.remove()
    assert passes[0] == passes[1] == 40
    assert len(passes) <= 4 and passes == sorted(passes, reverse=True)
    assert float((model(x_adv).argmax(1) != y).double().mean()) > 0.95
    likeliest = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    first = attack.generate(x, likeliest)
    broken = model(first).argmax(1) != y
    assert torch.equal(x_adv[broken], first[broken])
    one = dataclasses.replace(attack, targets=1)
    assert torch.equal(one(model, x, y, generator=_generator()), first)


@pytest.mark.parametrize("norm,epsilon", [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (4, 17, 8)])
def test_any_shape_and_norm_is_learnt_and_stays_in_the_ball(norm, epsilon, shape):
    threat_model = ThreatModel(norm, epsilon)
    x = torch.rand(20, *shape, generator=_generator())
    x[0], x[1] = 0.0, 1.0
    y = torch.arange(20) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2))
    attack = AiGan(threat_model, **QUICK).fit(model, x, y, generator=_generator())
    for images in (attack.generate(x, 1 - y), attack(model, x, y, generator=_generator())):
        assert images.shape == x.shape
        assert bool(threat_model.contains(images, x).all())
        assert float(threat_model.distance(images, x).max()) > 0.2 * epsilon


def test_training_leaves_model_data_and_random_state_as_found():
    model, (x, y) = _Templates().train(), _stripes()
    before = copy.deepcopy(model.state_dict())
    x_before, stream = x.clone(), torch.get_rng_state()
    AiGan(**QUICK).fit(model, x, y, generator=_generator())
    assert model.training and model.dropout.training and model.scale.requires_grad and model.scale.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, x_before)
    assert torch.equal(torch.get_rng_state(), stream)


def test_training_is_a_function_of_its_seed():
    first, again, other = _fit(), _fit(), _fit(seed=1)
    torch.manual_seed(5)
    for ours, same, different in zip(*(list(a.network.parameters()) for a in (first, again, other)), strict=True):
        assert torch.equal(ours, same)
        assert ours.numel() == 1 or not torch.equal(ours, different) or float(ours.std()) == 0
    x, _ = _stripes(4)
    target = torch.tensor([1, 2, 3, 0])
    assert not torch.equal(first.generate(x, target), other.generate(x, target))


def test_the_stages_show_the_discriminator_what_they_should(monkeypatch):
    """First the attacker's images for the generator's own targets, then clean ones."""
    asked = []
    original = TargetedPgd.towards

    def recording(self, model, x, target, *, generator):
        asked.append(len(x))
        return original(self, model, x, target, generator=generator)

    monkeypatch.setattr(TargetedPgd, "towards", recording)
    _fit({"epochs": 4, "first_stage": 0.5})
    assert sum(asked) == 2 * 96
    asked.clear()
    _fit({"first_stage": 0.0})
    assert asked == []


def test_the_discriminator_reaches_the_generator():
    """A GAN term computed on detached images would leave the weights as without it."""
    without, with_it = _fit({"gan_weight": 0.0}), _fit({"gan_weight": 5.0})
    weights = [attack.network.leave.weight for attack in (without, with_it)]
    assert float((weights[0] - weights[1]).abs().max()) > 1e-4


def test_a_file_gives_the_same_attack(tmp_path, fitted):
    attack, _ = fitted
    path = tmp_path / "attack.safetensors"
    attack.save(path)
    loaded = load(path)
    x, y = _stripes(8)
    target = (y + 1) % 4
    assert torch.equal(loaded.generate(x, target), attack.generate(x, target))
    assert str(loaded) == dataclasses.replace(attack, targets=loaded.targets).__str__()
    assert loaded.settings == attack.settings and loaded.settings["epochs"] == 10
    model = _Templates().eval()
    plugin = AiGan(ThreatModel("linf", 0.25), file=str(path))
    expected = attack(model, x, y, generator=_generator())
    assert torch.equal(plugin(model, x, y, generator=_generator()), expected)
    assert "0.25" in str(plugin) and "trained for" not in str(plugin)
    with safe_open(path, framework="pt") as file:
        assert "input_shape" in json.dumps(json.loads(file.metadata()["tree"]))
    smaller = AiGan(ThreatModel("linf", 0.05), file=str(path))
    assert bool(smaller.threat_model.contains(smaller(model, x, y, generator=_generator()), x).all())
    assert "trained for linf 0.25" in str(smaller)


def test_double_precision_is_kept_and_agrees_with_single(fitted):
    attack, _ = fitted
    x, y = _stripes(6)
    double = attack.generate(x.double(), (y + 1) % 4)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), attack.generate(x, (y + 1) % 4), rtol=0, atol=1e-5)
    assert _Templates().double()(double).dtype == torch.float64


def test_an_attack_that_has_not_learnt_says_what_to_do(tmp_path):
    x, y = _stripes(4)
    with pytest.raises(InputError, match=r"fit.*save.*file"):
        AiGan()(_Templates(), x, y, generator=_generator())
    assert "not trained" in str(AiGan())
    with pytest.raises(InputError, match="does not exist"):
        AiGan(file=str(tmp_path / "none"))(_Templates(), x, y, generator=_generator())


@pytest.mark.parametrize(
    "tree", [{}, {"ai_gan": 3}, {"ai_gan": {"schema": 99}}, {"ai_gan": {"schema": 1, "classes": 4}}], ids=str
)
def test_foreign_files_are_refused(tmp_path, tree):
    write_tree(tree, tmp_path / "file")
    with pytest.raises(InputError):
        load(tmp_path / "file")


def test_images_and_models_that_do_not_fit_are_refused(fitted):
    attack, _ = fitted
    x, y = _stripes(4)
    with pytest.raises(InputError, match="shape"):
        attack.generate(x[..., :8], y)
    with pytest.raises(InputError, match="4 classes"):
        attack(nn.Sequential(nn.Flatten(), nn.Linear(108, 3)), x, torch.zeros(4).long(), generator=_generator())
    for images, labels in ((x[..., :7], y), (x, y[:3]), (x[:0], y[:0]), (x[0], y)):
        with pytest.raises(InputError, match="8x8"):
            AiGan(**QUICK).fit(_Templates(), images, labels, generator=_generator())


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 0}, {"targets": 0}, {"first_stage": 1.5}, {"gan_weight": -1.0}, {"learning_rate": 0.0}],
    ids=str,
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(InputError):
        AiGan(**wrong)
