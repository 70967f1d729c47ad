"""What the site says about a public name: signature, bases, marks, table, Raises, Notes, Example, as Markdown."""

import ast
import functools
import inspect
import io
import re
import sys
import textwrap
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from nbdev.config import get_config
from nbdev.showdoc import BasicMarkdownRenderer

WIDTH = 84  # columns of a signature, which stands a little to the right of other code
DOCUMENTED = {"_prompt"}  # private by name, but part of the reference's interface
MARKS = {"classmethod": "classmethod", "staticmethod": "static method", "property": "property",
         "cached_property": "property", "abstractmethod": "abstract"}


@dataclass
class Parameter:
    name: str
    type: str = ""
    default: str = ""
    details: str = ""


@dataclass
class Signature:
    "What the source says about a callable: more than `inspect` knows, which has lost comments and tensor shapes."

    parameters: list[Parameter] = field(default_factory=list)
    returns: Parameter | None = None
    marks: list[str] = field(default_factory=list)


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").rstrip() for t in tokens if t.type == tokenize.COMMENT}


def _text(node: ast.AST | None) -> str:
    return "" if node is None else ast.unparse(node)


def _default(node: ast.AST | None) -> str:
    "The default of a field: that of `field(default=...)`, and what a default factory makes."
    if not (isinstance(node, ast.Call) and _text(node.func).rpartition(".")[2] == "field"):
        return _text(node)
    named = {word.arg: word.value for word in node.keywords}
    factory = named.get("default_factory")
    if factory is None:
        return _text(named.get("default"))
    return _text(factory.body) if isinstance(factory, ast.Lambda) else f"{_text(factory)}()"


def _type(node: ast.AST | None) -> str:
    "An annotation as it was written; one in quotes without them."
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else _text(node)


def _of_function(node: ast.FunctionDef, comments: dict[int, str]) -> Signature:
    args, last = node.args, node.returns.end_lineno if node.returns else 0
    positional = args.posonlyargs + args.args
    defaults = dict(zip(reversed(positional), reversed(args.defaults)))
    defaults |= {a: d for a, d in zip(args.kwonlyargs, args.kw_defaults) if d}
    starred = [(a, star) for a, star in ((args.vararg, "*"), (args.kwarg, "**")) if a]
    ordered = [(a, "") for a in positional] + starred[:bool(args.vararg)] + [(a, "") for a in args.kwonlyargs]
    ordered += starred[bool(args.vararg):]
    ends = {a: getattr(defaults.get(a), "end_lineno", a.end_lineno) for a, _ in ordered}
    rows = []
    for a, star in ordered:
        alone = ends[a] != last and ends[a] != node.lineno and list(ends.values()).count(ends[a]) == 1
        rows.append(Parameter(star + a.arg, _type(a.annotation), _text(defaults.get(a)),
                              comments.get(ends[a], "") if alone else ""))
    if args.kwonlyargs and not args.vararg:
        rows.insert(len(positional), Parameter("*"))
    # What stands beside the closing parenthesis is about the result, annotated or not.
    closing = max([last, node.body[0].lineno - 1 if not node.returns else 0])
    about = comments.get(closing, "")
    marks = [_text(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2] for d in node.decorator_list]
    marks = [MARKS[m] for m in marks if m in MARKS] + ["async"] * isinstance(node, ast.AsyncFunctionDef)
    return Signature(rows, Parameter("Returns", _type(node.returns), "", about), marks)


def _of_fields(node: ast.ClassDef, comments: dict[int, str]) -> list[Parameter]:
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return [Parameter(n.target.id, _type(n.annotation), _default(n.value), comments.get(n.end_lineno, ""))
            for n in fields if not n.target.id.startswith("_") and "ClassVar" not in _text(n.annotation)]


def _node(symbol) -> tuple[ast.AST, dict[int, str]]:
    source = textwrap.dedent(inspect.getsource(symbol))
    return ast.parse(source).body[0], _comments(source)


def _has_fields(cls: type) -> bool:
    return any(hasattr(cls, name) for name in ("__dataclass_fields__", "_fields", "model_fields"))


