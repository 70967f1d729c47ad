"""Every notebook runs from top to bottom in a Jupyter kernel of its own and shows what is stored in it."""

import os
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.refresh import ROOT, differences, notebooks, run, same_text  # noqa: E402


@pytest.mark.notebook
@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_notebook_runs_and_shows_what_is_stored(path):
    found = differences(nbformat.read(path, as_version=4), run(path))
    assert not found, "\n\n".join([*found, f"if that is right: make refresh ARGS={path.stem}"])


def test_there_are_notebooks():
    assert len(notebooks()) > 15


def test_only_last_digits_may_differ():
    assert same_text("loss 0.1234 after 10 steps", "loss 0.1235 after 10 steps")
    assert not same_text("loss 0.1234 after 10 steps", "loss 0.1234 after 11 steps")
    assert same_text("tensor([-0., 1.])", "tensor([0., 1.])") and not same_text("tensor([-0., 1.])", "tensor([-0., -1.])")
    assert not same_text("loss 0.12", "loss 0.22") and not same_text("a 1.0", "b 1.0") and not same_text("1.0", "1.0 2.0")


def _notebook(*outputs):
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("stream", name="stdout", text=o) for o in outputs])
    return nbformat.v4.new_notebook(cells=[cell])


def test_differences_name_the_cell():
    assert differences(_notebook("one\n", "two\n"), _notebook("one\ntwo\n")) == []
    found, = differences(_notebook("one\n"), _notebook())
    assert found.startswith("cell 0") and "one" in found


def test_each_page_runs_in_a_process_of_its_own(tmp_path):
    "Large libraries are there already, the package is not, and nothing is left of an earlier page."
    source = "import os, sys\nprint(os.getpid(), 'left' in globals(), 'prompting_nb' in sys.modules)\nleft = 1"
    path = tmp_path / "page.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    shown = [run(path).cells[0].outputs[0].text.split() for _ in range(2)]
    assert [words[1:] for words in shown] == [["False", "False"]] * 2
    pids = {int(words[0]) for words in shown}
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_page_shows_its_pictures(tmp_path):
    path = tmp_path / "page.ipynb"
    source = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    output, = run(path).cells[0].outputs
    assert "image/png" in output.data
