"Runs say what they were made with, and are laid side by side."

import json
import math
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from prompting_nb.cli import COMMANDS, main
from prompting_nb.config import InputError, command_line, merge
from prompting_nb.loop.compare import compare_runs, interval_of, over_seeds, read_run
from prompting_nb.loop.record import digest, digest_of_path
from prompting_nb.loop.report import Recorder, make_folder
from prompting_nb.loop.run import Loop
from prompting_nb.loop.tasks import Arena, Worker
from prompting_nb.validators.validator import Policy, default_gate

PROMPTS = [f"Is {n} a number?" for n in range(30)]


def a_run(folder: Path, seed: int, file: Path, **gating) -> Path:
    "A short run of three workers, recorded as the command does."
    texts = {"brief": "No.", "polite": "Yes, please.", "wordy": "Well, " * 5 + "yes."}
    workers = [Worker(name, lambda _, text=text: text) for name, text in texts.items()]
    grade = lambda prompt, completion: min(len(completion) / 34, 1.0)
    arena = Arena("small", PROMPTS, workers, Worker("new", lambda prompt: "N"), [], [], grade)
    judge = lambda prompt, found: torch.tensor([min(len(c or "") / 34, 1.0) for c in found])
    flags = merge({"seed": seed, "out": str(folder), "prompts": str(file), "gating": gating})
    recorder = Recorder(make_folder(folder), command=f"prompting-nb loop --seed {seed}", settings=flags, files=[file])
    gate = lambda metagraph, seed: default_gate(metagraph, seed, {"gating": gating})
    loop = Loop(arena, judge, Policy(k=1, timeout=30), gate, seed, recorder.event)
    loop.run(progress=False)
    recorder.close(loop)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    file = place / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    rate = dict(learning_rate=0.2)
    return [a_run(place / "a", 0, file), a_run(place / "b", 1, file), a_run(place / "c", 0, file, **rate)]


def test_a_summary_says_what_the_run_was_made_with(runs):
    summary = json.loads((runs[2] / "summary.json").read_text())
    assert summary["command"] == "prompting-nb loop --seed 0" and summary["seeds"] == {"run": 0}
    assert summary["versions"]["torch"] == torch.__version__ and "python" in summary["versions"]
    assert summary["gating"]["kind"] == "bayes" and summary["rule"] == "thompson"
    assert summary["loss"] == "reward_mse" and summary["learning_rate"] == 0.2
    assert summary["date"].endswith("+00:00") and summary["judging"]["kind"]
    assert summary["data"]["prompts"] == {"count": 30, "sha256": digest(PROMPTS)}
    (file,) = summary["data"]["files"]
    assert file["sha256"] == digest_of_path(file["path"])
    assert isinstance(summary["gate"], float), "the mean grade of the gate keeps its name"
    page = (runs[2] / "report.html").read_text()
    for text in (digest(PROMPTS), "prompting-nb loop --seed 0", summary["date"], torch.__version__, "learning_rate"):
        assert text in page


def test_runs_side_by_side(runs):
    found = compare_runs(runs)
    differs = {row.name for row in found.settings if row.differs}
    assert {"seed", "gating.learning_rate", "learning_rate"} <= differs and "gating.loss" not in differs
    (group,) = found.groups
    assert group.runs == ["a", "b"], "the third differs by more than its seed"
    values = [run.figures["gate"].value for run in found.runs[:2]]
    assert group.figures["gate"] == over_seeds(values) and group.figures["gate"].value == pytest.approx(np.mean(values))
    assert [d.paired for d in found.differences] == [True, True]
    for run in found.runs:
        figure = run.figures["gate"]
        assert figure.value == pytest.approx(run.summary["gate"], abs=1e-3)
        assert figure.low <= figure.value <= figure.high


