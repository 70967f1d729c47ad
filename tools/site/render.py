"""Our own renderer: the processed notebooks through pandoc into `page.html`, and what goes with a site.

Everything it writes is beside the pages: style, script, search index, figures. A page asks no other host for anything.
"""

import base64
import hashlib
import html
import json
import os
import re
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pypandoc
import yaml
from execnb.nbio import read_nb
from jinja2 import Environment, FileSystemLoader
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

from tools.site.pages import address

HERE = Path(__file__).parent
READER = "markdown+lists_without_preceding_blankline-implicit_figures"
PANDOC = [pypandoc.get_pandoc_path(), f"--from={READER}", "--to=html5", "--mathml", "--columns=10000", "--wrap=none"]


def process(path: Path):
    "A notebook after nbdev's processors and ours (`procs` in settings.ini); `IN_TEST` keeps it from exporting."
    os.environ["IN_TEST"] = "1"
    nb = read_nb(path)
    NBProcessor(nb=nb, procs=FilterDefaults().procs()).process()
    return nb


# ---- from cells to Markdown

def fenced(text: str, attributes: str) -> str:
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    return f"{fence}{attributes}\n{text.rstrip()}\n{fence}"


def options(source: str) -> tuple[dict[str, str | list[str]], str]:
    "Quarto's `#| name: value` lines, read as YAML as Quarto reads them, and the code without them."
    lines = re.findall(r"^#\|[ \t]*([\w-]+:(?:[ \t].*)?)$", source, re.M)
    found = yaml.load("\n".join(lines), Loader=yaml.BaseLoader) or {}  # every value as a text
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    return found, code.strip("\n")


def bare(markdown: str) -> str:
    "A line of Markdown as plain text: no backticks, emphasis, links or backslashes."
    markdown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    parts = re.split(r"(`+)(.+?)\1", markdown)  # text, ticks, code, text ...
    for i in range(0, len(parts), 3):
        text = re.sub(r"(?<![\\\w])([*_]{1,2})(?=\S)(.+?)(?<=\S)\1(?!\w)", r"\2", parts[i])
        parts[i] = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)
    return "".join(part for i, part in enumerate(parts) if i % 3 != 1).strip()


def inline(markdown: str) -> str:
    "A line of Markdown as HTML, as far as titles and descriptions need it: code, and text."
    parts = re.split(r"(`[^`]+`)", markdown)
    return "".join(f"<code>{html.escape(part[1:-1])}</code>" if i % 2 else html.escape(bare_ends(part))
                   for i, part in enumerate(parts))


def bare_ends(text: str) -> str:
    "Plain text that keeps the spaces at its ends."
    lead, trail = text[:len(text) - len(text.lstrip())], text[len(text.rstrip()):] if text.strip() else ""
    return lead + bare(text) + trail


@dataclass
class Writer:
    "Collects one page: Markdown for pandoc, plain Markdown, figures."

    stem: str  # of the page's file, for the names of its figures
    heading: str = ""  # the newest, for figures that say nothing of themselves
    blocks: list[str] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)

    def figure(self, data: str | bytes, kind: str, option: dict, number: int) -> str:
        data = data.encode() if kind == "svg" else base64.b64decode(data)
        name = f"{self.stem}_files/figure-{len(self.figures) + 1}.{kind}"
        self.figures[name] = data
        size = 'width="{}" height="{}"'.format(*struct.unpack(">II", data[16:24])) if kind == "png" else ""
        caption, alt = (one_of(option.get(name, ""), number) for name in ("fig-cap", "fig-alt"))
        alt = html.escape(bare(alt or caption or f"Plot: {self.heading}"))
        image = f'<img src="{name}" alt="{alt}" {size}>'
        return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>" if caption else image

    def output(self, out: dict, option: dict, number: int = 0) -> str:
        "What a cell shows; `number` counts its figures."
        if out["output_type"] == "stream":
            return "" if out.get("name") == "stderr" else _plain("".join(out["text"]))
        if out["output_type"] == "error":
            return _plain(f"{out['ename']}: {out['evalue']}")
        data = {kind: "".join(text) if isinstance(text, list) else text for kind, text in out.get("data", {}).items()}
        if "text/html" in data:
            return _raw(f'<div class="cell-output-html">{data["text/html"]}</div>')
        for kind in ("svg+xml", "png"):
            if f"image/{kind}" in data:
                return _raw(self.figure(data[f"image/{kind}"], kind[:3], option, number))
        for kind in ("text/markdown", "text/latex"):
            if kind in data:
                return data[kind]
        return _plain(data.get("text/plain", ""))

    def cell(self, cell: dict) -> None:
        if cell["cell_type"] == "markdown":
            self.blocks.append(cell["source"])
            headings = re.findall(r"^#+ +([^{\n]+)", cell["source"], re.M)
            self.heading = headings[-1].strip() if headings else self.heading
        if cell["cell_type"] != "code":
            return
        option, code = options(cell["source"])
        parts = []
        if code and option.get("echo") != "false" and option.get("include") != "false":
            parts.append(fenced(code, "{.python .cell-code}"))
            if option.get("code-fold") == "true":
                label = html.escape(option.get("code-summary", "Code"))
                parts = [_raw(f'<details class="code-fold"><summary>{label}</summary>'), *parts, _raw("</details>")]
        if option.get("output") != "false" and option.get("include") != "false":
            shown, drawn = [], len(self.figures)
            for out in cell.get("outputs", []):
                shown.append(self.output(out, option, len(self.figures) - drawn))
            wrap = "{text}" if option.get("output") == "asis" else "::: {{.cell-output}}\n{text}\n\n:::"
            parts += [wrap.format(text=text) for text in shown if text]
        if parts:
            self.blocks.append("\n\n".join(["::: {.cell}", *parts, ":::"]))


