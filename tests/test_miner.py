"""What the miner pages promise and cannot show in prose: every flag, threads, order, chains that hang, Ctrl-C."""

import abc
import argparse
import asyncio
import dataclasses
import http.client
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import bittensor as bt
import psutil
import pytest
from bittensor.sp_core import ss58_decode, ss58_encode
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import alive
from prompting_nb.baseminer.blacklist import Caller, RateLimiter, Verdict
from prompting_nb.baseminer.cache import PromptCache
from prompting_nb.baseminer.flags import MinerSettings
from prompting_nb.baseminer.miner import Miner
from prompting_nb.baseminer.miners import MINERS
from prompting_nb.baseminer.priority import StakePriority
from prompting_nb.baseminer.running import Runner
from prompting_nb.baseminer.subnet import NoAddressError, NotRegisteredError, Subnet
from prompting_nb.config import (
    Config, InputError, PositiveInt, add_argument, make_parser, merge, read_config,
)
from prompting_nb.network.axon import Axon
from prompting_nb.network.chain import EmbeddedChain, MemorySubstrate, make_wallet
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.protocol import Prompting, Synapse, Terminal

SECONDS = 30  # longest wait for something that must happen; never a wait for something that must not
VALIDATOR, SMALL, MINER, STRANGER = (make_wallet(name) for name in ("validator", "small", "miner", "stranger"))
FAST = {"miner.poll_interval": 0.01}


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])


class HangingSubstrate(MemorySubstrate):
    "Its block number takes as long as `answering` is not set; counts what it is asked, and says when somebody waits."

    def __init__(self, subnet):
        super().__init__(subnet)
        self.answering, self.asked, self.calls = threading.Event(), threading.Event(), []
        self.answering.set()

    async def block_number(self):
        if not self.answering.is_set():
            self.asked.set()
            await asyncio.get_running_loop().run_in_executor(None, self.answering.wait, SECONDS)
        self.calls.append("block")
        return await super().block_number()

    async def runtime_call(self, *args, **kwargs):
        self.calls.append("metagraph")
        return await super().runtime_call(*args, **kwargs)

    async def submit(self, call, keypair, **more):
        self.calls.append(call.function)
        return await super().submit(call, keypair, **more)


class HangingChain(EmbeddedChain):
    "A chain with such a substrate."

    def __init__(self, **given):
        super().__init__(**given)
        self.substrate = HangingSubstrate(self.subnet)
        self.answering, self.asked, self.calls = (getattr(self.substrate, n) for n in ("answering", "asked", "calls"))


@pytest.fixture
def chain():
    chain = HangingChain(netuid=1)
    chain.register(VALIDATOR, stake=1000.0, validator_permit=True)
    chain.register(SMALL, stake=5.0)
    chain.register(MINER)
    yield chain
    chain.answering.set()


@pytest.fixture
def client(chain):
    with chain.client() as client:
        yield client


class Echo(Miner):
    "Says the prompt back, and counts."

    calls = 0

    @classmethod
    def add_args(cls, parser):
        add_argument(parser, "--echo.suffix", type=str, default="", help="Said after it.")

    def config(self):
        return read_config(self.add_args)

    def prompt(self, synapse):
        self.calls += 1
        synapse.completion = synapse.prompt + self.config.echo.suffix
        return synapse


@pytest.fixture
def make(client):
    "Makes miners that are stopped when the test is over."
    made = []

    def make(cls=Echo, config=None, **given):
        given = {"wallet": MINER, "subtensor": client, **given}
        made.append(cls(merge(FAST, config), **given))
        return made[-1]

    yield make
    for miner in made:
        miner.stop_run_thread()


def header(wallet):
    return Synapse(dendrite=Terminal(hotkey=wallet.hotkey.ss58_address))


def ask(miner, wallet=VALIDATOR, text="Hello"):
    with Dendrite(wallet, allow_private=True) as dendrite:
        return dendrite.query([miner.axon], Prompting.ask(text))[0]


