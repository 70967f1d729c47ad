"""Make README.md from nbs/index.ipynb: its markdown, its visible code and the text that the code printed."""

import json
import re
from pathlib import Path

HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|export)\b", re.M)
LINK = re.compile(r"\]\((?!\w+:)([\w./-]+\.(?:ipynb|svg|png))")  # to another page or a picture, as seen from nbs/


def _output(cell: dict) -> str:
    texts = []
    for output in cell.get("outputs", []):
        text = output.get("text") or output.get("data", {}).get("text/plain") or []
        texts.append("".join(text).rstrip())
    body = "\n".join(t for t in texts if t)
    return "\n\n" + "\n".join("    " + line for line in body.splitlines()) if body else ""


def readme(notebook: dict) -> str:
    "The notebook as Markdown."
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"](nbs/\1", source))
        elif source and not HIDDEN.search(source):
            code = "\n".join(line for line in source.splitlines() if not line.startswith("#|"))
            parts.append(f"```python\n{code}\n```" + _output(cell))
    note = "<!-- Made from nbs/index.ipynb by `make prepare`: edit the notebook. -->"
    return "\n\n".join([note, *parts]) + "\n"


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    notebook = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))
    (root / "README.md").write_text(readme(notebook), encoding="utf-8")
