"""Rankings and pairs: what a row may look like, what is dropped and counted, and with which words a row is refused."""

import gzip
import json
import logging

import pytest

from prompting_nb.config import InputError
from prompting_nb.reward.preferences import (
    Pair,
    Ranking,
    Report,
    clean,
    decided,
    decisions,
    pairs,
    parse_ranking,
    rankings_from,
    read_rankings,
    score_rankings,
    split,
)

ROW = {"prompt": "p", "responses": [{"completion": "a", "score": 2}, {"completion": "b", "score": 0.5}]}
USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Yes.")))
OTHER = {"role": "assistant", "content": "No."}


def test_a_ranking_has_a_score_and_a_name_for_each_completion():
    assert len(Ranking("p", ["a", "b"], [1.0, 2.0], ["x", "y"])) == 2
    for more, reason in (({"scores": [1.0]}, "2 completions has 1 scores"),
                         ({"names": ["x"]}, "2 completions has 1 names")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^a ranking of {reason}$"):
            Ranking(**{"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 2.0], **more})


def test_pairs_are_what_the_judge_told_apart():
    ranking = Ranking("p", ["a", "b", "c"], [1.0, 3.0, 1.0])
    tie = Ranking("q", ["d", "e"], [1.0, 1.0])
    assert list(decisions(ranking)) == [(1, 0), (1, 2)]
    assert pairs([tie, ranking]) == [Pair("p", "b", "a", 2.0), Pair("p", "b", "c", 2.0)]
    assert decided([tie, ranking]) == [ranking]
    with pytest.raises(InputError) as error:
        decided([tie])
    assert str(error.value) == "there is nothing to learn: no prompt has two completions with different scores"


def test_empty_and_repeated_completions_are_dropped_and_counted():
    report = Report()
    ranking = Ranking("p", ["a", " ", " a\n", "b", ""], [1.0, 2.0, 3.0, 4.0, 5.0], list("vwxyz"), "s")
    assert clean(ranking, report) == Ranking("p", ["a", "b"], [1.0, 4.0], ["v", "y"], "s")
    assert report == Report(empty=2, repeated=1)
    for _ in range(2):
        assert clean(Ranking("p", ["a", "a"], [1.0, 2.0]), report) is None
    assert report == Report(empty=2, repeated=3, single=2)
    assert clean(Ranking("p", ["a", "b"], [1.0, 2.0])).names is None
    assert clean(Ranking("p", ["a", "", "b"], [1.0, 2.0, 0.0], margins=[3.0, 1.0, 0.0])).margins == [3.0, 0.0]
    assert str(report) == ("0 prompts from 0 rows; dropped: 2 empty completions, 3 repeated completions, "
                           "2 prompts with fewer than two completions")  # fmt: skip


def test_a_row_with_responses():
    assert parse_ranking(ROW) == Ranking("p", ["a", "b"], [2.0, 0.5])
    named = {**ROW, "source": "here", "responses": [{**r, "model": n} for r, n in zip(ROW["responses"], "xy")]}
    assert parse_ranking(named) == Ranking("p", ["a", "b"], [2.0, 0.5], ["x", "y"], "here")
    half = {**ROW, "responses": [{**ROW["responses"][0], "model": "x"}, ROW["responses"][1]]}
    assert parse_ranking(half).names is None
    talk = parse_ranking({**ROW, "prompt": [USER]})
    assert talk.prompt == "Hi?"


@pytest.mark.parametrize("row, expected", [
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, Ranking("p", ["a", "b"], [1.0, 0.0])),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 3, "source": "s"},
     Ranking("p", ["a", "b"], [1.0, 0.0], None, "s", [3.0, 0.0])),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 3, "score_chosen": 7, "score_rejected": 5.5},
     Ranking("p", ["a", "b"], [7.0, 5.5], margins=[3.0, 0.0])),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 7}, Ranking("p", ["a", "b"], [1.0, 0.0])),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_rejected": 7}, Ranking("p", ["a", "b"], [1.0, 0.0])),
    ({"chosen": "Q: why? A: so", "rejected": "Q: why? A: no"}, Ranking("Q: why? A: ", ["so", "no"], [1.0, 0.0])),
    ({"chosen": "Q: ab cd", "rejected": "Q: ab ce f"}, Ranking("Q: ab ", ["cd", "ce f"], [1.0, 0.0])),
    ({"chosen": "Q: a", "rejected": "Q: a b"}, Ranking("Q: ", ["a", "a b"], [1.0, 0.0])),
    ({"chosen": "Q: a b", "rejected": "Q: a"}, Ranking("Q: ", ["a b", "a"], [1.0, 0.0])),
    ({"prompt": "p", "chosen": [ASSISTANT], "rejected": [OTHER]}, Ranking("p", ["Yes.", "No."], [1.0, 0.0])),
])  # fmt: skip
def test_a_row_with_a_pair(row, expected):
    assert parse_ranking(row) == expected