def get(axon, path):
    connection = http.client.HTTPConnection(axon.host, axon.port, timeout=SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def wait_until(condition):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def threads(name):
    return [thread for thread in threading.enumerate() if thread.name == name]


# Construction and configuration


def test_abstract_names_and_signature():
    assert Miner.__abstractmethods__ == {"config", "add_args", "prompt"}
    assert Miner.__init__.__code__.co_varnames[1:5] == ("config", "axon", "wallet", "subtensor")
    assert Miner.__init__.__defaults__ == (None,) * 4
    assert inspect.ismethod(Miner.add_args) and not inspect.ismethod(Miner.config)
    with pytest.raises(TypeError, match="abstract"):
        Miner()


def test_a_miner_is_one_class():
    assert Miner.__mro__ == (Miner, abc.ABC, object)
    documented = ("config", "add_args", "_prompt", "prompt", "blacklist", "priority", "run", "run_in_background_thread",
                  "stop_run_thread", "__enter__", "__exit__", "sync", "set_weights", "wait_for_block", "state")
    assert [getattr(Miner, name).__qualname__ for name in documented] == [f"Miner.{name}" for name in documented]
    assert all(name in vars(Miner) for name in ("uid", "block", "synced_at", "hotkey", "metagraph", "error", "is_running"))


def test_given_parts_are_used_as_they_are(client):
    axon = Axon(MINER)
    miner = Echo(axon=axon, wallet=MINER, subtensor=client)
    assert miner.axon is axon and miner.wallet is MINER and miner.subtensor is client


def test_no_network_is_needed_with_stand_ins():
    metagraph = SimpleNamespace(hotkeys=[MINER.hotkey.ss58_address])  # "whatever has hotkeys"
    subtensor = SimpleNamespace(block=7, subnets=SimpleNamespace(metagraph=lambda netuid: metagraph))
    attached = []
    axon = SimpleNamespace(attach=lambda *functions: attached.append(functions), start=None, stop=None)
    miner = Echo(axon=axon, wallet=MINER, subtensor=subtensor)
    assert (miner.uid, miner.block, len(attached)) == (0, 7, 1)
    assert miner.blacklist(header(STRANGER)) and not miner.blacklist(header(MINER))


def test_functions_are_attached_once(make):
    axon = Axon(MINER)
    make(axon=axon)
    with pytest.raises(RuntimeError, match="attached already"):
        make(axon=axon)


class Named(Echo):
    "Its `config()` says more than its flags."

    def config(self):
        return merge(read_config(self.add_args), {"miner.name": "subclass", "miner.retries": 3})


@pytest.fixture
def outside(monkeypatch):
    "A command line, of another program as well, and an environment that set something of ours."
    flags = ["--miner.name", "shell", "--miner.blocks_per_epoch=50", "--echo.suffix", "!"]
    monkeypatch.setattr(sys, "argv", ["pytest", "-k", "x", "tests/", "--neuron.name", "n", *flags])
    monkeypatch.setenv("PROMPTING_NB_MINER__RETRIES", "4")


def test_without_config_the_command_line_wins(client, outside):
    miner = Named(wallet=MINER, subtensor=client)
    mine = miner.config.miner
    assert (mine.name, mine.retries, mine.blocks_per_epoch, mine.poll_interval) == ("shell", 4, 50, 6.0)
    assert type(mine.blocks_per_epoch) is int
    assert miner.config().echo.suffix == "!"  # callable, and with the subclass's own flags
    assert miner.settings.miner.name == "shell"


def test_with_config_neither_command_line_nor_environment_is_read(client, outside):
    given = {"miner": {"blacklist": {"window": 5.0}}}
    for config in (given, {}, Config()):
        miner = Named(config, wallet=MINER, subtensor=client)
        mine = miner.config.miner
        assert (mine.name, mine.retries, mine.blocks_per_epoch) == ("subclass", 3, 100)
        assert miner.config.echo.suffix == ""
        assert miner.settings.miner.blacklist.window == mine.blacklist.window == (5.0 if config else 60.0)
    assert given == {"miner": {"blacklist": {"window": 5.0}}}  # unchanged


UNKNOWN = [("miner.blacklist.quotaa", "miner.blacklist.quota"), ("axon.prot", "axon.port"), ("wallet.nmae", "wallet.name"),
           ("subtensor.networks", "subtensor.network"), ("miner.retry", "miner.retries")]


@pytest.mark.parametrize("name, nearest", UNKNOWN)
def test_an_unknown_setting_is_refused_with_the_nearest_one(client, monkeypatch, name, nearest):
    section, _, rest = name.partition(".")
    for config in ({name: "5"}, {section: {rest: "5"}}, merge({name: "5"})):
        with pytest.raises(InputError, match=f"{name}.*{nearest}"):
            Echo(config, wallet=MINER, subtensor=client)
    monkeypatch.setattr(sys, "argv", ["prog", f"--{name}", "5"])
    with pytest.raises(InputError, match=f"{name}.*{nearest}"):
        Echo(wallet=MINER, subtensor=client)


def test_settings_of_a_subclass_are_known(client, monkeypatch):
    class Own(Echo):
        @classmethod
        def add_args(cls, parser):
            add_argument(parser, "--miner.mood", type=str, default="calm", help="Declared.")

        def config(self):
            return merge(read_config(self.add_args), {"miner.colour": "red"})

    here = dict(wallet=MINER, subtensor=client)
    assert (mine := Own(**here).config.miner).mood == "calm" and mine.colour == "red"
    mine = Own({"miner": {"mood": "gay", "colour": "blue"}}, **here).config.miner
    assert (mine.mood, mine.colour) == ("gay", "blue")
    monkeypatch.setattr(sys, "argv", ["prog", "--miner.mood", "grim", "--miner.retries", "2", "--miner.colour", "grey"])
    assert (mine := Own(**here).config.miner).mood == "grim" and (mine.colour, mine.retries) == ("grey", 2)


@dataclasses.dataclass
class EarSettings:
    """How it listens.

    Args:
        volume: How loud.
    """

    volume: PositiveInt = 3


class Ear(Miner):
    "Declares a dataclass, and is done."

    Settings = EarSettings

    def prompt(self, synapse):
        synapse.completion = "!" * self.own_settings.volume
        return synapse


def test_a_dataclass_is_all_that_a_miner_declares(client, monkeypatch):
    assert Miner.__abstractmethods__ == {"config", "add_args", "prompt"} and Ear.__abstractmethods__ == frozenset()
    parser = argparse.ArgumentParser()
    Ear.add_args(parser)
    flag = parser._option_string_actions["--ear.volume"]
    assert (flag.type, flag.default, flag.help) == (int, 3, "How loud. (default: %(default)s)")
    here = dict(wallet=MINER, subtensor=client)
    miner = Ear({"ear": {"volume": 5}, "miner.name": "ear"}, **here)
    assert miner.own_settings == EarSettings(5) and miner.config.ear.volume == miner.config().ear.volume == 5
    assert miner._prompt(Prompting.ask("x")).completion == "!!!!!" and miner.settings.miner.name == "ear"
    monkeypatch.setattr(sys, "argv", ["prog", "--ear.volume", "7", "--other"])
    assert Ear(**here).own_settings.volume == 7 and Ear({}, **here).own_settings.volume == 3
    for config, words in (({"ear.volume": 0}, "--ear.volume must be at least 1"), ({"ear.volum": 2}, "nearest is ear.volume")):
        with pytest.raises(InputError, match=words):
            Ear(config, **here)
    with pytest.raises(InputError, match="--ear.volume must be at least 1"):
        Ear.check_config(merge({"ear.volume": 0}))
    assert Echo(FAST, **here).own_settings is None


def test_a_miner_with_a_dataclass_can_have_more(client):
    class Loud(Ear):
        section = "loud"

        def config(self):
            return merge(read_config(self.add_args), {"miner.name": "loud"})

    class Deaf(Ear):
        @dataclasses.dataclass
        class Settings(EarSettings):
            "Hears nothing."

            closed: bool = True

        @classmethod
        def add_args(cls, parser):
            super().add_args(parser)
            add_argument(parser, "--deaf.reason", default="noise")

    here = dict(wallet=MINER, subtensor=client)
    loud = Loud({"loud.volume": 4}, **here)
    assert (loud.own_settings.volume, loud.settings.miner.name, loud.section, Ear.section) == (4, "loud", "loud", "ear")
    deaf = Deaf({"deaf.volume": 2}, **here)
    assert (deaf.own_settings.volume, deaf.own_settings.closed, deaf.config.deaf.reason) == (2, True, "noise")


def test_settings_are_typed(client):
    settings = Echo({"netuid": 1, "miner.priority.rest": 30}, wallet=MINER, subtensor=client).settings
    assert type(settings) is MinerSettings and type(settings.miner.priority.rest) is float
    assert settings.miner.priority.rest == 30.0


FRIEND, OTHER = (make_wallet(name).hotkey.ss58_address for name in ("friend", "other"))
VAIN = {  # flag: what is written, and what gives it an effect
    "--miner.blacklist.prompt_cache_block_span": ("100", "--miner.blacklist.use_prompt_cache=true"),
    "--miner.blacklist.prompt_cache_per_caller": ("true", "--miner.blacklist.use_prompt_cache=true"),
    "--miner.blacklist.window": ("5", "--miner.blacklist.quota=3"),
    "--miner.priority.rest": ("5", "--miner.priority.idle_factor=0.5"),
    "--axon.nonces": ("memory", ""),
    "--axon.allow_private": ("true", "--axon.external_ip=10.1.2.3"),
    "--miner.blacklist.allow_non_registered": ("true", ""),
    "--miner.blacklist.whitelist": (FRIEND, "--miner.blacklist.quota=3"),
}


@pytest.mark.parametrize("flag", VAIN)
def test_a_setting_without_effect_is_said_with_the_remedy(flag, client, caplog, monkeypatch):
    value, remedy = VAIN[flag]
    missing = {"--axon.nonces": ["--axon.store=redis://127.0.0.1:1/0"], "--miner.priority.rest": ["--miner.priority.idle_factor=0"],
               "--axon.allow_private": ["--axon.external_ip=198.41.0.4"],
               "--miner.blacklist.allow_non_registered": ["--miner.blacklist.minimum_stake_requirement=1"]}
    for more, times in ((missing.get(flag, []), 1), ([remedy] if remedy else [], 0)):
        caplog.clear()
        everybody = ["--miner.blacklist.allow_non_registered=true"] * (flag == "--miner.blacklist.whitelist")
        monkeypatch.setattr(sys, "argv", ["prog", f"{flag}={value}", *more, *everybody])
        Echo(wallet=MINER, subtensor=client)
        said = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
        assert len(said) == times, said
        assert all(line.startswith(flag) and " --" in line for line in said)


LISTED = [  # lists of flags, and of what is said to have no effect
    ([FRIEND], [OTHER], [], []),
    ([FRIEND, OTHER], [OTHER], [], [f"--miner.blacklist.blacklist {OTHER}"]),
    ([FRIEND, OTHER], [f" {OTHER}"], [], [f"--miner.blacklist.blacklist {OTHER}"]),
    ([FRIEND, FRIEND], [], [], [f"--miner.blacklist.whitelist {FRIEND}"]),
    ([], [FRIEND, ss58_encode(ss58_decode(FRIEND), 0)], [], [f"--miner.blacklist.blacklist {FRIEND}"]),
    ([], [], ["10.1.2.3", "10.0.0.0/8", "::1"], ["--axon.trusted_proxies 10.1.2.3"]),
    ([], [], ["127.0.0.1", "127.0.0.1/32", "::ffff:127.0.0.1"],
     ["--axon.trusted_proxies 127.0.0.1/32", "--axon.trusted_proxies ::ffff:127.0.0.1"]),
]


@pytest.mark.parametrize("white, black, proxies, vain", LISTED)
def test_an_entry_of_a_list_without_effect_is_said(white, black, proxies, vain, client, caplog):
    lists = {"miner.blacklist.whitelist": white, "miner.blacklist.blacklist": black, "axon.trusted_proxies": proxies}
    Echo(lists, wallet=MINER, subtensor=client)
    said = [r.getMessage() for r in caplog.records if "has no effect" in r.getMessage()]
    assert [line.partition(" has no effect")[0] for line in said] == vain


@pytest.mark.parametrize("flag", ["--miner.blacklist.whitelist", "--miner.blacklist.blacklist", "--axon.trusted_proxies"])
@pytest.mark.parametrize("written", [[], [""], [" "]])
def test_a_list_flag_without_an_entry_is_refused(flag, written, client, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", flag, *written])
    with pytest.raises(InputError, match=re.escape(flag) if not written or "axon" not in flag else "is no trusted proxy"):
        Echo(wallet=MINER, subtensor=client)


def test_a_default_of_the_subclass_beats_the_base(make):
    class Patient(Echo):
        @classmethod
        def add_args(cls, parser):
            super().add_args(parser)
            add_argument(parser, "--miner.retries", type=int, default=77, help="More than usual.")

    class Silent(Patient):
        def config(self):
            return Config()

    assert make(Patient).config.miner.retries == make(Silent).config.miner.retries == 77


@pytest.mark.parametrize("make_one", [argparse.ArgumentParser, make_parser])
def test_flags_can_be_added_twice_to_either_parser(make_one):
    parser = make_one()
    Miner.add_base_args(parser)
    Miner.add_base_args(parser)
    assert set(EFFECTS) | WITHOUT_MINER <= set(parser._option_string_actions)


@pytest.mark.parametrize("value", ["0", "-5", "many", "1.5"])
def test_blocks_per_epoch_must_be_positive(make, client, monkeypatch, value):
    with pytest.raises(ValueError, match="blocks_per_epoch"):
        make(config={"miner.blocks_per_epoch": value})
    monkeypatch.setattr(sys, "argv", ["prog", "--miner.blocks_per_epoch", value])
    with pytest.raises(ValueError, match="blocks_per_epoch"):
        Echo(wallet=MINER, subtensor=client)


def test_an_unregistered_hotkey_is_a_named_exception(client):
    with pytest.raises(NotRegisteredError, match="not registered on subnet 1"):
        Echo(wallet=STRANGER, subtensor=client)


def test_nothing_is_written(client, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for kind in MINERS.values():
        read_config(kind.add_args)
    with Echo(FAST, wallet=MINER, subtensor=client) as miner:
        ask(miner)
    with pytest.raises(InputError, match="choose another with --wallet.name"):
        Echo(subtensor=client)
    assert [path for path in tmp_path.rglob("*")] == [tmp_path / "work"]


# Every flag has an effect. Each entry: what to write on the command line, and what to look at. The look must differ
# from what it is without the flag.


def refused(wallet, times=1):
    return lambda miner, chain: [miner.blacklist(header(wallet)).reason for _ in range(times)][-1]


def repeated(*wallets):
    def look(miner, chain):
        answered = []
        for block in (0, 8):
            miner.block += block
            for wallet in wallets:
                synapse = Prompting(roles=["user"], messages=["same"], dendrite=header(wallet).dendrite)
                try:
                    answered.append(miner._prompt(synapse).completion)
                except ValueError:
                    answered.append(None)
        return answered

    return look


def running(look):
    def wrapped(miner, chain):
        with miner:
            return look(miner, chain)

    return wrapped


def after_blocks(look, blocks):
    def wrapped(miner, chain):
        chain.calls.clear()
        with miner:
            chain.step(blocks)
            miner.wait_for_block(chain.block)
            return look(miner, chain)

    return wrapped


def first_wait(miner, chain):
    "What the loop waits for, in seconds, after its first step."
    waits = []

    class Noting(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            self.set()

    miner.runner.stopping = Noting()
    miner.run()
    return waits


def outlasts_failures(miner, chain):
    with miner:
        chain.fail(3)
        chain.step()
        miner.wait_for_block(chain.block)
    chain.fail(0)
    return type(miner.error)


def rested(wallet, gaps):
    def look(miner, chain):
        values = []
        for gap in (0, *gaps):
            miner.now[0] += gap
            values.append(miner.priority(header(wallet)))
        return values

    return look


def published(miner, chain):
    with chain.client() as client:
        return client.subnets.metagraph(miner.netuid).neuron(miner.uid).axon


CACHE = ["--miner.blacklist.use_prompt_cache"]
def calls_here(miner, chain):
    "How many prompts were answered in this process, of one."
    miner.axon._attached.forward(Prompting.ask("Who are you?"))
    return miner.calls


EFFECTS = {  # flag: (what is written, what else is written in both cases, what to look at)
    "--axon.host": (["127.0.0.2"], [], running(lambda miner, chain: miner.axon.address.split(":")[0])),
    "--axon.external_ip": (["10.1.2.3"], ["--axon.allow_private"], running(lambda m, c: published(m, c).split(":")[0])),
    "--axon.external_port": (["4242"], [], running(lambda m, c: published(m, c).split(":")[1] == "4242")),
    "--axon.no_legacy": ([], [], lambda miner, chain: miner.axon.legacy),
    "--axon.nonces": (["made_here.sqlite"], [], lambda miner, chain: miner.axon.nonces),
    "--axon.store": (["redis://127.0.0.1:1/0"], [], lambda miner, chain: type(miner.axon.nonces).__name__),
    "--axon.processes": (["2"], ["--axon.store", "redis://127.0.0.1:1/0"], lambda miner, chain: miner.axon.shared_port),
    "--axon.follower": ([], ["--axon.store", "redis://127.0.0.1:1/0"], after_blocks(lambda m, c: "set_mechanism_weights" in c.calls, 100)),
    "--axon.status_token": (["sesame"], [], lambda miner, chain: miner.axon.status_token),
    "--axon.trusted_proxies": (["10.0.0.1", "10.1.0.0/16"], [], lambda miner, chain: bool(miner.axon.proxies)),
    "--axon.isolate": ([], [], calls_here),
    "--miner.name": (["carol"], [], running(lambda miner, chain: len(threads("carol-run")))),
    "--miner.blocks_per_epoch": (["3"], [], after_blocks(lambda miner, chain: miner.synced_at, 5)),
    "--miner.poll_interval": (["2.5"], [], first_wait),
    "--miner.retries": (["1"], [], outlasts_failures),
    "--subtensor.timeout": (["7.5"], [], lambda miner, chain: miner.subnet.client.seconds),
    "--miner.no_set_weights": ([], [], after_blocks(lambda m, c: "set_mechanism_weights" in c.calls, 100)),
    "--miner.blacklist.whitelist": ([STRANGER.hotkey.ss58_address], [], refused(STRANGER)),
    "--miner.blacklist.blacklist": ([VALIDATOR.hotkey.ss58_address, SMALL.hotkey.ss58_address], [], refused(VALIDATOR)),
    "--miner.blacklist.allow_non_registered": ([], [], refused(STRANGER)),
    "--miner.blacklist.force_validator_permit": ([], [], refused(SMALL)),
    "--miner.blacklist.minimum_stake_requirement": (["1000"], [], refused(SMALL)),
    "--miner.blacklist.quota": (["3"], [], refused(SMALL, times=4)),
    "--miner.blacklist.window": (["3.5"], ["--miner.blacklist.quota", "1"], refused(SMALL, times=2)),
    "--miner.blacklist.use_prompt_cache": ([], [], repeated(VALIDATOR, SMALL)),
    "--miner.blacklist.prompt_cache_block_span": (["7"], CACHE, repeated(VALIDATOR)),
    "--miner.blacklist.prompt_cache_per_caller": ([], CACHE, repeated(VALIDATOR, SMALL)),
    "--miner.priority.default": (["0.25"], [], rested(STRANGER, [])),
    "--miner.priority.idle_factor": (["3"], [], rested(VALIDATOR, [30, 30])),
    "--miner.priority.rest": (["15"], [], rested(VALIDATOR, [30, 30])),
    "--miner.priority.history": (["1"], [], rested(VALIDATOR, [50, 5, 5])),
}
WITHOUT_MINER = {"--netuid", "--subtensor.network", "--wallet.name", "--wallet.hotkey", "--wallet.path", "--axon.port",
                 "--axon.allow_private"}


class Clocked(Echo):
    "A miner with a clock that stands still."

    def __init__(self, *args, **kwargs):
        self.now = [0.0]
        self.clock = lambda: self.now[0]
        super().__init__(*args, **kwargs)


def test_the_parser_has_no_other_flags():
    parser = make_parser(Miner.add_base_args)
    flags = {flag for flag in parser._option_string_actions if "." in flag or flag == "--netuid"}
    assert flags == set(EFFECTS) | WITHOUT_MINER


@pytest.mark.parametrize("flag", sorted(EFFECTS))
def test_flag_has_an_effect(flag, chain, client, monkeypatch):
    values, always, look = EFFECTS[flag]
    seen = []
    for written in (always, [*always, flag, *values]):
        poll = [] if flag == "--miner.poll_interval" else ["--miner.poll_interval", "0.01"]
        monkeypatch.setattr(sys, "argv", ["prog", *poll, *written])
        miner = Clocked(wallet=MINER, subtensor=client)
        seen.append(look(miner, chain))
        miner.stop_run_thread()
    assert seen[0] != seen[1]


def test_flag_port(make):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        miner = make(config={"axon.port": port})
        with pytest.raises(OSError, match="in use"):
            miner.run_in_background_thread()
        assert not miner.is_running and miner.error is None
    with miner:
        assert miner.axon.port == port and ask(miner).completion == "Hello"


@pytest.mark.parametrize("ip", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "[fe80::1]", "::ffff:10.0.0.1"])
def test_a_private_external_ip_needs_the_word(make, chain, ip):
    said = r"--axon.external_ip .* is not on the open internet \(.*\).*add --axon.allow_private"
    with pytest.raises(InputError, match=said):
        make(config={"axon.external_ip": ip})
    with make(config={"axon.external_ip": ip, "axon.allow_private": True}) as miner:
        assert published(miner, chain).split(":")[0] or published(miner, chain).startswith("[")
    assert make(config={"axon.external_ip": "198.41.0.4"}).settings.axon.external_ip == "198.41.0.4"
    with pytest.raises(InputError, match="miner.example is no IP address"):
        make(config={"axon.external_ip": "miner.example"})


EVERYWHERE = ["0.0.0.0", "0", "000.000.000.000", "::", "::0", "0:0:0:0:0:0:0:0", "[::]", "::ffff:0.0.0.0"]


@pytest.mark.parametrize("ip", EVERYWHERE)
def test_every_interface_is_no_address_to_publish(make, chain, ip):
    said = "means every interface.*--axon.external_ip where others reach this machine"
    with pytest.raises(InputError, match=f"--axon.host {re.escape(ip)} {said}"):
        make(config={"axon.host": ip})
    for private in (False, True):
        with pytest.raises(InputError, match=r"--axon.external_ip .* (means every interface|is no IP address)"):
            make(config={"axon.external_ip": ip, "axon.allow_private": private})
    if ip == "0.0.0.0":  # of an axon that was handed over
        with pytest.raises(NoAddressError, match=said), make(axon=Axon(MINER, ip)):
            pass
        assert "serve_axon" not in chain.calls


@pytest.mark.parametrize("ip", ["2001:4860::1%eth0", "[2001:4860::1%eth0]", "fe80::1%1"])
def test_an_address_with_a_zone_is_not_published(make, ip):
    with pytest.raises(InputError, match=r"--axon.external_ip \S+ has a zone, (eth0|1), that means something on one machine"):
        make(config={"axon.external_ip": ip, "axon.allow_private": True})


def test_flag_netuid(client, make):
    with pytest.raises(InputError, match="no subnet 2: choose another with --netuid"):
        make(config={"netuid": 2})
    chain = EmbeddedChain(netuid=2)
    chain.register(MINER)
    with chain.client() as client:
        assert make(config={"netuid": 2}, subtensor=client).uid == 0


def test_flags_of_wallet_and_network(chain, tmp_path, monkeypatch):
    wallets = tmp_path / "wallets"
    wallet = bt.Wallet("cold", "hot", str(wallets))
    wallet.create_new_coldkey(use_password=False, suppress=True).create_new_hotkey(suppress=True)
    chain.register(wallet)
    networks = []
    flags = ["--wallet.path", str(wallets), "--wallet.name", "cold", "--wallet.hotkey", "hot"]
    monkeypatch.setattr(sys, "argv", ["prog", *flags, "--subtensor.network", "test"])
    with chain.client() as client:
        # The one thing that cannot be had here is a node of a public network.
        monkeypatch.setattr(bt, "SyncClient", lambda network: networks.append(network) or client)
        assert Echo().hotkey == wallet.hotkey.ss58_address and networks == ["test"]
        for left_out in (0, 2, 4):
            monkeypatch.setattr(sys, "argv", ["prog", *flags[:left_out], *flags[left_out + 2 :]])
            with pytest.raises(InputError, match="does not exist"):
                Echo()


# Prompts and cache


def test_of_32_equal_prompts_one_is_served(make):
    miner = make(config={"miner.blacklist.use_prompt_cache": True})
    start = threading.Barrier(32)

    def send(_):
        start.wait()
        try:
            return miner._prompt(Prompting.ask("the same")).completion
        except ValueError:
            return None

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(send, range(32)))
    assert (answers.count("the same"), answers.count(None), miner.calls) == (1, 31, 1)


def test_the_cache_follows_the_chain(make, chain):
    config = {"miner.blacklist.use_prompt_cache": True, "miner.blacklist.prompt_cache_block_span": 5}
    with make(config=config) as miner:
        heard = []
        for steps in (0, 0, 5, 1):
            chain.step(steps)
            miner.wait_for_block(chain.block)
            heard.append(ask(miner).completion)
    assert heard == ["Hello", None, None, "Hello"]


def test_a_cached_prompt_does_not_reach_prompt(make):
    miner = make(config={"miner.blacklist.use_prompt_cache": True})
    miner._prompt(Prompting.ask("x"))
    with pytest.raises(ValueError, match="within the last 7200 blocks"):
        miner._prompt(Prompting.ask("x"))
    assert miner.calls == 1
    miner._prompt(Prompting(roles=["system"], messages=["x"]))  # other roles, another prompt
    assert miner.calls == 2
    assert make().cache is None  # off by default


def test_a_prompt_that_failed_may_be_repeated(make, caplog):
    class Shaky(Echo):
        def prompt(self, synapse):
            super().prompt(synapse)
            if self.calls == 1:
                raise MemoryError("the model is too large")
            return synapse

    with make(Shaky, {"miner.blacklist.use_prompt_cache": True}) as miner:
        first, second, third = ask(miner), ask(miner), ask(miner)
    assert (first.completion, second.completion, third.completion) == (None, "Hello", None)
    word = first.dendrite.status_message.split("error ")[1].split()[0]  # the caller gets a word, the log the text
    assert word in caplog.text and "too large" in caplog.text and "too large" not in first.dendrite.status_message


def test_processes_of_an_isolated_miner_have_what_its_init_made_and_end_with_its_run(make):
    class Loaded(Echo):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            self.model = "what was loaded"

        def prompt(self, synapse):
            synapse.completion = f"{self.model} {os.getpid()}"
            return synapse

    miner = make(Loaded, {"axon.isolate": True})
    for _ in range(2):
        with miner:
            said, pid = ask(miner).completion.rsplit(" ", 1)
            assert said == "what was loaded" and int(pid) != os.getpid()
            assert get(miner.axon, "/ready")[0] == 200
            group = psutil.Process(os.getpgid(int(pid)))
        with pytest.raises(psutil.NoSuchProcess):  # it was waited for
            group.status()
        wait_until(lambda: not alive(int(pid)))


@pytest.mark.parametrize("kind", ["template", "replay", "retrieval", "process"])
def test_kinds_of_miners_whose_prompts_can_be_isolated(kind, tmp_path, client):
    rows = {"replay": {"prompt": "Hello", "completion": "HELLO"}, "retrieval": {"text": "Hello", "answer": "HELLO"}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows.get(kind, {})) + "\n")
    file = str(tmp_path / "rows.jsonl")
    flags = {
        "template": {"template.completion": "HELLO"}, "replay": {"replay.file": file},
        "retrieval": {"retrieval.corpus": file}, "process": {"process.command": "tr a-z A-Z"},
    }  # fmt: skip
    config = {"axon.isolate": True, **flags[kind], **FAST}
    with MINERS[kind](config, wallet=MINER, subtensor=client) as miner:
        assert ask(miner).completion == "HELLO"


@pytest.mark.parametrize("overridden", ["prompt", "_prompt", "blacklist", "priority"])
def test_coroutines_and_plain_functions_are_welcome(make, overridden):
    class Awaited(Echo):
        pass

    async def coroutine(self, synapse):
        await asyncio.sleep(0)
        result = getattr(Echo, overridden)(self, synapse)
        return result

    setattr(Awaited, overridden, coroutine)
    with make(Awaited) as miner:
        assert ask(miner).completion == "Hello"
        assert ask(miner, STRANGER).dendrite.status_message == "hotkey is not registered"


def test_a_plain_function_that_returns_a_coroutine_is_welcome(make):
    class Around(Echo):
        def blacklist(self, synapse):  # as a decorator without `async` makes it
            return self._later(super().blacklist(synapse))

        def priority(self, synapse):
            return self._later(super().priority(synapse))

        async def _later(self, value):
            await asyncio.sleep(0)
            if value is None:
                raise ValueError("no value")
            return value

    with make(Around) as miner:
        assert ask(miner).completion == "Hello"
        assert ask(miner, STRANGER).dendrite.status_message == "hotkey is not registered"

    class Broken(Around):
        def blacklist(self, synapse):
            return self._later(None)

    with make(Broken) as miner:
        assert ask(miner).dendrite.status_message == "the blacklist of this miner failed"


def test_an_overridden_wrapper_is_used_around_a_coroutine(make):
    class Wrapped(Echo):
        async def prompt(self, synapse):
            return super().prompt(synapse)

        def _prompt(self, synapse):
            answer = super()._prompt(synapse)
            answer.completion += ", wrapped"
            return answer

    with make(Wrapped) as miner:
        assert ask(miner).completion == "Hello, wrapped"


def test_a_prompt_without_result_names_the_subclass(make):
    class Forgetful(Echo):
        def prompt(self, synapse):
            super().prompt(synapse)

    with make(Forgetful) as miner:
        with pytest.raises(TypeError, match="Forgetful.prompt returned None"):
            miner._prompt(Prompting.ask("x"))
        assert "Forgetful.prompt returned None" in ask(miner).dendrite.status_message


# Blacklist and priority


def reasons(make, chain, **settings):
    "What the validator, a small caller and a stranger hear, asked twice."
    miner = make(config={"miner.blacklist": settings})
    return [[miner.blacklist(header(wallet)).reason for _ in range(2)][-1] for wallet in (VALIDATOR, SMALL, STRANGER)]


def test_the_whitelist_wins_over_everything(make, chain):
    hotkey = STRANGER.hotkey.ss58_address
    everything = dict(blacklist=[hotkey], force_validator_permit=True, minimum_stake_requirement=1.0, quota=1)
    assert reasons(make, chain, **everything)[2] == "hotkey is blacklisted"
    assert reasons(make, chain, whitelist=[hotkey], **everything)[2] == "hotkey is whitelisted"


def test_rules_are_asked_in_their_order(make, chain):
    "Everything is against the small caller; what is in front of the order is taken away one after the other."
    against = dict(blacklist=[wallet.hotkey.ss58_address for wallet in (SMALL, STRANGER)], force_validator_permit=True,
                   minimum_stake_requirement=10.0, quota=1)
    heard = [reasons(make, chain, **against)[1:]]
    for name, value in (("blacklist", []), ("allow_non_registered", True), ("force_validator_permit", False),
                        ("minimum_stake_requirement", 0.0), ("quota", 0)):
        against[name] = value
        heard.append(reasons(make, chain, **against)[1:])
    assert heard == [
        ["hotkey is blacklisted", "hotkey is blacklisted"],
        ["hotkey has no validator permit", "hotkey is not registered"],
        ["hotkey has no validator permit", "hotkey has no validator permit"],
        ["stake 5 is below the required 10", "stake 0 is below the required 10"],
        ["more than 1 request within 60 seconds", "more than 1 request within 60 seconds"],
        ["admitted", "admitted"],
    ]


def test_a_subclass_adds_one_rule(make):
    class NoSmallTalk(Echo):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.rules.append(lambda caller: Verdict(True, "too small") if caller.stake < 100 else None)

    miner = make(NoSmallTalk)
    reasons = [miner.blacklist(header(wallet)).reason for wallet in (VALIDATOR, SMALL, STRANGER)]
    assert reasons == ["admitted", "too small", "hotkey is not registered"]


def test_a_broken_blacklist_refuses_and_is_logged(make, caplog):
    class Broken(Echo):
        def blacklist(self, synapse):
            return synapse.messages == ()  # a blacklist sees no messages

    with make(Broken) as miner:
        answer = ask(miner)
    assert (answer.dendrite.status_code, answer.dendrite.status_message) == (403, "the blacklist of this miner failed")
    assert any("blacklist failed" in record.message and record.exc_info for record in caplog.records)


def test_a_bare_pair_is_not_mistaken_for_true(make):
    class Pairs(Echo):
        def blacklist(self, synapse):
            return (synapse.dendrite.hotkey == SMALL.hotkey.ss58_address, "not you")

    with make(Pairs) as miner:
        assert ask(miner).completion == "Hello"
        assert ask(miner, SMALL).dendrite.status_message == "not you"


def test_the_rate_limit_holds_without_the_default_priority(make):
    class Fair(Echo):
        def priority(self, synapse):
            return 1.0

    config = {"miner.blacklist": {"quota": 2, "window": 3600.0, "allow_non_registered": True}}
    with make(Fair, config) as miner:
        for wallet in (VALIDATOR, STRANGER):
            codes = [ask(miner, wallet, text).dendrite.status_code for text in "abc"]
            assert codes == [200, 200, 429]


def test_interrupts_pass_through_the_rules(make):
    miner = make()
    for interrupt in (KeyboardInterrupt, SystemExit):
        def rule(caller):
            raise interrupt

        miner.rules = [rule]
        with pytest.raises(interrupt):
            miner.blacklist(header(VALIDATOR))


def test_higher_priority_is_served_first(chain, client, make):
    wallets = {stake: make_wallet(f"stake {stake}") for stake in (10, 50, 30, 20)}
    for stake, wallet in wallets.items():
        chain.register(wallet, stake=float(stake))
    served, busy, free, queued = [], threading.Event(), threading.Event(), threading.Semaphore(0)

    class OneByOne(Echo):
        def priority(self, synapse):
            queued.release()  # the axon queues the request before it looks at another
            return super().priority(synapse)

        def prompt(self, synapse):
            if synapse.prompt == "first":
                busy.set()
                free.wait(SECONDS)
            else:
                served.append(synapse.prompt)
            return super().prompt(synapse)

    arrivals = [(10, "10"), (50, "50"), (30, "30 a"), (20, "20"), (30, "30 b")]
    with make(OneByOne, {"miner.priority.idle_factor": 0.0}, axon=Axon(MINER, workers=1)) as miner:
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(ask, miner, VALIDATOR, "first")]
            assert busy.wait(SECONDS) and queued.acquire(timeout=SECONDS)
            for stake, text in arrivals:
                waiting.append(pool.submit(ask, miner, wallets[stake], text))
                assert queued.acquire(timeout=SECONDS)
            free.set()
            assert all(answer.result().is_success for answer in waiting)
    assert served == ["50", "30 a", "30 b", "20", "10"]


