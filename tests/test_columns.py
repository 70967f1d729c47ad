"""Data that people have: the columns of published data sets, and where rows are read from."""

import gzip
import io
import json
import math
import sys

import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict

from prompting_nb.config import InputError
from prompting_nb.reward.columns import read_row, split_pair
from prompting_nb.reward.conversations import Conversation, messages_of
from prompting_nb.reward.preferences import Pair, Ranking, Report, parse_ranking, rankings_from, rankings_of, read_rankings, split


def says(role, content):
    return {"role": role, "content": content}


ASK, YES, NO = says("user", "Rain?"), says("assistant", "Yes."), says("assistant", "No.")
HH = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Rain?\n\nAssistant: "
GPT = [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "Yes."}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Rain?"}]}]
FIRST = [1.0, 0.0]
FORMATS = {  # name: row, scores of "Yes." and "No."
    "trl": ({"prompt": "Rain?", "chosen": "Yes.", "rejected": "No."}, FIRST),
    "trl, messages": ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, FIRST),
    "trl, implicit prompt": ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, FIRST),
    "ultrafeedback binarized": ({"prompt": "Rain?", "prompt_id": "x", "chosen": [ASK, YES], "rejected": [ASK, NO], "messages": [ASK, YES],
                                 "score_chosen": 8.0, "score_rejected": 3.5}, [8.0, 3.5]),
    "ultrafeedback": ({"instruction": "Rain?", "source": "s", "models": ["a", "b"], "completions": [
        {"model": "a", "response": "Yes.", "overall_score": 7.5},
        {"model": "b", "response": "No.", "overall_score": 2.0}]}, [7.5, 2.0]),
    "argilla": ({"prompt": "Rain?", "chosen": [ASK, YES], "rejected": [ASK, NO], "chosen-rating": 5, "rejected-rating": 4}, [5.0, 4.0]),
    "orca dpo": ({"system": "", "question": "Rain?", "chosen": "Yes.", "rejected": "No."}, FIRST),
    "sharegpt, ranking": ({"conversations": GPT[:1], "chosen": {"from": "gpt", "value": "Yes."},
                           "rejected": {"from": "gpt", "value": "No."}}, FIRST),
    "sharegpt, whole": ({"chosen": GPT, "rejected": [GPT[0], {"from": "gpt", "value": "No."}]}, FIRST),
    "alpaca, preference": ({"instruction": "Rain?", "input": "", "chosen": "Yes.", "rejected": "No."}, FIRST),
    "alpaca farm": ({"instruction": "Rain?", "input": "", "output_1": "Yes.", "output_2": "No.", "preference": 2}, [0.0, 1.0]),
    "parts": ({"prompt": PARTS, "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}], "rejected": [NO]}, FIRST),
    "arrow's none": ({"prompt": [{**ASK, "tool_calls": None, "name": None}], "chosen": [{**YES, "tool_calls": None}], "rejected": [NO],
                      "margin": None}, FIRST),
    "dict of lists": ({"chosen": {"role": ["user", "assistant"], "content": ["Rain?", "Yes."]},
                       "rejected": {"role": ["user", "assistant"], "content": ["Rain?", "No."]}}, FIRST),
    "hh with a prompt": ({"prompt": "\n\nHuman: Rain?\n\nAssistant:", "chosen": "Yes.", "rejected": "No."}, FIRST),
    "nectar": ({"prompt": "\n\nHuman: Rain? \n\nAssistant: ", "answers": [{"answer": "Yes.", "model": "a", "rank": 2.0},
                                                                         {"answer": "No.", "model": "b", "rank": 1.0}]}, [-2.0, -1.0]),
    "shp": ({"history": "Rain?", "human_ref_A": "Yes.", "human_ref_B": "No.", "labels": 1, "score_A": 3, "score_B": 1}, FIRST),
    "webgpt": ({"question": {"full_text": "Rain?"}, "answer_0": "Yes.", "answer_1": "No.", "score_0": -0.5, "score_1": 0.5}, [-0.5, 0.5]),
    "safe rlhf": ({"prompt": "Rain?", "response_0": "Yes.", "response_1": "No.", "better_response_id": 1}, [0.0, 1.0]),
    "arena": ({"conversation_a": [ASK, YES], "conversation_b": [ASK, NO], "winner": "model_a", "model_a": "x", "model_b": "y"}, FIRST),
    "arena, tie": ({"conversation_a": [ASK, YES], "conversation_b": [ASK, NO], "winner": "tie"}, [0.5, 0.5]),
    "helpsteer 3": ({"context": [ASK], "response1": "Yes.", "response2": "No.", "overall_preference": 2}, [0.0, 1.0]),
    "judgebench": ({"question": "Rain?", "response_A": "Yes.", "response_B": "No.", "label": "B>A"}, [0.0, 1.0]),
    "texts and scores": ({"prompt": "Rain?", "responses": ["Yes.", "No."], "scores": [0.25, 0.75]}, [0.25, 0.75]),
    "texts and ranks": ({"prompt": "Rain?", "completions": ["Yes.", "No."], "ranks": [1, 2]}, [-1.0, -2.0]),
    "labels": ({"prompt": "Rain?", "completions": ["Yes.", "No."], "labels": [True, False]}, FIRST),
    "rewardbench 2": ({"prompt": "Rain?", "chosen": ["Yes."], "rejected": ["No."]}, FIRST),
    "numpy": ({"prompt": "Rain?", "responses": np.array(["Yes.", "No."]), "scores": np.array([0.5, 1.5], np.float32)}, [0.5, 1.5]),
    "numpy scores": ({"prompt": "Rain?", "responses": [{"completion": "Yes.", "score": np.float32(2)},
                                                       {"completion": "No.", "score": np.int64(1)}]}, [2.0, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats_are_read(name):
    row, scores = FORMATS[name]
    found = parse_ranking(row)
    assert (found.prompt, found.completions, found.scores) == ("Rain?", ["Yes.", "No."], scores)
    assert all(type(score) is float for score in found.scores)


@pytest.mark.parametrize("name", [
    name for name in FORMATS if "numpy" not in name and name not in ("dict of lists", "webgpt", "rewardbench 2")])  # fmt: skip
def test_published_formats_survive_a_table(name, tmp_path):
    "Parquet fills what a row lacks with nothing, and a comma-separated file knows texts alone."
    row, scores = FORMATS[name]
    Dataset.from_list([row]).to_parquet(tmp_path / "rows.parquet")
    pandas.DataFrame([row]).to_csv(tmp_path / "rows.csv", index=False)
    for file in ("rows.parquet", "rows.csv"):
        [found] = read_rankings(tmp_path / file)
        assert (found.prompt, found.completions, found.scores) == ("Rain?", ["Yes.", "No."], scores), file


def test_hh_rlhf_becomes_messages():
    found = parse_ranking({"chosen": HH + "Yes.", "rejected": HH + "Yes, I think.\n\nIt is."})
    assert found.completions == ["Yes.", "Yes, I think.\n\nIt is."]
    assert [m["content"] for m in messages_of(found.prompt)] == ["Hi.", "Hello.", "Rain?"]
    talk = "\n\nHuman: Rain?\n\nAssistant: {0}.\n\nHuman: Sure?\n\nAssistant: {0}!"
    early = parse_ranking({"chosen": talk.format("Yes"), "rejected": talk.format("No")})
    assert early.prompt == "Rain?" and [m["content"] for m in early.completions[1].messages] == ["No.", "Sure?", "No!"]


def test_pairs_that_part_before_the_last_turn_keep_all_turns_after_it():
    found = parse_ranking({"chosen": [ASK, YES, ASK, NO], "rejected": [ASK, NO]})
    assert found.prompt == "Rain?" and found.completions[1] == "No."
    assert isinstance(found.completions[0], Conversation) and messages_of(*[found.prompt, found.completions[0]]) == [ASK, YES, ASK, NO]


def test_system_turns_and_tools_stay_with_the_prompt():
    tools = [{"type": "function", "function": {"name": "f"}}]
    told = says("system", "Be brief.")
    found = parse_ranking({"chosen": [told, ASK, YES], "rejected": [told, ASK, NO], "tools": tools})
    assert [m["role"] for m in found.prompt.messages] == ["system", "user"] and found.prompt.tools == tools
    asked = parse_ranking({"system": "Be brief.", "question": "Rain?", "chosen": "Yes.", "rejected": "No."}).prompt
    assert asked.messages == [told, ASK]
    longer = Conversation([told, ASK, YES, ASK])
    for sides in (([YES], [NO]), ([ASK, YES], [ASK, NO]), ([ASK, YES, ASK, YES], [ASK, YES, ASK, NO])):
        assert split_pair(longer, *sides) == (longer, ["Yes.", "No."])
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    found = parse_ranking({"prompt": [ASK], "chosen": [call], "rejected": [NO], "tools": json.dumps(tools)})
    assert found.completions[0].messages[0]["tool_calls"][0]["function"]["arguments"] == {} and found.prompt.tools == tools


@pytest.mark.parametrize("margin", [0, -1.5, 3, np.float32(0.5)])
def test_a_margin_never_changes_who_won(margin):
    found = parse_ranking({"prompt": "p", "chosen": "a", "rejected": "b", "margin": margin})
    assert (found.scores, found.margins) == ([1.0, 0.0], [margin, 0.0])


@pytest.mark.parametrize("scores", [(3, 5), (4, 4)])
def test_scores_that_contradict_a_pair_are_counted(scores):
    report = Report()
    recorded = dict(zip(("score_chosen", "score_rejected"), scores))
    [found] = rankings_from([{"prompt": "p", "chosen": "a", "rejected": "b", **recorded}], report)
    assert found.scores == [1.0, 0.0] and report.contradicted == 1 and "1 pair whose scores do not say" in str(report)


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "p", "chosen": "a\ud83d", "rejected": "b"}, "lone surrogate"),
    ({"prompt": "p\udc00", "chosen": "a", "rejected": "b"}, "lone surrogate"),
    ({"prompt": [says("user", "\ud83d")], "chosen": "a", "rejected": "b"}, "lone surrogate"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "2 responses have 1 scores"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [1, math.nan]}, "'scores' should be a finite number, got nan"),
    ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "the blue one"}, "'winner' should be a finite number"),
    ({"prompt": "p", "response_a": "a", "response_b": "b"}, "'score' is missing"),
    ({"prompt": [says("user", [{"type": "image", "url": "x"}])], "chosen": "a", "rejected": "b"}, "'text' only"),
    ({"chosen": [ASK, YES], "rejected": [says("user", "Snow?"), NO]}, "do not begin with the same prompt"),
    ({"query": "p", "reply": "a"}, "'chosen' is missing (the columns are query, reply)"),
])  # fmt: skip
def test_what_cannot_be_read_is_named_with_file_and_row(row, reason, tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    with pytest.raises(InputError) as error:
        read_rankings(path)
    assert str(error.value).startswith(f"{path}:2: ") and reason in str(error.value)
    report = Report()
    assert len(read_rankings(path, report, skip_bad=1)) == 1
    assert (report.rows, report.bad) == (2, 1) and f"{path}:2: " in str(report)
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row, row)))
    with pytest.raises(InputError, match=":3: "):
        read_rankings(path, skip_bad=1)


