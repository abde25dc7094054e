"""The page of an attacked network: what was measured is there, what was not is absent, names are escaped."""

import torch

from nas.evaluation.gallery import Pair
from nas.report.attack_page import render

CHECKS = [
    {"name": "logits", "verdict": "pass", "detail": "fine"},
    {"name": "noise", "verdict": "fail", "detail": "<b>"},
]
RESULT = {
    "n": 40,
    "natural": 0.9,
    "worst_case": 0.5,
    "interval": [0.35, 0.65],
    "seed": 3,
    "digest": "abc",
    "attacks": {"pgd": 0.6, "fab": 0.5},
    "attack_settings": {"pgd": "PGD-5", "fab": "FAB"},
    "checks": CHECKS,
}
MORE = {
    "per_class": [{"class": 1, "n": 4, "natural": 1.0, "worst_case": 0.25, "interval": [0.05, 0.7]}],
    "left_out": {"rays": "knows l_inf only"},
    "transfer": {"from": {"plain": 0.8}, "worst_case": 0.8, "attack": "PGD-20"},
    "curves": {
        "epsilon": [{"epsilon": 0.0, "accuracy": 0.9}, {"epsilon": 0.1, "accuracy": 0.4}],
        "steps": [{"steps": 1.0, "accuracy": 0.7}, {"steps": 50.0, "accuracy": 0.5}],
    },
    "corruptions": {
        "accuracy": {"fog": {"1": 0.8, "5": 0.3}},
        "mean": 0.55,
        "absent": ["frost"],
    },
}
CLASSES = ("cat", "<script>")


def _pairs(channels):
    clean = torch.rand(channels, 8, 12)
    return [Pair(clean, (clean + 0.1).clamp(0, 1), 0, 0, 1), Pair(clean, clean, 0, 0, 0)]


def test_everything_that_was_measured_is_there():
    page = render({**RESULT, **MORE}, _pairs(3), CLASSES, "digits: <searched>")
    for text in ("PGD-5", "50.0%", "knows l_inf only", "plain", "fog", "frost", "over the size of the ball"):
        assert text in page
    assert "Do not trust the worst case: noise failed" in page
    assert page.count("data:image/png;base64,") == 6
    assert page.count("<svg") == 2
    assert "<script>" not in page and "digits: &lt;searched&gt;" in page and "&lt;b&gt;" in page


def test_what_was_not_measured_is_absent():
    page = render({**RESULT, "checks": CHECKS[:1]}, [], CLASSES, "net")
    for text in ("<svg", "Common corruptions", "Transfer", '<h2 id="gallery"', "Classes"):
        assert text not in page
    assert "No check for masked gradients or failed attacks failed" in page


def test_grey_and_many_channels_are_shown():
    for channels in (1, 2, 5):
        assert render(RESULT, _pairs(channels), CLASSES, "net").count("data:image/png;base64,") == 6