def one_of(texts: str | list[str], number: int) -> str:
    "The text for a figure of a cell: Quarto's options take one, or one for each."
    return texts if isinstance(texts, str) else texts[number] if number < len(texts) else ""


def _raw(text: str) -> str:
    return fenced(text, "{=html}")


def _plain(text: str) -> str:
    return _raw(f"<pre><code>{html.escape(text.rstrip())}</code></pre>") if text.strip() else ""


def plain_markdown(title: str, description: str, blocks: list[str]) -> str:
    "The page for those who read text: no classes, no folded code, no markup of our own."
    text = re.sub(r"^(`{3,})\{=html\}\n<details.*?</details>\n\1$", "", "\n\n".join(blocks), flags=re.M | re.S)
    text = re.sub(r"^`{3,}\{=html\}\n<pre><code>(.*?)</code></pre>\n`{3,}$",
                  lambda m: fenced(html.unescape(m[1]), "text"), text, flags=re.M | re.S)
    text = re.sub(r"^(`{3,})\{=html\}\n.*?\n\1$", "", text, flags=re.M | re.S)
    text = re.sub(r"^:::.*\n?", "", text, flags=re.M)
    text = re.sub(r"^(`{3,})\{\.python[^}]*\}", r"\1python", text, flags=re.M)
    text = re.sub(r"\[([\w ]+)\]\{\.api-kind\}", r"*\1*", text)
    text = re.sub(r"\\(['\"_])", r"\1", text)
    text = re.sub(r"(?<=[\w)])[ ]?\{[#.][^}\n]*\}", "", text)
    text = re.sub(r"(\]\([\w./-]*?)(\w+)\.ipynb", lambda m: m[1] + address(m[2] + ".ipynb") + ".md", text)
    return re.sub(r"\n{3,}", "\n\n", f"# {title}\n\n> {description}\n\n{text}".strip()) + "\n"


# ---- from Markdown to HTML

FLAG, MARKED = re.compile(r"(?<![\w-])--[a-z][\w.-]*"), r'<span class="flag">\g<0></span>'

def to_html(markdown: str, cache: Path | None = None) -> str:
    "What pandoc makes of a page, kept under its content's hash; links lead to pages, wide tables scroll by themselves."
    kept = cache and cache / (hashlib.sha256((str(PANDOC[1:]) + markdown).encode()).hexdigest()[:24] + ".html")
    if kept and kept.exists():
        body = kept.read_text(encoding="utf-8")
    else:
        body = subprocess.run(PANDOC, input=markdown, capture_output=True, text=True, check=True).stdout
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(body, encoding="utf-8")
    body = re.sub(r'<a href="#cb[\d-]+" aria-hidden="true" tabindex="-1"></a>', "", body)
    body = re.sub(r' id="cb[\d-]+"', "", body)
    whole = lambda table: table.replace(" ± ", "&nbsp;±&nbsp;")  # a number keeps its interval on its line, a flag its dashes
    body = re.sub(r"<table.*?</table>", lambda m: f'<div class="table-wrap">{whole(m[0])}</div>', body, flags=re.S)
    body = re.sub(r"(?<!<pre>)<code>([^<]*--[^<]*)</code>", lambda m: f"<code>{FLAG.sub(MARKED, m[1])}</code>", body)
    body = re.sub(r"<th></th>", '<td></td>', body)
    return re.sub(r'href="(?!\w+:|#)([^"#]*?)([^"#/]+\.ipynb)(?![^"]*" download)',
                  lambda m: f'href="{m[1]}{address(m[2])}', body)


