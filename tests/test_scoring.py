"""`reward score` and `reward eval`: one line for each row, streamed, continued, in several processes; and what they say."""

import io
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from families import tiny
from toys import letter_tokenizer, save_model

from prompting_nb.cli import main
from prompting_nb.config import InputError
from prompting_nb.reward.command import reward_parser, run_reward
from prompting_nb.reward.evaluation import confusion_by_length, evaluate, table
from prompting_nb.reward.model import RewardModel
from prompting_nb.reward.preferences import Ranking
from prompting_nb.reward.scoring import score_rows_of
from prompting_nb.reward.sources import read_rows

def talk(n, answer):
    return [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": answer}]


ROWS = [{"prompt_id": f"x{n}", "prompt": f"Say {n}.", "chosen": talk(n, f"{n}"), "rejected": talk(n, "No. " * n),
         "messages": talk(n, f"{n}")} for n in range(1, 12)]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    made = RewardModel("minilm", device="cpu", depth=1, max_length=16)
    made.folder = str(tmp_path_factory.mktemp("scoring") / "model")
    made.save_pretrained(made.folder)
    return made


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def command(*argv):
    said = []
    return run_reward(reward_parser().parse_args([*map(str, argv), "--quiet"]), said.append), "\n".join(said)


def test_a_line_has_id_prompt_completions_and_a_list_of_rewards(model, tmp_path):
    "Also of rows that have `messages` beside a pair: two rewards, not one."
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found, said = command("score", "--model", model.folder, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    lines = lines_of(tmp_path / "out.jsonl")
    assert [line["id"] for line in lines] == [row["prompt_id"] for row in ROWS] and (found.lines, found.texts) == (11, 22)
    wanted = model.score([row["prompt"] for row in ROWS], [row["rejected"][1]["content"] for row in ROWS]).flatten().tolist()
    assert [line["rewards"][1] for line in lines] == pytest.approx(wanted, abs=1e-5)
    assert lines[0]["completions"] == ["1", "No. "] and lines[0]["prompt"] == "Say 1." and list(lines[0])[-1] == "rewards"
    assert "22 completions of 11 rows scored; of 22 texts, 0 (0.0%) lost the beginning of the prompt and 6 (27.3%) the end" in said


def test_the_same_lines_from_a_table_and_from_standard_input(model, tmp_path, monkeypatch, capsys):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    command("score", "--model", model.folder, "--data", tmp_path / "rows.parquet", "--out", tmp_path / "out.jsonl")
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in ROWS)))
    capsys.readouterr()
    command("score", "--model", model.folder, "--data", "-")
    shown = capsys.readouterr()
    assert [json.loads(line) for line in shown.out.splitlines()] == lines_of(tmp_path / "out.jsonl")
    assert "22 completions" in shown.err


