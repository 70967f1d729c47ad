"""The test cells of one module's page, run in this process: `make mutants` runs them against changed modules.

By hand: `MODULE=network.auth python -m pytest tests/cells.py`. The cells see the names of the module as it is imported,
so that a changed module is what they test; the cells that are exported are left out.
"""

import ast
import asyncio
import importlib
import inspect
import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULE = os.environ.get("MODULE", "network.legacy")
LEFT_OUT = re.compile(r"^#\|\s*(exporti?\b|default_exp|eval:\s*false|slow|cuda)|^\s*%", re.M)


def sources(module: str) -> list[tuple[str, str]]:
    "Names and sources of the cells that test or show something."
    *wing, name = module.split(".")
    page, = ROOT.joinpath("nbs", *wing).glob(f"[0-9][0-9]_{name}.ipynb")
    cells = [(cell["id"], "".join(cell["source"])) for cell in json.loads(page.read_text())["cells"]
             if cell["cell_type"] == "code"]
    return [(name, source) for name, source in cells if not LEFT_OUT.search(source)]


def test_cells():
    names = dict(vars(importlib.import_module(f"prompting_nb.{MODULE}")), __name__="__main__", display=lambda *_: None)

    async def run():
        for name, source in sources(MODULE):
            done = eval(compile(source, f"<cell {name}>", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), names)
            if inspect.iscoroutine(done):
                await done

    asyncio.run(run())
