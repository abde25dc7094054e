"""Heat maps of mixing weights: the colour tells more from less, the opacity how much, and words say the same."""

import math
import re
import xml.etree.ElementTree as ET

from nas.report.heat_map import heat_map, span_of

ROWS = {"sep_conv_3x3": [0.25, 0.5], "skip_connect": [0.25, 0.2], "max_pool_3x3": [0.25, 0.2], "none": [0.25, 0.1]}


def draw(rows, columns=("0", "1"), **more):
    return heat_map("Mixing", rows, columns, span_of([rows]), axis="epoch", **more)


def fields(picture):
    """(class, opacity, tooltip) of every field, the legend's left out."""
    found = re.findall(r'<rect class="(\w+)".*?fill-opacity="([\d.]+)"><title>(.*?)</title>', picture)
    return [(kind, float(opacity), words) for kind, opacity, words in found if not words.startswith("weight")]


def test_more_and_less_than_an_even_mixture():
    shown = fields(draw(ROWS))
    assert len(shown) == 8
    assert {opacity for _, opacity, words in shown if words == "epoch 0: 0.250"} == {0.0}
    # A quarter is even: twice as much is one step of log2; 0.1 is 1.32 steps less, which is the largest.
    assert ("more", round(1 / math.log2(2.5), 2), "epoch 1: 0.500") in shown
    assert ("less", 1.0, "epoch 1: 0.100") in shown


def test_maps_of_one_search_share_a_scale():
    pale, strong = {"a": [0.49], "b": [0.51]}, {"a": [0.9], "b": [0.1]}
    assert span_of([pale, strong]) == span_of([strong]) > span_of([pale])
    assert span_of([pale]) == math.log2(1.25), "a difference of two per cent is not painted in full colour"


def test_words_say_what_colours_do():
    root = ET.fromstring(draw(ROWS))
    assert root.get("role") == "img"
    by_id = {child.get("id"): child.text for child in root if child.get("id")}
    title, description = (by_id[name] for name in root.get("aria-labelledby").split())
    assert title == "Mixing"
    assert description.startswith(
        "Weights at epoch 0 and at epoch 1. sep conv 3\N{MULTIPLICATION SIGN}3: 0.250 to 0.500"
    )


def test_hostile_names_and_weights_of_nothing():
    picture = draw({"<script>\x00\ud800": [0.0, 1.0], "b": [1.0, 0.0]})
    ET.fromstring(picture)
    assert "<script" not in picture


def test_stages_and_many_epochs():
    picture = draw({name: [0.5] * 200 for name in ("a", "b")}, [str(epoch) for epoch in range(200)], boundaries=[20])
    assert picture.count("<line") == 1
    assert "stage 2" in picture
    names = [int(text) for text in re.findall(r">(\d+)</text>", picture)]
    assert 10 < len(names) < 30, "names of epochs lie on top of each other"