def signature(symbol) -> Signature:
    "The signature of a function, or of a class's constructor."
    if not inspect.isclass(symbol):
        return _of_function(*_node(symbol))
    init = symbol.__init__
    if inspect.isfunction(init) and _ours(init):
        found = _of_function(*_node(init))
        found.parameters, found.returns.type = found.parameters[1:], ""
        return found
    if _has_fields(symbol):
        chain = [c for c in reversed(symbol.__mro__) if c.__module__.split(".")[0] == symbol.__module__.split(".")[0]]
        rows = {row.name: row for c in chain for row in _of_fields(*_node(c))}
        return Signature(list(rows.values()))
    return Signature()  # what torch, an exception or an enum takes is said there


def _ours(function) -> bool:
    "Whether a function was written in the project: dataclasses and named tuples generate some, bases bring others."
    function = inspect.unwrap(function)
    module = inspect.getmodule(function)
    written = module is not None and getattr(module, "__file__", None) == function.__code__.co_filename
    return written and module.__name__.split(".")[0] == get_config().lib_path.name


def _overrides_foreign(cls: type, name: str) -> bool:
    "Whether a method without docstring of its own only fills in a hook of some library."
    return any(name in vars(base) and not base.__module__.startswith(get_config().lib_path.name) for base in cls.__mro__)


def _function(raw):
    "The function inside a property, classmethod or staticmethod; None for what is no function."
    raw = getattr(raw, "fget", None) or getattr(raw, "func", None) or getattr(raw, "__func__", None) or raw
    return raw if inspect.isfunction(raw) else None


def members(cls: type) -> dict[str, object]:
    """The documented methods of a class: its own, and those of bases between it and the root of its family.

    The root, `BaseGatingModel` or `Miner`, has an entry that every class of the family shares.
    """
    found, family = {}, [c for c in cls.__mro__ if c.__module__.split(".")[0] == cls.__module__.split(".")[0]]
    for c in [cls, *family[1:-1]]:
        for name, raw in vars(c).items():
            function = _function(raw) if name not in getattr(cls, "__dataclass_fields__", ()) else None
            special = name.startswith("__") and name not in ("__init__", "__post_init__") and function and function.__doc__
            if not function or not _ours(function) or not function.__doc__ and _overrides_foreign(cls, name):
                continue
            if not name.startswith("_") or special or name in DOCUMENTED:
                found.setdefault(name, raw)
    return found


SECTIONS = {"arg": "Parameters", "arguments": "Parameters", "args": "Parameters", "parameters": "Parameters",
            "returns": "Returns", "return": "Returns", "raises": "Raises", "note": "Notes", "notes": "Notes",
            "example": "Example", "examples": "Example"}
_HEAD = re.compile(r"^(\w+):?[ \t]*\n(?:-{3,}[ \t]*\n)?", re.M)
_RAISES = re.compile(r"(?:(?<=[.;])\s+|^|\n)Raises (.+?)(?:\.(?=\s|$)|\Z)", re.S)
_TAIL = re.compile(r"(?:^|[;,]\s*)raises (.+)$", re.S)


def sections(doc: str) -> dict[str, str]:
    "A docstring, split at its headings (`Raises:`, or underlined); sentences that begin with 'Raises' go there too."
    parts, last, rest = {"": []}, "", doc or ""
    for line in re.split(r"\n(?=\S)", rest):
        head = _HEAD.match(line + "\n")
        name = SECTIONS.get(head[1].lower()) if head and (line.splitlines()[0].endswith(":") or "\n--" in line) else None
        if name:
            last, line = name, textwrap.dedent((line + "\n")[head.end():])
        elif re.fullmatch(r"-{3,}", line.strip()):
            heading = parts[last].pop().strip()
            last, line = SECTIONS.get(heading.lower(), last), ""
        parts.setdefault(last, []).append(line)
    texts = {name: "\n".join(lines).strip("\n") for name, lines in parts.items()}
    lifted = _RAISES.findall(texts[""])
    if lifted:
        texts[""] = _RAISES.sub("", texts[""]).strip()
        texts["Raises"] = "\n".join([texts.get("Raises", ""), *(" ".join(t.split()) for t in lifted)]).strip()
    return texts


def _described(text: str) -> dict[str, str]:
    "name -> meaning, from `name (type): meaning` or `name : type` with the meaning below."
    rows = re.findall(r"^[`*]{0,2}(\w+)[`*]{0,2}\s*(?:\([^)\n]*\))?\s*:[^\S\n]*(.*(?:\n[ \t]+.*)*)", text, re.M)
    return {name: " ".join(meaning.split()) for name, meaning in rows}


