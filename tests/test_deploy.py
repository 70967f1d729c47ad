"The systemd units: their commands are run as they stand, with other places for files."

import configparser
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml

from prompting_nb.baseminer.command import miner_parser
from prompting_nb.loop.validator import validator_parser
from prompting_nb.network.chain import EmbeddedChain
from prompting_nb.network.chain_server import ChainServer
from prompting_nb.network.wallets import local_wallet
from test_chain_service import line_of

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
UNITS = {"miner": miner_parser, "validator": validator_parser}
PROGRAM = "/opt/prompting-nb/bin/prompting-nb"


def unit(name):
    "Sections of a unit; a key that is given twice has the last value, which is enough for these."
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string((DEPLOY / f"prompting-nb-{name}.service").read_text())
    return parser


def command(name, config):
    "ExecStart, run by this Python, with a file of settings elsewhere."
    program, *arguments = shlex.split(unit(name)["Service"]["ExecStart"])
    assert program == PROGRAM and f"/etc/prompting-nb/{name}.yaml" in arguments
    arguments = [str(config) if one == f"/etc/prompting-nb/{name}.yaml" else one for one in arguments]
    return [sys.executable, "-c", "from prompting_nb.cli import main; main()", *arguments]


@pytest.mark.parametrize("name", UNITS)
def test_the_settings_are_read_by_the_parser_of_the_command(name):
    arguments = shlex.split(unit(name)["Service"]["ExecStart"])[1:]
    assert arguments[0] == name
    settings = UNITS[name]().parse_args(["--config", str(DEPLOY / f"{name}.yaml")])
    assert settings.subtensor.network == "finney" and settings.wallet.path == "/etc/prompting-nb/wallets"
    if name == "validator":
        assert settings.dir == f"/var/lib/{unit(name)['Service']['StateDirectory']}", "it may write nowhere else"


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_to_say(name, tmp_path):
    file = tmp_path / f"prompting-nb-{name}.service"
    file.write_text((DEPLOY / file.name).read_text().replace(PROGRAM, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if file.name in line]
    assert ours == [] and done.returncode == 0, done.stderr


def settings_for(name, tmp_path, network, **more):
    "The settings as they stand, for a chain, wallets and folders of this test."
    given = yaml.safe_load((DEPLOY / f"{name}.yaml").read_text())
    given["subtensor"]["network"] = network
    given["wallet"] |= {"name": name, "path": str(tmp_path / "wallets")}
    file = tmp_path / f"{name}.yaml"
    file.write_text(yaml.safe_dump(given | more))
    return file


def started(name, tmp_path, config):
    environment = dict(part.split("=", 1) for part in shlex.split(unit(name)["Service"]["Environment"]))
    if "XDG_STATE_HOME" in environment:
        environment["XDG_STATE_HOME"] = str(tmp_path)
    return subprocess.Popen(command(name, config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **environment}, cwd=tmp_path)


def stopped(name, process):
    "Stop as systemd does; the status must count as success for it."
    process.terminate()
    out, err = process.communicate(timeout=300)
    accepted = {0, int(unit(name)["Service"]["SuccessExitStatus"])}
    assert process.returncode in accepted and "Traceback" not in err, err
    return out


def test_the_command_of_the_miner_runs(tmp_path):
    chain, wallet = EmbeddedChain(), local_wallet(tmp_path / "wallets", "miner")
    chain.register(wallet)
    with ChainServer(chain) as server:
        axon = {"host": "127.0.0.1", "port": 0}
        process = started("miner", tmp_path, settings_for("miner", tmp_path, server.address, axon=axon))
        try:
            line_of(process, r"listens on 127\.0\.0\.1:\d+")
            assert chain.subnet.neurons[0].axon, "its address is on the chain"
            stopped("miner", process)
        finally:
            process.kill()
            process.communicate()
    assert list((tmp_path / "prompting_nb").glob("nonces-*")), "nonces are in the folder of the unit"


def test_a_wrong_setting_ends_with_the_status_that_prevents_a_restart(tmp_path):
    config = settings_for("miner", tmp_path, "ws://127.0.0.1:9", axon={"port": -1})
    process = started("miner", tmp_path, config)
    _, err = process.communicate(timeout=300)
    assert process.returncode == int(unit("miner")["Service"]["RestartPreventExitStatus"]) and "port" in err


@pytest.mark.long
def test_the_command_of_the_validator_runs(tmp_path):
    from prompting_nb.reward import RewardModel

    torch.manual_seed(0)
    RewardModel("minilm", device=None).save_pretrained(tmp_path / "reward")
    chain = EmbeddedChain()
    chain.register(local_wallet(tmp_path / "wallets", "validator"), stake=1000.0, validator_permit=True)
    chain.register(local_wallet(tmp_path / "wallets", "miner"))
    with ChainServer(chain) as server:
        axon = {"host": "127.0.0.1", "port": 0}
        miner = started("miner", tmp_path, settings_for("miner", tmp_path, server.address, axon=axon))
        validator = None
        try:
            line_of(miner, "listens on")
            more = dict(dir=str(tmp_path / "validator"), reward=str(tmp_path / "reward"), top_k=1, port=0)
            validator = started("validator", tmp_path, settings_for("validator", tmp_path, server.address, **more))
            address = line_of(validator, r"POST to (http://\S+)/prompt")[1]
            deadline, steps = time.monotonic() + 300, 0
            while steps < 2 and time.monotonic() < deadline:
                with urllib.request.urlopen(f"{address}/status", timeout=60) as answer:
                    steps = json.load(answer)["step"]
                time.sleep(0.5)
            assert steps >= 2
            assert "stopped after step" in stopped("validator", validator)
        finally:
            for process in filter(None, (validator, miner)):
                process.kill()
                process.communicate()
    assert (tmp_path / "validator").exists()
