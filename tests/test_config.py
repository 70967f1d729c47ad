"""Settings: flags from dataclasses, checked values, unknown names, and whose arguments are whose."""

import argparse
import dataclasses
import math
import os
import string
import subprocess
import sys
import textwrap
from typing import Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompting_nb.config import (
    Config, HalfOpenUnitInterval, InputError, NonNegativeFloat, NotEmptyStr, PositiveFloat, PositiveInt, add_argument,
    add_settings, check_settings, make_parser, merge, read_config, settings_of,
)

@dataclasses.dataclass
class Blacklist:
    """Whom to serve.

    Args:
        quota: Requests of a caller.
        whitelist: Hotkeys that are always served.
        closed: Serve nobody.
    """

    quota: PositiveInt = 5
    whitelist: list[str] = dataclasses.field(default_factory=list)
    closed: bool = False

    __post_init__ = check_settings


@dataclasses.dataclass
class Gating:
    """A gate.

    Args:
        model_name: Encoder.
        num_uids: Number of uids.
        learning_rate: Learning rate.
        momentum: Momentum.
        loss: What is minimised.
        blacklist: A section.
        frozen: Do not learn.
        cut: Where to cut.
    """

    model_name: NotEmptyStr = "minilm"
    num_uids: PositiveInt = 4096
    learning_rate: PositiveFloat = 0.01
    momentum: HalfOpenUnitInterval = 0.9
    loss: Literal["mse", "listwise"] = "mse"
    blacklist: Blacklist = dataclasses.field(default_factory=Blacklist)
    frozen: bool = False
    cut: Optional[NonNegativeFloat] = None

    __post_init__ = check_settings


def add_args(parser):
    add_settings(parser, Gating, "gating")


NAMES = {"gating.model_name", "gating.num_uids", "gating.learning_rate", "gating.momentum", "gating.loss",
         "gating.blacklist.quota", "gating.blacklist.whitelist", "gating.blacklist.closed", "gating.frozen", "gating.cut"}
READERS = {
    "dict": lambda name, value: read_config(add_args, given={name: value}),
    "nested": lambda name, value: read_config(add_args, given=merge({name: value})),
    "line": lambda name, value: read_config(add_args, argv=[f"--{name}", str(value)]),
    "line=": lambda name, value: read_config(add_args, argv=[f"--{name}={value}"]),
    "settings": lambda name, value: settings_of(Gating, {name: value}, "gating"),
}


def typed(**values):
    return settings_of(Gating, {f"gating.{name}": value for name, value in values.items()}, "gating")


@pytest.mark.parametrize("make", [argparse.ArgumentParser, make_parser])
def test_flags_come_from_the_dataclass_once(make):
    parser = make()
    add_args(parser)
    add_args(parser)
    flags = {name[2:] for name in parser._option_string_actions if name.startswith("--gating")}
    assert flags == NAMES
    values = vars(merge(parser.parse_args([])).gating)
    assert values.pop("blacklist") == Config(quota=5, whitelist=[], closed=False)
    assert values == {f.name: f.default for f in dataclasses.fields(Gating) if f.name != "blacklist"}


def test_plain_argparse_shows_names_types_and_defaults():
    parser = argparse.ArgumentParser()
    add_args(parser)
    shown = {a.dest: (a.type, a.default, a.choices) for a in parser._actions if a.dest != "help"}
    assert shown["gating.num_uids"] == (int, 4096, None)
    assert shown["gating.model_name"] == (str, "minilm", None)
    assert shown["gating.momentum"] == (float, 0.9, None)
    assert shown["gating.cut"] == (float, None, None)
    assert shown["gating.loss"] == (str, "mse", ("mse", "listwise"))
    assert shown["gating.frozen"] == (None, False, None)


@pytest.mark.parametrize("make", [argparse.ArgumentParser, make_parser])
@pytest.mark.parametrize("flag, value", [
    ("num_uids", "0"), ("num_uids", "-3"), ("num_uids", "many"), ("num_uids", "1.5"), ("learning_rate", "0"),
    ("learning_rate", "nan"), ("momentum", "1"), ("momentum", "-0.1"), ("loss", "mae"), ("blacklist.quota", "0"),
    ("cut", "-1"), ("model_name", ""),
])
def test_bad_values_are_refused_by_either_parser(make, flag, value):
    parser = make(exit_on_error=False)
    add_args(parser)
    with pytest.raises(argparse.ArgumentError, match=f"--gating.{flag}"):
        parser.parse_args([f"--gating.{flag}={value}"])


