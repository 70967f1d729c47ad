"""Take out of rendered pages what they would load from other hosts; Quarto calls this after a render (`post-render`).

For every page with an HTML output Quarto adds jQuery and require.js, for widgets that this project has none of. Only the
standard library is used, since Quarto runs the first Python on PATH.
"""

import os
import re
import sys
from pathlib import Path

ELSEWHERE = r"""(?:src|href)\s*=\s*["']?(?:https?:)?//"""
SCRIPT = re.compile(rf"<script\b[^>]*\b{ELSEWHERE}[^>]*>.*?</script\s*>[ \t]*\n?", re.S | re.I)
DEFINES = re.compile(r"<script\b[^>]*>\s*define\(\s*['\"]jquery['\"].*?</script\s*>[ \t]*\n?", re.S | re.I)  # needs require.js
LINK = re.compile(rf"<link\b(?=[^>]*\b{ELSEWHERE})(?=[^>]*\brel\s*=\s*[\"']?(?:stylesheet|preload|modulepreload|preconnect"
                  r"|dns-prefetch|icon))[^>]*>[ \t]*\n?", re.I)
CODE = re.compile(r"<(pre|code|textarea)\b.*?</\1\s*>", re.S | re.I)  # what a page says about scripts stays


def local(page: str) -> tuple[str, int]:
    "A page without scripts, styles and hints of other hosts, and how many there were."
    kept = []

    def put_by(found):
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    page, removed = CODE.sub(put_by, page), 0
    for pattern in (SCRIPT, DEFINES, LINK):
        page, count = pattern.subn("", page)
        removed += count
    return re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], page), removed


def main(folder: Path) -> None:
    changed = total = 0
    for path in sorted(folder.rglob("*.html")):
        before = path.read_text(encoding="utf-8")
        after, removed = local(before)
        if removed:
            path.write_text(after, encoding="utf-8")
            changed, total = changed + 1, total + removed
    print(f"{folder.name}/: {total} loads from other hosts taken out of {changed} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else os.environ["QUARTO_PROJECT_OUTPUT_DIR"]))
