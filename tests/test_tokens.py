"""The answer is always read: chat templates of many kinds, texts where lists belong, and what is cut and said."""

import random
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from test_reward import CONFIGS, kind_words, toy, toys  # noqa: F401
from toys import CountsCharacters, byte_tokenizer
from transformers import BertConfig, LlamaConfig

from prompting_nb.config import InputError
from prompting_nb.encoding import windows as windows_module
from prompting_nb.pretrained import word_tokenizer
from prompting_nb.reward.conversations import Conversation, answer_of
from prompting_nb.reward.tokens import LONGEST, Cuts, cuts_of, cuts_text, encode, length_limit, length_of

TEMPLATES = {  # as published, without what is not reached by plain conversations
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "deepseek-r1": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
                   "{% elif m['role'] == 'user' %}<|User|>{{ m['content'] }}{% else %}"
                   "<|Assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
                   "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    "deepseek-v3.1": "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}{% elif m['role'] == 'assistant' %}"
                     "<|Assistant|></think>{{ m['content'] }}<|end|>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
                     "{% if add_generation_prompt %}<|Assistant|><think>{% endif %}",
    "nemotron": "{% for m in messages %}<SPECIAL_10>{{ m['role']|capitalize }}\n{{ m['content']|trim }}\n{% endfor %}"
                "{% if add_generation_prompt %}<SPECIAL_11>Assistant\n<think>\n{% endif %}",
    "qwen3": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
             "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "idefics3": "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}{% if m['content'][0]['type'] == 'image' %}{{ ':' }}"
                "{% else %}{{ ': ' }}{% endif %}{% for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
                "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
                "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "parts of the user alone": "{% for m in messages %}{% if m['role'] == 'user' %}{% for p in m['content'] %}{{ p.text }}{% endfor %}"
                               "{% else %}[A]{{ m['content'] + '[/A]' }}{% endif %}{% endfor %}",
    "closes without an answer": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if loop.last %}</s>{% endif %}{% endfor %}",
    "marks the last turn": "{% for m in messages %}{% if loop.last %}(last) {% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
                           "{% if add_generation_prompt %}assistant: {% endif %}",
}  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def templated(request):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def test_the_answer_is_read_whatever_the_template(templated):
    "A prompt that is much too long gives way, and both answers stay whole."
    chosen, rejected = "It is a pear, I think.", "No idea."
    rows = encode(templated, "What is this? " * 40, [chosen, rejected], 120)
    for row, answer in zip(rows, (chosen, rejected)):
        text = templated.decode(row)
        assert answer in text and "What is this?" in text and len(row) <= 120
        assert row.prompt_cut == row.cut > 0
    assert rows[0] != rows[1] and rows[0][-1] == rows[1][-1]


def test_what_fits_is_what_the_template_writes(templated):
    from prompting_nb.reward.tokens import _Template

    said = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    whole = _Template(templated).write(said)
    [row] = encode(templated, ["Hi?"], ["Yes."])
    assert templated.decode(row) == whole and "Hi?" in whole and "Yes." in whole


def test_a_long_answer_is_cut_after_its_prompt_and_keeps_the_end_mark(templated):
    for row in encode(templated, "Why? " * 40, ["Because. " * 60, "For reasons. " * 60], 100):
        assert len(row) == 100 and 0 < row.prompt_cut < row.cut
    [short] = encode(templated, ["Why?"], ["Because."], 1000)
    assert short.cut == 0 and short[-1] == row[-1]


