"""A notebook as a page: nbdev's processors, then entries for exported names, links between them, and the page's index.

`Page` is named under `procs` in settings.ini, so that Quarto and our own renderer are handed the same notebook. It takes
the place of nbdev's `add_show_docs`, `exec_show_docs` and `rm_export`: it documents what the modules hold instead of
running the notebook's code a second time, and it keeps the source, folded below each entry.
"""

import ast
import functools
import html
import importlib
import inspect
import os
import re
from pathlib import Path

from execnb.nbio import mk_cell
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html
from nbdev.process import Processor
from nbdev.showdoc import showdoc_nm

from tools.site.api import DOCUMENTED, Renderer, anchor, members, summary

_SHOW = re.compile(r"^show_doc\((\w+(?:\.\w+)*)", re.M)
_CODE = re.compile(r"(?<![`\[])`([A-Za-z_]\w*(?:\.\w+)*)(\(\))?`(?![`\]])")


def address(notebook: Path | str) -> str:
    "Where a notebook's page stands on the site: `tutorials/02_x.ipynb` at `tutorials/x.html`."
    return _nbpath2html(Path(notebook)).as_posix()


@functools.cache
def modules() -> dict[str, tuple[str, frozenset]]:
    "module -> its notebook, as seen from the folder of notebooks, and its public names."
    cfg, found = get_config(), {}
    for path in sorted(cfg.lib_path.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        made_from = re.search(r"File to edit: (\S+\.ipynb)", text)
        if made_from:
            notebook = os.path.relpath((path.parent / made_from[1]).resolve(), cfg.nbs_path.resolve())
            listed = re.search(r"^__all__ = (\[.*?\])", text, re.M | re.S)
            name = ".".join(path.relative_to(cfg.lib_path.parent).with_suffix("").parts)
            found[name] = Path(notebook).as_posix(), frozenset(ast.literal_eval(listed[1]) if listed else ())
    return found


def target(name: str, here: str | None = None) -> tuple[str, str] | None:
    "Notebook and anchor of a public name, or of a public class's method; None when there is none, or more than one."
    first, _, method = name.partition(".")
    homes = [m for m, (_, names) in modules().items() if first in names]
    homes = [here] if here in homes else homes
    if len(homes) != 1:
        return None
    value = getattr(importlib.import_module(homes[0]), first)
    if not inspect.isroutine(value) and not isinstance(value, type):
        return None  # a constant or an alias, which has no entry
    if method and not (isinstance(value, type) and method in members(value)):
        return None
    return modules()[homes[0]][0], anchor(name, homes[0])


def linked(markdown: str, notebook: str, module: str | None) -> str:
    "Markdown in which names in backticks lead to their entries. Common words do so on their own page only."
    folder, fence, lines = Path(notebook).parent, "", []

    def link(found, sure):
        name, call = found.groups()
        clear = re.search(r"^[A-Z]\w*[a-z]", name) or "." in name
        goal = target(name, module) if clear or sure and (call or "_" in name or module) else None
        if goal is None or not (clear or call or "_" in name or goal[0] == notebook):
            return found[0]
        page = "" if goal[0] == notebook else Path(os.path.relpath(goal[0], folder)).as_posix()
        return f"[`{name}{call or ''}`]({page}#{goal[1]})"

    for line in markdown.splitlines():
        if (mark := re.match(r"\s*(`{3,}|~{3,})", line)):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        elif not fence and not re.match(r"#|:::|    (?! *[-*] )", line):
            line = _CODE.sub(lambda m: link(m, sure=not line.startswith("|")), line)
        lines.append(line)
    return "\n".join(lines)


def actions(notebook: str) -> str:
    "The links under a title: Colab, the notebook, its Markdown, its source."
    cfg, up = get_config(), "../" * (len(Path(notebook).parts) - 1)
    blob = f"{cfg.user}/{cfg.repo}/blob/{cfg.branch}/{cfg.nbs_path.name}/{notebook}"
    links = [("Open in Colab", f"https://colab.research.google.com/github/{blob}", ""),
             ("Download notebook", f"{up}notebooks/{notebook}", " download"),
             ("Markdown", Path(address(notebook)).name + ".md", ""),
             ("View on GitHub", f"https://github.com/{blob}", "")]
    shown = " ".join(f'<a href="{html.escape(url)}"{extra}>{text}</a>' for text, url, extra in links)
    return f'```{{=html}}\n<p class="page-actions">{shown}</p>\n```'


def _prepares(nodes: list[ast.stmt]) -> bool:
    "Whether a cell only imports, with what belongs to it: a logger, or imports for types or for a version of Python."
    imports = (ast.Import, ast.ImportFrom)
    beside = lambda node: isinstance(node, ast.If) and all(isinstance(one, imports) for one in node.body + node.orelse)
    private = lambda node: isinstance(node, ast.Assign) and all(getattr(x, "id", "").startswith("_") for x in node.targets)
    return isinstance(nodes[0], imports) and all(isinstance(n, imports) or beside(n) or private(n) for n in nodes) if nodes else True


class Page(Processor):
    "nbdev's last processor: the notebook as a reader of the site wants it."

    def begin(self):
        cfg, path = get_config(), Path(self.nb.path_).resolve()
        root = next((p for p in path.parents if p.name == cfg.nbs_path.name), path.parent)
        self.notebook = path.relative_to(root).as_posix()
        exports = [c.directives_["default_exp"][0] for c in self.nb.cells if "default_exp" in c.get("directives_", {})]
        self.module = f"{cfg.lib_path.name}.{exports[0]}" if exports else None
        self.space = vars(importlib.import_module(self.module)) if self.module else {}
        shown = frozenset(name for c in self.nb.cells if c.cell_type == "code" for name in _SHOW.findall(c.source))
        self.entries, cells, self.level = [], [], 1  # the level of the newest heading, 2 at most
        self.skip = shown | frozenset(n for c in self.nb.cells for n in self._defined(c) if "." in n)
        for cell in self.nb.cells:
            cells += self._cells(cell, shown)
        anchors = {anchor(name, self.module) for entry in self.entries for name in (entry, *self._methods(entry))}
        for cell in cells:
            if cell.cell_type == "markdown":
                cell.source = linked(_clear(cell.source, anchors), self.notebook, self.module)
        place = 1 if cells and cells[0].cell_type == "raw" else 0
        cells.insert(place, mk_cell("\n\n".join([actions(self.notebook), self._index()]), "markdown"))
        self.nb.cells[:] = cells

    def _defined(self, cell) -> list[str]:
        "The public names that an exported cell defines, in its order."
        if cell.cell_type != "code" or not {"export", "exports"} & set(cell.get("directives_", {})):
            return []
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        names = [showdoc_nm(node) for node in ast.parse(cell.source).body if isinstance(node, kinds)]
        return [n for n in names if not n.rpartition(".")[2].startswith("_") or n.rpartition(".")[2] in DOCUMENTED]

    def _entry(self, name: str) -> Renderer:
        value = self.space.get(name.split(".")[0])
        if value is None:
            raise LookupError(f"{self.notebook} documents {name}, which {self.module} does not have: run nbdev_export")
        raw = vars(value)[name.split(".")[1]] if "." in name and name.split(".")[1] in vars(value) else value
        self.entries.append(name)
        return Renderer(raw, name, self.level + 1 + ("." in name), skip=self.skip)

    def _methods(self, name: str) -> list[str]:
        value = self.space.get(name)
        return [f"{name}.{method}" for method in members(value)] if isinstance(value, type) else []

    def _cells(self, cell, shown: frozenset) -> list:
        directives = cell.get("directives_", {})
        if cell.cell_type != "code":
            self.level = 2 if re.search("^##", cell.source, re.M) else self.level
            return [cell]
        if "exec_doc" in directives:  # what the page shows is worked out when the site is built
            if not hasattr(self, "shell"):
                self.shell = CaptureShell(path=Path(self.nb.path_).parent)
            self.shell.cell(cell)
            if self.shell.exc:
                raise RuntimeError(f"{self.notebook} failed at:\n{cell.source}") from self.shell.exc
            return [cell]
        if (asked := _SHOW.search(cell.source)):
            return [mk_cell(self._entry(asked[1])._repr_markdown_(), "markdown")]
        if not {"export", "exports", "exporti"} & set(directives):
            return [] if "default_exp" in directives else [cell]
        if _prepares(ast.parse(cell.source).body):
            return []
        names = [name for name in self._defined(cell) if name not in shown]
        cell.outputs = []
        if not names:
            return [cell]  # private helpers are part of the story that the page tells: their code stays in sight
        cell.source = f'#| code-fold: true\n#| code-summary: "Source of {", ".join(names)}"\n{cell.source}'
        *first, last = map(self._entry, names)
        texts = ["\n\n".join([*map(repr, first), last._entry_markdown()]), last.methods()]
        before, after = (mk_cell(text, "markdown") for text in texts)
        return [before, cell, after] if after.source else [before, cell]

    def _index(self) -> str:
        "Module name, classes with their first lines (settings and errors last), functions."
        if not self.module:
            return ""
        classes = [n for n in self.entries if isinstance(self.space[n.split(".")[0]], type) and "." not in n]
        classes.sort(key=lambda n: n.endswith("Settings") + 2 * issubclass(self.space[n], BaseException))
        others = [n for n in self.entries if n not in classes and "." not in n]
        rows = [f"| [`{name}`](#{anchor(name, self.module)}) | {summary(self.space[name])} |" for name in classes]
        parts = [f"::: {{.module-index}}\nModule `{self.module}`"]
        if rows:
            parts.append("\n".join(["| Classes | |", "|---|---|", *rows]))
        if others:
            parts.append("Functions: " + ", ".join(f"[`{name}`](#{anchor(name, self.module)})" for name in others))
        return "\n\n".join([*parts, ":::"])


def _clear(markdown: str, anchors: set[str]) -> str:
    "Give way where a heading would take the anchor of an entry."

    def heading(found):
        slug = re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", found[2]).strip().lower())
        return f"{found[0]} {{#{slug}-section}}" if slug in anchors and "{#" not in found[0] else found[0]

    return re.sub(r"^(#+) (.*)$", heading, markdown, flags=re.M)
