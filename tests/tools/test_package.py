"""Things that a user meets first: what installs, what imports, what is documented, and a README that works."""

import ast
import importlib
import inspect
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version
from typer.testing import CliRunner

import hf_gallery
import hf_gallery.data
import hf_gallery.training
from eval.benchmark import TASKS
from eval.cli import app
from eval.contestants import CONTESTANTS
from eval.outside import OUTSIDE
from eval.peers import PEERS
from eval.presets import PRESETS

ROOT = Path(__file__).parents[2]
SOURCES = [p for folder in ("hf_gallery", "eval", "tests") for p in sorted((ROOT / folder).rglob("*.py"))]
MODELS = sorted((ROOT / "hf_gallery" / "models").glob("*.py"))
# Packages that come with transformers, so that a model's code runs wherever transformers loads it.
CARRIED = {"torch", "transformers", "safetensors"}


def called(path):
    return path.relative_to(ROOT).as_posix()


def imports(path):
    """(module, level, names, guarded) of each import statement; guarded: in a try that handles ImportError."""
    found = []

    def visit(node, guarded):
        if isinstance(node, ast.Import):
            found.extend((alias.name, 0, [], guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level, [alias.name for alias in node.names], guarded))
        if isinstance(node, ast.Try):
            handled = {
                name.id for h in node.handlers if h.type for name in ast.walk(h.type) if isinstance(name, ast.Name)
            }
            for child in node.body:
                visit(child, guarded or bool(handled & {"ImportError", "ModuleNotFoundError"}))
            children = [*node.handlers, *node.orelse, *node.finalbody]
        else:
            children = list(ast.iter_child_nodes(node))
        for child in children:
            visit(child, guarded)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def third_party(path):
    """Top-level packages that a file imports, but for the standard library, this repository and files beside it."""
    beside = [*path.parent.glob("*.py"), *(ROOT / "eval" / "tasks").glob("*.py")]  # lm-eval puts a task's folder there
    if "tests" in path.parts:  # on pytest's path
        beside += [p for p in (ROOT / "tests").rglob("*") if p.is_dir() or p.suffix == ".py"]
    own = {"hf_gallery", "eval", *(p.stem for p in beside)}
    names = {module.split(".")[0] for module, level, _, _ in imports(path) if level == 0}
    return names - own - set(sys.stdlib_module_names)


# ----------------------------------------------------------------------------------------------------------- setup.py


@pytest.fixture(scope="module")
def setup():
    """The arguments that setup.py gives to setuptools, which need not be installed."""
    given = {}
    fake = ModuleType("setuptools")
    fake.setup = given.update
    fake.find_packages = lambda include: include
    before = sys.modules.get("setuptools")
    sys.modules["setuptools"] = fake
    try:
        exec(
            compile((ROOT / "setup.py").read_text(encoding="utf-8"), ROOT / "setup.py", "exec"),
            {"__file__": ROOT / "setup.py"},
        )
    finally:
        del sys.modules["setuptools"]
        if before is not None:
            sys.modules["setuptools"] = before
    return given


def requirements(lines):
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in parsed}


