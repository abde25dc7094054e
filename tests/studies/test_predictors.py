"""Predictors against closed forms on linear networks, brute force, and what must not change."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.attacks.pgd import Pgd
from nas.compression.gdws import Gdws
from nas.defences.noise import ImageNoise, NoiseEnsemble
from nas.defences.particles import Particles
from nas.model_file import ModelSpec, with_plan
from nas.prediction import begin
from nas.randomness import generator
from nas.studies.predictors import at_birth, curvature, fosc, measures, synflow, tangent_kernel
from nas.threat_model import ThreatModel
from search_spaces.catalogue import load_genotype
from search_spaces.genotype import StageGenotype
from search_spaces.layers import Normalise
from search_spaces.residual import wide

EPSILON = 0.05
TRAINED = {"lipschitz", "lipschitz_kl", "stability", "fosc", "jacobian", "curvature"}
BORN = {f"birth_{name}" for name in ("synflow", "snip", "grad_norm", "naswot", "jacov", "ntk", "ntk_adv")}


def linear(classes: int = 2) -> nn.Sequential:
    """With logits of 0 for an image of mean brightness."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()
    with torch.no_grad():
        model[1].bias.copy_(-0.5 * model[1].weight.sum(1))
    return model


def images(n: int = 12) -> torch.Tensor:
    """Away from the pixel bounds by more than any attack here goes."""
    return 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels(n: int = 12, classes: int = 2) -> torch.Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(2))


