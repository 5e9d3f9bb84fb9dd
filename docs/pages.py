"""Pages of the documentation's site, made by mkdocs (see mkdocs.yml) from what stands elsewhere: README and the
documents beside this file, the table of architectures, the modeling files, their plain twins and the model cards.

A file of the repository that a page names, `path.py` or `path.py:Class.method`, becomes a link to its lines, and links
between the repository's documents become links between pages.
"""

from __future__ import annotations

import ast
import functools
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from hf_gallery.cards import drawing_text
from hf_gallery.drawing import draw
from hf_gallery.variants import VARIANTS, Variant

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.compile(r"`python (examples/\w+\.py) [^`]+`")
PLACE = re.compile(r"`([\w./]+/[\w]+\.py)(?::([\w.]+))?`")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
# Pages that documents of the repository become; a section of the guide is a page of its own.
DOCUMENTS = {
    "README.md": "index.md",
    "docs/ARCHITECTURE.md": "architecture.md",
    "docs/RESULTS.md": "results.md",
    "eval/results/README.md": "measured.md",
    "eval/tasks/README.md": "guides/tasks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "model_cards": "architectures/index.md",
}
REFERENCE = {
    "The cache": ["hf_gallery.models.cache.GalleryCache"],
    "Attention": [f"hf_gallery.models.{x}" for x in ("spans", "attention", "attention_problem", "positions")],
    "One forward": [
        f"hf_gallery.models.{x}" for x in ("backbone", "context", "states", "segments", "folding", "memory")
    ],
    "Training": ["hf_gallery.training.trainer", "hf_gallery.training.lanes"],
    "Data": [f"hf_gallery.data.{x}" for x in ("corpus", "catalogue", "tasks", "reasoning", "stories", "tokenizer")],
    "Conversion and the Hub": ["hf_gallery.convert", "hf_gallery.hub", "hf_gallery.cards"],
    "What is seen": [
        f"hf_gallery.{x}"
        for x in ("intervals", "roads", "drawing", "looking.text", "looking.watch", "looking.reach", "looking.worth")
    ],
    "Table of architectures": ["hf_gallery.variants"],
}