SILENT = ("annotation", "style", "script", "details")  # what search does not look at: markup, and folded source


class Sections(HTMLParser):
    "The headings of a page with the text below each of them."

    def __init__(self, body: str, title: str):
        super().__init__()
        self.found, self.depth, self.inside = [dict(level=1, id="", name=title, api=False, text=[])], 0, False
        self.feed(body)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if re.fullmatch("h[2-4]", tag) and "id" in attrs:
            api = "api-name" in attrs.get("class", "")
            self.found.append(dict(level=int(tag[1]), id=attrs["id"], name="", api=api, text=[]))
            self.inside = True
        self.depth += tag in SILENT

    def handle_endtag(self, tag):
        self.inside = self.inside and not re.fullmatch("h[2-4]", tag)
        self.depth -= tag in SILENT

    def handle_data(self, data):
        if self.inside:
            self.found[-1]["name"] += data
        elif not self.depth:
            self.found[-1]["text"].append(data)


# ---- the site

@dataclass
class Made:
    "A page on its way."

    notebook: str
    title: str
    description: str
    markdown: str
    figures: dict
    text: str
    body: str = ""
    sections: list = field(default_factory=list)

    @property
    def name(self) -> str:
        return bare(self.title)

    @property
    def shown(self) -> str:
        return inline(self.title)

    @property
    def about(self) -> str:
        return bare(self.description)

    @property
    def lede(self) -> str:
        return inline(self.description)

    @property
    def url(self) -> str:
        return address(self.notebook)

    def actions(self, settings: dict) -> list[tuple[str, str]]:
        "The links of Quarto's `repo-actions`, with the addresses that Quarto gives them."
        repo = settings.get("repo-url", "").rstrip("/")
        place = "/".join(filter(None, [settings.get("repo-branch", "main"), settings.get("repo-subdir", ""), self.notebook]))
        links = {"edit": ("Edit this page", f"{repo}/edit/{place}"), "source": ("View source", f"{repo}/blob/{place}"),
                 "issue": ("Report an issue", settings.get("issue-url", f"{repo}/issues/new"))}
        return [links[action] for action in settings.get("repo-actions", ()) if repo]


def make(path: Path, notebook: str) -> Made:
    nb = process(path)
    about = getattr(nb, "frontmatter_", {})
    title, description = about.get("title", Path(notebook).stem), about.get("description", "")
    writer = Writer(Path(address(notebook)).stem, title)
    for cell in nb.cells:
        writer.cell(cell)
    return Made(notebook, title, description, "\n\n".join(writer.blocks), writer.figures,
                plain_markdown(title, description, writer.blocks))


def groups(contents: list, nbs: Path) -> list[tuple[str, list[str]]]:
    "The sidebar of `_quarto.yml`: (heading, notebooks), in its order; a pattern stands for the files that match."
    found = [("", [])]
    for item in contents:
        if isinstance(item, dict) and "section" in item:
            found += [(item["section"], [n for _, inner in groups(item["contents"], nbs) for n in inner]), ("", [])]
        else:
            name = item if isinstance(item, str) else item["href"]
            found[-1][1].extend(sorted(p.relative_to(nbs).as_posix() for p in nbs.glob(name)) if "*" in name else [name])
    return [(heading, pages) for heading, pages in found if pages]