@pytest.mark.parametrize("line, reason", [
    ("only one", "it has 1 cells, and the first line has 3"),
    ("p,a,b,c,d", "it has 5 cells, and the first line has 3"),
    ('p,"a"b,c', "expected after"),
])  # fmt: skip
@pytest.mark.parametrize("mark", [",", "\t"])
def test_rows_of_a_table_that_do_not_fit_its_titles_are_counted(line, reason, mark, tmp_path):
    path = tmp_path / ("rows.csv" if mark == "," else "rows.tsv")
    lines = ["prompt,chosen,rejected", "p,a,b", line, "q,a,b", line, "r,a,b"]
    path.write_text("\n".join(lines).replace(",", mark) + "\n")
    report = Report()
    assert [ranking.prompt for ranking in read_rankings(path, report, skip_bad=2)] == ["p", "q", "r"]
    assert (report.rows, report.bad) == (5, 2) and report.first_bad.startswith(f"{path} row 1: ") and reason in report.first_bad
    with pytest.raises(InputError, match=f"{path} row 3: "):
        read_rankings(path, skip_bad=1)
    path.write_text(path.read_text() + 's,"a,b\nt,a,b\n'.replace(",", mark))  # an open quote would swallow what follows
    with pytest.raises(InputError, match="row 5: unexpected end of data"):
        read_rankings(path, skip_bad=9)


