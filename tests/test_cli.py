"""The program `prompting-nb` as a person meets it: help, topics, completion, pipes that nobody reads, and errors in a line."""

import fcntl
import gc
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
from prompting_nb.baseminer.miner import Miner
from prompting_nb.cli import COMMANDS, command_parsers, main
from prompting_nb.help.usage import completion_script

PROGRAM = [sys.executable, "-c", "import sys; from prompting_nb.cli import main; main()"]


@pytest.fixture(scope="module")
def parsers():
    return command_parsers()


def run(*argv, **how):
    return subprocess.run([*PROGRAM, *argv], capture_output=True, text=True, timeout=60, **how)


def failed(capsys, *argv):
    "Exit status and message of a call that fails."
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    return end.value.code, capsys.readouterr().err.strip()


# ---- help

def test_help_shows_choices_bounds_and_defaults_in_groups(parsers):
    text = parsers["loop"].format_help()
    assert "--gate {bayes,sentence,last-token}" in text and "(default: bayes)" in text
    epochs = "--epochs N Times that the reward model sees every training prompt. (at least 1 and at most 10000; default: 2)"
    assert epochs in " ".join(text.split())
    assert "\n  --force  " in text  # a switch shows no value
    gating = text[text.index("Settings of a Bayesian gating model:"):]
    assert gating.index("--gating.warm") < gating.index("general:") < gating.index("--help")


def test_every_help_names_the_environment_once_and_no_type(parsers):
    for name, parser in parsers.items():
        text = parser.format_help()
        assert text.count("PROMPTING_NB_") == 2, name  # the rule and its example
        assert not re.search(r"ARG:|ENV:|type: |Optional\[|Literal\[|PositiveInt| null ", text), name
        assert text.startswith(f"usage: prompting-nb {name} "), name
        assert "example" in text, name
        assert text == parser.format_help(), name  # a second time as well


def test_usage_names_required_flags(parsers):
    assert parsers["reward train"].format_help().splitlines()[0] == "usage: prompting-nb reward train --data DATA --out OUT [flags]"