def worst(model: nn.Sequential, x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The worst images of a linear network of two classes, linf."""
    weight = model[1].weight.detach()
    return x + epsilon * (weight[1 - y] - weight[y]).sign().view_as(x)


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )


def spec_of(genotype: StageGenotype | str, shape: tuple[int, int, int] = (1, 8, 8)) -> ModelSpec:
    found = load_genotype(genotype) if isinstance(genotype, str) else genotype
    return ModelSpec(found, 4, 4, shape, ("a", "b", "c"), (0.4,) * shape[0], (0.25,) * shape[0])


def test_lipschitz_and_stability_of_a_linear_network_at_its_worst_images() -> None:
    model, x, y = linear(), images(40), labels(40)
    found = measures(model, x, y, ThreatModel("linf", EPSILON), seed=0)
    with torch.no_grad():
        clean, attacked = model(x), model(worst(model, x, y, EPSILON))
    assert found["lipschitz"] == pytest.approx(float((clean - attacked).abs().sum(1).mean()) / EPSILON)
    divergence = (clean.softmax(1) * (clean.log_softmax(1) - attacked.log_softmax(1))).sum(1)
    assert found["lipschitz_kl"] == pytest.approx(float(divergence.mean()) / EPSILON)
    stable = (clean.argmax(1) == attacked.argmax(1)).double().mean()
    assert 0.1 < stable < 0.9 and found["stability"] == pytest.approx(float(stable))
    # To be attacked is no loss of stability where the answer was wrong before and after.
    assert stable > float(((clean.argmax(1) == y) & (attacked.argmax(1) == y)).double().mean())
    assert found["fosc"] == pytest.approx(0, abs=1e-12)


def test_distances_are_those_of_the_threat_model() -> None:
    model, x, y = linear(), images(), labels()
    weight = model[1].weight.detach()
    direction = weight[1 - y] - weight[y]
    direction = direction / direction.norm(dim=1, keepdim=True)
    found = measures(model, x, y, ThreatModel("l2", 0.1), seed=0, steps=100)
    assert found["lipschitz"] == pytest.approx(float((direction @ weight.T).abs().sum(1).mean()), rel=0.03)


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2), ("l1", torch.inf)])
def test_fosc_is_0_at_the_maximum_of_a_linear_loss_and_its_whole_rise_at_the_start(norm, dual) -> None:
    threat_model, x = ThreatModel(norm, EPSILON), images()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
    best = x + EPSILON * threat_model.geometry.steepest(gradient)
    rise = EPSILON * torch.linalg.vector_norm(gradient.flatten(1), ord=dual, dim=1)
    torch.testing.assert_close(fosc(gradient, best, x, threat_model), torch.zeros_like(rise), atol=1e-12, rtol=0)
    torch.testing.assert_close(fosc(gradient, x, x, threat_model), rise)
    torch.testing.assert_close(fosc(gradient, x - (best - x), x, threat_model), 2 * rise)


def test_the_gradient_of_fosc_is_taken_at_the_adversarial_image() -> None:
    model, x, y = linear(5), images(), labels(classes=5)
    threat_model = ThreatModel("linf", 2.0, -9, 9)
    found = measures(model, x, y, threat_model, seed=0, steps=2)
    x_adv = Pgd(threat_model, steps=2)(model, x, y, generator=generator(0, "measures"))
    gradient = ((model(x_adv).softmax(1).detach() - F.one_hot(y, 5)) @ model[1].weight.detach()).view_as(x)
    assert found["fosc"] == pytest.approx(float(fosc(gradient, x_adv, x, threat_model).mean()))
    assert found["fosc"] > 0


def test_jacobian_of_a_linear_network() -> None:
    for classes in (2, 7):
        model = linear(classes)
        found = measures(model, images(), labels(), ThreatModel("linf", EPSILON), seed=0)
        assert found["jacobian"] == pytest.approx(float(model[1].weight.detach().norm()))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_curvature_is_the_hessian_of_the_cross_entropy_times_a_unit_direction(norm) -> None:
    model, x, y = linear(5), images(), labels(classes=5)
    threat_model = ThreatModel(norm, EPSILON)
    weight, p = model[1].weight.detach(), model(x).softmax(1).detach()
    gradient = ((p - F.one_hot(y, 5)) @ weight).view_as(x)
    z = threat_model.geometry.steepest(gradient).flatten(1)
    z = z / z.norm(dim=1, keepdim=True)
    hessian = torch.einsum("ki,nkl,lj->nij", weight, torch.diag_embed(p) - p[:, :, None] * p[:, None], weight)
    expected = torch.einsum("nij,nj->ni", hessian, z).norm(dim=1)
    torch.testing.assert_close(curvature(model, x, y, threat_model, reach=1e-5), expected, rtol=1e-4, atol=0)
    # Over the distance of an attack, exactly: the gradient is W'(p - e_y).
    change = EPSILON * threat_model.geometry.steepest(gradient)
    bend = ((model(x + change).softmax(1) - p) @ weight).norm(dim=1) / change.flatten(1).norm(dim=1)
    assert measures(model, x, y, threat_model, seed=0)["curvature"] == pytest.approx(float(bend.mean().detach()))


def test_a_network_without_any_gradient_is_flat() -> None:
    model = linear(3)
    with torch.no_grad():
        model[1].weight.zero_()
    found = measures(model, images(), labels(), ThreatModel("linf", EPSILON), seed=0)
    assert found == {**dict.fromkeys(TRAINED, 0.0), "stability": 1.0}


def test_without_an_attack_nothing_changes_and_no_quotient_by_it_is_made() -> None:
    noisy = NoiseEnsemble(convolutional(), ImageNoise(0.5), draws=1).eval()
    for model in (convolutional(), noisy):
        x, y = images().float(), labels()
        found = measures(model, x, y, ThreatModel("linf", 0.0), seed=0)
        assert found.keys() == {"stability", "fosc", "jacobian"}
        # Of the noisy one as well: the noise on both images is the same.
        assert found["stability"] == 1 and found["fosc"] == 0


def test_only_so_many_images_are_looked_at() -> None:
    model, x, y = convolutional(), images(), labels(classes=3)
    threat_model = ThreatModel("linf", 0.1)
    few = measures(model.double(), x, y, threat_model, seed=0, images=5)
    assert few == measures(model, x[:5], y[:5], threat_model, seed=0) != measures(model, x, y, threat_model, seed=0)
    few = at_birth(model, x, y, threat_model, seed=0, images=5, kernel_images=4)
    assert few == at_birth(model, x[:5], y[:5], threat_model, seed=0, kernel_images=4)
    assert few["birth_ntk"] != at_birth(model, x[:5], y[:5], threat_model, seed=0)["birth_ntk"]


@pytest.mark.parametrize("ensemble", [None, "noise", "particles"])
def test_the_same_seed_measures_the_same_and_leaves_everything_as_it_was(ensemble) -> None:
    model: nn.Module = convolutional().train()
    if ensemble == "noise":
        model = NoiseEnsemble(model, ImageNoise(0.1), draws=3)
        begin(model.eval(), 3)
        model(images().float()), model(images().float())
    elif ensemble == "particles":
        model = Particles([model, convolutional()])
    first = next(model.parameters()).requires_grad_(False)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    noise = getattr(model, "stretch", None), getattr(model, "calls", None)
    state = torch.get_rng_state()
    x, y, threat_model = images().float(), labels(classes=3), ThreatModel("linf", 0.1)

    def both(seed: int) -> dict[str, float]:
        return {
            **measures(model, x, y, threat_model, seed=seed),
            **at_birth(model, x, y, threat_model, seed=seed),
        }

    found = both(3)
    assert found.keys() == TRAINED | BORN
    assert found == both(3)
    with torch.no_grad():
        assert found == both(3)
    assert both(4)["lipschitz"] != found["lipschitz"]
    if ensemble == "noise":
        begin(model)
        assert found == both(3)
        begin(model, 3)
        model(x), model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert (getattr(model, "stretch", None), getattr(model, "calls", None)) == noise
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not first.requires_grad and all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters() if p is not first)


def test_of_an_ensemble_the_first_network_counts_at_birth() -> None:
    x, y, threat_model = images().float(), labels(classes=3), ThreatModel("linf", 0.1)
    alone = at_birth(convolutional(), x, y, threat_model, seed=0)
    torch.manual_seed(5)
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    assert at_birth(Particles([convolutional(), other]), x, y, threat_model, seed=0) == alone
    assert at_birth(NoiseEnsemble(convolutional(), ImageNoise(9.0)), x, y, threat_model, seed=0) == alone


def test_synflow_of_two_layers_by_hand() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, False), nn.ReLU(), nn.Linear(2, 1, False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, -2.0], [-3.0, 4.0]]))
        model[3].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    # Paths: 5 (1 + 2) + 6 (3 + 4), each of two weights.
    assert float(synflow(model, (1, 1, 2))) == 2 * (5 * 3 + 6 * 7)
    found = at_birth(model, images().flatten(1)[:, :2].float(), torch.zeros(12).long(), ThreatModel(), seed=0)
    assert found["birth_synflow"] == pytest.approx(math.log(114))


def test_synflow_passes_normalisation() -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(1, 3, 3, bias=False), nn.Linear(12, 2, bias=False)
    plain = nn.Sequential(first, nn.ReLU(), nn.Flatten(), last)
    norm = nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, -1.0, 0.5]))
        norm.bias.fill_(-7)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.fill_(5)
        norm.running_var.fill_(4)
    untracked = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    whole = nn.Sequential(Normalise((2.0,), (0.3,)), first, norm, nn.ReLU(), untracked, nn.Flatten(), last)
    expected = synflow(plain, (1, 4, 4))
    assert float(expected) > 0
    torch.testing.assert_close(synflow(whole, (1, 4, 4)), expected)
    assert float(norm.bias[0].detach()) == -7


def test_synflow_counts_skips_by_the_weights_on_them() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.a, self.b = nn.Flatten(), nn.Linear(1, 1, False), nn.Linear(1, 1, False)
            nn.init.constant_(self.a.weight, -3)
            nn.init.constant_(self.b.weight, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.flatten(x)
            return self.b(x + self.a(x))

    assert float(synflow(Skip(), (1, 1, 1))) == 1 * 5 + 2 * 15


def test_synflow_is_left_out_where_images_are_normalised_inside() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 3))
    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = at_birth(model, x, labels(classes=3), ThreatModel(), seed=0)
    assert found.keys() == BORN - {"birth_synflow"}


def test_snip_and_gradient_norm_of_a_linear_network() -> None:
    model, x, y = linear(3), images(), labels(classes=3)
    found = at_birth(model, x, y, ThreatModel("linf", EPSILON), seed=0)
    weight = model[1].weight.detach()
    gradient = (model(x).softmax(1).detach() - F.one_hot(y, 3)).T @ x.flatten(1) / len(x)
    assert found["birth_snip"] == pytest.approx(float((weight * gradient).abs().sum()))
    assert found["birth_grad_norm"] == pytest.approx(float(gradient.norm()))  # the bias does not count


def test_scores_are_taken_with_the_statistics_of_the_batch_and_without_dropout() -> None:
    model, x, y = convolutional().eval(), images().float(), labels(classes=3)
    found = at_birth(model, x, y, ThreatModel("linf", 0.1), seed=0)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    norm.running_mean.fill_(100)
    assert at_birth(model, x, y, ThreatModel("linf", 0.1), seed=0) == found
    norm.train()
    loss = F.cross_entropy(model(x), y)
    weights = [model[0].weight, model[5].weight]
    gradients = torch.autograd.grad(loss, weights)
    expected = sum(float(gradient.norm()) for gradient in gradients)
    assert found["birth_grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_naswot_counts_agreement_image_by_image() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3))
    x = torch.randn(6, 1, 4, 4)
    first = model[1](x.flatten(1)) > 0
    second = model[3](model[1](x.flatten(1)).relu()) > 0
    codes = torch.cat([first, second], 1)
    kernel = [[float((a == b).sum()) for b in codes] for a in codes]
    found = at_birth(model, x, labels(6, 3), ThreatModel(), seed=0)
    assert found["birth_naswot"] == pytest.approx(float(torch.linalg.slogdet(torch.tensor(kernel)).logabsdet), rel=1e-5)


def test_naswot_needs_relus_that_are_not_those_of_gates() -> None:
    x, y = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels(classes=3)
    smooth = spec_of(wide((2, 2), (1, 1), (32, 48), stem=4, se="plain", se_reduction=1, activation="silu"))
    assert at_birth(smooth, x, y, ThreatModel(), seed=0).keys() == BORN - {"birth_naswot"}
    # Two images of one code have a kernel without an inverse.
    same = at_birth(convolutional(), images(1).float().repeat(4, 1, 1, 1), labels(4), ThreatModel(), seed=0)
    assert "birth_naswot" not in same and "birth_snip" in same


def test_jacov_by_explicit_jacobians() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x = torch.randn(20, 1, 4, 4, dtype=torch.float64)
    found = at_birth(model, x, labels(20, 3), ThreatModel(), seed=0)
    some = x[:8]  # half as many as pixels
    jacobian = torch.autograd.functional.jacobian(lambda points: model(points).sum(1), some)
    own = torch.stack([jacobian[i, i].flatten() for i in range(len(some))])
    eigenvalues = torch.linalg.eigvalsh(torch.corrcoef(own)) + 1e-5
    assert found["birth_jacov"] == pytest.approx(-float((eigenvalues.log() + 1 / eigenvalues).sum()))


def test_tangent_kernel_of_a_linear_network_clean_and_at_its_worst_images() -> None:
    model, x, y = linear(), images(), labels()
    found = at_birth(model, x, y, ThreatModel("linf", EPSILON), seed=0, kernel_images=6)
    for name, points in (("birth_ntk", x), ("birth_ntk_adv", worst(model, x, y, EPSILON))):
        flat = points[:6].flatten(1)
        kernel = 2 * (flat @ flat.T + 1)  # two outputs, each with weights and a bias
        torch.testing.assert_close(tangent_kernel(model, points[:6]), kernel)
        assert found[name] == pytest.approx(float(torch.linalg.eigvalsh(kernel)[0].log()))
    assert found["birth_ntk"] != pytest.approx(found["birth_ntk_adv"], abs=0.01)


def test_the_tangent_kernel_holds_the_statistics_of_all_images_fixed() -> None:
    model, x, y = convolutional().double(), images(), labels(classes=3)
    found = at_birth(model, x, y, ThreatModel("linf", 0.1), seed=0, kernel_images=5)
    maps = model[0](x).detach()
    model.eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean, norm.running_var = maps.mean((0, 2, 3)), maps.transpose(0, 1).flatten(1).var(1)
    kernel = tangent_kernel(model, x[:5])
    assert found["birth_ntk"] == pytest.approx(float(torch.linalg.eigvalsh(kernel)[0].log()))


@pytest.mark.parametrize(
    "genotype",
    [
        "arnas",
        wide((2, 1), (1, 1), (6, 8), stem=4),
        wide((1, 1), (2, 1), (8, 24), block="robust", base_width=40, cardinality=2, scales=3, se="residual"),
        StageGenotype("plain", (1, 1), (6, 8)),
        StageGenotype("mlp", (1,), (12,)),
    ],
)
def test_networks_of_all_kinds_are_measured(genotype) -> None:
    spec = spec_of(genotype)
    x, y = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels(classes=3)
    threat_model = ThreatModel("linf", 0.1)
    found = at_birth(spec, x, y, threat_model, seed=0)
    assert found.keys() == BORN
    torch.manual_seed(7)  # weights are of the seed
    state = torch.get_rng_state()
    assert at_birth(spec, x, y, threat_model, seed=0) == found != at_birth(spec, x, y, threat_model, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    model = spec.build()
    model.train()(x)
    assert measures(model.eval(), x, y, threat_model, seed=0).keys() == TRAINED


def test_what_compresses_later_is_not_there_at_birth() -> None:
    spec = spec_of(wide((1, 1), (1, 1), (6, 8), stem=4))
    x, y = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels(classes=3)
    threat_model = ThreatModel("linf", 0.1)
    plan = Gdws(keep=0.6, step=1).plan(spec.build())
    found = at_birth(with_plan(spec, plan), x, y, threat_model, seed=0)
    assert found == at_birth(spec, x, y, threat_model, seed=0)
