"""The evaluator's suspicion of itself: silent for honest models, loud for the classical ways to fool an attack."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nas.attacks.fgsm import Fgsm
from nas.attacks.pgd import Pgd
from nas.evaluation.robustness import Evaluation, Trial, evaluate
from nas.evaluation.suspicion import Check, suspicions
from nas.threat_model import ThreatModel

THREATS = {"linf": ThreatModel("linf", 0.07), "l2": ThreatModel("l2", 0.55)}


def _data():
    """Two noisy prototypes that differ little: within reach of an attack, out of reach of noise."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 2
    base = 0.3 + 0.4 * torch.rand(1, 1, 8, 8, generator=generator)
    pattern = torch.randn(1, 1, 8, 8, generator=generator).sign()
    x = base + (2 * y - 1).view(-1, 1, 1, 1) * 0.07 * pattern + 0.06 * torch.randn(120, 1, 8, 8, generator=generator)
    return x.clamp(0, 1), y


X, Y = _data()
TRAINED = {}


def _trained(kind, norm):
    """A model adversarially trained in a few steps, once per kind and norm."""
    if (kind, norm) in TRAINED:
        return TRAINED[kind, norm]
    torch.manual_seed(1)
    if kind == "linear":
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Flatten(), nn.Linear(128, 2),
        )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 0.01, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(2)
    attack = Pgd(THREATS[norm], steps=3)
    for _ in range(25):
        model.train()
        x_adv = attack(model, X, Y, generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(model(x_adv), Y).backward()
        optimiser.step()
    TRAINED[kind, norm] = model.eval()
    return TRAINED[kind, norm]


class _Around(nn.Module):
    """A model inside something that hampers attacks."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Quantised(_Around):
    """Pixels rounded to a few levels: no gradient anywhere."""

    def forward(self, x):
        return self.inner((x * 16).round() / 16)


class Random(_Around):
    """Fresh noise at every pass, in eval mode too."""

    def forward(self, x):
        return self.inner(x + 0.05 * torch.randn(x.shape))


class Saturated(_Around):
    """Logits so large that the cross-entropy of a right answer is exactly 0 in single precision."""

    def forward(self, x):
        return 1e4 * self.inner(x)


class QuantisedActivations(_Around):
    """Hidden features rounded to eight levels."""

    def forward(self, x):
        hidden = self.inner[:-1](x)
        return self.inner[-1]((hidden * 8).round() / 8)


class Scrambled(_Around):
    """Preprocessing without a derivative, for which a backward pass of no use stands in."""

    def forward(self, x):
        return self.inner(_Scramble.apply(x))


class _Scramble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 64).round() / 64

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(2, 3).roll(3, 2)


class Probabilities(_Around):
    """The softmax is part of the model, and sharp."""

    def forward(self, x):
        return (1000 * self.inner(x)).softmax(1)


class LearnsForever(_Around):
    """Batch statistics whatever is asked for."""

    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return self.inner(x)


MASKED = {
    "quantised activations": (QuantisedActivations, "zero gradients"),
    "saturated logits": (Saturated, "margin loss"),
    "randomness": (Random, "deterministic model"),
    "preprocessing without a derivative": (Scrambled, "gradients are true"),
    "probabilities": (Probabilities, "logits"),
    "batch statistics": (LearnsForever, "eval mode"),
}
"""Ways to look robust, each with the check that is made for it."""


def _evaluation(model, threat_model):
    trials = {"fgsm": Trial(Fgsm(threat_model)), "pgd": Trial(Pgd(threat_model, steps=10))}
    return evaluate(model, X, Y, trials, seed=0)


def _verdicts(model, threat_model, evaluation=None):
    evaluation = evaluation or _evaluation(model, threat_model)
    checks = suspicions(model, X, Y, evaluation, threat_model, seed=0)
    assert len({check.name for check in checks}) == len(checks)
    assert all(isinstance(check, Check) and check.detail for check in checks)
    return {check.name: check.verdict for check in checks}


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_honest_models_pass(kind, norm):
    model = _trained(kind, norm)
    data = _evaluation(model, THREATS[norm]).to_data()
    assert data["natural"] > 0.9
    assert 0.05 < data["worst_case"] < data["natural"] - 0.05, "otherwise there is nothing to overestimate"
    assert set(_verdicts(model, THREATS[norm]).values()) == {"pass"}


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize(("hampered", "failing"), [(Quantised, "zero gradients"), (Random, "deterministic model")])
def test_the_check_made_for_it_fails(hampered, failing, kind, norm):
    torch.manual_seed(0)
    model = hampered(_trained(kind, norm))
    assert _verdicts(model, THREATS[norm])[failing] == "fail"


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_saturated_logits_are_noticed(kind, norm):
    """Cross-entropy attacks find no gradient: the evaluation says robust what the margin loss breaks at once."""
    honest, threat_model = _trained(kind, norm), THREATS[norm]
    model = Saturated(honest)
    evaluation = _evaluation(model, threat_model)
    true = float(_evaluation(honest, threat_model).worst_case.double().mean())
    claimed = float(evaluation.worst_case.double().mean())
    assert claimed > true + 0.1, "the same function to the eye, and yet it looks more robust"
    assert set(_verdicts(model, threat_model, evaluation).values()) != {"pass"}


@pytest.mark.parametrize("defence", MASKED)
def test_a_masked_defence_is_told_by_its_check(defence, record_property):
    """And the evaluation that it misled claims more than the network it hides can do, where the mask works at all."""
    masked, telling = MASKED[defence]
    torch.manual_seed(0)
    honest, threat_model = _trained("conv", "linf"), THREATS["linf"]
    model = masked(copy.deepcopy(honest)).eval()
    evaluation = _evaluation(model, threat_model)
    checks = suspicions(model, X, Y, evaluation, threat_model, seed=0)
    verdicts = {check.name: check.verdict for check in checks}
    assert verdicts[telling] == "fail"
    true = float(_evaluation(honest, threat_model).worst_case.double().mean())
    claimed = float(evaluation.worst_case.double().mean())
    if defence not in ("randomness", "batch statistics"):  # they confuse, but hide no gradient
        assert claimed > true + 0.05


def test_a_search_by_queries_finds_what_no_gradient_shows():
    model, threat_model = Quantised(_trained("conv", "linf")).eval(), THREATS["linf"]
    assert _verdicts(model, threat_model)["search by queries"] == "fail"


def test_examples_that_transfer_are_told():
    honest, threat_model = _trained("conv", "linf"), THREATS["linf"]
    masked = Quantised(honest).eval()
    checks = suspicions(
        masked, X, Y, _evaluation(masked, threat_model), threat_model, seed=0, surrogates={"its inside": honest}
    )
    verdicts = {check.name: check.verdict for check in checks}
    assert verdicts["transfer from its inside"] == "fail"
    checks = suspicions(
        honest, X, Y, _evaluation(honest, threat_model), threat_model, seed=0, surrogates={"itself": honest}
    )
    assert next(check for check in checks if check.name == "transfer from itself").verdict == "pass"


def test_an_attack_that_did_nothing_is_noticed():
    """Masks of an evaluation whose attacks were broken: nothing ever fell."""
    model, threat_model = _trained("conv", "linf"), THREATS["linf"]
    natural = evaluate(model, X, Y, {}, seed=0).natural
    verdicts = _verdicts(model, threat_model, Evaluation(natural, {"broken": natural.clone()}))
    assert verdicts["iteration helps"] == "fail"


def test_an_attack_weaker_than_noise_is_noticed():
    generator = torch.Generator().manual_seed(0)
    model, threat_model = _trained("linear", "linf"), replace(THREATS["linf"], epsilon=0.9)
    natural = evaluate(model, X, Y, {}, seed=0).natural
    verdicts = _verdicts(model, threat_model, Evaluation(natural, {"broken": natural.clone()}))
    assert verdicts["random noise"] == "fail"
    assert bool((model(threat_model.random_start(X, generator)).argmax(1) != Y).any())


def test_a_model_deaf_to_its_input_is_noticed():
    class Deaf(nn.Module):
        def forward(self, x):
            return F.one_hot(Y[: len(x)], 2).float() + 0 * x.mean()

    model = Deaf()
    everything = torch.ones(len(X), dtype=torch.bool)
    verdicts = _verdicts(model, THREATS["linf"], Evaluation(everything, {"any": everything.clone()}))
    assert verdicts["zero gradients"] == "fail"
    assert verdicts["unbounded attack"] == "fail"


def test_the_model_and_the_streams_are_left_alone():
    model = _trained("conv", "linf").train()
    state, streams = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    _verdicts(model, THREATS["linf"])
    assert model.training
    model.eval()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), streams)


def test_the_checks_are_repeatable_and_look_at_the_samples_asked_for():
    model, threat_model = _trained("conv", "l2"), THREATS["l2"]
    evaluation = _evaluation(model, threat_model)
    first = suspicions(model, X, Y, evaluation, threat_model, seed=0, samples=40)
    torch.manual_seed(5)
    assert first == suspicions(model, X, Y, evaluation, threat_model, seed=0, samples=40)
    assert first == suspicions(model, X[:40], Y[:40], evaluation, threat_model, seed=0)