def test_templates_that_show_no_answer_are_refused_and_what_they_leave_out_is_said():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(InputError, match="leaves the completion out"):
        encode(tokenizer, ["q"], ["a"])
    tokenizer.chat_template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }};{% endif %}{% endfor %}"
    told = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "q"}]
    with pytest.warns(UserWarning, match="leaves out messages with the role 'system'"):
        encode(tokenizer, [told], ["a"])
    with pytest.warns(UserWarning, match="leaves out tools"):
        encode(tokenizer, [Conversation(told[1:], [{"type": "function", "function": {"name": "f"}}])], ["a"])
    tokenizer.chat_template = TEMPLATES["chatml"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(tokenizer, [told], ["a"])


def test_tools_calls_and_several_turns_reach_the_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ("{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}[{{ m.role }}] "
                               "{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.function.name }} "
                               "{{ c.function.arguments.place }}{% endfor %}{{ '\n' }}"
                               "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")  # fmt: skip
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    ask = Conversation([{"role": "user", "content": "Rain?"}], tools)
    call = answer_of({"role": "assistant", "content": None,
                      "tool_calls": [{"function": {"name": "weather", "arguments": '{"place": "Rome"}'}}]})  # fmt: skip
    turns = answer_of([{"role": r, "content": c} for r, c in (("assistant", "Where?"), ("user", "Here."), ("assistant", "No."))])
    one, several = (tokenizer.decode(row) for row in encode(tokenizer, [ask] * 2, [call, turns]))
    assert one.startswith("TOOLS") and one.endswith("[user] Rain?\n[assistant] CALL weather Rome\n")
    assert several.endswith("[user] Rain?\n[assistant] Where?\n[user] Here.\n[assistant] No.\n")
    for row in encode(tokenizer, [ask] * 2, [call, turns], 64):
        assert row.prompt_cut == row.cut or len(row) == 64
    tokenizer.chat_template = None
    one, _ = (tokenizer.decode(row) for row in encode(tokenizer, [ask] * 2, [call, turns]))
    assert "weather" in one and "Rome" in one


@pytest.mark.parametrize("completions", ["bcd", b"bcd", {"b": 1}, ["b", None], ["b", 3], ["b", ["c"]],
                                         ["half \ud83d"], [{"b": 1}]])  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(toys, completions):  # noqa: F811
    model = toy(toys, "bert")
    with pytest.raises(InputError):
        model.score("a", completions)
    if completions != "bcd":  # one prompt for all
        with pytest.raises(InputError):
            model.score(completions, ["b"] * len(completions))


def test_lists_of_other_kinds_are_read_as_lists(toys):  # noqa: F811
    model = toy(toys, "bert")
    wanted = model.score(["what is", "good day"], ["five", "six"])
    for as_list in (tuple, np.array):
        assert torch.equal(model.score(as_list(["what is", "good day"]), as_list(["five", "six"])), wanted)
    said = [{"role": "user", "content": "what is"}]
    assert torch.equal(model.score([said, "good day"], [[{"role": "assistant", "content": "five"}], "six"]), wanted)


def test_a_row_remembers_of_which_side_it_lost_tokens(toys):  # noqa: F811
    tokenizer = toy(toys, "bert").tokenizer
    rows = encode(tokenizer, ["good " * 30, "what is", "good " * 30], ["sun", "day " * 50, "day " * 50], 20)
    assert [(row.cut > 0, row.prompt_cut > 0, row.cut > row.prompt_cut) for row in rows] == [
        (True, True, False), (True, False, True), (True, True, True)]  # fmt: skip
    cuts = cuts_of(rows, 20)
    assert cuts == Cuts(3, 2, 2, sum(row.cut for row in rows), 20)
    assert str(cuts).startswith("of 3 texts, 2 (66.7%) lost the beginning of the prompt and 2 (66.7%) the end of the completion")
    assert str(cuts_of(encode(tokenizer, ["a"], ["b"], 20), 20)) == "none of 1 text was cut (at most 20 tokens)"


@pytest.mark.parametrize("template", [None, "chatml"])
@pytest.mark.parametrize("whole", [True, False])
def test_no_more_of_a_very_long_text_is_tokenised_than_is_kept(template, whole, monkeypatch):
    "The rows are those of the whole texts, and the tokens of the middle are cut as before, but not all counted."
    counting = CountsCharacters(byte_tokenizer())
    counting.tokenizer.chat_template = template and TEMPLATES[template]
    long = ["!" * 300_000, "It is a pear. " * 20_000]
    if whole:
        texts = [["fine", *long]]
    else:
        texts = [["What is this?", long[1], long[1]], [long[0], long[1], "A pear."]]
    rows = encode(counting, *texts, max_length=512)
    assert counting.characters < 400_000
    monkeypatch.setattr(windows_module, "_WHOLE", 10**9)
    uncut = encode(counting.tokenizer, *texts, max_length=512)
    assert rows == uncut and [row.more for row in rows] == [length_of(row) > 600 for row in uncut]
    assert all(0 <= length_of(row) <= length_of(other) for row, other in zip(rows, uncut))
    short, full = cuts_of(rows, 512), cuts_of(uncut, 512)
    assert (short.texts, short.prompts, short.completions) == (full.texts, full.prompts, full.completions)
    assert short.more == sum(row.more for row in rows) > full.more == 0 and short.tokens < full.tokens
    assert f", at least {short.tokens} tokens in all" in str(short) and str(short + short).count("at least") == 1
    assert cuts_text(short.to_dict()) == str(short) and "at least" not in str(full)


@pytest.mark.parametrize("own, limit", [(64, 64), (1024, 1024), (4096, LONGEST), (-1, LONGEST)])
def test_the_length_is_the_models_own_up_to_a_bound(own, limit):
    assert length_limit(byte_tokenizer(), LlamaConfig(max_position_embeddings=own)) == limit
    assert length_limit(byte_tokenizer(), BertConfig(max_position_embeddings=2000), 2000) == 2000


def test_tokens_share_their_numbers():
    "A token takes a pointer, and not an object of its own."
    tokenizer = byte_tokenizer()
    one, other = encode(tokenizer, ["ÿÿÿ a"] * 2, ["ÿ b", "ÿ c"])
    assert all(a is b for a, b in zip(one, other) if a == b)


def test_a_token_takes_few_bytes():
    "Of rows that are kept, and at most while they are made; a tokenizer's own result takes 134 bytes a token."
    words = [f"w{n}" for n in range(5000)]
    tokenizer = word_tokenizer(["[UNK]", *words], eos_token="[UNK]")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=200)) for _ in range(3000)]
    encode(tokenizer, texts[:1200])  # what is kept of ids that occur
    tracemalloc.start()
    rows = encode(tokenizer, texts)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(map(len, rows))
    assert tokens > 600_000 and kept / tokens < 11 and peak / tokens < 45


