"""Every parameter of a public function or method, and every public field, says beside itself what it is; `help` shows it."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prompting_nb"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
CALLED = {"__init__", "__call__"}  # special methods whose parameters a user gives


def comments(source: str) -> set[int]:
    "The lines that have a comment."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[ast.arg, int]:
    "The parameters of a function, each with the line on which it ends."
    args = function.args
    positional = [*args.posonlyargs, *args.args]
    defaults = dict(zip(reversed(positional), reversed(args.defaults)))
    defaults |= {one: default for one, default in zip(args.kwonlyargs, args.kw_defaults) if default}
    found = [*positional, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg])]
    return {one: getattr(defaults.get(one), "end_lineno", None) or one.end_lineno or 0 for one in found}


def silent_parameters(function, lines: set[int], of_class: bool) -> list[str]:
    "Those without a comment on a line of their own."
    ends = parameters(function)
    bound = {one for one in [*ends][:1] if of_class and one.arg in ("self", "cls")}
    return [one.arg for one, end in ends.items() if one not in bound
            and not (end in lines and end != function.lineno and [*ends.values()].count(end) == 1)]


def silent_fields(cls: ast.ClassDef, lines: set[int]) -> list[str]:
    "Those that neither a comment nor `Args:` in the docstring describes."
    kind = " ".join(map(ast.unparse, [*cls.decorator_list, *cls.bases]))
    if not re.search(r"\b(dataclass|NamedTuple|TypedDict)\b", kind):
        return []
    fields = [n for n in cls.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    described = set(re.findall(r"^\s*(\w+)(?: \(.*\))?:", ast.get_docstring(cls) or "", re.M))
    return [n.target.id for n in fields if not n.target.id.startswith("_") and "ClassVar" not in ast.unparse(n.annotation)
            and n.end_lineno not in lines and n.target.id not in described]


def silent(source: str) -> list[str]:
    "All of both in a module."
    lines, found = comments(source), []
    for node in ast.parse(source).body:
        public = isinstance(node, (*FUNCTION, ast.ClassDef)) and not node.name.startswith("_")
        if public and isinstance(node, FUNCTION):
            found += [f"{node.name}({name})" for name in silent_parameters(node, lines, False)]
        elif public:
            found += [f"{node.name}.{name}" for name in silent_fields(node, lines)]
            methods = (n for n in node.body if isinstance(n, FUNCTION) and (not n.name.startswith("_") or n.name in CALLED))
            found += [f"{node.name}.{n.name}({name})" for n in methods for name in silent_parameters(n, lines, True)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_parameter_and_field_has_a_comment(path):
    assert silent(path.read_text()) == []


def shows_arguments(cls: ast.ClassDef) -> bool:
    "Whether `help` of a class has what stands beside its parameters or fields."
    marks, bases = [set(map(ast.unparse, nodes)) for nodes in (cls.decorator_list, cls.bases)]
    if "arguments_in_help" in marks or {"Protocol", "BaseModel"} & bases or "Args:" in (ast.get_docstring(cls) or ""):
        return True
    inits = [n for n in cls.body if isinstance(n, FUNCTION) and n.name == "__init__"]
    if inits:
        return len(parameters(inits[0])) == 1
    has_fields = "NamedTuple" in bases or any("dataclass" in mark for mark in marks)
    return not (has_fields and any(isinstance(n, ast.AnnAssign) for n in cls.body))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_help_shows_the_comments(path):
    classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    unmarked = [cls.name for cls in classes if not shows_arguments(cls)]
    assert unmarked == (["Bar"] if path.name == "show.py" else [])  # defined before the mark is


def test_a_silent_one_is_found():
    source = '''
@dataclass
class Miner:
    """A miner.

    Args:
        netuid: Of the subnet.
    """

    netuid: int
    uid: int

    def __init__(self, wallet, axon):  # both of them
        pass

    def prompt(
        self,
        synapse: str,  # the question
        *,
        limit: int = max(
            1, 2
        ),  # tokens
        seed: int = 0,
    ) -> str:  # the answer
        pass

    def _hidden(self, x):
        pass


def make(x, *rest, **more):
    pass
'''
    assert silent(source) == ["Miner.uid", "Miner.__init__(wallet)", "Miner.__init__(axon)", "Miner.prompt(seed)",
                              "make(x)", "make(rest)", "make(more)"]