def test_changed_stake_is_seen_after_an_epoch(make, chain):
    with make() as miner:
        before = miner.priority(header(SMALL))
        chain.set_stake(SMALL, 2000.0)
        unchanged = miner.caller(header(SMALL)).stake
        chain.step(100)
        miner.wait_for_block(chain.block)
        assert (before, unchanged, miner.caller(header(SMALL)).stake) == (5.0, 5.0, 2000.0)


# Running


def test_a_second_start_starts_nothing(make):
    miner = make(config={"miner.name": "only one"})
    miner.run_in_background_thread()
    port = miner.axon.port
    assert miner.is_running
    miner.run_in_background_thread()
    assert len(threads("only one-run")) == 1 and miner.axon.port == port
    with pytest.raises(RuntimeError, match="only one is running already: stop it, or call `run` without `with`"):
        miner.run()


def test_a_miner_that_runs_says_where_it_listens(make, capsys):
    "A class of one's own that is run from a file showed nothing at all."
    miner, told = make(), threading.Thread(target=lambda: (wait_until(lambda: miner.axon.is_running), miner.runner.stopping.set()))
    told.start()
    miner.run()
    told.join()
    said = capsys.readouterr()
    assert said.err == f"Echo {miner.hotkey} is uid 2 of subnet 1 (ws://embedded) and listens on {miner.axon.address}\n"
    with miner:
        assert miner.is_running
    rest = capsys.readouterr()
    assert said.out == rest.out == rest.err == "", "in the background, it is its caller who says so"