def test_help_shows_groups_choices_defaults_and_the_docstring():
    for make in (argparse.ArgumentParser, make_parser):
        parser = make()
        add_args(parser)
        text = parser.format_help()
        assert "A gate:" in text and "Whom to serve:" in text
        assert "{mse,listwise}" in text and "What is minimised." in text and "default: 4096" in text
        assert text.index("Whom to serve:") < text.index("Requests of a caller.")


def test_flags_go_into_a_group_that_is_handed_in():
    parser = make_parser()
    add_args(parser.add_argument_group("mine"))
    assert [group.title for group in parser._action_groups if group._group_actions][-1] == "mine"


def test_names_without_a_section_take_dashes():
    @dataclasses.dataclass
    class Top:
        "Flags of a command."

        top_k: PositiveInt = 3
        packed: bool = True

    for make in (argparse.ArgumentParser, make_parser):
        parser = make(exit_on_error=False)
        add_settings(parser, Top)
        assert vars(parser.parse_args(["--top-k", "2", "--packed", "false"])) == {"top_k": 2, "packed": False}
    with pytest.raises(argparse.ArgumentError, match="top-kk; the nearest is top-k$"):
        parser.parse_args(["--top-kk", "2"])
    with pytest.raises(InputError, match="--top-k must be at least 1, not 0"):
        settings_of(Top, {"top_k": 0})


def test_a_setting_without_default_must_be_given():
    @dataclasses.dataclass
    class Job:
        "A job."

        out: str

    with pytest.raises(InputError, match="--out must be given"):
        settings_of(Job, {})
    parser = make_parser(exit_on_error=False)
    add_settings(parser, Job)
    with pytest.raises(argparse.ArgumentError, match="out"):
        parser.parse_args([])


def test_help_and_fields_are_inherited():
    @dataclasses.dataclass
    class Bayes(Gating):
        """A Bayesian gate.

        Args:
            topics: Groups of prompts.
        """

        topics: PositiveInt = 16

    parser = make_parser()
    add_settings(parser, Bayes, "gating")
    text = parser.format_help()
    assert "Groups of prompts." in text and "Number of uids." in text
    assert settings_of(Bayes, read_config(lambda p: add_settings(p, Bayes, "gating"), argv=[]), "gating") == Bayes()


# Values


@given(st.integers(1, 10**9), st.floats(0, 0.999), st.sampled_from(["mse", "listwise"]), st.booleans(),
       st.lists(st.text(string.ascii_letters, min_size=1), max_size=4), st.none() | st.floats(0, 1e9))
@settings(max_examples=50, deadline=None)
def test_good_values_come_back_typed_from_everywhere(uids, momentum, loss, frozen, names, cut):
    expected = Gating(num_uids=uids, momentum=momentum, loss=loss, frozen=frozen, cut=cut,
                      blacklist=Blacklist(whitelist=names))
    argv = [f"--gating.num_uids={uids}", f"--gating.momentum={momentum}", f"--gating.loss={loss}"]
    argv += ["--gating.frozen"] * frozen + ([f"--gating.cut={cut}"] if cut is not None else [])
    argv += ["--gating.blacklist.whitelist", *names] if names else []
    read = read_config(add_args, argv=["tests/", *argv, "--other", "7"])
    assert settings_of(Gating, read, "gating") == expected
    plain = argparse.ArgumentParser()
    add_args(plain)
    assert settings_of(Gating, plain.parse_args(argv), "gating") == expected
    assert settings_of(Gating, merge({"gating": expected}), "gating") == expected
    assert settings_of(Gating, read_config(add_args, given=merge({"gating": expected})), "gating") == expected
    assert type(read.gating.num_uids) is int and type(read.gating.momentum) is float


@given(st.sampled_from(["num_uids", "blacklist.quota"]),
       st.integers(max_value=0) | st.booleans() | st.floats() | st.text() | st.none() | st.lists(st.integers()))