def test_name_version_and_licence(setup):
    assert setup["name"] == "hf-gallery"
    assert setup["version"] == hf_gallery.__version__ == str(Version(hf_gallery.__version__))
    assert setup["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert setup["long_description"].startswith("# hf-gallery")


def test_python_versions(setup):
    allowed = SpecifierSet(setup["python_requires"])
    assert [v for v in ("3.9.20", "3.10.0", "3.11.9", "3.12.4", "3.13.1", "3.14.0") if v in allowed] == [
        "3.10.0",
        "3.11.9",
        "3.12.4",
        "3.13.1",
    ]


def test_requirements(setup):
    needed = requirements(setup["install_requires"])
    expected = "torch transformers huggingface-hub datasets evaluate faiss-cpu accelerate safetensors"
    assert set(expected.split()) <= set(needed)
    versions = ("4.57.3", "5.16.0", "5.17.0", "5.23.0", "5.99.0", "6.0.0")
    assert list(needed["transformers"].specifier.filter(versions)) == ["5.17.0", "5.23.0", "5.99.0"]


def test_ci_runs_what_a_newcomer_runs_and_constrains_nothing_but_the_oldest():
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", script], check=True)
    newest, oldest = script.read_text(encoding="utf-8").split("fresh oldest")
    assert [path.name for path in script.parent.iterdir()] == ["run"], "versions are capped in setup.py alone"
    assert not re.search("--constraint|PIP_CONSTRAINT|==", newest)
    for command in ('pip install -e ".[test]" && pytest', 'pip install -e ".[eval]" && python -m eval'):
        assert command in newest and command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "tests/laws/test_law_" in oldest and "--constraint" in oldest


def test_ci_tests_the_oldest_releases_that_are_allowed(setup):
    """The lines that .ci/run makes of setup.py are its lower bounds, and all that the library imports has one."""
    (line,) = re.findall(r"^(grep .*setup\.py.*?) >", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    pins = subprocess.run(["bash", "-c", line], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    asked = requirements([*setup["install_requires"], *setup["extras_require"]["test"]])
    floors = {r.name: s.version for r in asked.values() for s in r.specifier if s.operator == ">="}
    assert dict(pin.split("==") for pin in pins) == floors
    assert set(requirements(setup["install_requires"])) <= {canonicalize_name(name) for name in floors}


@pytest.mark.parametrize(("folder", "extra"), [("hf_gallery", None), ("eval", "eval"), ("tests", "test")])
def test_all_that_is_imported_is_required(setup, folder, extra):
    """Nothing has to be installed by hand beside what the README's commands install."""
    lines = setup["install_requires"] + (setup["extras_require"][extra] if extra else [])
    required = set(requirements(lines)) | {"packaging"}  # transformers requires it
    required |= {"triton"}  # torch brings it where there are GPUs, and all goes without it elsewhere
    if folder == "eval":  # peers are installed into environments of their own
        required |= set(requirements([line for peer in PEERS.values() for line in peer.requires]))
    extras = {"hf_gallery/harness.py": set(requirements(setup["extras_require"]["eval"]))}  # it says so in its errors
    extras["eval/gpu.py"] = {"fla"}  # timed where it is installed
    distributions = packages_distributions()
    for path in (p for p in SOURCES if called(p).startswith(folder + "/")):
        for name in third_party(path):
            owners = {canonicalize_name(owner) for owner in distributions.get(name, [name])}
            brought = required | extras.get(called(path), set())
            assert owners & brought, f"{called(path)} imports {name}, which no requirement brings ({owners})"


def test_all_folders_are_packages(setup):
    """find_packages passes over a folder without an __init__.py, and an install would lack it."""
    assert setup["packages"] == ["hf_gallery", "hf_gallery.*"]
    folders = {path.parent for path in (ROOT / "hf_gallery").rglob("*.py")}
    assert {called(folder) for folder in folders if not (folder / "__init__.py").exists()} == set()


# ------------------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("module", [hf_gallery, hf_gallery.data, hf_gallery.training], ids=lambda m: m.__name__)
def test_all_names_import(module):
    assert sorted(set(module.__all__)) == module.__all__
    for name in module.__all__:
        thing = getattr(module, name)
        assert isinstance(thing, dict) or thing.__module__.startswith(module.__name__)


def test_every_model_and_config_is_exported():
    for path in MODELS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = re.compile(r"Gallery\w+(Config|Model|For[A-Z]\w+)$|GalleryCache$")
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and named.match(node.name) and "PreTrained" not in node.name:
                if path.stem in ("configuration_base", "modeling_base"):
                    continue  # what the variants derive from
                assert node.name in hf_gallery.__all__, f"{called(path)} has {node.name}"


@pytest.mark.parametrize("path", MODELS, ids=called)
def test_model_files_travel(path):
    """A saved model takes these files along, and transformers follows `from .name import` alone: a file that imports
    otherwise would not find its siblings, and one that imports more would not run everywhere."""
    if path.name == "__init__.py":
        assert not imports(path)
        return
    siblings = {p.stem for p in MODELS} - {"__init__"}
    for module, level, names, guarded in imports(path):
        if level:
            assert level == 1 and module in siblings and names, f"from {'.' * level}{module} import {names}"
        else:
            top = module.split(".")[0]
            free = top in sys.stdlib_module_names or top in CARRIED
            assert free or (top in ("faiss", "triton") and guarded), f"imports {module}"


@pytest.mark.slow
def test_the_package_needs_nothing_of_the_evaluation():
    """Neither its code, nor what it alone installs, nor faiss, which many machines have no build of."""
    for path in SOURCES:
        if called(path).startswith("hf_gallery/"):
            assert not [m for m, level, _, _ in imports(path) if level == 0 and m.split(".")[0] in ("eval", "tests")]
    code = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *more):
        absent = name.split(".")[0] in {"faiss", "bs4", "eval", "tests"}
        return None if absent else self.finder.find_spec(name, *more)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
import hf_gallery, hf_gallery.data, hf_gallery.training
"""
    run(code, ROOT)


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.walk_packages(hf_gallery.__path__, "hf_gallery.")] + ["hf_gallery"]
)
def test_every_module_imports(module):
    importlib.import_module(module)


# ------------------------------------------------------------------------------------------------------- documentation


@pytest.mark.parametrize("path", [p for p in SOURCES if called(p).startswith(("hf_gallery/", "eval/"))], ids=called)
def test_docstrings(path):
    """Modules, and their public functions and classes, say what they are."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    kinds = (ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    silent = [node.name for node in nodes if not ast.get_docstring(node)]
    assert not silent
    assert ast.get_docstring(tree) or not text.strip()


def exported():
    modules = (hf_gallery, hf_gallery.data, hf_gallery.training)
    things = [getattr(module, name) for module in modules for name in module.__all__]
    return [thing for thing in things if callable(thing)]


@pytest.mark.parametrize("thing", exported(), ids=lambda thing: thing.__name__)
def test_docstrings_of_public_methods(thing):
    """A method says itself what it does, or has the words of the method that it replaces."""
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            if not name.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                assert inspect.getdoc(getattr(thing, name)), f"{thing.__name__}.{name}"


def test_no_file_knows_the_machine_it_was_written_on():
    roots = ("work", "tmp", "home", "Users", "root", "mnt")
    place = re.compile(r"(?<![\w.:/~-])/(" + "|".join(roots) + r")/\w|\b[A-Z]:\\\w")
    top = [p for p in ROOT.iterdir() if p.suffix in (".md", ".py", ".toml", ".cfg", ".txt")]
    files = [*SOURCES, *top, *(ROOT / ".ci").iterdir(), *(ROOT / "tests").rglob("*.json")]
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            found += [f"{called(path)}:{number}: {line.strip()}" for _ in place.finditer(line)]
    assert not found


# -------------------------------------------------------------------------------------------------------------- README

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "GUIDE.md").read_text(encoding="utf-8")
PAGES = {"README": README, "GUIDE": GUIDE}


def blocks(language, page="README"):
    """(line number of the first line, text, whether the block before comes first) of each fenced block."""
    lines = PAGES[page].splitlines()
    found, start = [], None
    for i, line in enumerate(lines):
        if start is None and line == f"```{language}":
            start = i + 1
        elif start is not None and line == "```":
            continues = start >= 2 and lines[start - 2] == "<!-- continues -->"
            found.append((start + 1, "\n".join(lines[start:i]), continues))
            start = None
    assert start is None
    return found


def run(code, folder):
    if folder != ROOT:
        (folder / "zoo").symlink_to(ROOT / "zoo")  # as in a checkout, where readers paste
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def chains(page):
    """Blocks that are pasted one after the other into one Python, each on its lines of the page."""
    found = []
    for line, code, continues in blocks("python", page):
        if continues:
            start, before = found[-1]
            code = before + "\n" * (line - 1 - before.count("\n")) + code
            found[-1] = start, code
        else:
            found.append((line, "\n" * (line - 1) + code))
    return found


@pytest.mark.parametrize(
    "code",
    [pytest.param(code, id=f"{page}_line_{line}") for page in PAGES for line, code in chains(page)],
)
def test_python_of_the_pages_runs_when_pasted(code, tmp_path):
    assert run(code, tmp_path).strip()  # and shows something


def test_readme_first_example_is_ten_lines():
    _, code, _ = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


@pytest.mark.parametrize(
    "command", ['pip install -e ".[eval]" && python -m eval', 'pip install -e ".[test]" && pytest']
)
def test_readme_has_the_two_commands(command):
    """Each alone in a block, to be copied with one click."""
    assert [code for _, code, _ in blocks("bash")].count(command) == 1


def commands():
    lines = [line for page in PAGES for _, code, _ in blocks("bash", page) for line in code.splitlines()]
    return [line for line in lines if line.startswith("python -m eval")]


@pytest.mark.parametrize("command", commands())
def test_commands_of_the_pages_exist(command):
    arguments = shlex.split(command, comments=True)[3:]
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0, result.output
    options = dict(zip(arguments, arguments[1:], strict=False))
    assert options.get("--preset", "quick") in PRESETS
    assert set(options.get("--variants", "transformer").split(",")) <= {*CONTESTANTS, *OUTSIDE}
    assert set(options.get("--tasks", "text").split(",")) <= set(TASKS)


def test_a_command_that_does_not_exist_would_be_found():
    """typer refuses what it does not know before it shows the help."""
    for arguments in (["--no-such-option"], ["no-such-command"], ["attention", "--no-such-option"]):
        assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 2


RESULTS = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")


def test_the_numbers_shown_are_those_of_the_results():
    """The text between the command and its end is what the command prints now."""
    blocks = re.findall(r"<!-- python -m eval (.+?) -->\n(.+?)\n<!-- end -->", RESULTS, re.DOTALL)
    assert blocks
    for command, shown in blocks:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0 and result.output.strip() == shown.strip(), command


def test_the_readme_is_short_and_repeats_the_results():
    """At most 220 lines, and its tables of results are those of docs/RESULTS.md."""
    assert len(README.splitlines()) <= 220
    (shown,) = re.findall(r"<!-- from docs/RESULTS.md -->\n(.+?)\n<!-- end -->", README, re.DOTALL)
    parts = shown.split("\n\n")
    assert len(parts) == 4 and all(f"{part}\n" in RESULTS for part in parts)


def test_readme_table_of_variants():
    """The heads in the table are those that there are."""
    listed = set()
    for row in re.findall(r"^\| \[(.+?)\]\(https://arxiv\.org/abs/[\d.]+\) .*\|(.+?)\|$", README, re.MULTILINE):
        name = "Gallery" + row[0].replace("-", "").replace(" ", "")
        listed |= {f"{name}For{head.strip()}" for head in row[1].split(",")}
    assert listed == {name for name in hf_gallery.__all__ if re.search(r"For[A-Z]", name)}


def test_readme_names_files_and_code_that_exist():
    for folder, files in re.findall(r"^    ([\w./]+/) +(.+)$", README, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
        for name in re.findall(r"\b\w+\.py\b", files):
            assert (ROOT / folder / name).is_file(), folder + name
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`(hf_gallery(?:\.\w+)+)`", README + GUIDE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    for name in set(re.findall(r"\bGallery\w+\b", README + GUIDE)):
        assert name in hf_gallery.__all__, name