def test_start_stop_start(make):
    miner = make()
    assert miner.stop_run_thread() and miner.stop_run_thread()  # nothing runs, nothing happens
    for _ in range(3):
        with miner as entered:
            assert entered is miner and ask(miner).completion == "Hello"
        assert not miner.is_running and not miner.axon.is_running and miner.stop_run_thread()


def test_exit_lets_exceptions_through(make):
    miner = make()
    with pytest.raises(ZeroDivisionError):
        with miner:
            1 / 0
    assert not miner.is_running
    miner.run_in_background_thread()
    assert miner.__exit__(None, None, None) is None and not miner.is_running


def test_the_stop_does_not_wait_for_the_poll_interval(make):
    with make(config={"miner.poll_interval": 3600.0}) as miner:
        assert miner.stop_run_thread(timeout=SECONDS)


def test_nothing_is_sent_to_the_chain_after_a_stop(make, chain):
    miner = make(config={"miner.blocks_per_epoch": 1})
    miner.run_in_background_thread()
    miner.wait_for_block()
    chain.answering.clear()
    assert chain.asked.wait(SECONDS)  # a look at the block number is under way
    chain.step(10)  # an epoch is due: metagraph and weights would be next
    chain.calls.clear()
    stopping = threading.Thread(target=miner.stop_run_thread)
    stopping.start()
    assert miner.runner.stopping.wait(SECONDS)
    chain.answering.set()
    stopping.join(SECONDS)
    assert not miner.is_running and chain.calls == ["block"]