@pytest.mark.parametrize("row", [
    {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    {"prompt": "Hi?", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
    {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
])  # fmt: skip
def test_a_row_with_a_pair_of_conversations(row):
    found = parse_ranking(row)
    assert (found.prompt, found.completions) == ("Hi?", ["Yes.", "No."])


def test_equal_answers_of_a_conversation_leave_one_message_each():
    same = parse_ranking({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]})
    assert same.completions == ["Yes.", "Yes."]
    with pytest.raises(ValueError, match="begin and end with a message of the assistant"):
        parse_ranking({"chosen": [USER, ASSISTANT, USER], "rejected": [USER, OTHER]})


@pytest.mark.parametrize("row, reason", [
    ([], "expected a JSON object, got list"), (None, "expected a JSON object, got NoneType"),
    ({}, "'chosen' is missing"), ({"chosen": "a"}, "'rejected' is missing"),
    ({"chosen": 1, "rejected": "b"}, "'chosen' should be a text or messages, got 1"),
    ({"chosen": "a", "rejected": [OTHER]}, "'chosen' and 'rejected' should be two texts or two lists"),
    ({"chosen": "a", "rejected": "b"}, "'prompt' is missing, and 'chosen' and 'rejected' do not begin with the same prompt"),
    ({"prompt": 5, "chosen": "a", "rejected": "b"}, "'prompt' should be a text or messages, got 5"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "'margin' should be a finite number, got 'x'"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": True, "score_rejected": 1},
     "'score_chosen' should be a finite number, got True"),
    ({"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": float("inf")},
     "'score_rejected' should be a finite number, got inf"),
    ({"responses": []}, "'prompt' is missing"), ({"prompt": 1.5, "responses": []}, "'prompt' should be a text or messages, got 1.5"),
    ({"prompt": "p", "responses": "x" * 99}, "'responses' should be a list, got '" + "x" * 39),
    ({"prompt": "p", "responses": ["x"]}, "'score' is missing"),
    ({"prompt": "p", "responses": [{"completion": 1}]}, "'completion' should be a text, got 1"),
    ({"prompt": "p", "responses": [{"completion": "a"}]}, "'score' is missing"),
    ({"prompt": "p", "responses": [{"completion": "a", "score": float("nan")}]}, "'score' should be a finite number, got nan"),
])  # fmt: skip
def test_a_row_that_is_malformed_is_refused_with_the_reason(row, reason):
    with pytest.raises(ValueError) as error:
        parse_ranking(row)
    assert str(error.value) == reason
    with pytest.raises(InputError) as error:
        rankings_from([ROW, row])
    assert str(error.value) == f"row 1: {reason}"


def test_rows_are_counted_and_cleaned(caplog):
    caplog.set_level(logging.INFO)
    single = {"prompt": "s", "responses": [{"completion": "a", "score": 1}, {"completion": " a", "score": 2}]}
    report = Report(rows=10, rankings=20)
    assert rankings_from([ROW, single, ROW], report) == [parse_ranking(ROW)] * 2
    assert report == Report(rows=13, rankings=22, repeated=1, single=1)
    record, = caplog.records
    assert (record.name, record.levelname) == ("prompting_nb.reward.preferences", "INFO")
    assert record.getMessage() == f"the data: {report}"
    assert rankings_from([single], keep_all=True) == [parse_ranking(single)]
    with pytest.raises(InputError) as error:
        rankings_from([single])
    assert str(error.value) == ("the data holds no prompt with two different completions (0 prompts from 1 row; dropped: "
                                "0 empty completions, 1 repeated completion, 1 prompt with fewer than two completions)")


@pytest.mark.parametrize("name, opener", [("rankings.jsonl", open), ("rankings.jsonl.gz", gzip.open)])
def test_a_file_of_rankings(tmp_path, name, opener):
    path, row = tmp_path / name, {**ROW, "prompt": "ä😀"}
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\n" + json.dumps(row, ensure_ascii=False) + "\n \n" + json.dumps({**row, "prompt": "q"}) + "\n")
    report = Report()
    assert [r.prompt for r in read_rankings(str(path), report)] == ["ä😀", "q"]
    assert (report.rows, report.rankings) == (2, 2)
    with opener(path, "at", encoding="utf-8") as file:
        file.write("{\n")
    with pytest.raises(InputError) as error:
        read_rankings(path)
    assert str(error.value).startswith(f"{path}:5: not JSON from column 2 on")


def test_files_that_cannot_be_read_and_files_without_a_ranking(tmp_path):
    for name, content, reason in (("a.jsonl", None, "No such file or directory"), ("b.jsonl", b"\xff", "it is no text in UTF-8"),
                                  ("c.jsonl.gz", b"no gzip", "it is not packed by gzip")):  # fmt: skip
        path = tmp_path / name
        if content:
            path.write_bytes(content)
        with pytest.raises(InputError) as error:
            read_rankings(path)
        assert str(error.value).startswith(f"cannot read {path}: {reason}")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match=r"empty\.jsonl holds no prompt with two different completions"):
        read_rankings(empty)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "a"}))
    assert len(read_rankings(twice, keep_all=True)) == 1


def test_rankings_are_divided_by_prompt():
    rankings = [Ranking(prompt, ["a", "b"], [1.0, 0.0]) for prompt in "abcdefghijabc"]
    train, test = split(rankings)
    assert len({r.prompt for r in test}) == 2
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    assert sorted(r.prompt for r in train + test) == sorted("abcdefghijabc")
    assert [r.prompt for r in train] == [r.prompt for r in rankings if r.prompt in {t.prompt for t in train}]
    assert split(rankings, seed=0) == (train, test) != split(rankings, seed=1)
    for test in (1, 0.1, 9, 0.9):
        assert len({r.prompt for r in split(rankings, test)[1]}) == (test if test >= 1 else test * 10)
    for test in (0, 10, 0.0, 1.0, -0.1):
        with pytest.raises(InputError) as error:
            split(rankings, test)
        assert str(error.value) == f"test={test} of 10 prompts leaves nothing on one side: both sides need a prompt"


def test_completions_are_scored_each_with_its_prompt():
    rankings = [Ranking("p", ["a", "bb"], [1.0, 0.0]), Ranking("q", ["ccc"], [1.0])]
    scorer = lambda prompts, completions: [f"{len(c) + (p == 'q') / 2}" for p, c in zip(prompts, completions, strict=True)]
    assert score_rankings(scorer, rankings) == [[1.0, 2.0], [3.5]]
