"""Notebooks, package and README say the same: exporting, cleaning and making the README again changes no file."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def _files(folder: Path) -> dict:
    kept = (p for part in ("nbs", "prompting_nb", "README.md") for p in [folder / part, *(folder / part).rglob("*")])
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in kept
            if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)}


def test_export_clean_and_readme_change_nothing(tmp_path):
    copy = tmp_path / "project"
    copy.mkdir()
    for part in ("nbs", "prompting_nb", "tools"):
        shutil.copytree(ROOT / part, copy / part, symlinks=True,
                        ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for part in ("settings.ini", "setup.py", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / part, copy / part)
    before = _files(copy)
    for command in ([BIN / "nbdev_export"], [BIN / "nbdev_clean"], [sys.executable, "tools/readme.py"]):
        subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=300)
    after = _files(copy)
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []


def test_sidebar_lists_every_page():
    listed = set(re.findall(r"[\w/]+\.ipynb", (ROOT / "_quarto.yml").read_text()))
    pages = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
             if ".ipynb_checkpoints" not in p.parts}
    assert listed == pages


def test_pages_install_the_package_where_it_is_missing():
    "On Colab a page starts without the package. Benchmarks and the map read files of a checkout, so they need one."
    pages = [p for p in (ROOT / "nbs").rglob("*.ipynb")
             if not {".ipynb_checkpoints", "measured", "about"} & set(p.parts)]
    without = [p.name for p in pages if '%pip install -q git+' not in "".join(json.loads(p.read_text())["cells"][1]["source"])]
    assert len(pages) > 50 and without == []