def test_a_hanging_chain_is_reported(make, chain, caplog):
    miner = make(config={"miner.name": "stuck"})
    miner.run_in_background_thread()
    miner.wait_for_block()
    chain.answering.clear()
    assert chain.asked.wait(SECONDS)
    assert miner.stop_run_thread(timeout=0.05) is False
    assert miner.is_running and not miner.axon.is_running
    assert "stuck did not stop within 0.05 s" in caplog.text
    with pytest.raises(RuntimeError, match="stuck has not stopped yet"):
        miner.run_in_background_thread()
    assert len(threads("stuck-run")) == 1
    chain.answering.set()
    assert miner.stop_run_thread() and not miner.is_running
    with miner:
        assert len(threads("stuck-run")) == 1 and ask(miner).completion == "Hello"


@pytest.mark.parametrize("background", [True, False])
def test_giving_up(make, chain, background):
    miner = make(config={"miner.retries": 2})
    chain.fail(100, ConnectionError("no route"))
    if background:
        with pytest.raises(ConnectionError, match="no route"):
            miner.__enter__()
    else:
        with pytest.raises(ConnectionError, match="no route"):
            miner.run()
    assert str(miner.error) == "no route" and not miner.is_running and not miner.axon.is_running
    chain.fail(2)  # which is not one too many
    with miner:
        assert miner.error is None and ask(miner).completion == "Hello"


