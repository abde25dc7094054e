"""The page of a study: everything that was found stands on it, what was not found is said, nothing breaks out of it."""

from __future__ import annotations

import dataclasses
import itertools
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nas.report.study_page import SHOWN, doubts, render, write_study
from nas.studies.observation import Observation, by_configuration


def observations(names: tuple[str, ...] = ("a",)) -> list[Observation]:
    found = []
    for index, (depths, name) in enumerate(itertools.product(itertools.product((1, 2, 3), repeat=3), names)):
        parts = tuple(100 * depth for depth in depths)
        for seed in (0, 1):
            found.append(
                Observation(
                    f"{name}{index}", "plain", depths, (8, 16, 32), sum(parts) + 50, 900 * sum(depths), parts, parts,
                    seed, 5, 0.9, 0.5 + 0.01 * depths[0], 200, measures={"lipschitz": 2.0},
                )
            )  # fmt: skip
    return found


def results_of(found: list[Observation], **changes: Any) -> dict[str, Any]:
    configurations = [
        {
            "configuration": name, "space": "plain", "depths": list(group[0].depths), "widths": list(group[0].widths),
            "options": {}, "parameters": group[0].parameters, "macs": group[0].macs, "seeds": [0, 1], "natural": 0.9,
            "robust": group[0].robust, "interval": [group[0].robust - 0.02, group[0].robust + 0.02],
        }
        for name, group in by_configuration(found).items()
    ]  # fmt: skip
    return {
        "name": "mine",
        "command": "nas study width-depth mine",
        "seeds": [0, 1],
        "threat_model": {"norm": "linf", "epsilon": 0.1},
        "data": {"name": "digits", "train": 1437, "test": 200, "classes": list("0123456789"), "digest": "abc"},
        "attacks": {"pgd": "PGD, 20 steps"},
        "trials": {"complete": len(found), "pruned": 0, "failed": 0, "running": 0},
        "observations": [
            {"observation": dataclasses.asdict(one), "checks": [{"name": "steps", "verdict": "pass"}]} for one in found
        ],
        "configurations": configurations,
        "verdict": ["The best is 3-3-3."],
        "claims": [
            {"statement": "More is more.", "source": "A, 2021", "verdict": verdict, "effect": effect, "unit": "points",
             "interval": None if effect is None else [0.1, 0.3], "n": 27, "how": "permutation"}
            for verdict, effect in (
                ("supported", 0.2),
                ("contradicted", -1.5),
                ("not supported by this data", 0.0),
                ("cannot be tested", None),
            )
        ],
        "rankings": [{"name": "parameters", "tau": 0.31, "interval": [0.1, 0.5], "n": 27}],
        "recipe": {"study.space": "plain"},
        "recipe_text": "[study]\nspace = \"plain\"\n",
        **changes,
    }  # fmt: skip


class Reader(HTMLParser):
    """The text of a page, and where its elements begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "path", "use", "circle", "rect", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_all_that_was_found_stands_on_the_page(tmp_path: Path) -> None:
    found = observations()
    results = results_of(found)
    write_study(results, found, tmp_path / "a.html")
    write_study(results, found, tmp_path / "b.html")
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    reader = read(page)
    text = " ".join(reader.text)
    for row in results["configurations"]:
        assert row["configuration"] in text
    assert text.count("More is more.") == 2 * 4  # in the table, and with how it was tested
    for words in (
        "✓ supported",
        "✗ contradicted",
        "▲ not supported by this data",
        "cannot be tested",
        "The best is 3-3-3.",
    ):
        assert words in text
    assert "-1.5 points" in text and "0.31" in text and f"The first {SHOWN} of 27" in text
    assert reader.tags.count("svg") == 4
    # Self-contained: nothing is fetched.
    assert not [
        word for word in ("src=", "@import", "http://", "https://") if word in page.replace("http://www.w3", "")
    ]


def test_what_is_missing_is_said() -> None:
    found = observations()
    page = render(results_of(found, claims=[], rankings=[]), found)
    assert "Too few finished trials" in page and 'id="predictors"' not in page


def test_names_cannot_break_out() -> None:
    found = observations(names=("<script>alert(1)</script>",))
    page = render(results_of(found, name="<b>x"), found)
    assert "<script>" not in page and "<b>x" not in page


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ({"complete": 50, "pruned": 3, "failed": 0, "running": 0}, "3 of 53 trials were stopped early"),
        ({"complete": 50, "pruned": 0, "failed": 2, "running": 0}, "2 of 52 trials diverged"),
        ({"complete": 50, "pruned": 0, "failed": 0, "running": 4}, "4 of 54 trials are not finished"),
    ],
)
def test_trials_that_are_missing_are_counted(trials: dict[str, int], words: str) -> None:
    found = observations()
    assert any(line.startswith(words) for line in doubts(results_of(found, trials=trials)))
    assert doubts(results_of(found)) == []


def test_networks_not_to_believe_are_named() -> None:
    found = [dataclasses.replace(one, natural=0.1) if one.configuration == "a3" else one for one in observations()]
    results = results_of(found)
    results["observations"][0]["checks"][0]["verdict"] = "fail"
    lines = doubts(results)
    assert lines[0].startswith("No better than guessing among 10 classes: a3.")
    assert lines[1].endswith("overstated: a0 (steps).")
