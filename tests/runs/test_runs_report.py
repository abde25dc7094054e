"""What a finished run's page is made of, and what it needs beside results.json."""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path

from tiny_runs import nas

from runs.directory import open_run
from runs.recipe import read_table


def test_the_page_shows_what_the_run_recorded(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    # Three kinds of cells over the epochs, and by edge; the page of a small run is small.
    assert page.count('class="heat"') == 6
    assert len(page) < 1_500_000
    gallery = json.loads((finished_run / "report" / "gallery.json").read_text())
    assert page.count("<img ") == 3 * len(gallery["pairs"])
    assert gallery["fallen"] <= gallery["looked_at"] <= 32 and len(gallery["pairs"]) <= 8
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_the_command_of_the_page_makes_the_recipe_again(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text(encoding="utf-8")
    shown = re.search(r"Run it again</h3>\n<pre[^>]*><code>(.*?)</code>", page)
    assert shown is not None
    words = shlex.split(html.unescape(shown[1]))
    assert words[:3] == ["nas", "run", "digits"]
    assert read_table("digits", words[4::2]) == open_run(finished_run).table


def test_runs_from_before_images_and_weights_were_kept(run_copy: Path) -> None:
    (run_copy / "report" / "gallery.json").unlink()
    records = (run_copy / "search" / "metrics.jsonl").read_text().splitlines()
    old = [{key: value for key, value in json.loads(line).items() if key != "mixing_weights"} for line in records]
    (run_copy / "search" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in old))
    assert nas("report", run_copy).status == 0
    page = (run_copy / "report.html").read_text(encoding="utf-8")
    assert "<img " not in page and 'class="heat"' not in page
    (run_copy / "search" / "metrics.jsonl").write_text("{")
    assert "metrics.jsonl is not JSON lines" in nas("report", run_copy).refusal
