"""Run notebooks from top to bottom, each in a Jupyter kernel of its own, and keep what they print.

    python -m tools.refresh                  run all of them and write their outputs back
    python -m tools.refresh gating loop      only those with one of these words in their path
    python -m tools.refresh --check          write nothing, say where outputs differ from those that are stored

Outputs are the same from run to run: seeds are fixed, and timings, ports and paths are not printed. Numbers may differ
in their last digits between processors, and pictures in a few pixels; that much is tolerated.
"""

import argparse
import base64
import copy
import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image, ImageChops
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tools.kernels import ForkedKernelManager  # noqa: E402

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar, which is gone when the page is read
TEXTS = ("text/markdown", "text/html", "text/plain")  # the first of these that an output has is compared
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
SHARE_OF_PIXELS = 0.03  # that may differ in a picture
SKIPPED = "skip-execution"


def notebooks(words: list[str] = ()) -> list[Path]:
    "The notebooks of the project, those with one of the words in their path if there are any."
    found = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    return [p for p in found if not words or any(word in p.relative_to(ROOT).as_posix() for word in words)]


def run(path: Path, timeout: int = 600):
    "The notebook with fresh outputs; a cell that fails raises `CellExecutionError`, which shows the cell and the traceback."
    notebook = copy.deepcopy(nbformat.read(path, as_version=4))
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(r"^#\|\s*eval:\s*false", cell.source, re.M):
            cell.metadata["tags"] = [SKIPPED]
    manager = ForkedKernelManager if sys.platform == "linux" else AsyncKernelManager
    patient = dict(startup_timeout=300, iopub_timeout=120)  # else a busy machine loses outputs that come after their cell
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", skip_cells_with_tag=SKIPPED, **patient,
                            kernel_manager_class=manager, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env={**os.environ, **ENVIRONMENT, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    return notebook


def _kept(outputs) -> list:
    "Outputs without warnings and progress bars, the pieces of one stream joined: where a stream is cut depends on timing."
    kept = []
    for output in outputs:
        if output.get("name") == "stderr" or WIDGET in output.get("data", {}):
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(copy.deepcopy(output))
    return kept


def _outputs(cell) -> list[tuple[str, str]]:
    "What a cell shows: pairs of kind and content."
    shown = []
    for output in _kept(cell.get("outputs", [])):
        data = output.get("data", {})
        if output.output_type == "stream":
            shown.append(("stdout", output.text))
        elif "image/png" in data:
            shown.append(("image/png", data["image/png"]))
        elif kind := next((kind for kind in TEXTS if kind in data), None):
            shown.append((kind, data[kind]))
    return shown


def _close(a: str, b: str) -> bool:
    "Are two printed numbers equal but for the last digits?"
    if a == b or float(a) == float(b) == 0:  # a sum that is zero may have either sign
        return True
    if "." not in a and "e" not in a:
        return False
    unit = 10.0 ** -len(a.split("e")[0].partition(".")[2])
    return abs(float(a) - float(b)) <= max(0.01 * abs(float(a)), 2 * unit)


def same_text(a: str, b: str) -> bool:
    "Do two texts say the same, if numbers may differ in their last digits?"
    squeeze = lambda text: re.sub(r"[ \t]+", " ", NUMBER.sub("#", text)).strip()
    found = NUMBER.findall(a), NUMBER.findall(b)
    return squeeze(a) == squeeze(b) and all(_close(x, y) for x, y in zip(*found))


def same_picture(a: str, b: str) -> bool:
    "Do two PNGs in base64 look alike?"
    first, second = (Image.open(io.BytesIO(base64.b64decode(png))).convert("L") for png in (a, b))
    if max(abs(x - y) for x, y in zip(first.size, second.size)) > 4:
        return False
    size = tuple(map(min, zip(first.size, second.size)))
    counts = ImageChops.difference(first.crop((0, 0, *size)), second.crop((0, 0, *size))).histogram()
    return sum(counts[64:]) <= SHARE_OF_PIXELS * size[0] * size[1]


def differences(stored, fresh) -> list[str]:
    "Where the outputs of two runs of a notebook differ, a text for each cell."
    found = []
    for number, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
        old, new = _outputs(old), _outputs(new)
        same = [kind for kind, _ in old] == [kind for kind, _ in new] and all(
            (same_picture if kind == "image/png" else same_text)(a, b) for (kind, a), (_, b) in zip(old, new))
        if not same:
            show = lambda outputs: "\n".join(f"[{kind}] {text if kind != 'image/png' else ''}" for kind, text in outputs)[:1500]
            found.append(f"cell {number}\nstored:\n{show(old)}\nfresh:\n{show(new)}")
    return found


def write(path: Path, fresh) -> None:
    "Store the fresh outputs, cleaned as every commit of a notebook is."
    notebook = nbformat.read(path, as_version=4)
    for old, new in zip(notebook.cells, fresh.cells):
        if old.cell_type == "code":
            old.outputs = _kept(new.outputs)
            old.execution_count = None
    nbformat.write(notebook, path)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", path], cwd=ROOT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only notebooks with one of these words in their path")
    parser.add_argument("--check", action="store_true", help="write nothing, compare with what is stored")
    parser.add_argument("--workers", type=int, default=2, help="notebooks at a time (default: %(default)s)")
    args = parser.parse_args()
    failed = 0
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = {pool.submit(run, path): path for path in notebooks(args.words)}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="notebooks"):
            path = jobs[job]
            try:
                fresh = job.result()
            except CellExecutionError as error:
                failed += 1
                tqdm.write(f"{path.relative_to(ROOT)} failed:\n{error}")
                continue
            if args.check:
                found = differences(nbformat.read(path, as_version=4), fresh)
                failed += bool(found)
                for text in found:
                    tqdm.write(f"{path.relative_to(ROOT)}, {text}\n")
            else:
                write(path, fresh)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