def test_every_kind_of_source_gives_the_same_rankings(tmp_path, monkeypatch):
    rows = [{"prompt": f"Say {n}.", "chosen": f"0{n}", "rejected": "NA"} for n in range(4)]
    wanted = [Ranking(row["prompt"], [row["chosen"], "NA"], [1.0, 0.0]) for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data = Dataset.from_list(rows)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8-sig")  # with a byte-order mark
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.json").write_text(lines)
    data.to_csv(tmp_path / "e.csv", index=False)
    data.to_parquet(tmp_path / "f.parquet")
    data.save_to_disk(tmp_path / "g")
    DatasetDict(train=data, test=data.select([0])).save_to_disk(tmp_path / "h")
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "0.jsonl").write_text("".join(lines.splitlines(True)[:1]))
    data.select([1, 2, 3]).to_parquet(tmp_path / "i" / "1.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.json", "d.json", "e.csv", "f.parquet", "g", "h", "h:train", "i"):
        assert read_rankings(tmp_path / name) == read_rankings(str(tmp_path / name)) == wanted, name
    assert read_rankings(f"{tmp_path / 'h'}:test") == wanted[:1]
    assert read_rankings([tmp_path / "a.jsonl", tmp_path / "f.parquet"]) == wanted * 2
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert read_rankings("-") == wanted
    for held in (rows, tuple(rows), iter(rows), data, data.to_iterable_dataset(), pandas.DataFrame(rows), data.with_format("numpy")):
        assert rankings_of(held) == wanted
    assert rankings_of([Pair("p", "a", "b", 2.0)]) == [Ranking("p", ["a", "b"], [1.0, 0.0], margins=[2.0, 0.0])]
    with pytest.raises(InputError, match="give one split"):
        rankings_of(DatasetDict(train=data))
    with pytest.raises(InputError, match="has the splits train, test"):
        read_rankings(f"{tmp_path / 'h'}:validation")
    with pytest.raises(InputError, match="nobody/nothing"):
        read_rankings("nobody/nothing")


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    "Asked for by name, with a split or a configuration; no hub is needed to see how."
    rows, asked = [{"prompt": "p", "chosen": "a", "rejected": "b"}], []

    def load_dataset(*name, **options):
        asked.append((name, options))
        return {"train": rows, "test": rows * 2}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [len(read_rankings(name)) for name in ("me/data", "me/data:test", "me/data:small:test")] == [1, 2, 2]
    assert [name for name, _ in asked] == [("me/data", None), ("me/data", None), ("me/data", "small")]
    assert all(options == {"streaming": True} for _, options in asked)


