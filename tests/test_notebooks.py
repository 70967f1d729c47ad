"""Every notebook runs from top to bottom in nbdev's own runner, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
                   if ".ipynb_checkpoints" not in p.parts)
RUNNER = Path(sys.executable).with_name("nbdev_test")


@pytest.mark.notebook
@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebook_runs(notebook):
    run = subprocess.run([RUNNER, "--path", notebook, "--n_workers", "0"], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "MPLBACKEND": "Agg"}, timeout=600)
    assert run.returncode == 0 and "Success." in run.stdout, run.stdout[-2000:] + run.stderr[-6000:]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 15
