"""`python -m tools.site build` makes the documentation; `preview` serves it and makes it again when something changes."""

import argparse
import contextlib
import functools
import http.server
import multiprocessing
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NBS, OUT, CACHE = ROOT / "nbs", ROOT / "_docs", ROOT / "_proc" / "pandoc"


@contextlib.contextmanager
def kept(path: Path):
    "A file that is afterwards as it was, whatever happens to it or to the build meanwhile."
    text = path.read_bytes()
    path.touch()  # nbdev makes a README only where it is older than the index
    try:
        yield
    finally:
        path.write_bytes(text)


def with_quarto(out: Path) -> None:
    "nbdev_docs, which is only called when Quarto is there: it would install it otherwise; then what goes with a site."
    from tools.site import render

    with kept(ROOT / "README.md"):  # nbdev_docs makes it too; ours comes from tools/readme.py
        subprocess.run([sys.executable, "-c", "from nbdev.quarto import nbdev_docs; nbdev_docs()"], cwd=ROOT, check=True)
    render.add_text(NBS, OUT)
    if out != OUT:
        shutil.move(OUT, out)


def alone(out: Path) -> None:
    from tools.site import render

    render.build(NBS, out, CACHE)


def docs(out: Path = OUT) -> None:
    "Make the site, and say in a line who did."
    start, quarto = time.monotonic(), shutil.which("quarto")
    (with_quarto if quarto else alone)(out)
    who = f"Quarto ({quarto})" if quarto else "our own renderer and pandoc, as Quarto is not installed"
    pages = len(list(out.rglob("*.html")))
    print(f"{out.name}/ made by {who}: {pages} pages, {time.monotonic() - start:.0f} s")


def stamp() -> float:
    "When something that the site is made of changed last."
    roots = [NBS, ROOT / "prompting_nb", ROOT / "tools"]
    files = [p for root in roots for p in root.rglob("*") if p.suffix in (".ipynb", ".py", ".css", ".js", ".html")]
    return max(p.stat().st_mtime for p in [*files, ROOT / "_quarto.yml", ROOT / "settings.ini"])


def rebuild() -> None:
    "In a child process, so that changed modules are read anew while torch and the like stay loaded."
    child = multiprocessing.get_context("fork").Process(target=docs)
    child.start()
    child.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def end_headers(self):
        self.send_header("Cache-Control", "no-store")
        super().end_headers()


def preview(port: int) -> None:
    if shutil.which("quarto"):
        command = f"from nbdev.quarto import nbdev_preview; nbdev_preview(port={port}, host='127.0.0.1', no_browser=True)"
        raise SystemExit(subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode)
    import bittensor, torch, transformers  # noqa: E401, F401  loaded once, inherited by each rebuild

    seen = stamp()
    rebuild()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Quiet, directory=str(OUT)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(1)
            if (now := stamp()) != seen:
                seen = now
                rebuild()
    except KeyboardInterrupt:
        server.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.site", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="make _docs/")
    make.add_argument("--out", type=Path, default=OUT, help="another folder for it")
    serve = commands.add_parser("preview", help="make it, serve it on loopback, make it again on change")
    serve.add_argument("--port", type=int, default=8000, help="port on 127.0.0.1; 0 takes one that is free")
    args = parser.parse_args()
    docs(args.out) if args.command == "build" else preview(args.port)