@settings(deadline=None)
def test_what_is_no_positive_whole_number_is_refused(name, value):
    with pytest.raises(InputError, match=f"--gating.{name} must be"):
        settings_of(Gating, {f"gating.{name}": value}, "gating")
    part, field = (Blacklist, "quota") if "." in name else (Gating, name)
    with pytest.raises(InputError, match=f"{field} must be"):
        part(**{field: value})


@given(st.floats(max_value=0, exclude_max=True) | st.floats(min_value=1) | st.sampled_from([math.nan, math.inf]))
@settings(deadline=None)
def test_momentum_is_bounded_on_both_sides(value):
    with pytest.raises(InputError, match="--gating.momentum must be"):
        typed(momentum=value)


@pytest.mark.parametrize("values, words", [
    ({"num_uids": 0}, "--gating.num_uids must be at least 1, not 0"),
    ({"num_uids": "7"}, "--gating.num_uids must be a whole number, at least 1, not '7'"),
    ({"momentum": 1.0}, "--gating.momentum must be at least 0 and less than 1, not 1.0"),
    ({"loss": "mae"}, "--gating.loss must be one of mse, listwise, not 'mae'"),
    ({"model_name": " "}, "--gating.model_name must be a text that is not empty, not ' '"),
    ({"cut": -1}, "--gating.cut must be at least 0, not -1"),
    ({"learning_rate": math.inf}, "--gating.learning_rate must be a number, greater than 0, not inf"),
    ({"frozen": 1}, "--gating.frozen must be true or false, not 1"),
    ({"blacklist.whitelist": "abc"}, "--gating.blacklist.whitelist must be a list, not 'abc'"),
    ({"blacklist.whitelist": [3]}, r"--gating.blacklist.whitelist must be a list, not \[3\]"),
])
def test_the_message_names_flag_and_bound(values, words):
    with pytest.raises(InputError, match=f"^{words}$"):
        typed(**values)


def test_whole_numbers_will_do_for_a_rate():
    assert typed(learning_rate=1).learning_rate == 1.0 and type(typed(learning_rate=1).learning_rate) is float


def test_a_value_that_was_read_before_says_nothing_about_one_of_another_type():
    "Values that were read are remembered, and 1 == 1.0 == True."
    assert type(typed(num_uids=1).num_uids) is int and typed(frozen=True).frozen is True
    for wrong in ({"num_uids": True}, {"num_uids": 1.0}, {"frozen": 1}):
        with pytest.raises(InputError):
            typed(**wrong)
    assert [type(typed(cut=value).cut) for value in (1, 1.0, 1)] == [float] * 3


# Unknown names

WORDS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)


@given(WORDS, st.sampled_from(sorted(READERS)), st.sampled_from(["gating.", "gating.blacklist."]))
@settings(max_examples=200, deadline=None)
def test_an_unknown_name_of_ours_is_refused_with_a_known_one(word, reader, section):
    name = section + word
    if name in NAMES or name == "gating.blacklist":
        return
    with pytest.raises(InputError, match=f"there is no setting {name}; the nearest is gating[.]") as error:
        READERS[reader](name, 5)
    assert str(error.value).rsplit(" ", 1)[1] in NAMES


@pytest.mark.parametrize("word", ["keys", "__dict__", "items"])
def test_a_name_may_be_that_of_a_method_of_a_namespace(word):
    "jsonargparse marks such names in a namespace with an invisible letter, which our messages must not have."
    with pytest.raises(InputError, match=f"^there is no setting gating.{word}; "):
        read_config(add_args, given=merge({f"gating.{word}": 5}))


@pytest.mark.parametrize("reader", READERS.values())
def test_the_nearest_name_is_named(reader):
    with pytest.raises(InputError, match="gating.blacklist.quotaa; the nearest is gating.blacklist.quota$"):
        reader("gating.blacklist.quotaa", 5)


@pytest.mark.parametrize("flag, said", [
    ("--miner.blacklist.quotaa", "miner.blacklist.quotaa, and none under miner: the sections are gating"),
    ("--gatingg.blacklist.quotaa", "gatingg.blacklist.quotaa; the nearest is gating.blacklist.quota")])
def test_a_name_of_another_section_has_no_nearest(flag, said):
    parser = make_parser(add_args, exit_on_error=False)
    parser.add_argument("--prices.worth", type=float)  # would be "the nearest" of miner.blacklist.quotaa
    said = said.replace("sections are gating", "sections are gating, prices")
    with pytest.raises(argparse.ArgumentError, match=f"there is no setting {said}$"):
        parser.parse_args([flag, "5"])


