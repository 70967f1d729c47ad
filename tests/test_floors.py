"""The house stands: each wing imports only what its row of the table allows, and no two modules import each other in a circle."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prompting_nb"

# wing -> what its modules may import besides each other: wings, single modules, and libraries that they must not know
MAY_IMPORT = {
    "root": set(),
    "reward": {"root"},
    "network": {"root"},
    "baseminer": {"root", "network"},
    "validators": {"root", "network", "baseminer.running", "baseminer.subnet"},
    "loop": {"root", "reward", "network", "baseminer", "validators"},
}
CLI = {"reward.command", "network.command", "baseminer.command", "loop.command"}  # the command line joins the commands, no more
FOREIGN = {"reward": {"bittensor", "aiohttp", "starlette", "uvicorn", "httpx"}, "network": {"torch", "transformers"}}
TORCH_IN_MINERS = {"baseminer.miners", "baseminer.batching"}  # only miners that use a model need torch


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = sorted(name_of(p) for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))


def wing(module: str) -> str:
    first = module.split(".")[0]
    return first if first in MAY_IMPORT else "root"  # encoding is a folder of the root


@cache
def imports(module: str) -> frozenset[str]:
    "All names that a module imports anywhere in its code, those of the package without `prompting_nb.` in front."
    path = PACKAGE / (module.replace(".", "/") + ".py")
    package, found = ["prompting_nb", *module.split(".")[:-1]], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *filter(None, [node.module])])
            found |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    return frozenset(name.removeprefix("prompting_nb.") for name in found)


def uses(module: str) -> set[str]:
    return set(imports(module)) & set(MODULES) - {module}


@pytest.mark.parametrize("module", MODULES)
def test_a_wing_imports_what_the_table_allows(module):
    allowed = CLI | {"root"} if module == "cli" else MAY_IMPORT[wing(module)]
    wrong = {name for name in uses(module) if wing(name) != wing(module) and not {wing(name), name} & allowed}
    assert wrong == set()
    assert module == "cli" or "cli" not in uses(module)


@pytest.mark.parametrize("module", MODULES)
def test_no_wing_imports_a_library_that_it_must_not_know(module):
    libraries = {name.split(".")[0] for name in imports(module)}
    assert libraries & FOREIGN.get(wing(module), set()) == set()
    if wing(module) == "baseminer" and module not in TORCH_IN_MINERS:
        assert "torch" not in libraries


def test_no_module_imports_a_private_name_of_another():
    "What two modules share has a public name."
    found = [f"{module}: {name}" for module in MODULES for name in imports(module)
             if name.rpartition(".")[0] in MODULES and name.rpartition(".")[2].startswith("_")]
    assert found == []


def test_no_circle():
    left = {module: uses(module) for module in MODULES}
    while free := [module for module, used in left.items() if not used & left.keys()]:
        for module in free:
            del left[module]
    assert left == {}


def test_every_module_has_a_page_in_its_wing():
    "`nbs/X/NN_y.ipynb` is `prompting_nb/X/y.py`."
    pages = {}
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        code = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        if ".ipynb_checkpoints" not in path.parts and (found := re.search(r"#\| default_exp (\S+)", code)):
            pages[found[1]] = path.relative_to(ROOT / "nbs").as_posix()
    assert sorted(pages) == MODULES
    for module, page in pages.items():
        assert re.fullmatch(rf"\d\d_{module.rpartition('.')[2]}\.ipynb", Path(page).name), page
        assert Path(page).parent.as_posix() == (module.rpartition(".")[0].replace(".", "/") or "."), page