def _straight(text: str) -> str:
    "Quotes as they are: in a docstring they hold values more often than speech. Flags are code, not dashes."
    flags = lambda part: re.sub(r"(?<![\w`-])--[a-z][\w.-]*\w", r"`\g<0>`", part)
    parts = re.split(r"(`[^`]*`|\$[^$\n]*\$)", text)
    return "".join(flags(re.sub(r"(?<!\\)(['\"])", r"\\\1", part)) if i % 2 == 0 else part for i, part in enumerate(parts))


def _tabled(text: str) -> str:
    return _straight(" ".join(text.split()).replace("|", r"\|") if "`" not in text else " ".join(text.split()))


def anchor(name: str, module: str) -> str:
    "Lower case, as nbdev has it; a function beside a class of the same letters gives way."
    first, names = name.split(".")[0], getattr(sys.modules.get(module), "__all__", ())
    taken = first.islower() and any(other != first and other.lower() == first for other in names)
    return name.lower() + "-function" * taken


def summary(symbol) -> str:
    "The first sentence or line of what is said about a name."
    text = sections(inspect.getdoc(symbol) or "")[""].split("\n\n")[0]
    return " ".join(text.split())


@functools.cache
def _line(file: str, line: int) -> str:
    cfg = get_config()
    path = Path(file).resolve().relative_to(cfg.config_path.resolve())
    return f"{cfg.git_url}/blob/{cfg.branch}/{path.as_posix()}#L{line}"


def source_link(symbol) -> str:
    "Where the code of a name can be read; empty for what is not in a file of the project."
    try:
        symbol = inspect.unwrap(symbol)
        return _line(inspect.getsourcefile(symbol), inspect.getsourcelines(symbol)[1])
    except (OSError, TypeError, ValueError):
        return ""