def test_yaml_with_an_unknown_name_is_refused(tmp_path):
    parser = make_parser(add_args, exit_on_error=False)
    parser.add_argument("--config", action="config")
    (tmp_path / "good.yaml").write_text("gating: {num_uids: 3, blacklist: {whitelist: [a, b], closed: true}}")
    read = settings_of(Gating, parser.parse_args([f"--config={tmp_path / 'good.yaml'}"]), "gating", ignore_unknown=True)
    assert (read.num_uids, read.blacklist) == (3, Blacklist(whitelist=["a", "b"], closed=True))
    (tmp_path / "bad.yaml").write_text("gating: {blacklist: {quotaa: 5}}")
    with pytest.raises(argparse.ArgumentError, match="the nearest is gating.blacklist.quota$"):
        parser.parse_args([f"--config={tmp_path / 'bad.yaml'}"])


def test_a_section_is_no_value():
    for value in ({"gating": 3}, {"gating.blacklist": 3}):
        with pytest.raises(InputError, match="there is no setting gating"):
            read_config(add_args, given=value)


def test_what_a_subclass_declares_or_returns_is_known():
    def own(parser):
        add_settings(parser, Gating, "gating")
        add_argument(parser, "--gating.extra", type=int, default=0)

    assert read_config(own, given={"gating.extra": 3}).gating.extra == 3
    returned = {"gating.returned": "x"}
    assert read_config(own, argv=[], defaults=returned).gating.returned == "x"
    assert read_config(own, given={"gating.returned": "y"}, defaults=returned).gating.returned == "y"
    assert read_config(own, argv=["--gating.returned", "z"], defaults=returned).gating.returned == "z"
    with pytest.raises(InputError, match="gating.retuned; the nearest is gating.returned"):
        read_config(own, argv=["--gating.retuned", "z"], defaults=returned)


def test_a_subclass_may_add_to_a_section_and_read_it_by_itself(monkeypatch):
    "As a miner does, whose `config` is `read_config(self.add_args)` and knows its own flags only."
    monkeypatch.setattr(sys, "argv", ["prog", "--gating.num_uids", "7", "--gating.mood", "good"])
    by_hand = lambda parser: add_argument(parser, "--gating.mood", type=str, default="")
    assert read_config(by_hand).gating.mood == "good"  # one flag does not make the section its own

    @dataclasses.dataclass
    class Mood:
        "A mood."

        mood: str = ""

    typed = lambda parser: add_settings(parser, Mood, "gating")
    for own in (by_hand, typed):
        read = read_config(own, add_args, defaults=lambda: read_config(own))
        assert (read.gating.mood, read.gating.num_uids) == ("good", 7)
    with pytest.raises(InputError, match="no setting gating.num_uids"):
        read_config(typed)


# Whose arguments are whose

OTHERS = st.lists(st.one_of(
    WORDS.map(lambda w: f"--{w}"), WORDS.map(lambda w: f"-{w[0]}"), WORDS, st.integers().map(str),
    WORDS.map(lambda w: f"--neuron.{w}=--gating.num_uids"), WORDS.map(lambda w: f"--miner.{w}"),
    st.just("--gating.num_uids 9"), st.sampled_from(["tests/", "--cov=src", "-f", "kernel.json", "-k", "gating.num_uids"]),
), max_size=5)


@given(OTHERS, OTHERS)
@settings(max_examples=200, deadline=None)
def test_arguments_of_the_script_are_left_alone(before, after):
    argv = [*before, "--gating.num_uids", "7", *after]
    assert settings_of(Gating, read_config(add_args, argv=argv), "gating") == Gating(num_uids=7)
    assert settings_of(Gating, read_config(add_args, argv=[*before, *after]), "gating") == Gating()


def test_a_switch_takes_no_argument_of_the_script():
    read = read_config(add_args, argv=["--gating.frozen", "tests/", "--gating.num_uids=3"])
    assert read.gating.frozen is True and read.gating.num_uids == 3
    assert read_config(add_args, argv=["--gating.frozen", "false"]).gating.frozen is False


