"""Colours of all pages: text can be read on every ground it stands on, in light and in dark."""

import re
from importlib import resources

import pytest

from nas.analysis.drawing import FAMILIES

CSS = resources.files("nas.report").joinpath("style.css.jinja").read_text("utf-8")
BLOCKS = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
SCHEMES = {
    name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", BLOCKS[at])) for at, name in enumerate(("light", "dark"))
}


def luminance(colour):
    """Relative luminance of "#rrggbb" (WCAG 2.1)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """From 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_measure():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(scheme):
    colours = SCHEMES[scheme]
    for text in ("ink", "muted", "accent", "pass", "warn", "fail"):
        for ground in ("ground", "card", "accent-ground"):
            found = contrast(colours[text], colours[ground])
            assert found >= 4.5, f"{text} on {ground}: {found:.2f}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_stand_out(scheme):
    """Graphics need 3:1."""
    colours = SCHEMES[scheme]
    lines = [colours[f"series-{number}"] for number in range(1, 7)]
    lines += [shades[scheme == "dark"] for shades in FAMILIES.values()]
    for ground in ("ground", "card"):
        assert min(contrast(line, colours[ground]) for line in lines) >= 3