def _spread(name: str, sig: Signature, arrow: bool) -> str:
    "The signature as code, on one line where it fits."
    rows = [r.name + (f": {r.type}" if r.type else "") + (f" = {r.default}" if r.default and r.type else
            f"={r.default}" if r.default else "") for r in sig.parameters]
    end = f") -> {sig.returns.type}" if arrow and sig.returns and sig.returns.type else ")"
    line = f"{name}({', '.join(rows)}{end}"
    if len(line) <= WIDTH:
        return line
    inner = "".join(textwrap.fill(row + ",", WIDTH, initial_indent="    ", subsequent_indent="        ",
                                  break_long_words=False, break_on_hyphens=False) + "\n" for row in rows)
    end = textwrap.fill(end, WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return f"{name}(\n{inner}{end}"


class Renderer(BasicMarkdownRenderer):
    "The entry of a name on a page of the site; nbdev's `show_doc` uses it through `renderer` in settings.ini."

    def __init__(self, sym, name: str | None = None, title_level: int = 3, skip: frozenset = frozenset()):
        self.raw, self.skip, self.level = sym, skip, title_level
        self.sym = _function(sym) or sym
        self.nm = name or self.sym.__qualname__
        self.module = self.sym.__module__

    def __repr__(self):
        return self._repr_markdown_()

    __str__ = __repr__

    def _kind(self, sig: Signature) -> list[str]:
        if inspect.isclass(self.sym):
            kinds = ["abstract"] if inspect.isabstract(self.sym) else []
            return ["class", *kinds, *["dataclass"] * hasattr(self.sym, "__dataclass_fields__"),
                    *["exception"] * issubclass(self.sym, BaseException)]
        mark = {classmethod: "classmethod", staticmethod: "static method"}.get(type(self.raw))
        marks = dict.fromkeys([*([mark] if mark else []), *sig.marks])
        return list(marks) or ["method" if "." in self.nm else "function"]

    def _bases(self) -> str:
        if not inspect.isclass(self.sym):
            return ""
        shown = []
        for base in self.sym.__bases__:
            if base is object:
                continue
            inner = base.__module__.split(".")[0] == self.module.split(".")[0]
            public = ".".join(p for p in base.__module__.split(".") if not p.startswith("_"))
            full = f"{public}.{base.__name__}".replace("torch.nn.modules.module", "torch.nn")
            shown.append(f"`{base.__name__}`" if inner or base.__module__ == "builtins" else f"`{full}`")
        return "Bases: " + ", ".join(shown) if shown else ""

    def _table(self, sig: Signature, parts: dict[str, str], raises: list[str]) -> str:
        described = _described(parts.get("Parameters", ""))
        rows = [r for r in sig.parameters if r.name not in ("self", "cls", "*")]
        about = (sig.returns.details if sig.returns else "") or " ".join(parts.get("Returns", "").split())
        if sig.returns and (about or sig.returns.type not in ("", "None")):
            rows.append(Parameter("**Returns**", sig.returns.type, "", about))
        lines = []
        for row in rows:  # what is raised stands beside the arguments or the result in many places
            details = row.details or described.get(row.name, "")
            if (tail := _TAIL.search(details)):
                raises.append(tail[1])
                details = details[:tail.start()]
            if row.name.startswith("**R") and not details and row.type in ("", "None"):
                continue
            name = row.name if row.name.startswith("**R") else f"`{row.name}`"
            cells = [name, *(f"`{text}`" if text else "" for text in (row.type, row.default)), _tabled(details)]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(["| | Type | Default | Details |", "|---|---|---|---|", *lines]) if lines else ""

    def _entry(self, sig: Signature) -> list[str]:
        parts, raises = sections(inspect.getdoc(self.sym) if self.sym.__doc__ else ""), []
        table = self._table(sig, parts, raises) if sig.parameters or sig.returns else ""
        raises += [r for r in re.split(r"\n(?=\S)", parts.get("Raises", "")) if r]
        blocks = [self._bases(), _prose(parts[""]), table and f"::: {{.api-table}}\n{table}\n\n:::"]
        if raises:
            listed = "\n".join("- " + " ".join(r.lstrip("- ").split()) for r in raises)
            blocks.append(f"::: {{.api-raises}}\n**Raises**\n\n{listed}\n\n:::")
        for name in ("Notes", "Example"):
            if name in parts:
                body = parts[name]
                code = name == "Example" and "```" not in body
                blocks.append(f"**{name}**\n\n" + (_example(body) if code else _prose(body)))
        return [b for b in blocks if b]

    def _entry_markdown(self) -> str:
        "The entry of the name alone."
        sig = signature(self.sym)
        if "." in self.nm and sig.parameters and not isinstance(self.raw, staticmethod) and not inspect.isclass(self.sym):
            sig.parameters = sig.parameters[1:]
        source = source_link(self.sym)
        kinds = self._kind(sig)
        head = " ".join(f"[{kind}]{{.api-kind}}" for kind in kinds)
        head += f' [source]({source}){{.api-source title="the code of {self.nm}"}}' if source else ""
        shown = self.nm if "." in self.nm else f"{self.module}.{self.nm}"
        if "property" in kinds:
            code = shown + (f": {sig.returns.type}" if sig.returns.type else "")
            sig.parameters, sig.returns.type = [], sig.returns.details and sig.returns.type
        else:
            code = _spread(("class " if "class" in kinds else "async " if "async" in kinds else "") + shown, sig, True)
        title = f"{'#' * self.level} {self.nm.replace('_', chr(92) + '_')} {{#{anchor(self.nm, self.module)} .api-name}}"
        body = "\n\n".join([head, f"```{{.python .api-signature}}\n{code}\n```", *self._entry(sig)])
        return f"{title}\n\n::: {{.api}}\n{body}\n\n:::"

    def methods(self) -> str:
        "The entries of a class's methods, but for those of `skip`, which have a place of their own."
        raws = {f"{self.nm}.{name}": raw for name, raw in members(self.sym).items()} if inspect.isclass(self.sym) else {}
        return "\n\n".join(Renderer(raw, full, self.level + 1)._entry_markdown()
                           for full, raw in raws.items() if full not in self.skip)

    def _repr_markdown_(self) -> str:
        return "\n\n".join(filter(None, [self._entry_markdown(), self.methods()]))


def _prose(text: str) -> str:
    "A docstring's text as Markdown: lists get their blank line, and what is indented in one block is no code."
    text = re.sub(r"(?<!\n)\n(?=[ ]{0,8}[-*] )", "\n\n", "\n" + text, count=1).strip("\n")
    lines = [re.sub(r"^ {9,}", "  ", line) for line in text.splitlines()]
    return _straight(textwrap.dedent("\n".join(lines)).strip())


def _example(text: str) -> str:
    if ">>>" in text or re.search(r"^\s*(class|def|with|import|from|\w+ = |\w+\()", text, re.M):
        return f"```python\n{textwrap.dedent(text).strip()}\n```"
    return _prose(text)