def test_single_answers_with_scores_become_rankings():
    rows = [{"prompt": "p", "response": answer, "helpfulness": score} for answer, score in (("a", 4), ("b", 1), ("c", 2))]
    liked = [{"prompt": "q", "completion": answer, "label": label} for answer, label in (("a", True), ("b", False))]
    assert rankings_from([*rows, *liked]) == [
        Ranking("p", ["a", "b", "c"], [4.0, 1.0, 2.0]), Ranking("q", ["a", "b"], [1.0, 0.0])]  # fmt: skip


@pytest.mark.parametrize("row, prompt, answers", [
    (FORMATS["ultrafeedback binarized"][0], "Rain?", ["Yes.", "No."]), ({"conversations": GPT}, "Rain?", ["Yes."]),
    ({"instruction": "Rain?", "input": "", "output": "Yes."}, "Rain?", ["Yes."]), ({"messages": [ASK, YES]}, "Rain?", ["Yes."]),
    ({"prompt": "Rain?", "completions": ["Yes.", "No."]}, "Rain?", ["Yes.", "No."]),
    ({"prompt": [ASK], "completion": [YES]}, "Rain?", ["Yes."]),
])  # fmt: skip
def test_rows_without_scores_can_be_scored(row, prompt, answers):
    found = read_row(row, judged=False)
    assert (found.prompt, found.completions) == (prompt, answers)


