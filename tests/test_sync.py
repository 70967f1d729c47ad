"""Notebooks, package and README say the same: exporting, cleaning and making the README again changes no file."""

import ast
import builtins
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
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
        subprocess.run(command, cwd=copy, check=True, capture_output=True, timeout=600)
    after = _files(copy)
    assert sorted(before) == sorted(after)
    assert [name for name in before if before[name] != after[name]] == []


def test_the_first_page_shows_the_figures_that_are_stored():
    "Other pages read `bench/results` themselves, and `make check` compares what they show; this table is typed."
    stored = json.loads((ROOT / "bench/results/gating.json").read_text())
    columns = stored["loop"]["moves"], stored["loop"]["stays"], stored["built_in"]
    said = lambda figure: f"{figure['mean']:+.3f} ± {figure['high'] - figure['mean']:.3f}"
    rows = [re.findall(r"[+-]\d\.\d+ ± \d\.\d+", line) for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    kinds = ("now", "grades", "corrected", "warm", "rule")  # as the rows follow each other
    assert [row for row in rows if row] == [[said(column[kind]) for column in columns if kind in column] for kind in kinds]


def test_the_readme_lists_every_module():
    "Its table links to each page below `nbs/` but the tutorials, which another page lists."
    listed = set(re.findall(r"\(nbs/([\w/]+\.ipynb)\)", (ROOT / "README.md").read_text()))
    pages = {p.relative_to(ROOT / "nbs").as_posix() for p in PAGES if p.parent.name != "tutorials"}
    assert pages - listed == {"index.ipynb"}


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


def code_of(page: Path) -> list[str]:
    "The code cells of a page."
    return ["".join(cell["source"]) for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "nbs").as_posix())
def test_code_fits_a_page_of_1280_pixels(page):
    "88 columns; options (`#|`) stay on one line, since nbdev drops those that are folded."
    lines = [line for code in code_of(page) for line in code.splitlines() if not line.startswith("#|")]
    assert [line for line in lines if len(line) > 88] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "nbs").as_posix())
def test_cell_options_are_yaml(page):
    "Quarto reads `#| name: value` lines as YAML and stops where they are not."
    for code in code_of(page):
        lines = re.findall(r"^#\|[ \t]*([\w-]+:.*)$", code, re.M)
        read = yaml.safe_load("\n".join(lines)) or {}
        assert isinstance(read, dict) and len(read) == len(lines), lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT / "nbs").as_posix())
def test_pictures_speak_one_language(page):
    "What a page draws with matplotlib has the look of `styled`, from the axes on."
    shown = [code for code in code_of(page) if not re.search(r"^#\| (export|hide)", code, re.M)]
    drawn = [code for code in shown if re.search(r"plt\.(subplots|figure|plot)\b", code)]
    assert [code for code in drawn if "@styled" not in code and "styled(plt.subplots)" not in code] == []


REFERENCE = [page for page in PAGES if any("#| default_exp" in code for code in code_of(page))]


def bound_in(tree: ast.AST) -> set[str]:
    "All names that a piece of code binds anywhere."
    imported = (alias for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for alias in n.names)
    found = {(alias.asname or alias.name).split(".")[0] for alias in imported} | set(dir(builtins))
    for n in ast.walk(tree):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or isinstance(n, ast.ExceptHandler) and n.name:
            found.add(n.name)
        elif isinstance(n, ast.arg):
            found.add(n.arg)
        elif isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store):
            found.add(n.id)
    return found


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.relative_to(ROOT / "nbs").as_posix())
def test_a_page_begins_with_an_example_that_runs_alone(page):
    "Who copies it needs no other cell; what exports something comes later. Cells that a reader does not see do not count."
    seen = [code for code in code_of(page) if not re.search(r"^#\|\s*(hide|default_exp)", code, re.M)][1:]
    defines = re.compile(r"^(async def|def|class) ", re.M)
    first = next(code for code in seen if not code.startswith("#| export") or defines.search(code))
    assert not first.startswith("#| export"), "the page exports before it shows an example"
    tree = ast.parse(first)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert used - bound_in(tree) == set()
    imports = sum((n.end_lineno or 0) - n.lineno + 1 for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))
    assert sum(1 for line in first.splitlines() if line.strip()) - imports <= 20


def test_forks_run_the_tests_on_each_version_of_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads the key `on` as true
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.13"]
    setup, *_ = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    assert setup == "${{ matrix.python }}"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    made = [step["run"].split()[1] for step in job["steps"] if step.get("run", "").startswith("make ")]
    assert made == ["test"] and set(made) <= set(targets)


def make(*arguments: str) -> str:
    "What make would do."
    done = subprocess.run(["make", "--dry-run", "--assume-old=.venv/.dev", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_fast_tests_say_what_they_leave_out_and_can_be_picked():
    said = make("test-fast", "K=miner or gate")
    assert '-k "miner or gate"' in said and "leaves out" in said
    assert '-m "not notebook and not slow and not site and not long"' in said
    assert "-m long" in make("test-long", "K=chain") and '-k "chain"' in make("test-long", "K=chain")
    assert " -k " not in make("test-fast") and '-k "gating"' in make("test", "K=gating")


def test_the_check_is_complete():
    said = make("check")
    for step in ("ruff check", "ruff format --check nbs", "basedpyright", "tests/test_sync.py", "tests/test_floors.py"):
        assert step in said
