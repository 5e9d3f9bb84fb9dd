"""The page of results in a real browser, at the width of a phone and of a desk: it draws, fits and can be read."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eval import report

STANDARD = Path(__file__).parents[2] / "eval" / "results" / "standard.json"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

WATCH = """<script>
window.problems = [];
addEventListener("error", e => problems.push(String(e.message)));
console.error = (...said) => problems.push(said.join(" "));
</script>"""
TELL = """<script>
addEventListener("load", () => setTimeout(() => {
  const texts = [...document.querySelectorAll("body *")].filter(e => !e.closest("script, style, details:not([open])")
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.getBoundingClientRect().height);
  const box = e => e.getBoundingClientRect();
  parent.postMessage({
    problems,
    plots: document.querySelectorAll(".plot.js-plotly-plot").length,
    curves: document.querySelectorAll(".plot .trace").length,
    narrowest: Math.min(...[...document.querySelectorAll(".plot .nsewdrag")].map(e => box(e).width)),
    small: texts.filter(e => parseFloat(getComputedStyle(e).fontSize) < 10).map(e => e.outerHTML).slice(0, 5),
    texts: texts.length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    asked: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).map(e => e.name),
  }, "*");
}, 500));
</script>"""


@pytest.fixture(scope="module")
def results():
    return json.loads(STANDARD.read_text())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_in_a_browser(width, results, tmp_path):
    page = report.page(results).replace("<head>", "<head>" + WATCH).replace("</body>", TELL + "</body>")
    (tmp_path / "page.html").write_text(page)
    # A frame, since a window cannot be as narrow as a phone.
    (tmp_path / "frame.html").write_text(
        f'<iframe src="page.html" width="{width}" height="2000" style="border: 0"></iframe><pre></pre><script>'
        'addEventListener("message", e => document.querySelector("pre").textContent = JSON.stringify(e.data))</script>'
    )
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--window-size=1600,2200"]
    done = subprocess.run(
        [BROWSER, *arguments, "--dump-dom", (tmp_path / "frame.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = json.loads(re.search(r"<pre>(\{.+\})</pre>", done.stdout, re.DOTALL).group(1).replace("&quot;", '"'))
    figures = report.figures(results)
    assert said["problems"] == [] and said["asked"] == []
    assert said["plots"] == len(figures) >= 6
    assert said["curves"] >= sum(len(figure.data) for _, _, figure in figures)
    assert said["texts"] > 100 and said["small"] == []
    assert said["overflow"] <= 0, "the page is wider than the screen"
    assert said["narrowest"] > min(width, 1152) / 3
