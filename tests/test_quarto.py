"""What Quarto reads of this project: only what its documentation knows (`tests/site/quarto.yaml`), and what is done about it.

Where `quarto` is on PATH the whole site is built with it too, and compared with that of our own renderer.
"""

import configparser
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "site"
sys.path.insert(0, str(ROOT))
KNOWN = yaml.safe_load((HERE / "quarto.yaml").read_text())
SETTINGS = yaml.safe_load((ROOT / "_quarto.yml").read_text())
PAGES = sorted(p for root in (ROOT / "nbs", HERE / "nbs") for p in root.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

TYPES = {"text": lambda v: isinstance(v, str), "flag": lambda v: isinstance(v, bool), "any": lambda v: True,
         "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool), "list": lambda v: isinstance(v, list),
         "texts": lambda v: isinstance(v, str) or isinstance(v, list) and all(isinstance(text, str) for text in v)}


def unknown(where: str, found: dict) -> list[str]:
    "The options of a part that Quarto does not document, or whose values are none of those that it documents."
    known = KNOWN[where]
    allowed = lambda name, value: value in known[name] if isinstance(known[name], list) else TYPES[known[name]](value)
    return [f"{where}: {name}: {value}" for name, value in found.items() if name not in known or not allowed(name, value)]


def test_the_project_uses_options_that_quarto_documents():
    small = yaml.safe_load((HERE / "nbs" / "_quarto.yml").read_text())
    found = unknown("website", small["website"]) + [name for name in small if name != "website"]
    assert set(SETTINGS) == {"project", "website", "format"} and set(SETTINGS["format"]) == {"html"}
    for where, part in (("project", SETTINGS["project"]), ("website", SETTINGS["website"]), ("html", SETTINGS["format"]["html"])):
        found += unknown(where, part)
    assert found == [] and set(SETTINGS["website"]["repo-actions"]) <= {"none", "edit", "source", "issue"}


def test_what_is_unknown_is_found():
    assert unknown("cell", {"fig-alt": "a", "echo": False, "code-fold": "show"}) == []
    assert unknown("cell", {"figalt": "a"}) and unknown("cell", {"output": "raw"}) and unknown("html", {"toc-depth": "4"})


def code(page: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(page.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_cells_and_fences_are_what_quarto_documents(page):
    for source in code(page):
        lines = re.findall(r"^#\|[ \t]*(.*)$", source, re.M)
        options = yaml.safe_load("\n".join(line for line in lines if re.match(r"[\w-]+:(\s|$)", line))) or {}
        assert unknown("cell", options) == []
        words = [line.split()[0] for line in lines if line and not re.match(r"[\w-]+:(\s|$)", line)]
        assert set(words) <= set(KNOWN["directives"]), page
    for cell in json.loads(page.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            fences("".join(cell["source"]))


def fences(markdown: str) -> None:
    "Hold the fenced blocks and divs of a page against what is documented."
    opened, divs = "", 0
    for line in markdown.splitlines():
        mark = re.match(r"\s*(`{3,}|~{3,})(.*)$", line)
        if mark and opened:
            opened = "" if mark[1].startswith(opened) and not mark[2].strip() else opened
        elif mark:
            opened, info = mark[1], mark[2].strip()
            inside = re.fullmatch(r"\{(.*)\}", info)
            words = inside[1].split() if inside else [info] if info else []
            for word in words:
                raw = word.startswith("=") or not inside
                assert word in KNOWN["fences"] if raw else re.match(r"[.#][\w-]+$|[\w-]+=", word), line
        elif not opened and line.startswith(":::"):
            assert re.fullmatch(r":{3,}( \{[.#][\w-]+( [.#][\w-]+)*\})?", line), line
            divs += 1 if "{" in line else -1
            assert divs >= 0
    assert not opened and divs == 0, markdown[-300:]


def test_what_our_processors_add_is_documented_too(toy):
    "The notebooks as they are handed to Quarto: entries, folded sources, raw HTML."
    from tools.site import render

    for path in sorted((HERE / "nbs").glob("*.ipynb")):
        nb = render.process(path)
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                fences(cell.source)
            elif cell.cell_type == "code":
                assert unknown("cell", yaml.safe_load("\n".join(re.findall(r"^#\|[ \t]*([\w-]+:.*)$", cell.source, re.M))) or {}) == []
            else:
                assert unknown("front-matter", yaml.safe_load(cell.source.strip().strip("-"))) == []


@pytest.fixture
def toy(monkeypatch):
    spec = importlib.util.spec_from_file_location("prompting_nb.toy", HERE / "toy.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prompting_nb.toy", module)
    spec.loader.exec_module(module)
    return module


def test_the_addresses_of_site_and_repository_are_those_of_the_package():
    read = configparser.ConfigParser()
    read.read(ROOT / "settings.ini")
    ours, site = read["DEFAULT"], SETTINGS["website"]
    assert site["site-url"] == ours["doc_host"] + ours["doc_baseurl"]
    assert site["repo-url"] == ours["git_url"] and site["repo-branch"] == ours["branch"]
    assert site["repo-subdir"] == ours["nbs_path"] and SETTINGS["project"]["output-dir"] == ours["doc_path"]


# ---- after a render

def test_what_a_page_would_load_from_elsewhere_is_taken_out():
    "Quarto runs the script in `_proc/`, with the folder of the site in the environment."
    from tools.site.local import local

    page = (HERE / "quarto.html").read_text()
    clean, removed = local(page)
    assert removed == 5 and local(clean) == (clean, 0)
    assert "cdnjs" not in clean and "jsdelivr" not in clean and "define(" not in clean
    assert 'site_libs/quarto-nav/quarto-nav.js' in clean and 'href="api.css"' in clean
    assert '&lt;script src="https://example.org/x.js"&gt;' in clean and "quarto-html-after-body" in clean
    assert local('<pre><script src="https://a/b.js"></script></pre>')[1] == 0
    assert local('<LINK rel=preconnect href=//fonts.example.org><script\nsrc = "//a/b.js"></script\n>')[0] == ""
    assert local('<link rel="canonical" href="https://a/"><a href="https://a/">a</a>')[1] == 0


def test_quarto_calls_the_script_in_the_folder_of_the_project(tmp_path):
    work = tmp_path / "_proc"
    (work / "_docs" / "loop").mkdir(parents=True)
    shutil.copytree(ROOT / "tools", tmp_path / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(HERE / "quarto.html", work / "_docs" / "loop" / "run.html")
    (work / "_docs" / "index.html").write_text("<p>Ünder</p>", encoding="utf-8")
    script = SETTINGS["project"]["post-render"]
    assert script.endswith(".py") and (ROOT / "nbs" / script).resolve().is_file()  # nbs/ and _proc/ stand side by side
    run = subprocess.run([sys.executable, "-S", script], cwd=work, text=True, capture_output=True,
                         env={"PATH": os.environ["PATH"], "QUARTO_PROJECT_OUTPUT_DIR": "_docs"})
    assert run.returncode == 0, run.stderr
    assert run.stdout == "_docs/: 5 loads from other hosts taken out of 1 pages\n"
    assert "https://cdn" not in (work / "_docs" / "loop" / "run.html").read_text()
    assert (work / "_docs" / "index.html").read_text(encoding="utf-8") == "<p>Ünder</p>"


@pytest.mark.parametrize("ends", (subprocess.CalledProcessError(1, "quarto"), KeyboardInterrupt(), None), ids=str)
def test_the_readme_is_put_back_whatever_happens(ends, tmp_path, monkeypatch):
    command = importlib.import_module("tools.site.__main__")
    readme = tmp_path / "README.md"
    readme.write_bytes(b"ours\r\n")

    def quarto(*args, **kwargs):
        readme.unlink()
        readme.write_text("made by Quarto")
        if ends:
            raise ends

    for name, value in (("ROOT", tmp_path), ("OUT", tmp_path / "_docs")):
        monkeypatch.setattr(command, name, value)
    monkeypatch.setattr(command.subprocess, "run", quarto)
    monkeypatch.setattr("tools.site.render.add_text", lambda nbs, out: None)
    if ends:
        with pytest.raises(type(ends)):
            command.with_quarto(tmp_path / "_docs")
    else:
        command.with_quarto(tmp_path / "_docs")
    assert readme.read_bytes() == b"ours\r\n"


# ---- the same site by both

def shape(page: Path) -> dict:
    "What both renderers must agree on: ids of headings, tables, formulas, code, outputs."
    import bs4

    tree = bs4.BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    main = tree.find("main")
    squeeze = lambda tag: re.sub(r"\s+", "", tag.get_text())
    ids = {tag["id"] for tag in main.select("h2[id], h3[id], h4[id], section[id]")} - {"toc-title", "title-block-header"}
    return dict(ids=ids, tables=[squeeze(table) for table in main.select("table")],
                formulas=len(main.select("math")), code=[squeeze(code) for code in main.select("div.sourceCode code")])


def elsewhere(page: Path) -> list[str]:
    import bs4

    tree = bs4.BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    loaded = [tag.get("src") or tag.get("href") for tag in tree.select("script[src], img, link[rel=stylesheet], iframe")]
    return [url for url in loaded if re.match(r"(https?:)?//", url)]


@pytest.mark.site
@pytest.mark.slow
def test_quarto_makes_the_same_site(tmp_path):
    if not shutil.which("quarto"):
        pytest.skip("no quarto on PATH: https://quarto.org/docs/get-started/")
    copy = tmp_path / "project"
    copy.mkdir()
    for part in ("nbs", "prompting_nb", "tools", "bench"):
        shutil.copytree(ROOT / part, copy / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for part in ("settings.ini", "setup.py", "_quarto.yml", "README.md"):
        shutil.copy(ROOT / part, copy / part)
    for name, path in (("by-quarto", os.environ["PATH"]), ("ours", str(Path(sys.executable).parent))):
        run = subprocess.run([sys.executable, "-m", "tools.site", "build", "--out", copy / name], cwd=copy, text=True,
                             capture_output=True, env={**os.environ, "PATH": path, "PYTHONPATH": str(copy)})
        assert run.returncode == 0, run.stdout + run.stderr[-5000:]
    addresses = lambda site: {p.relative_to(site).as_posix() for p in site.rglob("*.html") if "site_libs" not in p.parts}
    assert addresses(copy / "by-quarto") == addresses(copy / "ours")
    assert (copy / "by-quarto" / "sitemap.xml").is_file()
    for name in addresses(copy / "ours"):
        assert elsewhere(copy / "by-quarto" / name) == []
        theirs, ours = shape(copy / "by-quarto" / name), shape(copy / "ours" / name)
        assert ours["ids"] <= theirs["ids"] and {k: v for k, v in theirs.items() if k != "ids"} == {
            k: v for k, v in ours.items() if k != "ids"}, name