def test_topics(capsys, parsers):
    main(["help"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS) and "--gating.*, of loop, validator" in listed
    main(["help", "gating"])
    part = capsys.readouterr().out
    assert "--gating.topics N" in part and "--steps" not in part
    main(["help", "reward", "train"])
    assert capsys.readouterr().out.strip() == parsers["reward train"].format_help().strip()
    main(["help", "environment"])
    variables = capsys.readouterr().out
    assert re.search(r"PROMPTING_NB_GATING__TOPICS +--gating\.topics, of loop, validator", variables)
    assert failed(capsys, "help", "gatin") == (
        2, "prompting-nb help: there is no topic 'gatin'; the nearest is gating; `prompting-nb help` lists them")


# ---- completion

@pytest.mark.parametrize("words, wanted", [
    (["prompting-nb", "lo"], {"loop"}), (["prompting-nb", "loop", "--gate", ""], {"bayes", "sentence", "last-token"}),
    (["prompting-nb", "loop", "--gating.lo"], {"--gating.loss"}), (["prompting-nb", "reward", "tr"], {"train"}),
    (["prompting-nb", "reward", "train", "--lo"], {"--lora", "--log-folder"}),
    (["prompting-nb", "help", "env"], {"environment"}), (["prompting-nb", "completion", ""], {"bash", "zsh"})])
def test_bash_completes_commands_flags_and_choices(parsers, tmp_path, words, wanted):
    bash = shutil.which("bash") or pytest.skip("no bash")
    script = tmp_path / "complete.bash"
    script.write_text(completion_script(parsers, "bash", {}) + '\nCOMP_WORDS=("${@}")\nCOMP_CWORD=$(($# - 1))\n'
                      "_shtab_prompting_nb\necho ${COMPREPLY[@]}\n")
    done = subprocess.run([bash, script, *words], capture_output=True, text=True)
    assert set(done.stdout.split()) == wanted, done.stderr


def test_zsh_reads_its_script(parsers, tmp_path):
    script = completion_script(parsers, "zsh", {"loop": "run the loop"})
    assert script.startswith("#compdef prompting-nb") and "loop:'run the loop'" in script
    zsh = shutil.which("zsh") or pytest.skip("no zsh: apt-get install zsh")
    (tmp_path / "_prompting-nb").write_text(script)
    assert subprocess.run([zsh, "-n", tmp_path / "_prompting-nb"]).returncode == 0


def test_completion_for_another_shell_says_what_there_is(capsys):
    status, message = failed(capsys, "completion", "fish")
    assert status == 2 and "prompting-nb completion bash" in message


# ---- pipes and errors

@pytest.mark.parametrize("argv", [["--help"], ["chain", "--help"]])
def test_a_reader_that_leaves_gets_no_traceback(argv):
    with subprocess.Popen([*PROGRAM, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONUNBUFFERED": ""}) as process:
        process.stdout.close()  # before anything was written
        assert process.stderr.read() == ""
    assert process.returncode in (0, 141)


@pytest.mark.parametrize("encoding, shown", [("utf-8", "für \\ud83d"), ("ascii", "f\\xfcr \\ud83d")])
def test_what_the_output_cannot_hold_is_escaped(encoding, shown):
    program = """
from prompting_nb import cli
from prompting_nb.config import command_parser
make = lambda: command_parser(lambda parser: parser.add_argument("--debug"), prog="x")
cli.COMMANDS["say"] = make, lambda settings: print("f\\xfcr \\ud83d"), ""
cli.main(["say"])
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (found.returncode, found.stdout.decode(encoding).strip()) == (0, shown), found.stderr


@pytest.mark.parametrize("content, message", [
    (b"a: : b", "the file of --config is no YAML at line 1, column 4"), (b"\xff\xfe\xff", "--config is no text in UTF-8"),
    (b"gating: 3", "gating must hold settings by name"), (b"judge: [1]", "judge must hold settings by name")])
def test_a_file_of_settings_that_is_none(capsys, tmp_path, content, message):
    (tmp_path / "wrong.yaml").write_bytes(content)
    status, text = failed(capsys, "loop", "--config", str(tmp_path / "wrong.yaml"))
    assert status == 2 and message in text and "\n" not in text, text
    status, text = failed(capsys, "loop", "--config", str(tmp_path))
    assert status == 2 and "is no file: give one to --config" in text


@pytest.mark.parametrize("argv, message", [
    (["reward", "train", "--data", "x"], "--out must be given"),
    (["reward", "score"], "--model and --data must be given"),
    (["loop", "--steps", "x"], "--steps must be a whole number, at least 2"),
    (["loop", "--config", "no.yaml"], "there is no file"),
    (["lop"], "do you mean loop?"),
    (["loop", "--reward", "runs/no/folder"], "there is no folder runs/no/folder"),
    (["loop", "--gating.model_name", "./nothing"], "there is no folder ./nothing"),
    (["reward", "eval", "--model", "runs/no/reward", "--data", __file__], "there is no folder runs/no/reward"),
    (["miner", "--axon.port", "99999"], "--axon.port must be"),
])
def test_one_line_says_what_is_wrong(capsys, argv, message):
    status, text = failed(capsys, *argv)
    assert status == 2 and message in text and "\n" not in text, text


# ---- terminals

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9\d|10[0-7])[;\d]*m")
IN_TERMINAL = """
import sys
from prompting_nb.cli import main
run, model, data = sys.argv[1:]
main(["watch", "--dir", run])
for more in ([], ["--quiet"]):
    print("NEXT", flush=True)
    main(["reward", "train", "--model", model, "--data", data, "--out", f"{model}-{len(more)}", "--max-steps", "3", *more])
"""


def in_terminal(argv, **variables):
    "What a program writes that believes in a terminal of 120 columns."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # a bar has no room in the zero columns of a new one
    environment = {**os.environ, "TERM": "xterm-256color", **variables}
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                written += (block := os.read(ours, 1 << 16))
            except OSError:  # nobody holds the other end any more
                break
            if not block:
                break
    os.close(ours)
    text = written.decode(errors="replace")
    assert process.returncode == 0, text
    return text


@pytest.mark.slow
def test_no_colour_where_it_is_not_wanted_and_no_bars_where_it_is_quiet(tmp_path):
    from toys import letter_tokenizer, save_model
    from transformers import BertConfig

    tokenizer = letter_tokenizer(True)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = save_model(tmp_path / "model", config, tokenizer)
    rows = [{"prompt": f"say {n}", "chosen": "a b", "rejected": "c"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    run.mkdir()
    event = {"step": 0, "prompt": "a", "uids": [1], "hotkeys": ["5F"], "rewards": [1.0], "statuses": [200], "block": 1}
    (run / "events.jsonl").write_text(json.dumps(event) + "\n")
    (run / "summary.json").write_text(json.dumps({"status": "finished", "steps": 1, "top_k": 1}))
    text = in_terminal([sys.executable, "-c", IN_TERMINAL, run, model, tmp_path / "rows.jsonl"], NO_COLOR="1")
    assert not COLOUR.search(text)
    before, loud, quiet = text.split("NEXT")
    assert "\x1b[" in before and "5F" in before  # a table that was drawn anew
    assert "1 process):" in loud and "1 process):" not in quiet and "the model is in" in quiet


def test_a_miner_that_serves_leaves_what_is_loaded_out_of_garbage_collections(monkeypatch, capsys):
    "Each full collection of all that a miner has loaded would hold up its callers; one that is asked and ends needs none."
    frozen, wait, before = [], Miner.wait_for_block, gc.get_threshold()

    def stop(self, block=0, timeout=10.0):
        if block:
            frozen.append(gc.get_freeze_count())
            raise KeyboardInterrupt
        return wait(self, block, timeout)

    monkeypatch.setattr(Miner, "wait_for_block", stop)
    try:
        main(["miner", "--axon.port", "0", "--ask", "why?"])
        assert (frozen, gc.get_freeze_count()) == ([], 0)
        main(["miner", "--axon.port", "0"])
        assert frozen[0] > 10_000 and gc.get_threshold() > before
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
