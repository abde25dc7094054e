"""The report: complete, escaped, self-contained, the same every time, and content with missing parts."""

import copy
import html
import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from nas.report.page import count, duration, quantity, render, write_report
from search_spaces.genotype import StageGenotype, genotype_from_data

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """Checks that tags are balanced and remembers elements, attributes and the text of each element by tag."""

    def __init__(self, page):
        super().__init__()
        self.open = []
        self.elements = []
        self.texts = {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(text.strip())

    def tags(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


@pytest.fixture(scope="module")
def page(complete_results):
    return render(complete_results)


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


@pytest.fixture
def quick(results):
    """Results without what takes most of the time of a page: curves and the cells of many models."""
    del results["search"], results["models"][3:-1]
    for model in results["models"]:
        del model["training"]
    return results


def test_all_parts_are_shown(page, outline, complete_results):
    assert "not run" not in page
    headings = [text for text in outline.texts["h2"] if text]
    assert headings == [
        *("Verdict", "Models", "Masking checks", "Architecture", "Search", "Retraining", "Dense against compressed"),
        *("Adversarial images", "Size", "Export", "How it was made"),
    ]
    for model in complete_results["models"]:
        assert f"{100 * model['worst_case']:.1f}%" in page
        assert f"{100 * model['interval'][0]:.1f}% to {100 * model['interval'][1]:.1f}%" in page
        assert f"{model['nonzero']:,}" in page
        assert model["digest"] in page
    for settings in complete_results["models"][0]["attack_settings"].values():
        assert settings in page
    assert complete_results["search"]["warnings"][0] in page
    assert complete_results["command"] in page
    assert genotype_from_data(complete_results["genotype"]).digest in page
    assert "1 h 02 min" not in page
    assert "2 h 03 min" in page
    pictures = [attributes["aria-label"] for attributes in outline.tags("svg") if "aria-label" in attributes]
    assert len(pictures) == 1 + 5 + 3
    # Each kind of cell over the epochs and by edge.
    assert page.count('class="heat"') == 3 + 3
    # The cells of the searched network and of the five random ones.
    assert page.count('class="cell-drawing"') == 3 + 5 * 3


def test_the_searched_network_stands_out_in_more_than_colour(page):
    rows = re.findall(r'<tr class="searched">.*?</tr>', page, flags=re.DOTALL)
    assert len(rows) == 1
    assert ">searched<" in rows[0]
    assert "tr.searched > * { background: var(--accent-ground); font-weight: 700; }" in page


def test_grades_are_words(page):
    assert "✓ pass" in page
    assert "▲ warn" in page
    assert "✗ fail" in page


def test_structure(outline):
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert len(outline.tags("caption")) == len(outline.tags("table")) > 8
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.tags("th"))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(attributes.get("role") == "img" for attributes in outline.tags("svg"))
    for attributes in outline.tags("a"):
        assert attributes["href"].removeprefix("#") in ids
    assert outline.tags("html")[0]["lang"] == "en"


def test_self_contained(page, outline):
    assert "http://" not in page
    assert "https://" not in page
    assert all(image["src"].startswith("data:image/png;base64,") for image in outline.tags("img"))
    assert not re.search(r"@import|<link|<script|<iframe|<object", page)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", page))
    for _, attributes in outline.elements:
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)


def test_every_wide_thing_scrolls_in_its_own_box(page):
    assert len(re.findall(r'<div class="scroll"[^>]*>\s*<table', page)) == page.count("<table")
    assert len(re.findall(r'<div class="scroll"[^>]*><svg', page)) == page.count('class="cell-drawing"')


def test_light_dark_and_print(page):
    assert "@media screen and (prefers-color-scheme: dark)" in page
    assert "@media print" in page


def test_identical_results_give_identical_files(page, results, tmp_path):
    path = tmp_path / "report.html"
    write_report(results, path)
    assert path.read_bytes() == page.encode()


def test_rendering_leaves_the_results_alone(quick):
    before = copy.deepcopy(quick)
    render(quick)
    assert quick == before


HOSTILE = "<script>alert('x')</script><img src=//e.example onerror=\"a()\">{{ 7*7 }}$_{\x00\ud800"


