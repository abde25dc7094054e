"""Model cards say what was measured, and nothing that a name in them could say instead."""

import re
from dataclasses import replace

import pytest
import yaml

from nas.export.card import About, model_card, plain
from nas.export.package import ExportedFile

EVALUATION = {
    "threat_model": {"norm": "linf", "epsilon": 0.1},
    "n": 360,
    "seed": 3,
    "natural": 0.997,
    "attacks": {"pgd-20": 0.903},
    "attack_settings": {"pgd-20": "PGD-20, linf 0.1"},
    "worst_case": 0.897,
    "interval": [0.862, 0.925],
    "checks": [{"name": "zero gradients", "verdict": "pass", "detail": ""}],
}
ABOUT = About(
    name="mine: searched",
    size={"parameters": 26813, "nonzero": 14549, "macs": 410000, "bytes": {"dense": 113356}, "digest": "abc"},
    data={"name": "digits", "train": 1437, "test": 360, "digest": "d1"},
    recipe={"seed": 3, "train.epochs": 20, "evaluate.trials.0.name": "x"},
    seconds={"search": 43.5},
    evaluations=[EVALUATION],
    doubts=[],
    commands=["nas run digits"],
    environment={"torch": "2.15"},
)
HOSTILE = "---\nlicense: mit\n<script>alert(1)</script>|`x` [a](b) ``` \ud800 \U0001f600 # not a heading"


def test_a_card_says_what_was_measured_and_how(arnas):
    files = [ExportedFile("network.py", "py", 1e-6, 3e-6, 1e-7), ExportedFile("genotype.json", "json")]
    card = model_card(arnas.spec, ABOUT, files)
    for said in ("26,813", "14,549", "99.7%", "90.3%", "PGD-20", "86.2% to 92.5%",
                 "All 1 checks", "zero gradients", "mean 0.3, deviation 0.15", "nas run digits", "train.epochs = 20",
                 "3e-06", "1e-07", "genotype.json"):  # fmt: skip
        assert said in card, said
    assert "AutoAttack was not run" in card and "evaluate.trials" not in card


def test_what_was_not_measured_is_said(arnas):
    card = model_card(arnas.spec, replace(ABOUT, evaluations=[]), [])
    assert "not evaluated" in card and "model-index" not in card and "worst case" not in card.lower()
    failed = {"name": "gradients are true", "verdict": "fail", "detail": "they are not"}
    about = replace(ABOUT, evaluations=[{**EVALUATION, "checks": [failed]}], doubts=["may be overstated"])
    card = model_card(arnas.spec, about, [])
    assert "fail: gradients are true: they are not" in card and "* may be overstated" in card
    assert "unknown" in card and "Apache-2.0" in card


def test_names_are_text_in_front_matter_and_body(arnas):
    spec = replace(arnas.spec, classes=(HOSTILE, *arnas.spec.classes[1:]))
    evaluation = {**EVALUATION, "attacks": {HOSTILE: 0.5}, "attack_settings": {HOSTILE: HOSTILE}}
    about = replace(
        ABOUT, name=HOSTILE, data={**ABOUT.data, "name": HOSTILE}, evaluations=[evaluation], recipe={"name": HOSTILE}
    )
    card = model_card(spec, about, [])
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
    entries = yaml.safe_load(front)
    assert set(entries) == {"library_name", "license", "tags", "datasets", "model-index"}
    assert entries["license"] == "unknown" and len(entries["datasets"]) == 1 and "\U0001f600" in entries["datasets"][0]
    (model,) = entries["model-index"]
    (result,) = model["results"]
    assert result["task"]["type"] == "image-classification" and set(result["dataset"]) == {"type", "name"}
    assert [metric["value"] for metric in result["metrics"]] == [0.997, 0.897]
    outside = re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert body.count("```") == 4 and "```" not in outside
    assert not re.search(r"(?<!\\)<script", outside) and not re.search(r"(?<!\\)\[a\]", outside)
    assert not re.search(r"^(license|---|# not)", outside, flags=re.MULTILINE)


@pytest.mark.parametrize("text", ["a|b", "*bold*", "<b>", "line\nbreak", "`code`"])
def test_plain_text_has_no_unescaped_markup(text):
    assert not re.search(r"(?<!\\)[|*<>`\n]", plain(text))