def test_a_share_of_few_prompts_keeps_one_on_each_side():
    for count in (2, 3, 5):
        few = [Ranking(str(n), ["a", "b"], [1.0, 0.0]) for n in range(count)]
        for share in (0.01, 0.1, 0.99):
            assert all(split(few, test=share))
    with pytest.raises(InputError):
        split(few[:1], test=0.5)


@pytest.mark.parametrize("sides, key, value", [
    (("output_1", "output_2"), "preference", 0), (("output_1", "output_2"), "label", False), (("response_a", "response_b"), "winner", 2),
    (("answer_0", "answer_1"), "label", 2), (("answer_0", "answer_1"), "label", -1), (("response1", "response2"), "overall_preference", 4),
])  # fmt: skip
def test_a_verdict_on_another_scale_is_no_win_of_the_first(sides, key, value):
    with pytest.raises(ValueError, match=f"'{key}' should be .* where {sides[0]} is better"):
        parse_ranking({"prompt": "p", **dict(zip(sides, "ab")), key: value})


HELLO = [says("user", "Hi?"), says("assistant", "Hello.")]
TOLD = says("system", "Be brief.")


@pytest.mark.parametrize("row, wanted", [
    ({"system": "Be brief.", "chosen": [ASK, YES], "rejected": [ASK, NO]}, [TOLD, ASK]),
    ({"system": "Be brief.", "chosen": HH + "Yes.", "rejected": HH + "No."}, [TOLD, says("user", "Hi."), says("assistant", "Hello."), ASK]),
    ({"system_prompt": "Be brief.", "conversations": GPT}, [TOLD, ASK]), ({"system": math.nan, "messages": [ASK, YES]}, [ASK]),
    ({"system": "Be brief.", "messages": [says("system", "Be kind."), ASK, YES]}, [says("system", "Be kind."), ASK]),
    ({"instruction": "Rain?", "input": "", "history": [["Hi?", "Hello."]], "output": "Yes."}, [*HELLO, ASK]),
    ({"prompt": "Rain?", "history": HELLO, "response": "Yes."}, [*HELLO, ASK]),
    ({"instruction": "Rain?", "context": "In Rome.", "response": "Yes."}, [says("user", "Rain?\n\nIn Rome.")]),
    ({"prompt": "Rain?", "input": "In Rome.", "chosen": "Yes.", "rejected": "No."}, [says("user", "Rain?\n\nIn Rome.")]),
    ({"prompt": "Rain? In Rome.", "input": "In Rome.", "chosen": "Yes.", "rejected": "No."}, [says("user", "Rain? In Rome.")]),
    ({"prompt": "[INST] Rain? [/INST]", "chosen": [ASK, YES], "rejected": [ASK, NO]}, [ASK]),
])  # fmt: skip
def test_all_that_a_prompt_has_is_read_whatever_column_it_has(row, wanted):
    assert messages_of(read_row(row, judged=False).prompt) == wanted


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "Snow?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "'prompt' is not what 'chosen' and 'rejected' begin with"),
    ({"prompt": "p", "history": "Hi?", "chosen": "a", "rejected": "b"}, "'history' should be a list"),
    ({"prompt": "p", "system": ["x"], "chosen": "a", "rejected": "b"}, "'system' should be a text"),
    ({"prompt": "p", "responses": ["a", "b"], "scores": [10**400, 1]}, "'scores' should be a finite number"),
    ({"prompt": [{**ASK, "images": ["x.png"]}], "chosen": "a", "rejected": "b"}, "a message holds text only, and this one has 'images'"),
    ('{"prompt": "p", "chosen": "a", "chosen": "c", "rejected": "b"}', "the key 'chosen' stands there twice"),
])  # fmt: skip
def test_what_would_be_left_out_is_refused(row, reason):
    with pytest.raises(InputError, match="^row 0: .*") as error:
        rankings_from(iter([row]))
    assert reason in str(error.value)


