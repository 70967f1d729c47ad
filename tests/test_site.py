"""The documentation site, built once from all notebooks and read with a parser and in a browser.

Screenshots are of a small site in `tests/site`, in a font that matplotlib brings, so that neither an edited page nor the
fonts of a machine change them; `make screenshots` takes them anew.
"""

import fcntl
import functools
import http.server
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "tests" / "site"
sys.path.insert(0, str(ROOT))
pytestmark = [pytest.mark.site, pytest.mark.slow]
bs4 = pytest.importorskip("bs4")


# ---- what is tested

@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The whole site, built once, whichever worker comes first."
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    out = shared / "whole-site"
    with open(shared / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            run = subprocess.run([sys.executable, "-m", "tools.site", "build", "--out", out], cwd=ROOT, text=True,
                                 capture_output=True, env={**os.environ, "PATH": str(Path(sys.executable).parent)})
            assert run.returncode == 0, run.stdout + run.stderr[-5000:]
            (out / "said.txt").write_text(run.stdout)
    return out


@functools.cache
def soup(path: Path) -> "bs4.BeautifulSoup":
    return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


@pytest.fixture(scope="session")
def toy():
    spec = importlib.util.spec_from_file_location("prompting_nb.toy", HERE / "toy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["prompting_nb.toy"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["prompting_nb.toy"]


@pytest.fixture(scope="session")
def small(toy, tmp_path_factory):
    "The site of the notebooks in `tests/site/nbs`."
    from tools.site import render

    out = tmp_path_factory.mktemp("small") / "site"
    render.build(HERE / "nbs", out)
    return out


# ---- the build

def test_the_build_says_who_made_it(site):
    said = (site / "said.txt").read_text().strip().splitlines()
    assert len(said) == 1 and "our own renderer and pandoc, as Quarto is not installed" in said[0]


def test_quarto_is_used_where_it_is_installed_and_never_fetched(monkeypatch, capsys, tmp_path):
    command = importlib.import_module("tools.site.__main__")
    called = []
    monkeypatch.setattr(command, "with_quarto", lambda out: called.append("quarto"))
    monkeypatch.setattr(command, "alone", lambda out: called.append("alone"))
    for found in ("/opt/quarto", None):
        monkeypatch.setattr(command.shutil, "which", lambda name: found)
        command.docs(tmp_path)
    assert called == ["quarto", "alone"]
    first, second = capsys.readouterr().out.strip().splitlines()
    assert "/opt/quarto" in first and "own renderer" in second
    # nbdev's commands fetch Quarto with curl and sudo when it is missing: our own way must not come near them
    check = "import sys; import tools.site.render; assert 'nbdev.quarto' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_cells_that_only_import_are_not_shown(site):
    "Also where a logger is made beside the imports: a page begins with the object in use."
    shown = [p.relative_to(site).as_posix() for p in pages(site) for block in soup(p).select("main pre")
             if block.get_text().strip().startswith(("import ", "from ")) and "\n_log = logging" in block.get_text()]
    assert shown == []


def test_addresses_are_those_of_quarto(site):
    "nbdev hands Quarto each notebook with an `output-file`: the name without its number."
    expected = {re.sub(r"\d+\w?_", "", p.relative_to(ROOT / "nbs").as_posix().lower()).replace(".ipynb", ".html")
                for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    assert {p.relative_to(site).as_posix() for p in pages(site)} == expected


def test_generated_files_are_not_in_the_repository():
    for name in ("nbs/nbdev.yml", "nbs/sidebar.yml", "_docs/index.html"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT).returncode == 0, name


def test_every_page_has_its_text_its_notebook_and_a_place_in_llms_txt(site):
    listed = (site / "llms.txt").read_text()
    for page in pages(site):
        name, tree = page.relative_to(site).as_posix(), soup(page)
        text = Path(f"{page}.md").read_text()
        assert text.splitlines()[0].replace("`", "") == "# " + tree.h1.get_text() and f"]({name}.md)" in listed
        assert ":::" not in text and "{=html}" not in text and "api-name" not in text, name
        links = {a.get_text(): a["href"] for a in tree.select(".page-actions a")}
        assert links["Open in Colab"].startswith("https://colab.research.google.com/github/")
        notebook = (page.parent / links["Download notebook"]).resolve()
        assert notebook.read_bytes() == (ROOT / "nbs" / notebook.relative_to(site / "notebooks")).read_bytes()


def test_internal_links_and_anchors_resolve(site):
    broken = []
    for page in pages(site):
        ids = [tag["id"] for tag in soup(page).select("[id]")]
        assert len(ids) == len(set(ids)), f"{page.name}: {[i for i in ids if ids.count(i) > 1]}"
        for tag in soup(page).select("[href], [src]"):
            link = urlsplit(urljoin(page.as_uri(), tag.get("href") or tag.get("src")))
            if link.scheme != "file":
                continue
            target = Path(unquote(link.path))
            found = target.exists() and (not link.fragment or target.suffix != ".html"
                                         or soup(target).find(id=unquote(link.fragment)))
            broken += [] if found else [f"{page.name}: {tag.get('href') or tag.get('src')}"]
    assert broken == []


def test_nothing_is_fetched_from_elsewhere(site):
    for page in pages(site):
        loaded = [tag.get("src") or tag["href"] for tag in soup(page).select("script[src], img, link, iframe, source")]
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
    assert not re.search(r"https?://|url\(|@import", (site / "style.css").read_text() + (site / "api.css").read_text())


def test_every_picture_says_what_it_shows(site):
    "And not only under which heading it stands, which is what is said where a cell has no `fig-alt`."
    silent = []
    for page in pages(site):
        for picture in soup(page).select("main img, main svg"):
            said = picture.get("alt") or picture.get("aria-label") or (picture.title.get_text() if picture.title else "")
            silent += [] if said.strip() and not said.startswith("Plot: ") and "\\" not in said else [f"{page.name}: {said!r}"]
    assert silent == []


def test_titles_are_rendered(site):
    for page in pages(site):
        tree = soup(page)
        texts = [tree.title.get_text(), tree.h1.get_text(), *(a.get_text() for a in tree.select(".sidebar a, .turn a"))]
        assert not [text for text in texts if "`" in text or "\\" in text], page
    assert soup(site / "loop" / "subnet.html").h1.code.get_text() == "subnet"


def test_no_flag_became_a_dash(site):
    "Pandoc makes a dash of two hyphens, also in `--out` where a docstring names it."
    assert [(p.name, found) for p in pages(site) if (found := re.findall(r"\s\u2013[a-z][a-z-]*", soup(p).get_text()))] == []


def test_links_to_the_repository_and_the_sitemap(site):
    tree = soup(site / "loop" / "run.html")
    links = {a.get_text(): a["href"] for a in tree.select(".repo-actions a")}
    base = "https://github.com/prompting-nb/prompting_nb"
    assert links == {"View source": f"{base}/blob/main/nbs/loop/00_run.ipynb", "Report an issue": f"{base}/issues/new"}
    listed = re.findall("<loc>(.*?)</loc>", (site / "sitemap.xml").read_text())
    assert set(listed) == {f"https://prompting-nb.github.io/prompting_nb/{p.relative_to(site).as_posix()}" for p in pages(site)}


def test_no_rule_of_the_style_is_dead(site):
    "What a selector names is on some page, or is made by the script."
    html = "".join(path.read_text() for path in [HERE / "quarto.html", ROOT / "tools" / "site" / "site.js", *pages(site)])
    used = {word for texts in re.findall(r"""(?:class|id|className:?)\s*=?\s*["']([^"']+)["']""", html) for word in texts.split()}
    used |= {"root", "found", "quarto-dark"} | set(re.findall(r"""classList\.\w+\(["']([\w-]+)""", html))
    used |= set(re.findall(r"<([a-z]+\d?)\b", html))
    for name in ("style.css", "api.css"):
        other = r"/\*.*?\*/|\{[^{}]*\}|@[^{]*\{|\[[^]]*\]|::?(?!is|not|has)[\w-]+(\([^)]*\))?"  # comments, rules, attributes, states
        text = re.sub(other, " ", (site / name).read_text(), flags=re.S)
        named = set(re.findall(r"(?<![\w-])[.#]?([a-z][\w-]*)", text.replace(":is", "").replace(":not", "").replace(":has", "")))
        assert named - used == set(), name


# ---- the points of a page of the API

def api_pages(site: Path) -> list[tuple]:
    "(module, notebook's page) of every page that a module is made from."
    from tools.site.pages import address

    found = []
    for path in sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
        code = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        if (name := re.search(r"#\| default_exp (\S+)", code)):
            module = importlib.import_module("prompting_nb." + name[1])
            found.append((module, soup(site / address(path.relative_to(ROOT / "nbs")))))
    assert len(found) >= 20
    return found


def own(module) -> dict:
    "The public classes and functions that a module defines."
    values = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in values.items()
            if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module.__name__}


def entry(tree, name: str):
    heading = next((h for h in tree.select(".api-name") if h.get_text() == name), None)
    assert heading is not None, f"no entry for {name}"
    assert heading["id"] in (name.lower(), f"{name}-function")
    return heading.find_next_sibling(class_="api")


def cells(box) -> list[list[str]]:
    table = box.select_one(".api-table")
    return [[cell.get_text() for cell in row.find_all("td")] for row in table.select("tbody tr")] if table else []


def test_each_page_has_title_description_and_index(site):
    for module, tree in api_pages(site):
        assert tree.h1.get_text() and tree.select_one(".lede").get_text().strip(), module
        index = tree.select_one(".module-index")
        assert module.__name__ in index.get_text()
        rows = {row.td.get_text(): row.find_all("td")[1].get_text().strip() for row in index.select("tbody tr")}
        for name, value in own(module).items():
            assert entry(tree, name)
            assert index.find("a", string=name) is not None, f"{module.__name__}.{name}"
            assert not inspect.isclass(value) or rows[name], f"{name} has no first line"


def test_each_entry_has_signature_bases_and_marks(site):
    for module, tree in api_pages(site):
        for name, value in own(module).items():
            box = entry(tree, name)
            shown = box.select_one("pre.api-signature").get_text()
            assert f"{module.__name__}.{name}" in shown
            marks = [tag.get_text() for tag in box.select(".api-kind")]
            if inspect.isfunction(value):
                parameters = inspect.signature(value).parameters.values()
                assert all(re.search(rf"[*(\s]{re.escape(p.name)}\b", shown) for p in parameters), name
                assert shown.count("=") >= sum(p.default is not p.empty for p in parameters), name
                continue
            assert "class" in marks and ("abstract" in marks) == inspect.isabstract(value)
            public = [base for base in value.__mro__[1:-1] if not base.__name__.startswith("_")]
            if public:
                bases = next(p.get_text() for p in box.find_all("p") if p.get_text().startswith("Bases: "))
                assert public[0].__name__ in bases, name


def test_each_argument_and_result_has_its_row(site):
    for module, tree in api_pages(site):
        for name, value in own(module).items():
            if not inspect.isfunction(value):
                continue
            rows = {row[0].lstrip("*"): row[1:] for row in cells(entry(tree, name))}
            for p in inspect.signature(value).parameters.values():
                assert p.name in rows, f"{name}: {p.name}"
                assert bool(rows[p.name][0]) == (p.annotation is not p.empty), f"{name}: {p.name}"
                assert bool(rows[p.name][1]) == (p.default is not p.empty), f"{name}: {p.name}"
            result = inspect.signature(value).return_annotation
            assert result in (None, inspect.Signature.empty, "None") or rows["Returns"][0], name


def test_each_entry_leads_to_its_source(site):
    for module, tree in api_pages(site):
        for name, value in own(module).items():
            path, line = re.search(r"/blob/main/(\S+)#L(\d+)$", entry(tree, name).select_one(".api-source")["href"]).groups()
            around = (ROOT / path).read_text().splitlines()[int(line) - 1:int(line) + 8]
            assert any(re.match(rf"(async )?(def|class) {name}\b", row) for row in around), name


def test_each_page_shows_its_code_at_work(site):
    for module, tree in api_pages(site):
        assert tree.select_one(".cell-output"), module


def test_what_is_raised_stands_under_raises(site):
    for module, tree in api_pages(site):
        for box in tree.select(".api"):
            texts = [p.get_text() for p in box.find_all("p", recursive=False)] + [cell for row in cells(box) for cell in row]
            assert not any(re.search(r"(^|[.;] )[Rr]aises ", text) for text in texts), box.get_text()[:200]


def test_the_points_about_particular_names(site):
    trees = {module.__name__.removeprefix("prompting_nb."): tree for module, tree in api_pages(site)}
    home = lambda name: trees[getattr(importlib.import_module("prompting_nb.reward"), name).__module__[len("prompting_nb."):]]
    gating, miner, reward, loss = trees["validators.gating"], trees["baseminer.miner"], home("RewardModel"), home("PairwiseLoss")
    formula = entry(loss, "PairwiseLoss").find("math") or loss.find("math", display="block")
    assert formula is not None and "log" in formula.get_text()
    rows = {row[0]: row for row in cells(entry(reward, "RewardModel.forward"))}
    assert rows["input_ids"][1] == "TensorType['batch_size', 'seq_len']"
    assert rows["Returns"][1] == "TensorType['batch_size', 1]"
    rows = {row[0]: row for row in cells(entry(gating, "GatingModel.backward"))}
    assert rows["scores"][1] == rows["rewards"][1] == "TensorType['metagraph.n']"
    assert "network_size" in entry(gating, "GatingModel.forward").select_one("pre").get_text()
    for name in ("Miner._prompt", "Miner.__enter__", "Miner.__exit__"):
        assert entry(miner, name).get_text()
    assert "ValueError" in entry(miner, "Miner._prompt").select_one(".api-raises").get_text()
    for cls in ("GatingModel", "SentenceEmbedGatingModel"):
        assert {row[0] for row in cells(entry(gating, cls + ".resync"))} >= {"previous_metagraph", "metagraph"}
    pooling = entry(gating, "SentenceEmbedGatingModel.mean_pooling")
    assert "1e-9" in pooling.get_text() and {"model_output", "attention_mask"} <= {row[0] for row in cells(pooling)}
    flags = entry(gating, "BaseGatingModel.add_args").get_text()
    for flag, default in {"model_name": "'EleutherAI/gpt-neo-125m'", "num_uids": "4096",
                          "learning_rate": "0.01", "momentum": "0.9"}.items():
        assert re.search(rf"--gating\.{flag}\b.*?\(default: {re.escape(default)}\)", flags, re.S), flag
    marks = {name: [tag.get_text() for tag in entry(miner, f"Miner.{name}").select(".api-kind")]
             for name in ("add_args", "config", "prompt")}
    assert marks["add_args"] == ["classmethod", "abstract"]
    assert "abstract" in marks["config"] and "abstract" in marks["prompt"]


REFERENCE = """
BaseGatingModel BaseGatingModel.add_args BaseGatingModel.config BaseGatingModel.check_config BaseGatingModel.forward
BaseGatingModel.backward BaseGatingModel.resync GatingModel GatingModel.__init__ GatingModel.forward
GatingModel.backward GatingModel.resync SentenceEmbedGatingModel SentenceEmbedGatingModel.__init__
SentenceEmbedGatingModel.mean_pooling SentenceEmbedGatingModel.forward SentenceEmbedGatingModel.backward
SentenceEmbedGatingModel.resync --gating.model_name --gating.num_uids --gating.learning_rate --gating.momentum
Miner Miner.__init__ Miner.config Miner.add_args Miner._prompt Miner.prompt Miner.blacklist Miner.priority Miner.run
Miner.run_in_background_thread Miner.stop_run_thread Miner.__enter__ Miner.__exit__
RewardModel RewardModel.__init__ RewardModel.forward PairwiseLoss PairwiseLoss.forward
Prompting bittensor.synapse.Synapse bt.Config bt.metagraph.Metagraph TensorType
""".split()


def test_the_reference_map_misses_no_name(site):
    rows = {}
    for row in soup(site / "about" / "reference.html").select("tbody tr"):
        name, place = row.find_all("td")
        rows |= {code.get_text(): place for code in name.find_all("code")}
    assert set(REFERENCE) <= set(rows), set(REFERENCE) - set(rows)
    for name in REFERENCE[:-2]:
        page, _, anchor = rows[name].a["href"].partition("#")
        target = soup((site / "about" / page).resolve()).find(id=anchor)
        assert target is not None and "api-name" in target["class"], name
        said = name.removesuffix(".__init__").rpartition(".")[2] if not name.startswith("--") else "add_args"
        assert target.get_text().endswith(said), name


def test_the_map_of_the_notebooks_knows_every_module(site):
    tree = soup(site / "about" / "map.html")
    drawn = {(site / "about" / a["href"]).resolve().relative_to(site).as_posix() for a in tree.select("svg.house a")}
    modules = {page.relative_to(site).as_posix() for page in pages(site) if soup(page).select_one(".module-index")}
    assert drawn == modules
    uses = {row.find_all("td")[0].get_text(): row.find_all("td")[1].get_text() for row in tree.select("tbody tr")}
    assert {"config", "shapes"} <= set(uses["validators.gating"].split(", "))


# ---- our own renderer, on the small site

def test_cell_options_are_read_as_yaml():
    from tools.site.render import options

    source = '#| export\n#| fig-alt: "Rewards: \\"good\\" on the right"\n#| echo: false\n#| fig-cap: it\'s 5\n#| label:\nx = 1  #| y: z'
    assert options(source) == ({"fig-alt": 'Rewards: "good" on the right', "echo": "false", "fig-cap": "it's 5",
                                "label": ""}, "x = 1  #| y: z")
    assert options("#| hide\nx = 1") == ({}, "x = 1")
    with pytest.raises(yaml.YAMLError, match="mapping values are not allowed"):
        options("#| fig-alt: Rewards: good on the right\nx = 1")


def test_an_entry_says_all_that_the_source_says(small):
    tree = soup(small / "toy.html")
    assert [a.get_text() for a in tree.select(".module-index a")] == ["Model", "Linear", "Settings", "halve"]
    box = entry(tree, "Linear")
    assert box.pre.get_text() == "class prompting_nb.toy.Linear(size: int = 4, *, name: str = 'x')"
    assert cells(box) == [["size", "int", "4", "how many weights"], ["name", "str", "'x'", "what to call it"]]
    assert [li.get_text() for li in box.select(".api-raises li")] == ["ValueError below 1"]
    box = entry(tree, "Linear.forward")
    assert cells(box)[2] == ["Returns", "TensorType['batch_size', 1]", "", "one number a row"]
    said = box.get_text()
    assert "Notes" in said and "clamped to 1e-9" in said and "Example" in said
    assert box.select("pre")[1].get_text() == "model = Linear(size=3)\nmodel.forward(rows)"
    assert [tag.get_text() for tag in entry(tree, "Model.add_args").select(".api-kind")] == ["classmethod", "abstract"]
    assert entry(tree, "Linear.width").pre.get_text() == "Linear.width: int"
    assert [li.get_text() for li in entry(tree, "halve").select(".api-raises li")] == ["ValueError: for negative times."]
    assert cells(entry(tree, "Settings"))[1] == ["names", "tuple[str, ...]", "()", "in order"]
    assert tree.find(id="linear.__enter__") and not tree.find(id="linear._hidden") and tree.find(id="linear-section")


def test_cells_become_what_they_are(small):
    toy, tree = soup(small / "toy.html"), soup(small / "outputs.html")
    assert "not shown" not in toy.get_text() and "_helper" in toy.get_text()
    folded = [fold.summary.get_text() for fold in toy.select("details")]
    assert folded == ["Source of Model", "Source of Linear", "Source of Settings", "Source of halve"]
    assert tree.img["alt"] == "Twelve bars, each higher than the one before" and tree.img["width"] == "560"
    assert (small / tree.img["src"]).read_bytes()[:4] == b"\x89PNG"
    assert "42" in tree.select("details + *")[-1].get_text() and "stale" not in tree.get_text()
    assert "Six times seven is 42." in tree.get_text()
    assert soup(small / "index.html").find("a", string="link to another page")["href"] == "toy.html#linear"


def test_a_number_keeps_its_interval_and_a_flag_its_dashes():
    from tools.site.render import to_html

    made = bs4.BeautifulSoup(to_html("| a |\n|---|\n| .1 ± .2 |\n\nUse `loop --out a-b`.\n\n```\nloop --out x\n```\n"), "html.parser")
    assert made.td.get_text() == ".1\u00a0±\u00a0.2" and made.find(class_="table-wrap").table
    assert [flag.get_text() for flag in made.select(".flag")] == ["--out"] and made.p.get_text() == "Use loop --out a-b."


# ---- in a browser

@pytest.fixture
def serve():
    "Folders on loopback ports, as a host of pages would serve them."
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    def start(folder: Path) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def watched(context, base: str, complaints: list):
    "A page that notes errors, failures and requests to other hosts."
    page = context.new_page()
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda r: complaints.append("failed " + r.url))
    page.on("response", lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("request", lambda r: complaints.append("elsewhere " + r.url) if not r.url.startswith((base, "data:")) else None)
    return page


def violations(page, where: str, context=None, **options) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context=context, options={"resultTypes": ["violations"], **options}).response["violations"]
    return [f"{where}: {v['id']}: {v['nodes'][0]['html'][:160]}" for v in found]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_every_page_loads_fits_a_phone_and_passes_axe(site, browser, serve, every):
    """axe reads every third page here, and each one in the long form.

    Contrast is measured where a page brings colours of its own; those of the style are tested below, in both themes."""
    base, complaints = serve(site), []
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page = watched(context, base, complaints)
    for number, path in enumerate(pages(site)):
        name = path.relative_to(site).as_posix()
        page.goto(base + name)
        width = page.evaluate("document.documentElement.scrollWidth")
        complaints += [f"{name} is {width} px wide"] if width > 390 else []
        if number % every == 0:
            complaints += violations(page, name, {"exclude": [[".sourceCode"], [".sidebar li"]]},  # see the test below
                                     rules={"color-contrast": {"enabled": False}})
        if page.query_selector(".cell-output-html"):
            for scheme in ("dark", "light"):
                page.emulate_media(color_scheme=scheme)
                complaints += violations(page, f"{name}, {scheme}", {"include": [[".cell-output-html"]]},
                                         runOnly=["color-contrast"])
    context.close()
    assert complaints == []


def test_nothing_is_cut_at_1280_pixels(site, browser):
    "No code, output, table or formula scrolls sideways, folded code included."
    from tools.survey import survey

    figures, lines = survey(site, browser)
    assert {name: lines[name] for name, page in figures.items() if page.cut} == {}
    assert sum(page.silent for page in figures.values()) == 0 and figures["reward/model.html"].blocks > 60


def test_the_survey_prints_before_and_after():
    from tools.survey import Figures, table

    old, new = Figures(100, 10, 3, 2, 1, 1), Figures(90, 10, 3, 0, 1, 0)
    rows = table({"a.html": new}, {"a.html": old}).splitlines()
    assert rows[2] == "| a.html | 100 → 90 | 10 | 3 | 2 → 0 | 1 | 1 → 0 |" and rows[-1].startswith("| **all pages** | 100 → 90")
    assert table({"a.html": new}).splitlines()[2] == "| a.html | 90 | 10 | 3 | 0 | 1 | 0 |"


def test_a_page_of_quarto_has_names_in_monospace_and_no_prose(browser):
    "Quarto gives a section the classes of its heading; a long output wraps, a name stays in one piece."
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.set_content((HERE / "quarto.html").read_text().replace("https://", "about:"))
    page.add_style_tag(content=(ROOT / "nbs" / "api.css").read_text())
    font = lambda selector: page.evaluate("s => getComputedStyle(document.querySelector(s)).fontFamily", selector)
    assert "monospace" in font("h3.api-name") and "monospace" not in font("#details") + font("#prose")
    assert page.evaluate("document.querySelector('#output').scrollWidth <= document.querySelector('#output').clientWidth")
    name = ".module-index p:last-child code"
    assert page.evaluate(f"document.querySelector('{name}').getClientRects().length") == 1
    page.close()


def test_the_wide_layout_passes_axe_in_both_themes(small, browser, serve):
    base, complaints = serve(small), []
    for scheme in ("light", "dark"):
        context = browser.new_context(viewport={"width": 1400, "height": 900}, color_scheme=scheme)
        page = watched(context, base, complaints)
        for name in ("index.html", "toy.html", "outputs.html"):
            page.goto(base + name)
            complaints += violations(page, f"{name}, {scheme}")
        page.keyboard.press("/")
        page.keyboard.type("row")
        page.wait_for_selector("#found li")
        complaints += violations(page, f"search, {scheme}")
        context.close()
    assert complaints == []


def test_search_finds_names_and_words(site, browser, serve):
    page = browser.new_page()
    page.goto(serve(site) + "tutorials/the_whole_loop.html")
    page.keyboard.press("/")
    page.keyboard.type("rewardmodel.forward")
    first = page.wait_for_selector("#result-0[aria-selected=true]")
    assert first.query_selector("b").inner_text() == "RewardModel.forward"
    page.keyboard.press("Enter")
    page.wait_for_url("**/reward/model.html#rewardmodel.forward")
    page.keyboard.press("/")
    page.keyboard.type("padding")
    page.wait_for_selector("#found li")
    assert "reward/model.html" in " ".join(li.get_attribute("data-url") for li in page.query_selector_all("#found li"))
    page.keyboard.type("xyzzy")
    page.wait_for_selector("#found:empty", state="attached")
    assert "Nothing has" in page.inner_text(".hint")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert not page.query_selector("dialog[open]")
    page.close()


def test_search_answers_questions_and_ranks_whole_words_first(site, browser, serve):
    page = browser.new_page()
    page.goto(serve(site) + "index.html")
    page.keyboard.press("/")

    def search(query: str) -> list[tuple[str, str, list[str]]]:
        page.fill("dialog.search input", query)
        page.wait_for_function("query => document.querySelector('.hint').textContent.includes('result') || "
                               "document.querySelector('.hint').textContent.includes('Nothing')", arg=query)
        return [(li.get_attribute("data-url"), li.query_selector("b").inner_text(),
                 [m.inner_text() for m in li.query_selector_all("mark")]) for li in page.query_selector_all("#found li")]

    for question, wanted in QUESTIONS.items():
        found = search(question)
        assert any(re.search(wanted, url) for url, _, _ in found[:3]), f"{question}: {found[:5]}"
    assert "start_here" in search("how do I run a validator")[0][0]  # a heading with all the words, before a class Run
    for _, name, marks in search("gate "):
        assert all(re.match(r"gat", mark, re.I) for mark in marks)
    names = [name.lower() for _, name, _ in search("axon ")]
    whole = [bool(re.search(r"\baxon\b", name)) for name in names]
    assert whole[0] and whole == sorted(whole, reverse=True)
    url, name, marks = search("--gating.num_uids")[0]
    assert name == "--gating.num_uids" and "--gating.num_uids" in marks
    assert search("prompting-nb subnet")[0][1] == "prompting-nb subnet" and not search("xyzzy")
    assert search("padding plugh"), "what has most of the words, where nothing has all"
    page.close()


QUESTIONS = {  # what is asked: what is among the first three
    "how do I run a validator": "start_here|loop/validator|validators/validator",
    "how can I write my own miner?": "start_here|your_own_miner|my_own_miners",
    "train a reward model": "reward_from_preferences|bring_your_own|reward/training|start_here",
    "what does padding do to scores": "padding_and_scores",
    "which miners does the gate ask": "gating|bayes|whom_to_ask|selection|start_here",
    "what will my miner earn": "what_will_my_miner_earn|start_here",
    "refused callers": "blacklist",
    "multiple gpus": "several_devices",
    "huggingface data set": "bring_your_own|sources|columns",
    "ask a question from the shell": "loop/ask",
    "event log format": "validators/event",
    "early stopping": "reward/training",
    "compare two runs": "loop/compare",
    "explain why a uid was asked": "explain",
}


def test_the_dark_theme_is_remembered(small, browser, serve):
    base = serve(small)
    page = browser.new_context(color_scheme="light").new_page()
    page.goto(base + "index.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.click(".theme-button")
    assert page.evaluate(colour) != before and page.get_attribute(".theme-button", "aria-pressed") == "true"
    page.goto(base + "toy.html")
    assert page.get_attribute("html", "data-theme") == "dark" and page.evaluate(colour) != before
    page.click(".theme-button")
    assert page.evaluate(colour) == before
    page.context.close()


def test_the_keyboard_is_enough(small, browser, serve):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(serve(small) + "toy.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.focus(".menu-button")
    page.keyboard.press("Enter")
    assert page.is_visible("#pages") and page.get_attribute(".menu-button", "aria-expanded") == "true"
    page.keyboard.press("Escape")
    assert not page.is_visible("#pages") and "menu-button" in page.evaluate("document.activeElement.className")
    wide = page.evaluate("[...document.querySelectorAll('pre, .table-wrap')].filter(b => b.scrollWidth > b.clientWidth"
                         " && b.checkVisibility()).map(b => b.tabIndex)")
    assert wide and set(wide) == {0}
    page.close()


# ---- screenshots

SHOTS = {  # name: page, width, theme, what to scroll to
    "index": ("index.html", 1280, "light", None),
    "index-phone": ("index.html", 390, "light", "a-formula"),
    "toy-light": ("toy.html", 1280, "light", "linear"),
    "toy-dark": ("toy.html", 1280, "dark", None),
    "outputs": ("outputs.html", 1280, "dark", "a-plot"),
    "search": ("index.html", 1100, "light", None),
}


def shoot(page, base: str, name: str):
    "A picture of a page, as a Pillow image."
    from PIL import Image

    address, width, theme, anchor = SHOTS[name]
    page.set_viewport_size({"width": width, "height": 720})
    page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    page.goto(base + address)
    page.add_style_tag(content="@font-face { font-family: Sans; src: url(/fonts/DejaVuSans.ttf) }"
                       "@font-face { font-family: Mono; src: url(/fonts/DejaVuSansMono.ttf) }"
                       ":root { --sans: Sans; --mono: Mono } math { font-family: Sans } * { caret-color: transparent }")
    if name == "search":
        page.keyboard.press("/")
        page.keyboard.type("row")
        page.wait_for_selector("#found li")
    page.evaluate("document.fonts.load('1rem Sans').then(() => document.fonts.load('1rem Mono'))"
                  ".then(() => document.fonts.ready).then(() => true)")
    page.evaluate("id => id && document.getElementById(id).scrollIntoView({behavior: 'instant'})", anchor)
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def test_pages_look_as_they_did(small, browser, serve):
    import matplotlib
    from PIL import Image, ImageChops

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    (small / "fonts").mkdir(exist_ok=True)
    for name in ("DejaVuSans.ttf", "DejaVuSansMono.ttf"):
        (small / "fonts" / name).write_bytes((fonts / name).read_bytes())
    base, page, differing = serve(small), browser.new_page(), {}
    for name in SHOTS:
        image, kept = shoot(page, base, name), HERE / "shots" / f"{name}.png"
        if os.environ.get("REFRESH_SCREENSHOTS"):
            image.quantize(64).save(kept, optimize=True)
        expected = Image.open(kept).convert("RGB")
        assert image.size == expected.size, name
        changed = ImageChops.difference(image, expected).convert("L").point(lambda v: 255 * (v > 48)).histogram()[255]
        differing[name] = round(100 * changed / (image.width * image.height), 2)  # % of the pixels
    page.close()
    assert all(share < 1.0 for share in differing.values()), f"% of pixels that changed: {differing}; make screenshots?"
