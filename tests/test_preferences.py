"""Rankings and pairs: what a row may look like, what is dropped and counted, and with which words a row is refused."""

import gzip
import json
import logging

import pytest

from prompting_nb.config import InputError
from prompting_nb.reward import preferences
from prompting_nb.reward.preferences import (
    Pair,
    Ranking,
    Report,
    clean,
    decided,
    decoded,
    decisions,
    pairs,
    parse_ranking,
    rankings_from,
    rankings_of,
    read_rankings,
    score_rankings,
    split,
)
from prompting_nb.reward.sources import Unreadable
from prompting_nb.show import Bar, html_table

ROW = {"prompt": "p", "responses": [{"completion": "a", "score": 2}, {"completion": "b", "score": 0.5}]}
USER, ASSISTANT = ({"role": role, "content": text} for role, text in (("user", "Hi?"), ("assistant", "Yes.")))
OTHER = {"role": "assistant", "content": "No."}


def test_a_ranking_has_a_score_and_a_name_for_each_completion():
    assert len(Ranking("p", ["a", "b"], [1.0, 2.0], ["x", "y"])) == 2
    for more, reason in (({"scores": [1.0]}, "2 completions has 1 scores"),
                         ({"names": ["x"]}, "2 completions has 1 names"),
                         ({"margins": [1.0, 2.0, 3.0]}, "2 completions has 3 margins")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^a ranking of {reason}$"):
            Ranking(**{"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 2.0], **more})
    assert Ranking("p", ["a", "b"], ["1", 2]).scores == [1.0, 2.0]
    for more, reason in (({"completions": "ab" * 30}, "completions are a list of texts, got '" + "ab" * 19 + "a"),
                         ({"scores": [1, float("inf")]}, "scores are finite numbers, got [1.0, inf]")):  # fmt: skip
        with pytest.raises(ValueError) as error:
            Ranking(**{"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 2.0], **more})
        assert str(error.value) == reason


def test_pairs_are_what_the_judge_told_apart():
    ranking = Ranking("p", ["a", "b", "c"], [1.0, 3.0, 1.0])
    tie = Ranking("q", ["d", "e"], [1.0, 1.0])
    assert list(decisions(ranking)) == [(1, 0), (1, 2)]
    assert pairs([tie, ranking]) == [Pair("p", "b", "a", 2.0), Pair("p", "b", "c", 2.0)]
    assert decided([tie, ranking]) == [ranking]
    with pytest.raises(InputError) as error:
        decided([tie])
    assert str(error.value) == "there is nothing to learn: no prompt has two completions with different scores"
    with pytest.raises(InputError, match="^there is nothing to see: no prompt has"):
        decided([tie], "there is nothing to see")
    recorded = Ranking("p", ["a", "b"], [1.0, 3.0], margins=[0.25, 1.0])
    assert pairs([recorded]) == [Pair("p", "b", "a", 0.75)]


def test_a_ranking_in_a_notebook_is_a_table_from_the_best_to_the_worst():
    columns = ("completion", "by", "score")
    found = Ranking("p", ["a", "b", "c"], [1.0, 3.0, 2.0], ["x", "y", None])
    rows = [["b", "y", Bar(3.0, 1.0)], ["c", "", Bar(2.0, 0.5)], ["a", "x", Bar(1.0, 0.0)]]
    assert found._repr_html_() == html_table("p", columns, rows)
    same = Ranking("p", ["a", "b"], [2.0, 2.0])
    assert same._repr_html_() == html_table("p", columns, [["a", "", Bar(2.0, 0.0)], ["b", "", Bar(2.0, 0.0)]])
    assert Ranking("p", [], [])._repr_html_() == html_table("p", columns, [])


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
    with pytest.raises(InputError, match="1 repeated completion,"):
        read_rankings(twice)


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
    for test, kept in ((0.99, 9), (0.01, 1)):  # a share leaves a prompt on each side
        assert len({r.prompt for r in split(rankings, test)[1]}) == kept
    for test in (0, 10, 0.0, 1.0, -0.1):
        with pytest.raises(InputError) as error:
            split(rankings, test)
        assert str(error.value) == f"test={test} of 10 prompts leaves nothing on one side: both sides need a prompt"


def test_completions_are_scored_each_with_its_prompt():
    rankings = [Ranking("p", ["a", "bb"], [1.0, 0.0]), Ranking("q", ["ccc"], [1.0])]
    scorer = lambda prompts, completions: [f"{len(c) + (p == 'q') / 2}" for p, c in zip(prompts, completions, strict=True)]
    assert score_rankings(scorer, rankings) == [[1.0, 2.0], [3.5]]
    with pytest.raises(ValueError) as error:
        score_rankings(lambda prompts, completions: [1.0], rankings)
    assert str(error.value) == "a scorer gives a number for each completion: it gave 1 for 3"


def test_bad_rows_are_passed_over_up_to_a_number(tmp_path):
    report, rows = Report(), [ROW, {"chosen": "a"}, ROW, [], "{"]
    assert rankings_from(rows, report, skip_bad=3) == [parse_ranking(ROW)] * 2
    assert report == Report(rows=5, rankings=2, bad=3, first_bad="row 1: 'rejected' is missing")
    assert str(report).endswith(" completions; passed over: 3 bad rows, the first: row 1: 'rejected' is missing")
    for skip_bad, reason in ((0, "row 1: 'rejected' is missing"), (2, "row 4: not JSON from column 2 on")):
        with pytest.raises(InputError) as error:
            rankings_from(rows, skip_bad=skip_bad)
        assert str(error.value) == reason
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n{}\n")
    assert len(read_rankings(path, skip_bad=1)) == 1
    with pytest.raises(InputError) as error:
        read_rankings(path)
    assert str(error.value) == f"{path}:2: 'chosen' is missing"


def test_scores_that_contradict_a_pair_are_counted_and_its_order_counts():
    report, pair = Report(), {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}
    [first, second] = rankings_from([pair, {**pair, "prompt": "q"}], report)
    assert first.scores == second.scores == [1.0, 0.0] and report.contradicted == 2
    assert str(report).startswith("2 prompts from 2 rows; dropped: 0 empty completions, ")
    assert str(report).endswith("; 2 pairs whose scores do not say that the chosen one is better: it counts as better")


def test_single_answers_are_joined_by_prompt():
    def row(prompt, text, score, **more):
        return {"prompt": prompt, "response": text, "score": score, **more}

    rows = [row("p", "a", 1), row("q", "a", 1), row("p", "b", 2), row("q", "b", 0), row("p", "c", 3)]
    assert rankings_from(rows) == [Ranking("p", ["a", "b", "c"], [1.0, 2.0, 3.0]), Ranking("q", ["a", "b"], [1.0, 0.0])]
    listed = {"prompt": "p", "responses": ROW["responses"][:1]}  # a list of one stays what it is
    assert [len(found) for found in rankings_from([listed, listed], keep_all=True)] == [1, 1]
    one, named = Ranking("p", ["a"], [1.0], ["x"]), Ranking("p", ["b"], [2.0], ["y"])
    preferences._join(one, named)
    assert one == Ranking("p", ["a", "b"], [1.0, 2.0], ["x", "y"])
    preferences._join(one, Ranking("p", ["c"], [0.0]))
    assert one == Ranking("p", ["a", "b", "c"], [1.0, 2.0, 0.0])


def test_whatever_holds_rankings():
    report, ranking = Report(), parse_ranking(ROW)
    held = [ranking]
    assert rankings_of(held) == rankings_of((ranking,)) == held and rankings_of(held) is not held
    assert rankings_of([]) == rankings_of(()) == []
    assert rankings_of([Pair("p", "a", "b", 2.0)]) == [Ranking("p", ["a", "b"], [1.0, 0.0], margins=[2.0, 0.0])]
    assert rankings_of([ROW], report) == rankings_of(iter([json.dumps(ROW)])) == held and report.rows == 1
    with pytest.raises(InputError, match="^row 0: "):
        rankings_of([ranking, Pair("p", "a", "b", 2.0)])
    assert parse_ranking({**ROW, "source": 5}).source is None


@pytest.mark.parametrize("row, reason", [
    ('{"a": x}', "not JSON from column 7 on"), ('{ "a" \n', "not JSON from column 6 on"),
    ("[" * 100_000, "not JSON: it is nested too deeply"),
    ("1" * 5000, "not JSON: a value in it cannot be used"), (Unreadable("it has 1 cells"), "it has 1 cells"),
])  # fmt: skip
def test_a_line_that_is_no_json_is_refused_with_the_reason(row, reason):
    with pytest.raises(ValueError) as error:
        decoded(row)
    assert str(error.value) == reason
    assert decoded('{"a": 1}') == decoded({"a": 1}) == {"a": 1}


def test_a_ranking_takes_messages_and_arrays():
    import numpy as np

    assert Ranking([USER], [[ASSISTANT], "No."], np.array([1, 0])) == Ranking("Hi?", ["Yes.", "No."], [1.0, 0.0])
    assert Ranking("p", np.array(["a", "b"]), (1, 0), np.array(["x", "y"]), margins=np.array([2.0, 0.0])) == Ranking(
        "p", ["a", "b"], [1.0, 0.0], ["x", "y"], margins=[2.0, 0.0])  # fmt: skip
    for prompt, completions in ((None, ["a", "b"]), ("p", ["a", None]), ("p", [1, 2]), ([{"role": "user"}], ["a", "b"])):
        with pytest.raises(ValueError):
            Ranking(prompt, completions, [1.0, 0.0])