# ---------------------------------------------------------------- what a template leaves out, and what no row may lack
ASKED = [{"role": "user", "content": "q"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "rain", "arguments": {}}}]}


@pytest.mark.parametrize("template, prompt, answer, said", [
    ("deepseek-r1", "q", "<think>long thoughts</think>short", "a part of completions"),
    ("chatml", ASKED, [CALL], "'tool_calls' of messages with the role 'assistant'"),
    ("chatml", ASKED, [{"role": "assistant", "content": "a", "reasoning_content": "hm, why"}], "'reasoning_content' of messages"),
    ("deepseek-r1", [*ASKED, CALL, {"role": "tool", "content": "it is wet"}], "a", "'tool_calls' of messages"),
    ("no results", [*ASKED, CALL, {"role": "tool", "content": "it rains"}], "a", "messages with the role 'tool'"),
])  # fmt: skip
def test_a_template_that_leaves_a_part_out_says_so(template, prompt, answer, said):
    tokenizer = byte_tokenizer()
    known = ("{% for m in messages %}{% if m['role'] != 'tool' %}{{ m['role'] + m['content'] + (m.tool_calls or '')|string }};"
             "{% endif %}{% endfor %}")
    tokenizer.chat_template = TEMPLATES.get(template, known)
    with pytest.warns(UserWarning, match=f"leaves out {said}"):
        encode(tokenizer, [prompt], [answer])


def test_a_template_that_only_moves_spaces_says_nothing(templated):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(templated, ["Hi?"], ["\n\n Yes,  no. \n"])


def test_a_template_with_todays_date_says_so():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }};" + TEMPLATES["chatml"]
    with pytest.warns(UserWarning, match="writes today's date: the same text has another reward"):
        [row] = encode(tokenizer, ["q"], ["a"])
    assert tokenizer.decode(row)[:2] == "20"
    tokenizer.chat_template = "{% if never %}{{ strftime_now('%Y') }}{% endif %}" + TEMPLATES["chatml"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(tokenizer, ["q"], ["a"])


def test_the_mark_that_begins_a_conversation_stays(templated):
    templated.chat_template = "{{ bos_token }}" + templated.chat_template.removeprefix("{{ bos_token }}")
    whole, cut, both = (encode(templated, ["q " * n], ["a " * k], 100)[0] for n, k in ((1, 1), (99, 1), (99, 99)))
    assert whole[0] == cut[0] == both[0] == templated.bos_token_id and len(cut) == len(both) == 100
    assert templated.bos_token_id not in cut[1:-1] and cut.prompt_cut == cut.cut == whole.prompt_cut + 196 - 100 + len(whole)


def test_a_row_without_a_token_is_refused():
    tokenizer = word_tokenizer(["[UNK]", "a"])  # which adds no token of its own
    for texts in ((["a", ""],), (["a", ""], ["a", " "])):
        with pytest.raises(InputError, match="text 1 has no token"):
            encode(tokenizer, *texts)


def test_whatever_can_be_listed_is_a_list_of_texts(toys):  # noqa: F811
    import pandas

    model = toy(toys, "bert")
    wanted = model.score(["what is", "good day"], ["five", "six"])
    table = pandas.DataFrame({"p": ["what is", "good day"], "c": ["five", "six"]}, index=[7, 3])
    assert torch.equal(model.score(table["p"], table["c"]), wanted)
    assert torch.equal(model.score((p for p in ["what is", "good day"]), (c for c in ["five", "six"])), wanted)
    assert torch.equal(model.score(table["p"]), model.score(["what is", "good day"]))
    for wrong in (None, 3, {"what is", "day"}):
        with pytest.raises(InputError):
            model.score(wrong)
        with pytest.raises(InputError):
            model.score(wrong, ["five", "six"])


def test_tokens_that_came_later_need_rows(toys):  # noqa: F811
    model = toy(toys, "bert")
    model.tokenizer.add_tokens(["<tool>", *(f"<t{n}>" for n in range(40))])
    with pytest.raises(InputError, match="resize_token_embeddings"):
        model.score("what", ["<tool>"])
    model.model.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    assert model.score("what", ["<tool>"]).isfinite().all()


def test_every_scorer_wants_lists_and_says_what_it_cuts(toys):  # noqa: F811
    from prompting_nb.reward.ensemble import HeadEnsemble
    from prompting_nb.reward.fast.packing import score_packed

    model = toy(toys, "bert", max_length=20)
    heads = HeadEnsemble(model, torch.randn(2, model.encoder.hidden_size))
    for ask in (heads.score, heads.spread, lambda *texts: score_packed(model, *texts)):
        assert len(ask("no", ["five", "six", "day"])) == 3  # one prompt for all, which is shorter than they are many
        with pytest.raises(InputError):
            ask("no", "day")
        with pytest.raises(ValueError):
            ask(["no", "day"], ["five", "six", "day"])
        model.warned = False
        with pytest.warns(UserWarning, match="texts are too long: of 1 text, 0 .*1 .100.0%. the end"):
            ask("no", ["day " * 50])
