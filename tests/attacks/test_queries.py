"""The oracle counts every image it is shown and remembers the first that broke its sample inside the ball."""

import torch
from torch import nn

from nas.attacks.queries import Oracle
from nas.threat_model import ThreatModel


class _Bright(nn.Module):
    """Class 1 where the mean is above one half."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_the_first_misclassified_query_inside_the_ball_is_the_result():
    x = torch.tensor([0.4, 0.3, 0.6]).view(3, 1, 1, 1).expand(3, 1, 2, 2).contiguous()
    y = torch.zeros(3, dtype=torch.int64)
    oracle = Oracle(_Bright(), x, y, ThreatModel("linf", 0.2))
    everyone = torch.arange(3)
    assert torch.allclose(oracle.margins(x, everyone), torch.tensor([-0.2, -0.4, 0.2]))
    assert oracle.unbroken.tolist() == [0, 1]
    oracle.margins(x[:2] + 0.3, oracle.unbroken)  # misclassified, but outside the ball
    assert oracle.unbroken.tolist() == [0, 1]
    oracle.margins(x[:1] + 0.15, torch.tensor([0]))
    oracle.margins(x[:1] + 0.2, torch.tensor([0]))  # later ones do not count
    attempt = oracle.attempt(x + 0.5)
    assert attempt.queries.tolist() == [4, 2, 1]
    assert attempt.broken_at.tolist() == [3, -1, 1]
    expected = torch.stack([x[0] + 0.15, x[1] + 0.2, x[2]])
    assert torch.allclose(attempt.x_adv, expected)


def test_no_answer_is_misclassified():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    nn.init.constant_(model[1].weight, torch.nan)
    x = torch.rand(2, 1, 2, 2)
    oracle = Oracle(model, x, torch.tensor([0, 1]), ThreatModel())
    oracle.logits(x, torch.arange(2))
    assert oracle.broken_at.tolist() == [1, 1]
