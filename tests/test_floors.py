"""The house stands: a page imports only from pages with a lower number, and the floors stay apart where they should."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {}  # module -> number of its notebook
for _path in sorted((ROOT / "nbs").glob("*.ipynb")):
    _code = "\n".join("".join(cell["source"]) for cell in json.loads(_path.read_text())["cells"])
    if (_module := re.search(r"#\| default_exp (\S+)", _code)):
        NUMBERS["prompting_nb." + _module[1]] = int(_path.name[:2])


def imports(module: str) -> set[str]:
    "The modules of the project that a module imports, anywhere in its code."
    path = ROOT / (module.replace(".", "/") + ".py")
    package, found = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1] if node.level else [])
            start = ".".join(filter(None, [base, node.module]))
            names = [start, *(f"{start}.{alias.name}" for alias in node.names)]
        found |= {name for name in names if name in NUMBERS}
    return found


@pytest.mark.parametrize("module", sorted(NUMBERS))
def test_imports_come_from_pages_before(module):
    assert {name: NUMBERS[name] for name in imports(module) if NUMBERS[name] >= NUMBERS[module]} == {}


@pytest.mark.parametrize("floor, others", [("1", "234"), ("2", "134"), ("3", "14"), ("4", "23")])
def test_floors_that_do_not_know_each_other(floor, others):
    "Reward (1), network (2), miner (3) and validator (4) meet only above; a miner knows the network it serves on."
    for module, number in NUMBERS.items():
        if f"{number:02}"[0] == floor:
            assert {name for name in imports(module) if f"{NUMBERS[name]:02}"[0] in others} == set(), module


def test_every_module_has_a_page():
    modules = {".".join(("prompting_nb", *path.relative_to(ROOT / "prompting_nb").with_suffix("").parts))
               for path in (ROOT / "prompting_nb").rglob("*.py") if path.name not in ("__init__.py", "_modidx.py")}
    assert modules == set(NUMBERS)