class Docstrings(griffe.Extension):
    """Docstrings as pages show them: examples are code, not quotations, and a field's comment says what it is."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            example = r"((?:^>>> .*\n(?:(?!>>>).+\n)*)+)"
            text = f"{obj.docstring.value}\n"
            obj.docstring.value = re.sub(example, r"```pycon\n\1```\n", text, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        comment = re.search(r"  # (.+)$", attr.source.splitlines()[-1] if attr.source else "")
        if attr.docstring is None and comment:
            attr.docstring = griffe.Docstring(f"{comment[1]}.", parent=attr)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Gives the site its order."""
    guides = [{title: f"guides/{slug(title)}.md"} for title in guide()]
    config.nav = [
        {
            "Start": [
                "index.md",
                {"What works": "works.md"},
                {"Contributing": "contributing.md"},
                {"Changes": "changelog.md"},
            ]
        },
        {
            "Guides": [
                {"Train on your own text": "guides/train.md"},
                *guides,
                {"Tasks of lm-eval": "guides/tasks.md"},
                {"Add a variant": "guides/add.md"},
            ]
        },
        {
            "Architectures": [
                "architectures/index.md",
                *({v.title: f"architectures/{name}.md"} for name, v in VARIANTS.items()),
                {"How all are built": "architecture.md"},
            ]
        },
        {"Results": ["results.md", {"All that was measured": "measured.md"}]},
        {
            "Reference": [
                *({title: f"reference/{slug(title)}.md"} for title in REFERENCE),
                *({v.title: f"reference/{name}.md"} for name, v in VARIANTS.items()),
            ]
        },
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Takes the documents' files away, and makes the pages."""
    for file in list(files):
        if file.src_uri.endswith(".md"):
            files.remove(file)
    site = Site(config, files)
    text = read("README.md")
    works = section(text, "What works")
    site.page("index.md", text.replace(works, ""), "README.md")
    site.page("works.md", works.replace("## ", "# ", 1), "README.md")
    for path, page in DOCUMENTS.items():
        if path.endswith(".md") and path != "README.md":
            site.page(page, read(path), path)
    for title, part in guide().items():
        if title == "On a GPU":  # beside what it does, how fast
            part += "\n" + section(text, title).partition("\n")[2].replace("](", "](../")
        site.page(f"guides/{slug(title)}.md", part.replace("## ", "# ", 1), "docs/GUIDE.md")
    site.page("guides/train.md", section(text, "Train on your own text").replace("## ", "# ", 1), "README.md")
    adding = ("Adding a variant", "The layer's contract", "Adding an ability", "Adding a checkpoint format")
    parts = [section(read("docs/ARCHITECTURE.md"), title) for title in adding]
    site.page("guides/add.md", "# Add to the gallery\n\n" + "\n".join(parts), "docs/ARCHITECTURE.md")
    site.page("architectures/index.md", overview(), "README.md")
    for name, variant in VARIANTS.items():
        site.asset(f"drawings/{name}.svg", draw(name).encode())
        site.page(f"architectures/{name}.md", architecture(variant), "README.md")
        own = [variant.config.__module__, variant.model.__module__]
        site.page(f"reference/{name}.md", reference(variant.title, own), "README.md")
    for title, modules in REFERENCE.items():
        site.page(f"reference/{slug(title)}.md", reference(title, modules), "README.md")
    site.code()
    return files


# ---- pages


def overview() -> str:
    """All architectures on a page: what they see, and drawings."""
    lines = ["# Architectures", "", "All are one idea, an interval of positions that a query may see; see"]
    lines += ["[how all are built](docs/ARCHITECTURE.md).", ""]
    for v in VARIANTS.values():
        lines += [f"## {v.title}", "", f"{v.about} [More](architectures/{v.name}.md)", "", picture(v), ""]
    return "\n".join(lines)


def architecture(v: Variant) -> str:
    """The page of one architecture."""
    modeling = ROOT / Path(*v.model.__module__.split(".")).with_suffix(".py")
    code, twin = modeling.relative_to(ROOT).as_posix(), f"tests/plain/{v.name}.py"
    said = ast.get_docstring(ast.parse(modeling.read_text(encoding="utf-8"))) or ""
    card = read(f"model_cards/{v.name}.md").split("---\n", 2)[2]
    rows = equations()
    parts = [
        f"# {v.title}",
        f"{v.authors}, [{v.paper_title}]({v.paper}). In a line: {v.idea}.",
        v.about,
        f"- A query at position p sees {v.sees}.\n- From one call to the next it carries {v.carries}.",
        f"## What a query sees\n\n{picture(v)}",
        f"Drawn from the model's own intervals. Other settings: `hf-gallery spans {v.name} --set NAME=VALUE`.",
        f"## Equations\n\nFrom the head of `{code}`:\n\n{said}",
        "### Where each is computed\n\n| equation | computed in |\n|---|---|\n" + "\n".join(rows[v.short]),
        "What all architectures share:\n\n| equation | computed in |\n|---|---|\n" + "\n".join(rows["All six"]),
        f"## The same as plain loops\n\n`{twin}` holds no more than the paper says; a test holds the model to it.",
        f"```python\n{read(twin).rstrip()}\n```",
        strengths(v),
        section(card, "Limits"),
    ]
    claims = [row for row in claimed() if v.authors in row]
    if claims:
        head = "| claim | paper | here | measured |\n|---|---|---|---|\n"
        parts.append("## What its paper claims, and what came out here\n\n" + head + "\n".join(claims))
    parts += [section(card, title) for title in ("Results", "How it was measured")]
    parts.append(f"Classes and arguments: [reference](reference/{v.name}.md).")
    return "\n\n".join(filter(None, parts))


def picture(v: Variant) -> str:
    return f"![{drawing_text(v)}](drawings/{v.name}.svg)"


def reference(title: str, modules: list[str]) -> str:
    """A page of what docstrings say."""
    parts = [f"# {title}"]
    for module in modules:
        fields = "\n    options:\n      show_if_no_docstring: true" if ".configuration_" in module else ""
        parts.append(f"::: {module}{fields}")
    return "\n\n".join(parts)


def equations() -> dict[str, list[str]]:
    """Rows of the table of where each equation is, by its headings."""
    rows: dict[str, list[str]] = {}
    for line in section(read("docs/ARCHITECTURE.md"), "Where each equation is").splitlines():
        heading = re.fullmatch(r"\| \*\*(.+)\*\* \| \|", line)
        if heading:
            rows[heading[1]] = []
        elif rows and line.startswith("| "):
            rows[next(reversed(rows))].append(line)
    return rows


def strengths(v: Variant) -> str:
    """Tasks that it does best in the standard run, of the table of who does; empty if it is not in that run."""
    results = read("docs/RESULTS.md")
    names = {contestant.label for contestant in v.contestants}
    if not any(f"\n| {name} |" in results for name in names):
        return ""
    table = results.split("| at | best | the first has |\n")[1].split("\n\n")[0]
    rows = [row for row in table.splitlines()[1:] if any(f" {x} " in row or f" {x}, " in row for x in names)]
    said = "## Where it is strong, as measured\n\nIn the [standard run](docs/RESULTS.md), of models of one size, "
    if not rows:
        return said + "it is first at nothing; its numbers stand below."
    head = "| at | best | the first has |\n|---|---|---|\n"
    return said + "it is first here, or not surely behind the first:\n\n" + head + "\n".join(rows)


def claimed() -> list[str]:
    """Rows of the table of what papers claim."""
    table = read("docs/RESULTS.md").split("| claim | paper | here | measured |\n")[1].split("\n\n")[0]
    return table.splitlines()[1:]


def guide() -> dict[str, str]:
    """Sections of the guide by title."""
    parts = re.split(r"^(?=## )", read("docs/GUIDE.md"), flags=re.MULTILINE)[1:]
    return {part.splitlines()[0][3:]: part for part in parts}


def section(text: str, title: str) -> str:
    """A section of a document with its heading, which begins with the title; empty if there is none."""
    found = re.search(rf"^## {re.escape(title)}.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found[0].rstrip() + "\n" if found else ""


@functools.cache
def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


# ---- links


class Site:
    """The files of a build. Pages of code are those that other pages lead to."""

    def __init__(self, config: MkDocsConfig, files: Files):
        self.config, self.files = config, files
        self.codes: set[str] = set()

    def page(self, uri: str, text: str, origin: str) -> None:
        """Adds a page of what stands in the file `origin` of the repository, from where its links lead."""
        parts = FENCED.split(re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL))
        parts[::2] = [self._linked(part, uri, origin) for part in parts[::2]]
        self.files.append(File.generated(self.config, uri, content="".join(parts)))

    def asset(self, uri: str, content: bytes) -> None:
        """Adds a picture, once."""
        if self.files.get_file_from_path(uri) is None:
            self.files.append(File.generated(self.config, uri, content=content))

    def code(self) -> None:
        """Adds a page for each file that others lead to, with an address for each of its lines."""
        for path in sorted(self.codes):
            text = read(path)
            ticks = "`" * (1 + max(map(len, re.findall("`+", text + "``"))))
            head = "---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n\n"
            page = f"{head}# {path}\n\n{ticks}{{.python linenums='1'}}\n{text}{ticks}\n"
            self.files.append(File.generated(self.config, code_page(path), content=page))

    def _linked(self, text: str, uri: str, origin: str) -> str:
        """Text with its links, and the places in code that it names, as links from the page `uri`."""

        def link(found: re.Match) -> str:
            image, label, target = found.groups()
            if "://" in target:
                return found[0]
            to = self._target(target, origin)
            if to is None:
                return label
            return f"{image}[{label}]({away(to, uri)})"

        def place(found: re.Match) -> str:
            path, name = found.groups()
            if not (ROOT / path).is_file():
                return found[0]
            self.codes.add(path)
            line = f"#__codelineno-0-{line_of(path, name)}" if name else ""
            label = f"{Path(path).name}:{name}" if name else path
            return f"[`{label}`]({away(code_page(path), uri)}{line})"

        def example(found: re.Match) -> str:
            self.codes.add(found[1])
            return f"[{found[0]}]({away(code_page(found[1]), uri)})"

        return EXAMPLE.sub(example, PLACE.sub(place, LINK.sub(link, text)))

    def _target(self, target: str, origin: str) -> str | None:
        """The page, with its fragment, that a link in a document leads to; None if the site has none."""
        path, _, fragment = target.partition("#")
        inside = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path)) if path else origin
        if inside == "docs/GUIDE.md":
            titles = {slug(title) for title in guide()}
            return f"guides/{fragment if fragment in titles else slug(next(iter(guide())))}.md"
        fragment = f"#{fragment}" if fragment else ""
        if inside in DOCUMENTS:
            return DOCUMENTS[inside] + fragment
        if inside.startswith("model_cards/"):
            return f"drawings/{Path(inside).name}"
        if inside.endswith(".png"):
            self.asset(inside, (ROOT / inside).read_bytes())
            return inside
        if inside.split("/")[0] in ("architectures", "reference", "drawings"):  # pages that have no file
            return inside + fragment
        return None


def away(to: str, uri: str) -> str:
    """The way from one page to another, or within one."""
    path, hash_, fragment = to.partition("#")
    return (posixpath.relpath(path, posixpath.dirname(uri)) if path != uri or not hash_ else "") + hash_ + fragment


def code_page(path: str) -> str:
    return f"code/{path.removesuffix('.py')}.md"


@functools.cache
def line_of(path: str, name: str) -> int:
    """The line on which a file defines a name, Class.method for one within another.

    Raises ValueError if it does not, so that a page never leads to a line that is about something else."""
    body = ast.parse(read(path)).body
    line = 1
    for part in name.split("."):
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
            if part in names:
                line, body = node.lineno, getattr(node, "body", [])
                break
        else:
            raise ValueError(f"{path} defines no {name}; a document names it")
    return line
