"""The page in a real browser: nothing is wider than the screen, and the console stays silent."""

import re
import shutil
import subprocess

import pytest

from nas.report.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: install chromium to try pages in a browser"),
]

# The page lies in frames of exact width, since a window has a least one; the shipped page has no script.
PROBE = """<!DOCTYPE html><title>probe</title><body>
<iframe id="small" style="width:360px;height:800px;border:0"></iframe>
<iframe id="large" style="width:1440px;height:900px;border:0"></iframe><script>
const found = [];
for (const name of ["small", "large"]) {
  const frame = document.getElementById(name);
  frame.onload = () => {
    const inner = frame.contentDocument;
    inner.querySelectorAll("details").forEach(one => { one.open = true; });
    found.push(name + " " + inner.documentElement.scrollWidth + " of " + frame.contentWindow.innerWidth
      + ", table " + inner.querySelectorAll("table").length);
    document.title = found.sort().join("; ");
  };
  frame.src = "report.html";
}
</script>"""


def browse(page, profile):
    """The document as it stands in the end, and what the console said."""
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions"),
            *("--disable-background-networking", "--allow-file-access-from-files", "--enable-logging=stderr", "--v=0"),
            *(f"--user-data-dir={profile}", "--window-size=1500,1000", "--virtual-time-budget=10000"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_no_overflow_and_a_silent_console(complete_results, tmp_path):
    (tmp_path / "report.html").write_text(render(complete_results), encoding="utf-8")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE, encoding="utf-8")
    document, console = browse(probe, tmp_path / "profile")
    assert console == []
    found = re.search(r"<title>(.*?)</title>", document)[1]
    widths = re.findall(r"(large|small) (\d+) of (\d+), table (\d+)", found)
    assert [name for name, *_ in widths] == ["large", "small"], found
    for name, wide, screen, tables in widths:
        assert int(tables) > 8
        assert int(screen) == {"small": 360, "large": 1440}[name]
        assert int(wide) <= int(screen), f"{name}: {wide} pixels on {screen}"


def test_the_console_would_be_heard(tmp_path):
    page = tmp_path / "wrong.html"
    page.write_text("<script>console.error('heard')</script>", encoding="utf-8")
    assert "heard" in browse(page, tmp_path / "profile")[1][0]
