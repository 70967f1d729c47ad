"""The report of a training run: curve, margins, who preferred the longer answer, all figures; and the model card."""

import json

from test_reward import toy, toys  # noqa: F401

from prompting_nb.reward.command import reward_parser, run_reward
from prompting_nb.reward.saving import model_card


def test_a_training_run_leaves_a_report(tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": f"Yes, {n}. " * 9, "rejected": f"No {n}."} for n in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["train", "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "mine", "--depth", 1,
            "--max-length", 24, "--epochs", 2, "--quiet"]  # fmt: skip
    said = []
    run_reward(reward_parser().parse_args(list(map(str, argv))), said.append)
    folder = tmp_path / "mine-report"
    assert sorted(path.name for path in folder.iterdir()) == ["by_length.svg", "curve.svg", "margins.svg", "report.md", "summary.json"]
    page, figures = (folder / "report.md").read_text(), json.loads((folder / "summary.json").read_text())
    assert "steps in 2 epochs of" in page and "the loss" in page and "| judge: longer | 1 | 0 |" in page
    assert figures["evaluation"]["confusion"]["judge longer, scores longer"] == 1
    assert figures["training"]["cuts"]["completions"] == 9 and len(figures["training"]["steps"]) > 3
    caption = "\n\nIn how many pairs judge and model preferred the longer or the shorter answer:\n\n| | model"
    assert caption in page and "of 1 pair in the right order.\n" in page  # an interval of one pair would say nothing
    assert "lost the beginning of the prompt and 9 (50.0%) the end" in page
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "Of its texts: of 2 texts" in card and "1 (50.0%) the end of the completion" in card
    assert any("curve, margins and figures" in text for text in said)


def test_a_card_without_an_evaluation_says_nothing_of_cuts(toys):  # noqa: F811
    assert "Of its texts" not in model_card(toy(toys, "bert"))


def test_a_report_says_what_was_left_out(tmp_path):
    from prompting_nb.reward.report import write_report
    from prompting_nb.reward.training import History

    page = write_report(tmp_path, History(undecided=2, equal=1)).read_text()
    assert "2 rankings left out: all completions have one score." in page and "1 pair became equal by cutting" in page


def test_an_interval_is_given_from_ten_pairs(tmp_path):
    from prompting_nb.reward.evaluation import evaluate_scores
    from prompting_nb.reward.preferences import Ranking
    from prompting_nb.reward.report import write_report
    from prompting_nb.reward.training import History

    for count, given in ((9, False), (10, True)):
        rankings = [Ranking(f"p{n}", ["yes", "no"], [1, 0]) for n in range(count)]
        found = evaluate_scores([[1.0, 0.0]] * count, rankings)
        page = write_report(tmp_path, History(), found).read_text()
        assert f"1.000 of {count} pairs in the right order{' (95 % interval' if given else '.'}" in page