def test_hostile_names_are_escaped(results, tmp_path):
    results.update(name=HOSTILE, command=HOSTILE, verdict=[HOSTILE], environment={HOSTILE: HOSTILE})
    results["data"].update(name=HOSTILE, classes=[HOSTILE] * 3, digest=HOSTILE)
    results["threat_model"]["norm"] = HOSTILE
    results["timing"] = {HOSTILE: 1.0}
    results["export"] = [{"file": HOSTILE, "difference": 0.0}]
    results["search"]["warnings"] = [HOSTILE]
    results["gallery"]["pairs"][0].update(label=HOSTILE, seen=HOSTILE)
    results["recipe_text"] = HOSTILE
    results["search"]["epochs"] = results["search"]["epochs"][:2]
    for row in results["search"]["epochs"]:
        row.update(stage=HOSTILE, alpha_entropy={HOSTILE: 1.0}, mixing_weights={HOSTILE: {HOSTILE: [0.5], "b": [0.5]}})
    results["genotype"]["space"] = HOSTILE[:60]
    results["analysis"]["topology"][0].update(kind=HOSTILE, operations={HOSTILE: 1})
    results["analysis"]["complexity"]["sections"][0]["name"] = HOSTILE
    results["models"] = results["models"][:2]
    for model in results["models"]:
        model.update(name=HOSTILE, role=HOSTILE, digest=HOSTILE, attacks={HOSTILE: 0.5})
        model.update(
            attack_settings={HOSTILE: HOSTILE}, checks=[{"name": HOSTILE, "verdict": HOSTILE, "detail": HOSTILE}]
        )
        model["training"] = model["training"][:2]
    path = tmp_path / "report.html"
    write_report(results, path)
    page = path.read_text(encoding="utf-8")
    outline = Outline(page)
    assert not outline.tags("script")
    assert all(image["src"].startswith("data:image/png;base64,") for image in outline.tags("img"))
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert "{{ 7*7 }}" in page
    # A grade that nobody knows is not a pass.
    assert "✓ pass" not in page
    assert "▲ warn" in page


PARTS = (
    "name",
    "command",
    "seed",
    "threat_model",
    "data",
    "verdict",
    "genotype",
    "analysis",
    "models",
    "export",
    "gallery",
)


@pytest.mark.parametrize("part", [*PARTS, "schema", "environment", "timing", "throughput"])
def test_any_part_may_be_missing(quick, part):
    quick.pop(part, None)
    Outline(render(quick))


def test_any_entry_of_a_part_may_be_missing(quick):
    whole, data = quick["models"][0], quick["data"]
    quick["models"] = [{key: value for key, value in whole.items() if key != left_out} for left_out in whole]
    Outline(render(quick))
    del quick["models"], quick["genotype"]
    for kept in data:
        Outline(render(quick | {"data": {kept: data[kept]}}))
    for kept in ("topology", "complexity"):
        Outline(render(quick | {"analysis": {kept: quick["analysis"][kept]}}))


def test_what_is_missing_is_said(quick):
    page = render({})
    assert page.count("not run") >= 11
    assert "No searched network was evaluated" in page
    Outline(page)
    page = render(quick)
    assert page.count("not run") == 2
    assert "No search belongs to this report." in page


def test_a_search_whose_epochs_lack_entries(results):
    results["models"] = []
    results["search"]["epochs"] = [{"epoch": 0}, {"epoch": 1, "gamma": None, "natural_accuracy": 0.5}]
    page = render(results)
    assert "Accuracy on the architecture part" in page
    assert "Gamma, the weight" not in page


def test_other_forms_of_genotype(quick):
    quick["genotype"] = StageGenotype("plain", (2, 3), (16, 24)).to_data()
    del quick["analysis"]
    page = render(quick)
    assert "Stages of genotype" in page
    assert "The topology of the cells was not analysed" not in page
    quick["genotype"] = {"schema": 99}
    assert "The genotype cannot be shown: genotype schema version 99 is not known" in render(quick)
    nodes = [[["skip_connect", 0]] * 60] * 4
    layout = {"sections": ["normal"], "ratio": [1], "reduction": "reduction"}
    quick["genotype"] = {"schema": 1, "space": "darts", "layout": layout, "cells": {"normal": nodes}}
    assert "too many operations for a readable picture" in render(quick)


