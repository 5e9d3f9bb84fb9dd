"""The documentation's site: it builds without a warning, every link in it leads somewhere, and the page of each
architecture shows what its model and files say. Needs `pip install -e ".[docs]"`."""

import contextlib
import functools
import html
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from hf_gallery.drawing import draw
from hf_gallery.variants import VARIANTS

pytest.importorskip("mkdocs", reason='the site needs mkdocs: pip install -e ".[docs]"')
pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a strict build."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    about = {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | about, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site):
    """Every page's text in HTML by its address within the site."""
    return {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def lead(pages, page, href):
    """The file that a link on `page` leads to, and the fragment."""
    path, _, fragment = href.partition("#")
    target = os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page
    if target not in pages and not re.search(r"\.[a-z]+$", target):
        target = os.path.normpath(os.path.join(target, "index.html"))
    return target, fragment


def test_every_link_leads_somewhere_and_nothing_is_fetched(site, pages):
    """Pages, fragments and pictures; lines of code too. Styles, scripts and pictures come from the site itself."""
    ids = {name: set(re.findall(r'\bid="([^"]+)"', page)) for name, page in pages.items()}
    broken, followed = [], 0
    for name, page in pages.items():
        for tag, to in re.findall(r'<(\w+)\b[^>]*?\b(?:href|src)="?([^"\s>]+)', page):
            to = html.unescape(to)
            if re.match(r"\w+:|/", to):
                assert tag == "a" or name == "404.html", (name, tag, to)
                continue
            target, fragment = lead(pages, name, to)
            followed += 1
            if not (site / target).is_file() or (fragment and fragment not in ids[target]):
                broken.append((name, to))
    assert not broken and followed > 1000


def winners():
    """Rows of the results' table of who does best: at what, who, how much."""
    table = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8").split("| at | best | the first has |")[1]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.split("\n\n")[0].splitlines()[2:]]


@pytest.mark.parametrize("name", VARIANTS)
def test_an_architecture_has_its_page(site, pages, name):
    """Idea, drawing, equations with links to the very lines that compute them, plain twin, limits."""
    about, place = VARIANTS[name], f"architectures/{name}/index.html"
    page = BeautifulSoup(pages[place], "html.parser")
    text = page.get_text()
    assert about.title in page.h1.get_text() and about.about.split("`")[0] in text
    (picture,) = page.select('article img[src$=".svg"]')
    assert (site / lead(pages, place, picture["src"])[0]).read_text(encoding="utf-8") == draw(name)
    compared = json.loads((ROOT / "eval" / "results" / "standard.json").read_text(encoding="utf-8"))["summary"]
    if any(contestant.name in compared for contestant in about.contestants):
        strong = page.find(id="where-it-is-strong-as-measured").find_next(["table", "h2"])
        own = [row for row in winners() if any(x.label in row[1] for x in about.contestants)]
        assert [cell.get_text() for cell in strong.select("td")] == [cell for row in own for cell in row]
    for limit in about.limits:
        assert limit.replace("`", "") in text
    twin = (ROOT / "tests" / "plain" / f"{name}.py").read_text(encoding="utf-8")
    assert twin.rstrip() in text
    lines = [link for link in page.select("article a[href*='#__codelineno']") if link.code and ":" in link.get_text()]
    assert len(lines) > 8
    for link in lines:
        target, fragment = lead(pages, place, link["href"])
        path = ROOT / f"{os.path.dirname(target).removeprefix('code/')}.py"
        line = path.read_text(encoding="utf-8").splitlines()[int(fragment.rsplit("-", 1)[1]) - 1]
        defined = link.get_text().split(":")[1].split(".")[-1]
        assert re.match(rf"\s*(def|class) {defined}\b|{defined}\b", line), (link.get_text(), line)
    assert "Recall by distance" in text


def test_the_guide_is_whole(pages):
    """Every section of the guide is a page, and every setting of an architecture stands in the reference."""
    for title in re.findall(r"^## (.+)$", (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert f"guides/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}/index.html" in pages, title
    for name, about in VARIANTS.items():
        page = pages[f"reference/{name}/index.html"]
        for field in about.config.__annotations__:
            assert f'id="{about.config.__module__}.{about.config.__name__}.{field}"' in page, field


# One page of each kind: what is on it, and how it is laid out.
KINDS = (
    "",
    "works/",
    "guides/training/",
    "guides/examples/",
    "architecture/",
    "architectures/",
    "architectures/block_recurrent_transformer/",
    "results/",
    "measured/",
    "reference/the-cache/",
    "reference/longformer/",
    "code/hf_gallery/models/modeling_memorizing_transformer/",
)

# Only what is shown: links of headings appear under the mouse, drawers and menus when they are opened.
VISIBLE = """[...document.querySelectorAll("body *")].filter(
  e => !e.checkVisibility({ opacityProperty: true, visibilityProperty: true })).forEach(e => e.remove())"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_kind_of_page_is_readable(site, dark):
    """On a phone no page is wider than the screen; in either scheme no letter is smaller than 12 pixels or has less
    contrast than 4.5 to 1, and no script fails."""
    browsers = pytest.importorskip("browser")
    if browsers.FOUND is None:
        pytest.skip("no Chromium here")
    wrong = {}
    with served(site) as address, browsers.Browser() as browser:
        for page in KINDS:
            for width in (390, 1280):
                browser.open(Address(address + page), width=width, dark=dark)
                browser.evaluate(VISIBLE)
                said = browser.look()
                scheme = browser.evaluate("document.body.dataset.mdColorScheme")
                assert scheme == ("slate" if dark else "default") and said["texts"] > 20
                found = {name: said[name] for name in ("problems", "small", "faint") if said[name]}
                if said["overflow"] > 0:
                    found["overflow"] = said["overflow"]
                if found:
                    wrong[page, width] = found
    assert not wrong


class Address(str):
    """An address that a browser opens as it opens files."""

    def as_uri(self):
        return str(self)


@contextlib.contextmanager
def served(site):
    """The address of the site on this machine."""
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *message):
        """Says nothing."""
