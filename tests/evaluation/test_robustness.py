"""Accuracy under attack, on a model that reads its answer from a pixel and attacks that follow a script."""

import pytest
import torch
from torch import nn

from nas.attacks.pgd import Pgd
from nas.errors import InputError
from nas.evaluation.interval import wilson
from nas.evaluation.robustness import Evaluation, Trial, evaluate
from nas.objective import Attack
from nas.threat_model import ThreatModel

N = 12


class _Reader(nn.Module):
    """Predicts class 1 where pixel (0, 1) is above one half. Pixel (0, 0) is the number of the image."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        assert not self.training
        self.seen.append(len(x))
        pixel = x[:, 0, 0, 1]
        return torch.stack([0.5 - pixel, pixel - 0.5], 1)


class _Scripted:
    """Breaks given images at each start, and notes which it was asked to attack."""

    def __init__(self, *starts):
        self.starts, self.asked, self.draws = starts, [], []

    def __call__(self, model, x, y, *, generator):
        numbers = [round(float(value) * 255) for value in x[:, 0, 0, 0]]
        start = len({*self.draws, generator.initial_seed()}) - 1
        self.draws.append(generator.initial_seed())
        self.asked.append((start, numbers))
        x_adv = x.clone()
        for row, number in enumerate(numbers):
            if number in self.starts[start]:
                x_adv[row, 0, 0, 1] = 1 - x_adv[row, 0, 0, 1]
        return x_adv

    def __str__(self):
        return f"scripted {len(self.starts)}"

    def by_start(self):
        """The images each start was asked to attack."""
        return [
            sorted(n for s, numbers in self.asked if s == start for n in numbers) for start in range(len(self.starts))
        ]


def _images(wrong=()):
    """Twelve images of class 0 and 1 in turns; those in ``wrong`` are misread even without an attack."""
    x = torch.zeros(N, 1, 2, 2)
    y = torch.arange(N) % 2
    x[:, 0, 0, 0] = torch.arange(N) / 255
    x[:, 0, 0, 1] = y.float()
    for number in wrong:
        x[number, 0, 0, 1] = 1 - x[number, 0, 0, 1]
    return x, y


def _rows(mask):
    return mask.nonzero().squeeze(1).tolist()


def test_the_worst_case_is_the_and_of_all_masks():
    x, y = _images(wrong=[0])
    attacks = {"a": _Scripted({1, 2}), "b": _Scripted({2, 3}), "c": _Scripted(set())}
    result = evaluate(_Reader().eval(), x, y, {name: Trial(attack) for name, attack in attacks.items()}, seed=0)
    assert _rows(result.natural) == list(range(1, N))
    assert _rows(result.attacks["a"]) == list(range(3, N))
    assert _rows(result.attacks["b"]) == [1, *range(4, N)]
    assert _rows(result.attacks["c"]) == list(range(1, N))
    assert _rows(result.worst_case) == list(range(4, N))
    for attack in attacks.values():
        assert attack.by_start() == [list(range(1, N))], "each attack faces every image that is read right, no other"
    data = result.to_data()
    assert data["n"] == N
    assert data["natural"] == pytest.approx(11 / 12)
    assert data["attacks"] == {"a": pytest.approx(9 / 12), "b": pytest.approx(9 / 12), "c": pytest.approx(11 / 12)}
    assert data["worst_case"] == pytest.approx(8 / 12)
    assert data["interval"] == list(wilson(8, 12))
    assert data["attack_settings"] == dict.fromkeys("abc", "scripted 1")


@pytest.mark.parametrize("batch_size", [1, 5, 512])
def test_restarts_attack_the_survivors_only(batch_size):
    """Each start has its own random stream; what one start breaks stays broken."""
    x, y = _images(wrong=[3])
    attack = _Scripted({0, 1}, {1, 5}, set(), {11})
    result = evaluate(_Reader().eval(), x, y, {"a": Trial(attack, restarts=4)}, seed=0, batch_size=batch_size)
    everything = [0, 1, 2, *range(4, N)]
    after_one = [2, *range(4, N)]
    after_two = [2, 4, *range(6, N)]
    assert attack.by_start() == [everything, after_one, after_two, after_two]
    assert _rows(result.attacks["a"]) == after_two[:-1]
    assert len(set(attack.draws)) == 4
    assert max(len(numbers) for _, numbers in attack.asked) <= batch_size
    assert result.settings == {"a": "scripted 4, 4 restarts"}


def test_a_later_start_cannot_bring_an_image_back():
    class Heals:
        def __call__(self, model, x, y, *, generator):
            x_adv = x.clone()
            x_adv[:, 0, 0, 1] = y.float()
            return x_adv

    x, y = _images(wrong=[4])
    result = evaluate(_Reader().eval(), x, y, {"a": Trial(Heals(), 3)}, seed=0)
    assert 4 not in _rows(result.attacks["a"])
    assert 4 not in _rows(result.worst_case)


def test_nothing_left_to_attack():
    x, y = _images()
    attack = _Scripted(set(range(N)), set())
    result = evaluate(_Reader().eval(), x, y, {"a": Trial(attack, 2)}, seed=0)
    assert attack.by_start() == [list(range(N)), []]
    assert result.to_data()["worst_case"] == 0
    assert result.to_data()["interval"][0] == 0


def test_without_attacks_the_worst_case_is_the_natural_one():
    x, y = _images(wrong=[1])
    result = evaluate(_Reader().eval(), x, y, {}, seed=0)
    assert torch.equal(result.worst_case, result.natural)


def test_a_trial_may_have_any_name():
    """Even that of a mask the evaluation keeps itself, or one with a slash."""
    x, y = _images(wrong=[0])
    names = ("natural", "worst_case", "pgd 8/255", "done", "")
    result = evaluate(_Reader().eval(), x, y, {name: Trial(_Scripted({1})) for name in names}, seed=0)
    assert _rows(result.natural) == list(range(1, N))
    for name in names:
        assert _rows(result.attacks[name]) == list(range(2, N))


def _linear(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(3, 16, generator=generator))
        model[2].bias.zero_()
    x = torch.rand(40, 1, 4, 4, generator=generator)
    return model, x, model.eval()(x).argmax(1)


class Stopped(Exception):
    pass


class _Noise:
    """A weak attack: one random draw of the ball, so that the result hangs on the random stream."""

    def __init__(self, fails_after=None):
        self.fails_after = fails_after

    def __call__(self, model, x, y, *, generator):
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise Stopped
        return ThreatModel("linf", 0.2).random_start(x, generator)


def _trials(fails_after=None):
    weak = _Noise(fails_after)
    return {"first 1/2": Trial(weak, 3), "pgd": Trial(Pgd(ThreatModel("linf", 0.02), steps=2)), "last": Trial(weak, 2)}


@pytest.mark.parametrize("fails_after", [0, 1, 5, 6, 9, 12])
def test_an_interrupted_evaluation_goes_on_to_the_same_result(fails_after, tmp_path):
    model, x, y = _linear()
    path = tmp_path / "progress.safetensors"
    whole = evaluate(model, x, y, _trials(), seed=5, batch_size=16)
    with pytest.raises(Stopped):
        evaluate(model, x, y, _trials(fails_after), seed=5, batch_size=16, progress_file=path)
    calls = _Noise(10**6)
    rest = {name: Trial(calls, t.restarts) if name != "pgd" else t for name, t in _trials().items()}
    again = evaluate(model, x, y, rest, seed=5, batch_size=16, progress_file=path)
    assert torch.equal(again.natural, whole.natural)
    for name in whole.attacks:
        assert torch.equal(again.attacks[name], whole.attacks[name])
    assert 0 < int(whole.worst_case.sum()) < len(x)
    calls.fails_after = 0
    finished = evaluate(model, x, y, rest, seed=5, batch_size=16, progress_file=path)
    assert torch.equal(finished.worst_case, whole.worst_case), "a finished one is read back without an attack"


def test_seeds_matter_and_nothing_else():
    model, x, y = _linear()
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(masks))
        masks.append(evaluate(model, x, y, {"a": Trial(_Noise(), 2)}, seed=seed).attacks["a"])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_more_restarts_never_help_the_model():
    model, x, y = _linear()
    survivors = None
    for restarts in (1, 2, 4):
        mask = evaluate(model, x, y, {"a": Trial(_Noise(), restarts)}, seed=0).attacks["a"]
        assert survivors is None or bool((mask <= survivors).all())
        survivors = mask


def test_the_model_is_evaluated_in_eval_mode_and_left_as_found():
    model, x, y = _linear()
    model.train()
    model[2].eval()
    evaluate(model, x, y, _trials(), seed=0)
    assert [module.training for module in model.modules()] == [True, True, True, False]
    natural = evaluate(model, x, y, {}, seed=0).natural
    assert bool(natural.all()), "with dropout some images would be misread"


def test_progress_is_told():
    model, x, y = _linear()
    shares = []
    evaluate(model, x, y, _trials(), seed=0, tick=shares.append)
    assert shares == pytest.approx([i / 6 for i in range(1, 7)])


def test_wrong_inputs_are_refused():
    model, x, y = _linear()
    nan = x.clone()
    nan[3, 0, 0, 0] = float("nan")
    for images, labels in (
        (x, y[:-1]),
        (x[:0], y[:0]),
        (x * 255, y),
        (x - 0.5, y),
        ((x * 255).to(torch.uint8), y),
        (x.long(), y),
        (nan, y),
    ):
        with pytest.raises(InputError):
            evaluate(model, images, labels, {}, seed=0)
    with pytest.raises(InputError):
        Trial(_Noise(), restarts=0)


def test_a_model_without_an_answer_is_not_right():
    """argmax of NaN is the position of the NaN: under attack it must not count as class 0."""

    class Falters(nn.Module):
        def forward(self, x):
            logits = torch.zeros(len(x), 3) + x.mean((1, 2, 3))[:, None]
            logits[:, 0] += 1
            return logits / (x.mean((1, 2, 3)) != 0.25)[:, None]  # infinite minus infinite in the margin

    class Constant:
        def __call__(self, model, x, y, *, generator):
            return torch.full_like(x, 0.25)

    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    result = evaluate(Falters(), x, torch.zeros(5, dtype=torch.long), {"a": Trial(Constant())}, seed=0)
    assert bool(result.natural.all())

    class Silent(nn.Module):
        def forward(self, x):
            silent = (x == 0.25).flatten(1).all(1)
            logits = torch.tensor([[1.0, 0.0, 0.0]]).repeat(len(x), 1)
            logits[silent] = torch.nan
            return logits

    result = evaluate(Silent(), x, torch.zeros(5, dtype=torch.long), {"a": Trial(Constant())}, seed=0)
    assert bool(result.natural.all()) and not bool(result.worst_case.any())


class _Answers(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: (x.flatten(1)[:, :3], x), "returns a tuple"),
        (lambda x: {"logits": x.flatten(1)}, "returns a dict"),
        (lambda x: x, r"shape \(4, 1, 4, 4\)"),
        (lambda x: x.flatten(1)[:, :1], "at least 2 classes"),
        (lambda x: x.flatten(1).long(), "int64"),
        (lambda x: x.flatten(1)[:, :3] / 0 * 0, "NaN or infinite"),
        (lambda x: x.flatten(1)[:, :2], r"labels 0\.\.2, but the model has 2 classes"),
    ],
)
def test_a_model_that_cannot_be_judged_is_refused(answer, says):
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    with pytest.raises(InputError, match=says):
        evaluate(_Answers(answer), x, y, {}, seed=0)


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.rand(4, 16), torch.zeros(4, dtype=torch.long), "N, C, H, W"),
        (torch.rand(4, 1, 4, 4), torch.zeros(4), "int64"),
        (torch.rand(4, 1, 4, 4), torch.zeros(4, 1, dtype=torch.long), "int64"),
        (torch.rand(4, 1, 4, 4), torch.tensor([0, 1, -1, 2]), r"labels -1\.\.2"),
        (torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), "floating point"),
        (torch.rand(4, 1, 4, 4) * 255, torch.zeros(4, dtype=torch.long), r"\[0, 1\]"),
        (torch.full((4, 1, 4, 4), torch.nan), torch.zeros(4, dtype=torch.long), r"\[0, 1\]"),
    ],
)
def test_images_and_labels_that_cannot_be_judged_are_refused(x, y, says):
    with pytest.raises(InputError, match=says):
        evaluate(_Answers(lambda x: x.flatten(1)[:, :3]), x, y, {}, seed=0)


def test_accuracies_by_class():
    labels = torch.tensor([0, 0, 0, 2, 2])
    natural, survived = torch.tensor([1, 1, 0, 1, 1]).bool(), torch.tensor([1, 0, 1, 1, 1]).bool()
    rows = Evaluation(natural, {"a": survived}, {}, labels).to_data()["per_class"]
    assert [(row["class"], row["n"]) for row in rows] == [(0, 3), (2, 2)]
    assert [row["natural"] for row in rows] == pytest.approx([2 / 3, 1])
    assert [row["worst_case"] for row in rows] == pytest.approx([1 / 3, 1])
    assert all(row["interval"][0] <= row["worst_case"] <= row["interval"][1] for row in rows)


def test_a_trial_is_named_by_its_attack():
    assert "PGD-2" in str(Trial(Pgd(steps=2)))
    assert "restarts" not in str(Trial(Pgd(steps=2)))
    assert "5 restarts" in str(Trial(Pgd(steps=2), 5))
    assert isinstance(_Noise(), Attack)
    assert Evaluation(torch.tensor([True, False]), {}).to_data()["natural"] == 0.5
