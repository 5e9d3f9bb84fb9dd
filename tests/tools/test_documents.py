"""The documents say what is there: files and functions of docs/ARCHITECTURE.md, and the links of all."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
import yaml

import hf_gallery as gallery
from hf_gallery.variants import VARIANTS

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("eval/**/README.md"), *ROOT.glob("tests/**/*.md")]


def names_in(tree):
    """Names that a module or class defines."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, node
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Name):
                yield target.id, None


def test_the_places_in_the_architecture_are_there():
    """`path` is a file or folder, `path:Class.method` what it defines."""
    places = [x for x in re.findall(r"`([\w./]+/[\w./:]*)`", ARCHITECTURE) if "NAME" not in x]
    assert len(places) > 50
    for place in places:
        path, _, name = place.partition(":")
        assert (ROOT / path).exists(), f"{path} is gone"
        node = ast.parse((ROOT / path).read_text(encoding="utf-8")) if name else None
        for part in filter(None, name.split(".")):
            defined = dict(names_in(node))
            assert part in defined, f"{path} has no {name}"
            node = defined[part]


def test_the_architecture_names_all():
    """Every variant with its twin, every law with its number, every file of the models."""
    for name in VARIANTS:
        assert f"tests/plain/{name}.py" in ARCHITECTURE
    for path in (ROOT / "tests" / "laws").glob("test_law_*_*.py"):
        number = path.name.split("_")[2]
        assert re.search(rf"^{number}\. \*\*", ARCHITECTURE, re.MULTILINE), path.name
    for path in (ROOT / "hf_gallery" / "models").glob("*.py"):
        if not path.name.startswith(("__", "configuration_", "modeling_", "attention_")):
            assert f"`hf_gallery/models/{path.name}`" in ARCHITECTURE, path.name


def letters_of_shapes(text):
    """The letters in shapes such as (B or 1, H, C + T, D): brackets of sizes and nothing else."""
    size = r"(?:[A-Z][a-z]?\'?|\d+|any|columns|batch|rows|\.\.\.|k|g|t|s|n)"
    for shape in re.findall(
        rf"(?<!\w)\((?:{size}(?: (?:or|[*+]) {size}| {size})*, ?)+(?:{size}(?: (?:or|[*+]) {size})*)?\)", text
    ):
        yield from re.findall(r"[A-Z][a-z]?", shape)


def test_a_letter_of_a_shape_has_one_meaning():
    """The letters of shapes in the library's comments are those of the table, and each stands there once."""
    table = ARCHITECTURE.split("| letter | meaning | letter | meaning |")[1].split("\n\n")[0]
    cells = [cell for line in table.splitlines()[2:] for cell in line.strip("|").split("|")[::2]]
    listed = [letter for cell in cells for letter in re.findall(r"[A-Za-z]+", cell)]
    assert len(set(listed)) == len(listed)
    used = {}
    for path in (ROOT / "hf_gallery" / "models").glob("*.py"):
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        said = "\n".join(t.string for t in tokens if t.type == tokenize.COMMENT or t.string.startswith('"""'))
        used |= dict.fromkeys(letters_of_shapes(said), path.name)
    assert {"B", "T", "S", "C", "H", "D", "E"} <= set(used)
    assert not (unlisted := {letter: path for letter, path in used.items() if letter not in listed}), unlisted


@pytest.mark.parametrize("name", ["limit", "keep", "infers", "far", "near"])
def test_a_name_with_two_meanings_does_not_come_back(name):
    """Fields and arguments of the forward's plan and of the caches; see Words and letters."""
    for path in (ROOT / "hf_gallery" / "models").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = getattr(node, "attr", None) or getattr(node, "arg", None)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found = node.target.id
            assert found != name, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "pictures").glob("*")), ids=lambda path: path.name)
def test_pictures_are_small_and_shown(path):
    """Each that docs/screenshots.py makes stands in a document."""
    assert path.suffix == ".png" and path.stat().st_size <= 200_000
    assert any(f"pictures/{path.name})" in document.read_text(encoding="utf-8") for document in DOCUMENTS)


def test_the_citation_has_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == gallery.__version__ and cited["license"] == "Apache-2.0"
    assert [x["url"] for x in cited["references"]] == [variant.paper for variant in VARIANTS.values()]
    assert [x["title"] for x in cited["references"]] == [variant.paper_title for variant in VARIANTS.values()]


def test_hooks_are_tools_of_the_test_extra():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        assert hook["language"] == "system" and f'"{hook["entry"].split()[0]}"' in (ROOT / "setup.py").read_text()


def test_mypys_disabled_codes_only_shrink():
    """And bodies of the library's functions are checked, annotated or not."""
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = [{"override", "misc", "attr-defined"}]
    allowed.append(allowed[0] | {"operator", "arg-type", "union-attr"})  # in models
    found = re.findall(r"^disable_error_code = \[(.*?)\]", settings, re.M | re.S)
    assert len(found) == 2
    for codes, at_most in zip(found, allowed, strict=True):
        assert set(re.findall(r'"([a-z-]+)"', re.sub("#.*", "", codes))) <= at_most
    (checked,) = re.findall(r"^module = (\[.*\])\ncheck_untyped_defs = true$", settings, re.M)
    assert ast.literal_eval(checked) == ["hf_gallery.models.*", "hf_gallery.training.*"]


HEADLESS = re.compile(r"(What|Whether|Which|How|Who|Where|Whose|That)\b")
HARD_GOING = re.compile(
    r"\bso many\b|\bmanieth\b|\b[Ll]ikewise\b|\b(scale|pairs?|bias|gate) a head\b|what else there is"
)
FOLDERS = ("hf_gallery", "eval", "examples", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb_or_a_noun(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            said = ast.get_docstring(node) or ""
            assert not HEADLESS.match(said), f"{getattr(node, 'name', path.name)}: {said[:80]}"
            assert not HARD_GOING.search(said), f"{getattr(node, 'name', path.name)}: {HARD_GOING.search(said)}"
