"""Pictures of curves: well-formed, complete, the page's colours, the same bytes everywhere."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

from nas.report.curves import Interval, Series, curves, intervals

SERIES = [Series("robust", range(5), [0.1, 0.2, None, 0.5, 0.6]), Series("natural", range(5), [0.5] * 5, 1, 1)]


def texts(picture):
    return ["".join(text.itertext()) for text in ET.fromstring(picture).iter("text")]


def test_a_picture_holds_its_legend_axis_and_stages():
    picture = curves("Accuracy", SERIES, unit="share", boundaries=[2.5], top=1.0)
    assert {"robust", "natural", "epoch", "stage 1", "stage 2", "100%"} <= set(texts(picture))
    label = ET.fromstring(picture).get("aria-label")
    assert label == (
        "Accuracy. robust: 10.0% at epoch 0, 60.0% at epoch 4; natural: 50.0% at epoch 0, 50.0% at epoch 4"
    )


def test_names_are_shown_as_they_are():
    hostile = ["$x_{", "_hidden", "<script>&", "日本語", "#fe0001", "0.031372549"]
    picture = curves("Loss", [Series(name, [0, 1], [1.0, 2.0]) for name in hostile], unit="number")
    assert set(hostile) <= {text.strip() for text in texts(picture)}
    picture = intervals("Worst case", [Interval(name, 0.5, (0.4, 0.6), 0.9) for name in hostile])
    assert set(hostile) <= set(texts(picture))


def test_nothing_reaches_beyond_the_picture():
    picture = curves("Accuracy", SERIES, unit="share", boundaries=[2.5])
    assert "http" not in picture
    assert "<style" not in picture
    assert "<script" not in picture
    ids = set(re.findall(r' id="([^"]+)"', picture))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', picture)) == ids
    other = curves("Accuracy", SERIES[:1], unit="share")
    assert not ids & set(re.findall(r' id="([^"]+)"', other))


def test_colours_are_left_to_the_page():
    picture = curves("Accuracy", SERIES, unit="share", boundaries=[2.5])
    assert not re.search(r"#[0-9a-f]{6}[;\"]", picture)
    assert "var(--series-1)" in picture
    assert "var(--series-2)" in picture
    assert "currentColor" in picture


def test_nothing_to_draw():
    assert curves("Gamma", [Series("gamma", [0, 1], [None, float("nan")])], unit="number") == ""
    assert curves("Gamma", [], unit="number") == ""
    assert intervals("Worst case", [Interval("a", None, None, None)]) == ""


def test_odd_values_are_left_out():
    picture = curves("Loss", [Series("loss", range(4), [1.0, float("inf"), float("nan"), 2.0])], unit="number")
    assert "nan" not in picture
    assert "inf" not in picture
    assert "at epoch 3" in picture


def test_a_single_epoch_is_a_point():
    assert "<use" in curves("Loss", [Series("loss", [0], [1.0])], unit="number")


def test_the_same_bytes_in_another_process_with_other_settings(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsvg.fonttype: path\naxes.facecolor: red\n")
    code = (
        "import sys; from tests.report.test_curves import SERIES, curves;"
        "sys.stdout.write(curves('Accuracy', SERIES, unit='share', boundaries=[2.5]))"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = {**os.environ, "MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7", "PYTHONPATH": root}
    other = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, cwd=tmp_path)
    assert other.stdout.decode() == curves("Accuracy", SERIES, unit="share", boundaries=[2.5])


def test_many_names_leave_room_for_the_lines():
    series = [Series(f"contender {i}", [0, 1], [0.1, 0.9], i) for i in range(24)]
    few, many = (curves("All", series[:n], unit="share") for n in (4, 24))
    height = [float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1]) for svg in (few, many)]
    # matplotlib warns, which is an error here, where the axes have no room left.
    assert height[1] > height[0] + 9 * 0.19 * 72 - 1
