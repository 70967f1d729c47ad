"""`python -m tools.survey _docs` prints a table of the pages of a site: height, words, what is cut, pictures without text.

A second folder is compared: `python -m tools.survey _docs --before old/_docs` shows both figures where they differ.
"""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

COUNT = """() => {
  document.querySelectorAll("details").forEach((fold) => fold.open = true)
  const wide = (selector) => [...document.querySelectorAll(selector)].filter((box) => box.scrollWidth > box.clientWidth + 1)
  const blocks = document.querySelectorAll("main pre, main .cell-output-html")
  const cut = [...wide("main pre, main .cell-output-html"), ...wide("main .table-wrap, main math[display=block]")]
  const pictures = [...document.querySelectorAll("main img, main svg")].filter((p) => !p.closest("[aria-hidden=true]"))
  const said = (p) => p.getAttribute("alt") || p.getAttribute("aria-label") || p.querySelector("title")?.textContent || ""
  const longest = cut.map((box) => (box.innerText ?? box.textContent).split("\\n").sort((a, b) => b.length - a.length)[0])
  document.querySelectorAll("details").forEach((fold) => fold.open = false)
  return {height: document.documentElement.scrollHeight, words: document.querySelector("main").innerText.split(/\\s+/).length,
          blocks: blocks.length, cut: cut.length, pictures: pictures.length,
          silent: pictures.filter((p) => !said(p).trim() || said(p).startsWith("Plot: ")).length,
          first: longest}
}"""


@dataclass
class Figures:
    "What is counted on a page."

    height: int  # pixels
    words: int
    blocks: int  # of code or output
    cut: int  # blocks, tables and formulas that scroll sideways, with folded code opened
    pictures: int
    silent: int  # pictures that do not say what they show


def survey(site: Path, browser, width: int = 1280) -> tuple[dict[str, Figures], dict[str, list[str]]]:
    "Figures of every page of a site, and the longest line of each block that is cut, by address."
    found, lines = {}, {}
    page = browser.new_page(viewport={"width": width, "height": 900})
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        name = path.relative_to(site).as_posix()
        counted = page.evaluate(COUNT)
        lines[name] = counted.pop("first")
        found[name] = Figures(**counted)
    page.close()
    return found, lines


def table(after: dict[str, Figures], before: dict[str, Figures] | None = None) -> str:
    "Figures as a Markdown table, with a last row of sums."
    names = [field.name for field in fields(Figures)]

    def row(name: str, new: Figures | None, old: Figures | None) -> str:
        shown = []
        for column in names:
            now, was = getattr(new, column, "–"), getattr(old, column, "–")
            shown.append(str(now) if before is None or now == was else f"{was} → {now}")
        return "| " + " | ".join([name, *shown]) + " |"

    total = lambda all_of: Figures(*(sum(getattr(f, column) for f in all_of.values()) for column in names))
    pages = sorted({*after, *(before or {})})
    rows = [row(name, after.get(name), (before or {}).get(name)) for name in pages]
    last = row("**all pages**", total(after), total(before) if before is not None else None)
    return "\n".join(["| page | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|", *rows, last])


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(prog="python -m tools.survey", description=__doc__)
    parser.add_argument("site", type=Path, nargs="?", default=Path("_docs"), help="a built site")
    parser.add_argument("--before", type=Path, help="an earlier one to compare with")
    parser.add_argument("--width", type=int, default=1280, help="of the window, in pixels")
    parser.add_argument("--lines", action="store_true", help="list the longest line of each block that is cut")
    args = parser.parse_args()
    with sync_playwright() as play:
        found = next(p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if Path(p).exists())
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        after, lines = survey(args.site.resolve(), browser, args.width)
        before = survey(args.before.resolve(), browser, args.width)[0] if args.before else None
        browser.close()
    print(table(after, before))
    if args.lines:
        print(*(f"{name}: {line}" for name, cut in lines.items() for line in cut), sep="\n")


if __name__ == "__main__":
    main()
