"""Change one module in many small ways, and count the changes that its tests notice.

    python -m tools.mutants network.auth            all mutants of a module, and a list of those that survive
    python -m tools.mutants network.auth --show     the same list with what was changed, as it stands in tests/survivors.md

mutmut makes the mutants and runs the tests on them. This lays out a folder for it, `.mutants/MODULE`, with a copy of the
project and its configuration: one module to change, and the test cells of its page and the test files that are about it.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # module -> files of tests; cells.py runs the test cells of its page
    "network.auth": ["cells.py", "test_auth.py"],
    "network.legacy": ["cells.py", "test_legacy.py"],
    "network.queue": ["cells.py", "test_queue.py"],
    "baseminer.cache": ["cells.py", "test_cache.py"],
    "baseminer.blacklist": ["cells.py", "test_blacklist.py"],
    "baseminer.priority": ["cells.py", "test_priority.py"],
    "validators.selection": ["test_drawing.py", "test_selection.py"],  # their pages take twenty seconds
    "validators.replay": ["test_drawing.py", "test_replay.py"],
    "reward.loss": ["cells.py", "test_loss.py"],
    "reward.evaluation": ["test_evaluation.py"],
    "reward.preferences": ["test_preferences.py"],
}
# docstrings are not mutated: a line that is nothing but a sentence in quotes
CONFIG = r"""[mutmut]
source_paths = prompting_nb
only_mutate = {path}
pytest_add_cli_args_test_selection =
    {tests}
pytest_add_cli_args =
    -p
    no:cacheprovider
timeout_multiplier = 4
do_not_mutate_patterns =
    ^\s+"[A-Z][^"]*"$
also_copy =
    nbs
    tools
    pytest.ini
    settings.ini
"""


def apply_later(source: str) -> str:
    "Apply the decorators of functions in a line of their own, below: mutmut leaves decorated functions as they are."
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(functions, key=lambda node: -node.lineno):
        names = [ast.unparse(decorator) for decorator in node.decorator_list]
        if names and not {"staticmethod", "classmethod"} & set(names) and not any(name.endswith(".setter") for name in names):
            call = "".join(f"{name}(" for name in names) + node.name + ")" * len(names)
            lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {call}")
            del lines[node.decorator_list[0].lineno - 1:node.lineno - 1]
    return "\n".join(lines) + "\n"


def lay_out(module: str) -> Path:
    "Copy the project into a folder of its own, and write mutmut's configuration."
    folder = ROOT / ".mutants" / module
    shutil.rmtree(folder, ignore_errors=True)  # with the verdicts of earlier tests
    (folder / "mutants").mkdir(parents=True)  # is on the path, so it must be there when Python starts
    for name in ("prompting_nb", "tests", "tools", "nbs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pytest.ini", "settings.ini"):
        shutil.copy2(ROOT / name, folder / name)
    tests = "\n    ".join(f"tests/{name}" for name in TESTS[module])
    path = Path("prompting_nb", *module.split(".")).with_suffix(".py")
    (folder / path).write_text(apply_later((folder / path).read_text()))
    (folder / "setup.cfg").write_text(CONFIG.format(path=path, tests=tests))
    return folder


def function_of(mutant: str) -> str:
    "Name the function of a mutant: `Class.name` for `prompting_nb.module.xǁClassǁname__mutmut_1`."
    name = mutant.rsplit(".", 1)[-1].rsplit("__mutmut_", 1)[0]
    return name.removeprefix("xǁ").replace("ǁ", ".") if "ǁ" in name else name.removeprefix("x_")


def change_of(diff: str) -> str:
    "Write in short what was changed, `before` -> `after`, with a few words around it."
    sides = [" ".join(line[1:].strip() for line in diff.splitlines() if line.startswith(sign) and not line.startswith(3 * sign))
             for sign in "-+"]
    same = len(os.path.commonprefix(sides))
    same_after = len(os.path.commonprefix([side[same:][::-1] for side in sides]))
    start, end = max(0, same - 40), max(0, same_after - 20)
    cut = [bool(start) * "..." + side[start:len(side) - end] + bool(end) * "..." for side in sides]
    return " -> ".join(f"`` {text} ``" if "`" in text else f"`{text}`" for text in cut)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", choices=sorted(TESTS), metavar="MODULE", help=", ".join(sorted(TESTS)))
    parser.add_argument("--show", action="store_true", help="show what was changed in each mutant that survives")
    parser.add_argument("--workers", default="2", help="mutants at a time (default: %(default)s)")
    args = parser.parse_args()
    folder = lay_out(args.module)
    environment = {**os.environ, "MODULE": args.module, "PYTHONPATH": str(folder / "mutants"), "MPLBACKEND": "agg",
                   "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    mutmut = lambda *words, **more: subprocess.run(
        [Path(sys.executable).with_name("mutmut"), *words], cwd=folder, env=environment, **more)
    if mutmut("run", "--max-children", args.workers).returncode:
        raise SystemExit(1)
    results = mutmut("results", "--all", "true", capture_output=True, text=True).stdout.split("\n")
    pairs = [line.strip().rsplit(": ", 1) for line in results if ": " in line]
    survivors = [name for name, status in pairs if status not in ("killed", "timeout")]
    print(f"{args.module}: {len(pairs)} mutants, {len(pairs) - len(survivors)} caught", *survivors, sep="\n  ")
    if args.show:
        explained = (ROOT / "tests" / "survivors.md").read_text()
        show = lambda name: mutmut("show", name, capture_output=True, text=True).stdout
        changes = Counter(f"- `{function_of(name)}`: {change_of(show(name))}" for name in survivors)
        for change, count in changes.items():
            line = change + f" ({count})" * (count > 1)
            print(line + " [not explained in tests/survivors.md]" * (f"{line}: " not in explained))


if __name__ == "__main__":
    main()