def test_bad_rows_keep_their_line(model, tmp_path):
    good = json.dumps(ROWS[0])
    half = json.dumps({"prompt": "p", "completion": "\ud83d"})
    (tmp_path / "rows.jsonl").write_text("\ufeff" + "\n".join([good, "{", good, half]) + "\n", "utf-8")
    argv = ["score", "--model", model.folder, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl"]
    with pytest.raises(InputError, match=r"rows\.jsonl:4: the text holds a lone surrogate"):
        command(*argv, "--skip-bad", 1)
    (tmp_path / "out.jsonl.part").unlink(missing_ok=True)
    found, said = command(*argv, "--skip-bad", 2)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [len(line["rewards"]) for line in lines] == [2, 0, 2, 0] and found.bad == 2 and "2 bad rows" in said
    assert lines[1]["error"].startswith(f"{tmp_path / 'rows.jsonl'}:2: not JSON")


def test_a_row_of_a_table_with_a_wrong_number_of_cells_keeps_its_line(model, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\np,a\nb\nq,c,d\nr,e\n")
    argv = ["score", "--model", model.folder, "--data", tmp_path / "rows.csv", "--out", tmp_path / "out.jsonl"]
    with pytest.raises(InputError, match="row 2: it has 3 cells, and the first line has 2"):
        command(*argv, "--skip-bad", 1)
    found, said = command(*argv, "--skip-bad", 2)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [len(line["rewards"]) for line in lines] == [1, 0, 0, 1] and found.bad == 2 and "2 bad rows" in said
    assert lines[1]["error"] == f"{tmp_path / 'rows.csv'} row 1: it has 1 cells, and the first line has 2"


def test_rows_are_read_as_they_are_needed(model, tmp_path):
    "At no time is more than a round read ahead of what is written."
    out, ahead = tmp_path / "out.jsonl", []

    def rows():
        for n in range(50):
            written = Path(f"{out}.part")
            ahead.append(n - (written.read_bytes().count(b"\n") if written.exists() else 0))
            yield {"prompt": "p", "completion": str(n)}

    score_rows_of(model, read_rows(rows()), out, chunk=8)
    assert max(ahead) <= 8 and len(lines_of(out)) == 50


def test_two_runs_do_not_write_the_same_file(model, tmp_path):
    out = tmp_path / "out.jsonl"

    def rows():
        for n in range(20):
            if n == 10:  # while this one is at work
                with pytest.raises(InputError, match="another process writes .*out.jsonl: wait for it"):
                    score_rows_of(model, read_rows([{"prompt": "q", "completion": "other"}]), out)
            yield {"prompt": "p", "completion": str(n)}

    score_rows_of(model, read_rows(rows()), out, chunk=4)
    assert [line["completions"] for line in lines_of(out)] == [[str(n)] for n in range(20)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    "The rewards of a million texts would be as many objects; a model that costs nothing shows that they are not kept."
    from toys import byte_tokenizer

    class Cheap:
        device, max_length, pooling, depth, bound, tokenizer = torch.device("cpu"), 64, "last", None, None, byte_tokenizer()
        encode_texts = RewardModel.encode_texts
        state_dict = staticmethod(dict)
        encoder = SimpleNamespace(frame=None)
        model = SimpleNamespace(config=SimpleNamespace(model_type="cheap"))

        def score_rows(self, rows, batch_size):
            return torch.tensor([[float(len(row))] for row in rows])

    peaks = []
    for count in (3000, 12_000):
        rows = ((f"row {n}", {"prompt": "p", "completion": f"answer number {n}"}) for n in range(count))
        tracemalloc.start()
        score_rows_of(Cheap(), rows, tmp_path / "out.jsonl", chunk=256)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def scored_in(folder, model, count):
    "Let the command score short texts in a process of its own; its peak memory in MB, and the seconds it took."
    rows, out = folder / "rows.jsonl", folder / "out.jsonl"
    with rows.open("w") as file:
        file.writelines(json.dumps({"prompt": f"say {n % 977}", "completion": "abcdefghij"[: n % 10 + 1]}) + "\n" for n in range(count))
    code = "from prompting_nb.cli import main\nmain()\nprint(open('/proc/self/status').read())"
    program = [sys.executable, "-c", code, "reward", "score"]
    started = time.monotonic()
    given = ["--model", model, "--data", str(rows), "--out", str(out)]
    done = subprocess.run([*program, *given], stdout=subprocess.PIPE, text=True, check=True)
    peak = next(int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("VmHWM:"))  # its own alone
    with out.open() as file:
        assert sum(1 for _ in file) == count
    return peak, time.monotonic() - started


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_a_million_texts_take_the_memory_of_a_hundred_thousand(tmp_path):
    torch.manual_seed(0)
    name = save_model(tmp_path / "encoder", tiny("bert"), letter_tokenizer(bert=True))
    model = str(tmp_path / "model")
    RewardModel(name, device="cpu").save_pretrained(model)
    found = {count: scored_in(tmp_path, model, count) for count in (100_000, 1_000_000)}
    print({count: f"{peak:.0f} MB at most, {seconds:.0f} s" for count, (peak, seconds) in found.items()})
    assert found[1_000_000][0] < 1.05 * found[100_000][0]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.py").write_text("from prompting_nb.cli import main\nmain()\n")
    argv = ["reward", "score", "--model", model.folder, "--data", "rows.jsonl", "--out", "two.jsonl"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--num_machines", "1", "--cpu",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "run.py"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HOME": str(tmp_path)}
    done = subprocess.run([*launch, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("22 completions of 11 rows scored; of 22 texts, 0 ") == 1
    score_rows_of(model, read_rows(tmp_path / "rows.jsonl"), tmp_path / "one.jsonl")
    one, two = lines_of(tmp_path / "one.jsonl"), lines_of(tmp_path / "two.jsonl")
    assert [line["rewards"] for line in two] == [pytest.approx(line["rewards"], abs=2e-6) for line in one]
    assert [{**line, "rewards": 0} for line in two] == [{**line, "rewards": 0} for line in one]


def test_an_evaluation_says_what_was_cut_and_names_a_file_without_a_pair(model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found, said = command("eval", "--model", model.folder, "--data", tmp_path / "rows.jsonl", "--json", tmp_path / "figures.json")
    assert "of 22 texts, 0 (0.0%)" in said and found["cuts"]["completions"] == 6
    assert json.loads((tmp_path / "figures.json").read_text())["confusion"] == found["confusion"]
    (tmp_path / "ties.jsonl").write_text(json.dumps({"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}))
    with pytest.raises(SystemExit):
        main(["reward", "eval", "--model", model.folder, "--data", str(tmp_path / "ties.jsonl")])
    assert "ties.jsonl: there is nothing to evaluate: no prompt has two" in capsys.readouterr().err
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(model, [Ranking("p", ["a", "b"], [1.0, 1.0])])


def test_a_figure_of_no_pair_is_no_number(model):
    found = evaluate(model, [Ranking("p", ["a", "longer than it"], [0.0, 1.0])])
    assert found.n_shorter == 0 and "no pair" in table({"m": found})
    assert "nan" not in table({"m": found}) and "nan" not in found._repr_html_()


def test_pairs_that_cutting_made_equal_are_counted(model):
    long = "day " * 30
    found = evaluate(model, [Ranking("p", [long + "one", long + "two"], [1.0, 0.0])])
    assert (found.equal, found.accuracy, found.cuts.completions) == (1, 0.5, 2)


def test_who_preferred_the_longer_answer():
    rankings = [Ranking("p", ["long", "no", "yes"], [2.0, 1.0, 0.0])]  # longer than both, shorter than the last
    found = confusion_by_length([[0.0, 2.0, 1.0]], rankings)
    assert found == {"judge longer, scores longer": 0, "judge longer, scores shorter": 2, "judge shorter, scores longer": 0,
                     "judge shorter, scores shorter": 1, "equal length or score": 0}  # fmt: skip


def test_data_of_several_files_and_a_count_of_bad_rows(tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "No."} for n in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]) + "{}\n")
    Dataset.from_list(rows[3:]).to_csv(tmp_path / "b.csv", index=False)
    both = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.csv'}"
    found, said = command("train", "--data", both, "--out", tmp_path / "mine", "--depth", 1, "--max-length", 16, "--skip-bad", 1,
                          "--epochs", 1, "--margin", 0.5, "--centring", 0.01)  # fmt: skip
    assert "6 prompts from 7 rows" in said and "passed over: 1 bad row, the first: " in said and "a.jsonl:4: 'chosen' is missing" in said
    assert "training on 5 prompts" in said and "evaluating on 1" in said  # a tenth of six is one, not none
    assert "trained: none of 10 texts was cut" in said and "in 1 epoch of batches" in said


ALTERNATING = ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
               "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
               "{% if add_generation_prompt %}[assistant] {% endif %}")


def test_rows_that_a_template_refuses_are_bad_rows(model, tmp_path):
    chatty = RewardModel.from_pretrained(model.folder, device="cpu")
    chatty.tokenizer.chat_template = ALTERNATING
    chatty.save_pretrained(tmp_path / "chatty")
    told = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]
    rows = [{"prompt": "Hi?", "completion": "Hi."}, {"prompt": told, "completions": ["Hi.", "No."]}]
    rows += [{"prompt": "Hi?", "completion": "No."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["score", "--model", tmp_path / "chatty", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl"]
    with pytest.raises(InputError, match=r"rows\.jsonl:2: the tokenizer's chat template does not take the roles system, user"):
        command(*argv)
    found, said = command(*argv, "--skip-bad", 1)
    lines = lines_of(tmp_path / "out.jsonl")
    assert [len(line["rewards"]) for line in lines] == [1, 0, 1] and "must alternate" in lines[1]["error"]
    assert (found.lines, found.texts, found.bad) == (3, 2, 1)
    wanted = chatty.score("Hi?", ["Hi.", "No."]).flatten().tolist()
    assert [line["rewards"][0] for line in (lines[0], lines[2])] == pytest.approx(wanted, abs=1e-5)


def test_rewards_do_not_take_the_place_of_the_data(model, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    for out in ("rows.jsonl", "link.jsonl"):
        with pytest.raises(InputError, match="is the data: give another file"):
            command("score", "--model", model.folder, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / out)
    assert lines_of(tmp_path / "rows.jsonl") == [ROWS[0]]


SMALL = ("--depth", 1, "--max-length", 16, "--epochs", 1)


def test_prompts_without_a_decision_neither_end_a_run_nor_are_left_out_silently(tmp_path):
    "They are left out before some are held out: a share of them alone would end the run after the training."
    pair = lambda n, scores: {"prompt": f"Say {n}.", "responses": [f"{n}", "No."], "scores": scores}
    rows = [pair(n, [1, 1]) for n in range(20)] + [pair(n, [1, 0]) for n in range(20, 23)] + [pair(20, [1, 0])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--data", tmp_path / "a.jsonl", "--out", tmp_path / "mine", *SMALL]
    found, said = command(*argv)
    assert "left out: 20 prompts whose answers all have one score" in said and found["n_pairs"] in (1, 2)
    assert "training on 2 prompts in 1 process, evaluating on 1" in said
    (tmp_path / "ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    with pytest.raises(InputError, match="ties.jsonl: there is nothing to learn"):
        command("train", "--data", tmp_path / "ties.jsonl", "--out", tmp_path / "other", *SMALL)


def test_prompts_that_are_learnt_from_and_evaluated_on_are_counted(tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "No. " * n} for n in range(1, 9)]
    for name, some in (("a", rows[:6]), ("b", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    _, said = command("train", "--data", tmp_path / "a.jsonl", "--eval-data", tmp_path / "b.jsonl", "--out", tmp_path / "mine", *SMALL)
    assert f"2 prompts of {tmp_path / 'b.jsonl'} can be learnt from as well" in said


def test_a_card_without_an_evaluation_says_what_was_cut_in_training(tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "No. " * 9 * n} for n in range(1, 5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("train", "--data", tmp_path / "a.jsonl", "--held-out", 0, "--out", tmp_path / "mine", *SMALL)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "Of the texts it learnt from: of 8 texts, 0 (0.0%) lost the beginning" in card and "; 0 pairs left out" in card


def test_several_processes_do_not_share_standard_input(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cannot read standard input"):
        command("train", "--data", "-", "--out", tmp_path / "mine")


def test_an_evaluation_that_breaks_off_leaves_the_model(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise KeyboardInterrupt
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": "No."} for n in range(1, 5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("prompting_nb.reward.evaluation.evaluate", broken)
    with pytest.raises(KeyboardInterrupt):
        command("train", "--data", tmp_path / "a.jsonl", "--out", tmp_path / "mine", *SMALL)
    assert RewardModel.from_pretrained(tmp_path / "mine", device="cpu").score("Say 1.", ["1"]).isfinite().all()