def test_the_beginning_of_a_flag_is_not_the_flag():
    with pytest.raises(InputError, match="no setting gating.num; "):
        read_config(add_args, argv=["--gating.num", "7"])
    assert read_config(add_args, argv=["--gat", "7", "--g=3"]).gating.num_uids == 4096


def test_nothing_after_two_dashes_is_a_flag():
    assert read_config(add_args, argv=["--", "--gating.num_uids", "7", "--gating.x"]).gating.num_uids == 4096


def test_each_source_is_stronger_than_the_one_before(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    defaults = {"gating.num_uids": 2}
    read = lambda **more: read_config(add_args, defaults=defaults, **more).gating.num_uids
    assert read_config(add_args).gating.num_uids == 4096 and read() == 2
    monkeypatch.setenv("PROMPTING_NB_GATING__NUM_UIDS", "3")
    assert read() == 3 and read(environment=False) == 2
    monkeypatch.setattr(sys, "argv", ["prog", "--gating.num_uids", "4"])
    assert read() == 4
    assert read(given={"gating.num_uids": 5}) == 5


def test_with_a_configuration_neither_environment_nor_command_line_is_read(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--gating.num_uids", "4", "--gating.wrong"])
    monkeypatch.setenv("PROMPTING_NB_GATING__MOMENTUM", "0.5")
    own = lambda: merge(read_config(add_args), {"gating.loss": "listwise"})  # as a subclass's `config()` does
    read = read_config(add_args, defaults=own, given={"gating.cut": 1.0})
    assert settings_of(Gating, read, "gating") == Gating(loss="listwise", cut=1.0)
    monkeypatch.setattr(sys, "argv", ["prog", "--gating.num_uids", "4"])
    assert settings_of(Gating, read_config(add_args, defaults=own), "gating") == Gating(
        num_uids=4, momentum=0.5, loss="listwise")


def test_given_is_not_changed():
    given = {"gating": {"num_uids": 3}}
    read_config(add_args, given=given).gating.num_uids = 9
    assert given == {"gating": {"num_uids": 3}}


def test_a_notebook_has_no_command_line(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(sys, "argv", ["kernel", "-f", "x.json", "--gating.num_uids=7", "--gating.wrong"])
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1)))
    assert read_config(add_args).gating.num_uids == 4096


def test_our_own_commands_refuse_every_unknown_flag():
    for argv in (["--verbose"], ["--gating.num", "3"], ["--neuron.name", "x"], ["stray"]):
        with pytest.raises(argparse.ArgumentError, match="the nearest is|none under neuron|belongs to no flag"):
            make_parser(add_args, exit_on_error=False).parse_args(argv)


def test_settings_need_no_torch(tmp_path):
    script = "import sys, prompting_nb.config\nassert not {'torch', 'bittensor', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=dict(os.environ))


def test_a_command_says_which_variable_it_does_not_know(monkeypatch, capsys):
    monkeypatch.setenv("PROMPTING_NB_STEP", "7")  # of no section: perhaps of another command
    monkeypatch.setenv("PROMPTING_NB_GATING__MOMENTUM", "0.5")
    monkeypatch.setenv("OTHERS_GATING__MOMENTUMM", "0.5")
    command = make_parser(add_args, prog="command", exit_on_error=False)
    command.add_argument("--steps", type=int, default=1)
    assert command.parse_args([]).gating.momentum == 0.5
    said = "there is no environment variable PROMPTING_NB_STEP; the nearest is PROMPTING_NB_STEPS; it is ignored"
    assert capsys.readouterr().err == f"command: warning: {said}\n"


@pytest.mark.parametrize("name", ["GATING__NUM_UIDZ", "GATING_NUM_UIDS", "gating__num_uids", "GATING__BLACKLIST__QUOTAA"])
def test_a_command_refuses_an_unknown_variable_of_its_sections(monkeypatch, name):
    monkeypatch.setenv(f"PROMPTING_NB_{name}", "7")
    near = "there is no environment variable PROMPTING_NB_.*; the nearest is PROMPTING_NB_GATING__"
    with pytest.raises(argparse.ArgumentError, match=near):
        make_parser(add_args, prog="command", exit_on_error=False).parse_args([])
    assert read_config(add_args, argv=[]).gating.num_uids == 4096  # in a script it may be somebody else's
    assert make_parser(add_args, environment=False, prog="command").parse_args([]).gating.num_uids == 4096