def read(nbs: Path) -> tuple[dict, list[tuple[str, list[Made]]]]:
    "The settings of the website in `_quarto.yml`, and its sidebar with every notebook processed."
    settings = yaml.safe_load((nbs / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    sidebar = groups(settings["sidebar"]["contents"], nbs)
    for name in [name for _, names in sidebar for name in names]:
        if not (nbs / name).exists():
            raise FileNotFoundError(f"_quarto.yml lists {name}, which is not in {nbs.name}/")
    return settings, [(heading, [make(nbs / name, name) for name in names]) for heading, names in sidebar]


def build(nbs: Path, out: Path, cache: Path | None = None) -> list[Made]:
    "Build the site of the notebooks in `nbs`, as the `_quarto.yml` there says, into `out`."
    settings, menu = read(nbs)
    pages = [page for _, inside in menu for page in inside]
    with ThreadPoolExecutor(2) as pool:  # pandoc runs beside Python
        for page, body in zip(pages, pool.map(lambda p: to_html(p.markdown, cache), pages)):
            page.body, page.sections = body, Sections(body, page.name).found
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh, menu, settings)
    write_text(fresh, menu, settings, nbs)
    shutil.rmtree(out, ignore_errors=True)
    fresh.rename(out)
    return pages


def commands_and_flags(pages: list[Made]) -> list[list]:
    "Entries of the search index for `prompting-nb ...` and `--flags`: the section that says most about each of them."
    best = {}
    for page in pages:
        for s in page.sections:
            text = " ".join("".join(s["text"]).split())
            names = re.findall(r"prompting-nb(?: [a-z]+)(?: (?:train|eval|score)\b)?|(?<![\w-])--[a-z][\w.]*[\w]", text)
            for name in set(names):
                command = not name.startswith("-")
                about = re.search(re.escape(name) + r"(?![\w.])(.{0,300})", text)
                head = page.name.lower().startswith("the command") or "command" in page.url.rpartition("/")[2]
                words = set(re.findall(r"\w+", page.name.lower())) & set(name.split()[1:])
                helped = re.search(re.escape(name) + r"(?: [A-Z_]+)? .{0,120}\(default", text)  # as `--help` has it
                rank = (bool(command and words), bool(helped), head, len(about[1]) if about else 0)
                if name not in best or rank > best[name][0]:
                    place = f"{page.url}#{s['id']}".rstrip("#")
                    best[name] = rank, [place, page.name, name, 1, (name + about[1]) if about else text[:200]]
    return [entry for _, entry in best.values()]


def write(out: Path, menu: list, settings: dict) -> None:
    "Pages with their figures, style, script and search index."
    env = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template, pages = env.get_template("page.html"), [page for _, inside in menu for page in inside]
    for i, page in enumerate(pages):
        path = out / page.url
        path.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * page.url.count("/")
        before, after = pages[i - 1] if i else None, pages[i + 1] if i + 1 < len(pages) else None
        part = next((heading for heading, inside in menu if page in inside), "")
        path.write_text(template.render(page=page, up=up, menu=menu, settings=settings, part=part, before=before,
                                        after=after), encoding="utf-8")
        for name, data in page.figures.items():
            (path.parent / name).parent.mkdir(exist_ok=True)
            (path.parent / name).write_bytes(data)
    for path in (HERE / "style.css", HERE / "site.js", get_config().nbs_path / "api.css"):  # the last is Quarto's too
        shutil.copy(path, out / path.name)
    index = [[f"{page.url}#{s['id']}".rstrip("#"), page.name, s["name"], int(s["api"]), " ".join("".join(s["text"]).split())[:4000]]
             for page in pages for s in page.sections] + commands_and_flags(pages)
    if site := settings.get("site-url", "").rstrip("/"):  # as Quarto: with the address of the site there is a sitemap
        urls = "".join(f"  <url><loc>{html.escape(site)}/{page.url}</loc></url>\n" for page in pages)
        (out / "sitemap.xml").write_text(f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/'
                                         f'schemas/sitemap/0.9">\n{urls}</urlset>\n', encoding="utf-8")
    (out / "search.js").write_text(f"window.searchIndex={json.dumps(index, ensure_ascii=False)}", encoding="utf-8")


def write_text(out: Path, menu: list, settings: dict, nbs: Path) -> None:
    "What goes with the site whoever rendered it: notebooks to download, the Markdown of each page, llms.txt."
    lines = [f"# {settings['title']}", "", f"> {settings['description']}", ""]
    for heading, inside in menu:
        lines += [f"## {heading or 'Start'}", ""]
        lines += [f"- [{page.name}]({page.url}.md): {page.description}" for page in inside] + [""]
    (out / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    for page in [page for _, inside in menu for page in inside]:
        for name in set(re.findall(r'<img src="(?!\w+:)([^"]+)"', page.body)) - set(page.figures):  # beside the notebook
            picture = (out / page.url).parent / name
            picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy((nbs / page.notebook).parent / name, picture)
        text, copy = out / (page.url + ".md"), out / "notebooks" / page.notebook
        for path in (text, copy):
            path.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(page.text, encoding="utf-8")
        shutil.copy(nbs / page.notebook, copy)


def add_text(nbs: Path, out: Path) -> None:
    "The same for a site that Quarto has rendered."
    settings, menu = read(nbs)
    write_text(out, menu, settings, nbs)