def test_a_run_of_an_earlier_version_is_read(runs, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    summary = json.loads((runs[0] / "summary.json").read_text())
    known = ("status", "arena", "graded_by", "seed", "steps", "top_k", "warm", "random", "best_fixed", "gate", "oracle", "gap_closed")
    (old / "summary.json").write_text(json.dumps({name: summary[name] for name in known}))
    (old / "events.jsonl").write_text((runs[0] / "events.jsonl").read_text())
    found = compare_runs([runs[1], old])
    figures = found.runs[1].figures
    np.testing.assert_allclose(found.runs[1].curves["gate"], read_run(runs[0]).curves["gate"], atol=1e-3)
    assert figures["gate"].low is not None and figures["random"] == (summary["random"], None, None)
    assert "old does not say what it was made with" in found.notes and found.groups == []
    (row,) = [row for row in found.settings if row.name == "learning_rate"]
    assert row.recorded == [True, False] and not row.differs
    assert "?" in found.as_html()


@pytest.mark.parametrize("broken, says", [
    ({"summary.json": None}, "has not ended, or was killed"),
    ({"summary.json": None, "events.jsonl": None}, "is no run"),
    ({"summary.json": "{"}, "cannot read"),
    ({"summary.json": "[]"}, "is no summary of a run"),
    ({"summary.json": '{"steps": 3}'}, "is no summary of a run"),
    ({"curves.json": "[1, 2]"}, "cannot read"),
    ({"curves.json": '{"gate": [0.5]}'}, "does not fit"),
    ({"curves.json": None, "events.jsonl": None}, "no events.jsonl"),
    ({"curves.json": None, "events.jsonl": '{"uids": []}\n'}, "events.jsonl:1: no event"),
])
def test_a_folder_that_is_no_run_is_refused_with_the_reason(runs, tmp_path, broken, says):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in runs[0].iterdir():
        text = broken.get(file.name, file.read_bytes())
        if text is not None:
            (folder / file.name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError, match=says):
        compare_runs([runs[1], folder])


def test_a_summary_with_values_of_other_kinds_is_compared_or_refused(runs, tmp_path):
    "Whatever stands in it, there is a comparison that JSON can hold, or one line that says what is wrong."
    whole, odd = json.loads((runs[0] / "summary.json").read_text()), tmp_path / "odd"
    shutil.copytree(runs[0], odd)
    refused = set()
    for name in whole:
        for value in (None, "x", [1], {"files": 3}, math.nan, -1):
            (odd / "summary.json").write_text(json.dumps(whole | {name: value}))
            try:
                found = compare_runs([runs[1], odd])
                json.dumps(found.as_dict(), allow_nan=False)
            except InputError as error:
                assert str(odd) in str(error)
                refused.add(name)
    assert refused == {"status", "steps", "seed", "settings", "data", "judging"}
    (odd / "summary.json").write_text(json.dumps(whole))
    (odd / "curves.json").unlink()
    for rewards in ([], [math.nan], [1e308, 1e308], ["x"], 3):
        (odd / "events.jsonl").write_text(json.dumps({"rewards": rewards}) + "\n")
        with pytest.raises(InputError, match="events.jsonl:1: no event of a run"):
            compare_runs([runs[1], odd])


def test_brackets_are_no_markup(runs, tmp_path):
    one, two = tmp_path / "one [red]", tmp_path / "two"
    shutil.copytree(runs[0], one)
    shutil.copytree(runs[1], two)
    for folder, gate, graded_by in ((one, "bayes", "the judge"), (two, "[/x]", "[bold]nobody")):
        summary = json.loads((folder / "summary.json").read_text())
        summary["settings"]["gate"], summary["graded_by"] = gate, graded_by
        (folder / "summary.json").write_text(json.dumps(summary))
    text = StringIO()
    compare_runs([one, two]).print(Console(file=text, width=300, force_jupyter=False))
    assert "one [red]" in text.getvalue() and "[/x]" in text.getvalue() and "[bold]nobody" in text.getvalue()


def test_the_command_writes_a_page_and_prints_json_or_tables(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["compare", *map(str, runs), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["page"] == "runs/compare-1.html" and len(found["runs"]) == 3
    page = Path(found["page"]).read_text()
    assert page.count("<img") == 1 and "<script" not in page and 'class="marked"' in page
    main(["compare", *map(str, runs)])
    assert "runs/compare-2.html" in capsys.readouterr().out, "the first page is kept"
    for arguments, says in [([runs[0]], "at least two"), ([runs[0], runs[0]], "twice"),
                            ([runs[0], runs[1], "--out", found["page"]], "--force")]:
        with pytest.raises(SystemExit) as end:
            main(["compare", *map(str, arguments)])
        assert end.value.code == 2 and says in capsys.readouterr().err


def test_the_program_records_what_was_typed(monkeypatch):
    "The command line reaches the record through the program, not through `sys.argv`."
    seen, parser = [], COMMANDS["loop"][0]
    monkeypatch.setitem(COMMANDS, "loop", (parser, lambda settings: seen.append(command_line.get()), ""))
    main(["loop", "--seed", "3"])
    assert seen == [("loop", "--seed", "3")] and command_line.get() == ()


def test_interval_of_few_steps():
    assert interval_of([]) == (None, None, None) and interval_of([1.0, 0.0]) == (0.5, None, None)
    assert interval_of([0.5] * 20)[1:] == (0.5, 0.5)