def test_back_off(make, chain):
    class Waits(threading.Event):
        noted = []

        def wait(self, timeout=None):
            self.noted.append(timeout)
            if len(self.noted) == 6:
                self.set()

    class Hasty(Echo):
        longest_pause = 70.0

    miner = make(Hasty, {"miner.poll_interval": 10.0})
    miner.runner.stopping = Waits()
    chain.fail(4)
    miner.run()
    assert Waits.noted == [20.0, 40.0, 70.0, 70.0, 10.0, 10.0]


def test_a_lost_uid_ends_a_run(make, chain):
    miner = make()
    chain.replace(2, make_wallet("usurper"))
    chain.step(100)
    with pytest.raises(NotRegisteredError):
        miner.run()
    assert miner.uid is None and not miner.axon.is_running and isinstance(miner.error, NotRegisteredError)


class Nodes:
    "Nodes behind one address: `metagraphs` come first, one a call, then that of the chain."

    def __init__(self, client, network="ws://embedded"):
        self.client, self.network, self.metagraphs, self.calls = client, network, [], []
        self.subnets = self

    @property
    def block(self):
        return self.client.block

    def metagraph(self, netuid):
        found = self.client.subnets.metagraph(netuid)
        return self.metagraphs.pop(0) if self.metagraphs else found

    def execute(self, call, wallet):
        self.calls.append(call)
        return self.client.execute(call, wallet)


def test_a_node_that_does_not_know_the_miner_yet_ends_nothing(make, caplog):
    "A registered miner must not end because one of the nodes is behind."
    chain = EmbeddedChain()
    chain.register(VALIDATOR)
    with chain.client() as client:
        before = client.subnets.metagraph(1)
        chain.step(3)
        chain.register(MINER)
        nodes = Nodes(client)
        with make(subtensor=nodes, config={"miner.blocks_per_epoch": 5}) as miner:
            nodes.metagraphs = [before, before]  # its block says how old it is
            chain.step(5)
            assert miner.wait_for_block(chain.block) and miner.uid == 1 and not nodes.metagraphs
            assert caplog.text.count("shows subnet 1 at block 1, without this hotkey, which had uid 1 at block 4") == 2
            without = SimpleNamespace(neurons=before.neurons)  # of an unknown block: another look tells
            nodes.metagraphs = [without]
            chain.step(5)
            assert miner.wait_for_block(chain.block) and miner.uid == 1 and not nodes.metagraphs
            nodes.metagraphs = [without, without]
            chain.step(5)
            until_it_ends = miner.runner.wait_for(chain.block, SECONDS)
            assert not until_it_ends and isinstance(miner.error, NotRegisteredError)


def test_an_old_metagraph_is_a_reason_not_to_be_ready(make, chain, client):
    nodes, old = Nodes(client), client.subnets.metagraph(1)
    with make(subtensor=nodes, config={"miner.blocks_per_epoch": 10}) as miner:
        for age, ready in ((20, True), (30, False), (0, True)):
            nodes.metagraphs = [old] if age else []
            chain.step(age or 10)
            assert miner.wait_for_block(chain.block) and (miner._not_ready() == "") is ready
            assert miner.synced_at == (1 if age else chain.block)
            if not ready:
                assert miner._not_ready() == "the metagraph is of block 1, 50 blocks before the newest when it was read"
        assert miner.subnet.read_at == chain.block


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST.", "miner.example", "127.1", "2130706433", "1.2.3.4:80", "http://1.2.3.4"])
def test_a_name_is_no_address_to_publish(client, name):
    axon = SimpleNamespace(host=name, port=8091, serve=lambda client, *where: client.execute(where, MINER))
    for network in ("finney", "ws://embedded"):
        nodes = Nodes(client, network)
        nodes.execute = lambda where, wallet, nodes=nodes: nodes.calls.append(where)
        subnet = Subnet(MINER, nodes, 1)
        for ip in ("", name):  # the axon's own, and one that is given
            with pytest.raises(NoAddressError, match="is no IP address in full, .*--axon.external_ip where others reach"):
                subnet.publish(axon, ip, allow_private=True)
        assert not nodes.calls


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "10.1.2.3", "[fd00::1]"])
def test_a_private_address_is_published_on_an_embedded_chain_or_with_the_word(client, host):
    said = r"is not on the open internet \((loopback|private)\).*--axon.external_ip where others reach.*--axon.allow_private"
    axon = SimpleNamespace(host=host, port=8091, serve=lambda client, *where: client.execute(where, MINER))
    for network in ("finney", "local", "ws://10.0.0.1:9944"):
        nodes = Nodes(client, network)
        nodes.execute = lambda where, wallet, nodes=nodes: nodes.calls.append(where)
        subnet = Subnet(MINER, nodes, 1)
        with pytest.raises(NoAddressError, match=said):
            subnet.publish(axon)
        assert not nodes.calls
        subnet.publish(axon, allow_private=True)
        subnet.publish(axon, ip="198.51.100.7")
        assert [where[1] for where in nodes.calls] == [host.strip("[]"), "198.51.100.7"]
    for network in ("ws://embedded", "embedded://127.0.0.1:9944"):
        nodes = Nodes(client, network)
        nodes.execute = lambda where, wallet, nodes=nodes: nodes.calls.append(where)
        Subnet(MINER, nodes, 1).publish(axon)
        assert len(nodes.calls) == 1