def test_attacks_with_other_settings_are_kept_apart(quick):
    quick["models"][1]["attack_settings"]["pgd"] = "10 steps only"
    page = render(quick)
    row = re.search(r"<td[^>]*>10 steps only</td><td>(.*?)</td>", page)
    assert row is not None
    assert row[1] == "compressed"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (643_264, "643 k"), (999_999, "1.00 M"), (1_240_151_040, "1.24 G")],
)
def test_quantities(value, text):
    assert quantity(value) == text.replace(" ", "\N{NO-BREAK SPACE}")


def test_numbers():
    assert [duration(seconds) for seconds in (0.04, 59.94, 245, 3599.6, 7620, None)] == [
        *("0.0 s", "59.9 s", "4 min 05 s", "1 h 00 min", "2 h 07 min", "\N{EN DASH}"),
    ]
    assert count(4520394) == "4,520,394"
    assert count(None) == "\N{EN DASH}"


def test_retraining_tells_what_was_lost_after_the_best_epoch(quick):
    assert "below it by" not in render(quick), "records from before that was kept"
    first, second = quick["models"][:2]
    validated = {"validation_natural": 0.9, "validation_robust": 0.5}
    first["training"] = [
        {"epoch": epoch, **validated, "robust_overfitting": gap} for epoch, gap in ((0, 0.9), (1, 0.034))
    ]
    second["training"] = [{"epoch": 0, **validated, "robust_overfitting": 0.0, "warnings": ["epoch 3: <collapse>"]}]
    page = render(quick)
    assert f"3.4 points ({first['name']}); 0.0 points ({second['name']})." in page
    assert f"▲ warning</span> {second['name']}: epoch 3: &lt;collapse&gt;" in page
    Outline(page)


def test_dense_against_compressed(quick):
    page = render(quick)
    table = page[page.index("before and after compression") : page.index("Adversarial images</h2>")]
    lines = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")]
    rows = {line[0]: line[1:] for line in lines if line}
    assert rows["Non-zero parameters"] == ["50,418", "21,007", "41.7%"]
    assert rows["Bytes stored, zeros left out"] == ["100,836", "100,836", "100.0%"]
    assert rows["Worst case"] == ["90.3%", "89.7%", "\N{MINUS SIGN}0.6 points"]
    speeds = ["5.63\N{NO-BREAK SPACE}k", "5.66\N{NO-BREAK SPACE}k", "1.01 times as fast"]
    assert rows["Images per second, eager, batch 64"] == speeds
    assert "compressed, batch 64, eager: no speed-up (1.01 times as fast as searched)." in table
    del quick["models"][1]
    assert "No compressed network was evaluated." in render(quick)


def test_images_that_are_not_inside_the_page_are_left_out(quick):
    assert render(quick).count("<img ") == 3
    quick["gallery"]["pairs"][0]["change"] = "https://e.example/track.png"
    page = render(quick)
    assert "<img " not in page
    assert "e.example" not in page


def test_what_does_not_pass_is_told_outside_the_folded_list(quick):
    page = render(quick)
    told = page[page.index('id="checks"') : page.index("<summary>What every check found")]
    assert "plain, a larger epsilon lowers accuracy to chance: at epsilon 0.5 accuracy is still 31%" in told
    assert "searched, transfer from another network: the transfer attack is 0.4 points stronger" in told


def test_mixing_weights_need_not_have_been_recorded(results):
    """Runs from before they were."""
    results["models"] = []
    for row in results["search"]["epochs"]:
        del row["mixing_weights"]
    assert "Mixing weights" not in render(results)


def test_files_to_save_first_are_named(quick):
    assert "Save the recipe" not in render(quick)
    quick.update(command="nas train recipe.toml --genotype genotype.json", recipe_text="name = 'x'")
    page = render(quick)
    assert "Save the recipe below as <code>recipe.toml</code>" in page
    assert "Save the genotype below as <code>genotype.json</code>" in page
    assert "name = &#39;x&#39;" in page


def test_the_genotype_can_be_copied(quick):
    page = render(quick)
    text = re.search(r"to train it elsewhere</summary>\n<pre[^>]*><code>(.*?)</code>", page, flags=re.DOTALL)
    assert json.loads(html.unescape(text[1])) == quick["genotype"]
    assert text[1].count("\n") < 15
