"""A variant's page can be read beside its paper: it is short, and what two variants would repeat stands in neither."""

import ast
from pathlib import Path

import pytest

import hf_gallery
from hf_gallery.variants import VARIANTS

MODELS = Path(hf_gallery.__file__).parent / "models"
# Lines of a page at most, by variant; others' may be as long as the longest.
MOST = {"transformer": 500, "transformer_xl": 400}
PAGES = [*(f"modeling_{name}.py" for name in VARIANTS), "longformer_layer.py", "longformer_xl_layer.py"]
BLOCK = 6


@pytest.mark.parametrize("name", VARIANTS)
def test_a_page_is_short(name):
    lines = (MODELS / f"modeling_{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < MOST.get(name, 550)


def statements(path):
    """(number, text) of a file's lines of code, without imports, docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("  # ")[0].strip()
        if line and number not in left_out and not line.startswith("#"):
            yield number, line


def test_no_six_lines_stand_in_two_pages():
    seen = {}
    for page in PAGES:
        lines = list(statements(MODELS / page))
        for i in range(len(lines) - BLOCK + 1):
            block = tuple(line for _, line in lines[i : i + BLOCK])
            first = seen.setdefault(block, (page, lines[i][0]))
            assert first[0] == page, f"{page}:{lines[i][0]} repeats {first[0]}:{first[1]}:\n" + "\n".join(block)