def test_a_miner_of_a_real_chain_does_not_publish_its_private_address(make, client):
    nodes = Nodes(client, "finney")
    with pytest.raises(NoAddressError, match="127.0.0.1 is not on the open internet"), make(subtensor=nodes):
        pass
    assert not nodes.calls
    with make(subtensor=nodes, config={"axon.allow_private": True}):
        assert len(nodes.calls) == 1


def test_a_new_uid_is_found_and_the_address_published_again(make, chain, client):
    with make() as miner:
        chain.replace(2, make_wallet("usurper"))
        uid = chain.register(MINER)
        assert client.subnets.metagraph(1).neuron(uid).axon is None
        chain.step(100)
        miner.wait_for_block(chain.block)
        assert miner.uid == uid == 3
        assert client.subnets.metagraph(1).neuron(uid).axon == miner.axon.address
        chain.calls.clear()
        chain.step(100)
        miner.wait_for_block(chain.block)
        assert "serve_axon" not in chain.calls  # it stands there already


@pytest.mark.parametrize("ip", ["2001:4860::8888", "[2001:4860:0::8888]", "2001:4860::0:8888"])
def test_an_ipv6_axon_is_published_once(make, chain, ip):
    with make(config={"axon.external_ip": ip, "miner.blocks_per_epoch": 1}) as miner:
        for _ in range(3):
            chain.step()
            miner.wait_for_block(chain.block)
    assert chain.calls.count("serve_axon") == 1


def test_a_failed_publish_is_tried_again_at_the_next_look(make, chain, caplog):
    failing, serve = [], Axon.serve

    class Unlucky(Axon):
        def serve(self, *args, **more):
            if failing and failing.pop():
                raise ConnectionError("the node hung up")
            return serve(self, *args, **more)

    with make(axon=Unlucky(MINER)) as miner:
        chain.replace(2, make_wallet("usurper"))
        uid = chain.register(MINER)
        failing.append(True)
        chain.step(100)  # an epoch: the new uid has no address yet
        with chain.client() as client:
            wait_until(lambda: client.subnets.metagraph(1).neuron(uid).axon == miner.axon.address)
        wait_until(lambda: "the address is published" in caplog.text)
    assert "(ConnectionError: the node hung up), retry 1 in" in caplog.text and chain.block - miner.synced_at < 100


class Refused(Axon):
    "The chain takes no address from it while it is `refused`."

    refused = tries = 0

    def serve(self, *args, **more):
        self.tries += 1
        if self.refused:
            raise RuntimeError("an axon was served too recently")
        return super().serve(*args, **more)


def test_a_chain_that_refuses_the_address_has_not_failed(make, chain, caplog):
    class Weighs(Echo):
        weighed = 0

        def weights(self):
            self.weighed += 1
            return {}

    axon = Refused(MINER)
    with make(Weighs, axon=axon, config={"miner.retries": 2, "miner.blocks_per_epoch": 1}) as miner:
        Axon.serve(axon, chain.client(), 1, "127.0.0.2", 1)  # another one is shown: it is to be published again
        axon.refused, miner.weighed = True, 0
        for _ in range(5):
            chain.step()
            assert miner.wait_for_block(chain.block) and miner.synced_at == chain.block
        wait_until(lambda: axon.tries > 4)
        assert miner.is_running and miner.runner.failures == 0 and get(miner.axon, "/ready")[0] == 200
        assert miner.weighed >= 5
        axon.refused = False
        wait_until(lambda: "the address is published" in caplog.text)
    pauses = [float(pause) for pause in re.findall(r"served too recently\), retry \d+ in (\S+) s", caplog.text)]
    assert pauses[:3] == [0.01, 0.02, 0.04]


def test_pauses_grow_within_bounds(make):
    axon = Refused(MINER)
    miner = make(axon=axon)
    assert [miner.runner.pause(n) for n in (0, 1, 5, 5000)] == [0.01, 0.02, 0.32, 300.0]
    axon.refused = True
    miner.run_in_background_thread()
    assert not miner.wait_for_block(timeout=0.3) and axon.tries < 9  # nothing is published yet
    axon.refused = False
    assert miner.wait_for_block() and miner.is_running


def limit_calls(miner, seconds, look):
    "Let a call to the chain, and a look at it, take so long: not less than an honest one, whatever this machine does."
    miner.subnet.client.seconds, miner.runner.longest_look = seconds, look


@pytest.mark.parametrize("through", ["the miner's client", "one of its own"])
def test_weights_that_hang_are_noticed(make, chain, caplog, through):
    class Asks(Echo):
        def weights(self):
            return {2: float((self.subnet.client if through == "the miner's client" else own).block)}

    settings = {"subtensor.timeout": SECONDS, "miner.blocks_per_epoch": 1, "miner.name": "asks"}
    hang, hung = threading.Event(), threading.Event()

    class Hangs:
        network = "ws://embedded"

        def __init__(self, client):
            self.client, self.subnets, self.execute, self.looks = client, client.subnets, client.execute, 0

        @property
        def block(self):
            self.looks += 1
            if hung.is_set() and (self is own or self.looks % 3 == 0):  # the look, the metagraph's block, `weights`
                hang.wait(SECONDS)
            return self.client.block

    client, own = Hangs(chain.client()), Hangs(chain.client())
    with make(Asks, config=settings, subtensor=client) as miner:
        assert get(miner.axon, "/ready")[0] == 200
        limit_calls(miner, 0.1 if through == "the miner's client" else SECONDS, 0.5 if through == "one of its own" else 1e6)
        client.looks = 0
        wait_until(lambda: client.looks > 2)  # begun with these limits
        client.looks = 0
        hung.set()
        chain.step()
        if through == "one of its own":
            wait_until(lambda: "longer than 0.5 s: a call hangs" in caplog.text)
            status, told = get(miner.axon, "/ready")
            assert status == 503 and told["reason"].startswith("one look at the chain takes longer than 0.5 s, the metagraph is of")
        else:
            wait_until(lambda: "block: the chain did not answer within 0.1 s" in caplog.text)
        limit_calls(miner, SECONDS, 1e6)
        hung.clear(), hang.set()
        chain.step()
        assert miner.wait_for_block(chain.block)
        wait_until(lambda: get(miner.axon, "/ready")[0] == 200)
    assert caplog.text.count("a call hangs") == (through == "one of its own")


def test_a_call_that_hangs_is_given_up_and_tried_again(make, chain, caplog):
    with make(config={"subtensor.timeout": SECONDS, "miner.blocks_per_epoch": 1, "miner.name": "patient"}) as miner:
        limit_calls(miner, 0.1, 1e6)
        chain.calls.clear()
        wait_until(lambda: len(chain.calls) > 1)  # begun with that limit
        chain.answering.clear()
        wait_until(lambda: "retry 3 of 10" in caplog.text)
        assert miner.runner.failures >= 3 and ask(miner).completion == "Hello"
        status, told = get(miner.axon, "/ready")
        assert status == 503 and re.fullmatch(r"the chain has failed \d times? in a row, the metagraph is of block 1", told["reason"])
        limit_calls(miner, SECONDS, 1e6)
        chain.answering.set()
        chain.step()
        assert miner.wait_for_block(chain.block) and miner.synced_at == chain.block
        wait_until(lambda: miner.runner.failures == 0)
        assert get(miner.axon, "/ready")[0] == 200
    assert "the chain failed (TimeoutError: block: the chain did not answer within 0.1 s)" in caplog.text


