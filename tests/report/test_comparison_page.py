"""The table and page of a comparison: what was measured is there, what was not is absent, names are escaped."""

import copy

import pytest

from nas.report.comparison_page import render
from nas.report.comparison_table import ABSENT, certified_at, columns, interval, markdown, spread

CHECKS = [
    {"name": "logits", "verdict": "pass", "detail": "fine"},
    {"name": "noise", "verdict": "warn", "detail": "<b> a little"},
]


def contender(name, worst, **more):
    run = {
        "seed": 0,
        "natural": 0.9,
        "worst_case": worst,
        "interval": [worst - 0.1, worst + 0.1],
        "digest": "abc",
        "checks": CHECKS,
        "training": [{"epoch": i, "validation_robust": worst, "validation_natural": 0.9} for i in (0, 1)],
    }
    return {
        "name": name,
        "network": name,
        "method": {"class": "Trades", "attack": {"class": "Pgd", "steps": 3, "threat_model": {}}, "beta": 6.0},
        "epochs": 4,
        "passes": {"forward": 3, "backward": 3, "preparation": 0, "total": 12345.0, "relative": 1.5},
        "runs": [run],
        "natural": {"mean": 0.9, "deviation": None},
        "attacks": {"pgd|20": {"mean": worst, "deviation": 0.01}},
        "worst_case": {"mean": worst, "deviation": 0.012},
        "interval": [worst - 0.1, worst + 0.1],
        "masking": {"verdict": "warn", "checks": {"noise": 1}},
        **more,
    }


FAILED = {
    key: value
    for key, value in contender("wild", 0.1).items()
    if key not in ("natural", "attacks", "worst_case", "interval", "masking")
} | {"runs": [{"seed": 0, "failed": "the loss is nan"}]}


def results(*contenders):
    return {
        "name": "mine & yours",
        "command": "nas compare mine",
        "seeds": [0],
        "equal": "passes",
        "reference": contenders[0]["name"],
        "threat_model": {"norm": "linf", "epsilon": 0.1},
        "data": {"name": "digits", "train": 100, "test": 50, "digest": "def", "input_shape": [1, 8, 8], "classes": []},
        "genotype": {"space": "plain"},
        "attacks": {"pgd|20": "PGD-20, linf"},
        "contenders": list(contenders),
        "recipe": {"name": "mine"},
        "recipe_text": 'name = "mine"\n',
        "measured": {each["name"]: {"seconds": [12.25], "memory": 3 * 2**20} for each in contenders},
        "environment": {"torch": "2"},
        "verdict": ["One <line>."],
    }


def test_the_table_in_markdown():
    lines = markdown(results(contender("base", 0.5), contender("other", 0.25))).splitlines()
    assert lines[0] == "mine & yours: digits, linf 0.1, 50 test images, 1 seed."
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0].startswith(r"| contender | natural | worst case | 95 % interval | masking | pgd\|20 | epochs |")
    assert rows[2] == ("| base | 90.0 | 50.0 ± 1.2 | 40.0 to 60.0 | ▲ warn | 50.0 ± 1.0 | 4 | 1.50 | 12.2 | 3.0 MiB |")
    assert "* One <line>." in lines
    assert "certified" not in "".join(rows).lower() and "Certified" not in lines[-1] and "detector" not in lines[-1]


def test_a_failed_training_is_a_row_that_says_so():
    given = results(contender("base", 0.5), FAILED)
    row = next(line for line in markdown(given).splitlines() if line.startswith("| wild"))
    assert row.startswith(f"| wild | {ABSENT} | {ABSENT} | {ABSENT} | failed, see below | {ABSENT} |")
    page = render(given)
    assert "the loss is nan" in page and "failed, see below" in page


def test_columns_know_what_they_show():
    shown = {column.title: column for column in columns(results(contender("base", 0.5)))}
    assert shown["pgd|20"].share(contender("a", 0.25)) == 0.25 and shown["pgd|20"].attack
    assert shown["worst case"].share(contender("a", 0.25)) == 0.25
    assert shown["pgd|20"].share(FAILED) is None and shown["seconds"].share(contender("a", 0.25)) is None


def test_numbers():
    assert spread({"mean": 0.1234, "deviation": None}) == "12.3"
    assert spread({"mean": 1.0, "deviation": 0.0}) == "100.0 ± 0.0"
    assert spread(None) == interval(None) == ABSENT
    found = {"radii": [0.0, 0.1, 0.2], "certified_accuracy": [0.9, 0.6, 0.3]}
    assert [certified_at(found, radius) for radius in (0.0, 0.05, 0.1, 0.2, 0.3)] == [0.9, 0.6, 0.6, 0.3, 0.0]


CERTIFIED = {
    "settings": "smoothing sigma 0.1",
    "n": 30,
    "sigma": 0.1,
    "radii": [0.0, 0.1],
    "certified_accuracy": [0.8, 0.4],
    "abstained": 0.1,
}
ROW = {"n": 40, "successful": 20, "detected": 0.75, "interval": [0.5, 0.9], "auc": 0.8}
NONE = {"n": 40, "successful": 0, "detected": None, "interval": None, "auc": None}
DETECTION = {
    "detector": "squeezing",
    "false_positives": 0.05,
    "without": 0.5,
    "attacks": {"pgd|20": ROW, "adaptive": NONE},
}


def test_the_page_shows_what_was_measured():
    page = render(
        results(
            contender("base", 0.5),
            contender("smooth", 0.3, certification=CERTIFIED),
            contender("guarded", 0.4, detection=DETECTION, network="base"),
        )
    )
    for text in (
        "One &lt;line&gt;.",
        "mine &amp; yours",
        "&lt;b&gt; a little",
        "PGD-20, linf",
        "Trades (attack Pgd [steps 3], beta 6)",
    ):
        assert text in page, text
    for text in ("80.0, 40.0", "smoothing sigma 0.1", "20 of 40", "75.0%", "0.800", "the networks of base", "12.3 k"):
        assert text in page.replace("\N{NO-BREAK SPACE}", " "), text
    assert page.count("<svg") == 4
    assert "http" not in page and "<b>" not in page


def test_what_was_not_measured_is_absent():
    page = render(results(contender("base", 0.5)))
    for text in ('id="certified"', 'id="detection"', "± sample deviation"):
        assert text not in page
    assert page.count("<svg") == 3
    last_only = contender("base", 0.5)
    del last_only["runs"][0]["training"][0]["validation_robust"]
    assert render(results(last_only)).count("<svg") == 2


@pytest.mark.parametrize("change", [lambda r: r, copy.deepcopy])
def test_identical_results_give_an_identical_page(change):
    given = results(contender("base", 0.5), contender("other", 0.25))
    assert render(given) == render(change(given))
