"""No function of the library takes more arguments by position than a reader can tell apart."""

import ast
from pathlib import Path

import pytest

import hf_gallery

FOLDER = Path(hf_gallery.__file__).parent
MOST = 6
# torch reads an operator's schema from flat parameters, see operators.py.
OPERATORS = {
    *("_forward_kernels", "_backward_kernels", "_backward_shapes", "_decode_kernels"),
    *("_operator_forward", "_operator_backward", "_retrieve_from_columns"),
}


def functions(tree, of_class=False):
    """All functions, with whether they stand in a class."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, of_class
        yield from functions(node, isinstance(node, ast.ClassDef))


def is_exempt(function, names):
    """A forward of a whole model, whose arguments transformers names and orders; a kernel, whose parameters its
    launch gives by name; an operator's body."""
    is_kernel = any(isinstance(x, ast.Name) and x.id == "jit" for x in function.decorator_list)
    return is_kernel or function.name in OPERATORS or (function.name == "forward" and names[:1] == ["input_ids"])


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_function_has_more_than_six_positional_parameters(path):
    for function, in_class in functions(ast.parse(path.read_text(encoding="utf-8"))):
        names = [x.arg for x in [*function.args.posonlyargs, *function.args.args]]
        if in_class and names[:1] in (["self"], ["cls"], ["ctx"]):
            names = names[1:]
        assert len(names) <= MOST or is_exempt(function, names), f"{function.name}, line {function.lineno}: {names}"