def test_calls_of_functions_in_their_first_form_are_calls_of_tools():
    call = {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": '{"in": "Rome"}'}}
    found = parse_ranking({"prompt": [ASK], "chosen": [call, {"role": "function", "name": "rain", "content": "no"}, NO], "rejected": [YES]})
    called, result, _ = found.completions[0].messages
    assert called["tool_calls"] == [{"function": {"name": "rain", "arguments": {"in": "Rome"}}}] and result["role"] == "tool"


def test_columns_that_no_format_uses_and_prompts_that_repeat_are_counted():
    report, row = Report(), {"prompt": "p", "chosen": "a", "rejected": "b", "id": 7, "source": "s", "empty": "", "notes": "x"}
    rankings_from([row, {**row, "images": ["y"], "messages": [ASK, YES]}], report)
    assert report.unread == {"notes": 2, "images": 1}  # messages that stand beside a pair are its own
    assert str(report).startswith("2 rankings of 1 prompt from 2 rows; ")
    assert "columns that are not read (rows): notes (2), images (1)" in str(report)
    for name, (row, _) in FORMATS.items():
        left = set(read_row(row).unread)
        assert left <= {"prompt_id", "source", "models", "messages", "model_a", "model_b", "score_A", "score_B"}, name


def test_tables_with_missing_cells_and_with_a_title_twice(tmp_path):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0, "tools": "[]"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    first, second = rankings_of(pandas.DataFrame(rows))
    assert first.margins == [2.0, 0.0] and second.margins is None and type(second.prompt) is str
    import pyarrow

    assert rankings_of(pyarrow.Table.from_pylist(rows)) == [first, second]
    (tmp_path / "twice.csv").write_text("prompt,chosen,chosen,rejected\np,a,c,b\n")
    for twice in (tmp_path / "twice.csv", pandas.DataFrame([["p", "a", "c", "b"]], columns=["prompt", "chosen", "chosen", "rejected"])):
        with pytest.raises(InputError, match="has two columns 'chosen': rename one"):
            rankings_of(twice)


def test_standard_input_is_utf_8_whatever_the_locale(monkeypatch):
    good = json.dumps({"prompt": "\u00e4", "chosen": "a", "rejected": "b"}, ensure_ascii=False).encode()
    for data, skip_bad in ((b"\xef\xbb\xbf" + good + b"\r\n", 0), (b'{"prompt": "\xe4"}\n' + good, 1)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
        report = Report()
        assert [ranking.prompt for ranking in read_rankings("-", report, skip_bad=skip_bad)] == ["\u00e4"]
        assert report.bad == skip_bad and (not skip_bad or report.first_bad == "line 1: it is no text in UTF-8")


def test_a_folder_says_what_is_not_read_of_it(tmp_path):
    row = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    (tmp_path / "old").mkdir()
    for name in ("train.jsonl", "test.jsonl", "more.zip", "README.md", "old/more.jsonl"):
        (tmp_path / name).write_text(row)
    with pytest.warns(UserWarning) as said:
        assert len(read_rankings(tmp_path)) == 2
    texts = [str(one.message) for one in said]
    assert any("not read: 2 files (more.zip, old/more.jsonl)" in text for text in texts)
    assert any("several splits (test, train)" in text for text in texts)