@pytest.mark.parametrize("what", ["metagraph", "execute"])
def test_every_call_to_the_chain_has_its_limit(client, what):
    hang = threading.Event()

    class Silent:
        block, network = 1, "ws://embedded"
        subnets = SimpleNamespace(metagraph=lambda netuid: hang.wait(SECONDS) if what == "metagraph" else None)
        execute = staticmethod(lambda *_: hang.wait(SECONDS))

    subnet = Subnet(MINER, Silent(), 1, timeout=0.05)
    if what == "metagraph":
        with pytest.raises(TimeoutError, match="subnets.metagraph: the chain did not answer within 0.05 s"):
            subnet.sync()
    else:
        assert subnet.set_weights({0: 1.0}) is False
        with pytest.raises(TimeoutError, match="execute: the chain did not answer"):
            subnet.publish(SimpleNamespace(host="127.0.0.1", port=1, serve=lambda client, *_: client.execute()))
    hang.set()


class Panic(BaseException):
    "As a client in another language raises it."


def test_an_error_that_is_no_exception_is_retried_like_one(make, chain, caplog):
    with make() as miner:
        chain.fail(3, Panic("index out of bounds"))
        chain.step()
        assert miner.wait_for_block(chain.block) and miner.is_running
    assert "the client failed with Panic: index out of bounds), retry 3 of 10" in caplog.text
    miner = make(config={"miner.retries": 1})
    chain.fail(100, Panic("index out of bounds"))
    with pytest.raises(RuntimeError, match="the client failed with Panic"):
        miner.run()
    chain.fail(0)
    assert "index out of bounds" in str(miner.error) and not miner.axon.is_running


@pytest.mark.parametrize("error", [Panic("x"), SystemExit(3), asyncio.CancelledError(), GeneratorExit()])
def test_whatever_ends_a_run_is_its_error(error, caplog):
    def fails():
        raise error

    runner = Runner(fails, name="ended", poll_interval=0.001)
    with pytest.raises(type(error)):
        runner.run()
    assert runner.error is error and not runner.is_running
    runner.start()
    wait_until(lambda: f"ended stopped: {type(error).__name__}" in caplog.text)
    assert runner.error is error and not runner.is_running


def test_weights(make, chain, caplog):
    class ForOthers(Echo):
        def weights(self):
            return {0: 1.0}

    cases = (Echo, {"miner.no_set_weights": True}, {}), (ForOthers, None, {}), (Echo, None, {2: {2: 1.0}})
    for cls, config, expected in cases:
        with make(cls, config) as miner:
            chain.step(100)
            assert miner.wait_for_block(chain.block) and miner.is_running
        assert chain.weights == expected
    assert caplog.text.count("the chain refused the weights") == 1


def test_a_miner_may_stop_itself(make, chain, caplog):
    class Done(Echo):
        def weights(self):
            self.stop_run_thread()
            return super().weights()

    miner = make(Done)
    chain.step(100)
    miner.run()
    assert not miner.is_running and miner.error is None and "did not stop" not in caplog.text


def test_ctrl_c_ends_a_foreground_run():
    program = textwrap.dedent("""
        import signal, threading
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        from prompting_nb.baseminer.miners import TemplateMiner
        from prompting_nb.network.chain import EmbeddedChain, MemorySubstrate, make_wallet
        chain, wallet = EmbeddedChain(), make_wallet("miner")
        chain.register(wallet)
        miner = TemplateMiner(wallet=wallet, subtensor=chain.client())
        def announce():
            miner.wait_for_block()
            print("ready", flush=True)
        threading.Timer(0.2, announce).start()
        try:
            miner.run()
        except KeyboardInterrupt:
            print("stopped", miner.axon.is_running, miner.is_running, flush=True)
    """)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", program], **pipes)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert (out, process.returncode) == ("stopped False False\n", 0), err


@pytest.mark.parametrize("module", ["running", "subnet"])
def test_the_parts_that_a_validator_shares_are_small(module):
    "Neither a server nor torch nor a miner comes with the loop and the view of the subnet."
    heavy = {"torch", "transformers", "uvicorn", "starlette", "bittensor"}
    heavy |= {f"prompting_nb.{name}" for name in ("network.axon", "network.server", "baseminer.miner")}
    program = f"import sys, prompting_nb.baseminer.{module}; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stdout + run.stderr


def test_no_torch_before_a_model_is_made():
    program = "import sys, prompting_nb.baseminer.miners; print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr


# The parts alone


def test_a_runner_that_cannot_start_is_not_running():
    def taken():
        raise OSError("the port is in use")

    runner = Runner(lambda: 1, on_start=taken)
    for start in (runner.start, runner.run):
        with pytest.raises(OSError, match="in use"):
            start()
        assert not runner.is_running and runner.error is None


def test_a_runner_ends_orderly_when_its_end_fails():
    def fails():
        raise OSError("the socket is gone")

    runner = Runner(lambda: runner.stopping.set() or 7, on_stop=fails)
    with pytest.raises(OSError, match="gone"):
        runner.run()
    assert not runner.is_running and runner.block == 7


def test_waiting_for_a_block_ends_with_the_run():
    runner = Runner(lambda: 5, poll_interval=0.001)
    assert not runner.wait_for(timeout=SECONDS)  # nothing runs
    runner.start()
    assert runner.wait_for(5, SECONDS) and not runner.wait_for(6, 0.05)
    waiting = ThreadPoolExecutor(1).submit(runner.wait_for, 6, SECONDS)
    assert runner.stop() and waiting.result(SECONDS) is False


def test_a_new_run_forgets_the_last_one():
    failing = [True]

    def look():
        if failing[0]:
            raise KeyError("away")
        return 3

    runner = Runner(look, poll_interval=0.001, retries=0)
    with pytest.raises(KeyError):
        runner.run()
    assert runner.block == -1 and type(runner.error) is KeyError
    failing[0] = False
    runner.start()
    assert runner.wait_for(3, SECONDS) and runner.error is None and runner.stop()
    failing[0] = True
    with pytest.raises(KeyError):
        runner.run()
    assert runner.block == -1


def test_a_success_resets_the_count_of_failures():
    waits, outcomes = [], iter([1, None, 2, None, None, 3])

    class Noted(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return self.is_set()

    def look():
        block = next(outcomes)
        if block is None:
            raise ConnectionError("away")
        if block == 3:
            runner.stopping.set()
        return block

    runner = Runner(look, poll_interval=1.0, retries=2)
    runner.stopping = Noted()
    runner.run()
    assert waits == [1.0, 2.0, 1.0, 2.0, 4.0, 1.0]


def test_a_subnet_is_found_by_hotkey(client, chain):
    subnet = Subnet(MINER, client, 1)
    assert (subnet.uid, subnet.block, subnet.metagraph, subnet.callers) == (None, 0, None, {})
    subnet.sync()
    assert (subnet.uid, subnet.synced_at) == (2, subnet.block) and subnet.caller(header(SMALL)).stake == 5.0
    chain.step(3)
    assert subnet.look() == subnet.block == subnet.synced_at + 3


# Properties


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.booleans()), max_size=40), st.integers(0, 6))
def test_cache_agrees_with_a_plain_dictionary(events, span):
    cache, claimed, block = PromptCache(span=span), {}, 0
    for ahead, key, failed in events:
        block += ahead
        free = key not in claimed or block > claimed[key] + span
        assert cache.claim(bytes([key]), block) == free
        if free:
            claimed[key] = block
            if failed:
                cache.release(bytes([key]))
                del claimed[key]
        assert len(cache) <= len(claimed)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), max_size=60), st.integers(1, 4), st.integers(1, 12))
def test_no_window_holds_more_than_the_quota(events, quota, window):
    now, admitted = 0, []
    limiter = RateLimiter(quota, window, clock=lambda: now)
    for gap, caller in events:
        now += gap
        recent = [t for t, c in admitted if c == caller and now - t < window]
        assert limiter.admit(str(caller)) == (len(recent) < quota)
        if len(recent) < quota:
            admitted.append((now, caller))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30),
    st.floats(0, 1e9),
    st.floats(0, 10),
    st.integers(1, 8),
    st.floats(1e-3, 1e6),
)
def test_priority_stays_within_its_band(times, stake, idle_factor, history, rest):
    clock = iter(times)
    priority = StakePriority(0.0, idle_factor, rest, history, clock=lambda: next(clock))
    values = [priority(Caller("x", 0, stake=stake)) for _ in times]
    assert values[0] == stake
    assert all(stake <= value <= stake * (1 + idle_factor) for value in values)
