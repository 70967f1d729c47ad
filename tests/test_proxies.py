"""nginx and Caddy in front of a miner, with the configurations that the page about proxies shows."""

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from bittensor import http_auth

from prompting_nb.network.axon import Axon
from prompting_nb.network.chain import make_wallet
from prompting_nb.network.dendrite import Dendrite
from prompting_nb.network.limits import Limits
from prompting_nb.protocol import Prompting, StreamPrompting, write_body
from test_dendrite import Keeping

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {name: shutil.which(name) or shutil.which(name, path="/usr/sbin") for name in ("nginx", "caddy")}
MINER, VALIDATOR = make_wallet("miner"), make_wallet("validator")
SECONDS = 20


def shown(language: str) -> str:
    "The block of this language on the page about proxies."
    cells = json.loads((ROOT / "nbs/network/14_proxies.ipynb").read_text())["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.search(rf"```{language}\n(.*?)```", text, re.S)[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


seen, heard = [], {}  # by prompt: a piece has been heard


def words(synapse):
    seen.append(synapse.dendrite.ip)
    for word in ("It ", "is ", "42."):
        yield word
        if synapse.prompt in heard:
            assert heard[synapse.prompt].acquire(timeout=SECONDS)  # the next is made when this one has been heard


def nginx_command(folder, axon, plain, tls):
    "Write the configuration of the page for these ports; the command that runs it."
    site = shown("nginx").replace("127.0.0.1:8091", axon.address).replace("/etc/ssl", str(folder))
    site = site.replace("listen 443 ssl;", f"listen 127.0.0.1:{tls} ssl;")
    site = site.replace("listen 8080;", f"listen 127.0.0.1:{plain};")
    assert f":{tls} ssl;" in site and f":{plain};" in site
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in
                        ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))  # fmt: skip
    main = f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
    (folder / "nginx.conf").write_text(f"{main}http {{ access_log off; {temporary}\n{site}}}")
    return [PROGRAMS["nginx"], "-p", folder, "-c", folder / "nginx.conf"]


def caddy_command(folder, axon, plain, tls):
    site = shown("caddyfile").replace("127.0.0.1:8091", axon.address)
    version = subprocess.run([PROGRAMS["caddy"], "version"], capture_output=True, text=True).stdout
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < (2, 6, 3):  # the page says so
        assert site.count("request_buffers 1MiB") == 1
        site = site.replace("request_buffers 1MiB", "buffer_requests")
    assert site.count("miner.example.org {") == 1
    certificate = f"tls {folder}/miner.pem {folder}/miner.key"
    with_tls = site.replace("miner.example.org {", f"https://miner.example.org:{tls} {{\n    {certificate}")
    without = site.replace("miner.example.org {", f"http://:{plain} {{")
    alone = f"admin off\n    default_bind 127.0.0.1\n    auto_https off\n    storage file_system {folder}"
    (folder / "Caddyfile").write_text(f"{{\n    {alone}\n}}\n{with_tls}\n{without}")
    return [PROGRAMS["caddy"], "run", "--config", folder / "Caddyfile", "--adapter", "caddyfile"]


COMMANDS = {"nginx": nginx_command, "caddy": caddy_command}


@contextmanager
def running(name, folder, axon):
    "A proxy in front of an axon: its ports for HTTP and TLS."
    if PROGRAMS[name] is None:
        pytest.skip(f"{name} is not installed (apt-get install {name})")
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    plain, tls = free_port(), free_port()
    key = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
           "-subj", "/CN=miner.example.org", "-addext", "subjectAltName=DNS:miner.example.org",
           "-keyout", folder / "miner.key", "-out", folder / "miner.pem"]  # fmt: skip
    subprocess.run(key, check=True, capture_output=True)
    command, alone = COMMANDS[name](folder, axon, plain, tls), {"HOME": str(folder), "XDG_DATA_HOME": str(folder)}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env={**os.environ, **alone})
    try:
        end = time.monotonic() + SECONDS
        while not (listens(plain) and listens(tls)):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.01)
        yield SimpleNamespace(axon=axon, plain=plain, tls=tls, certificate=folder / "miner.pem")
    finally:
        process.terminate()
        process.wait(SECONDS)


@pytest.fixture(scope="module", params=list(COMMANDS))
def proxy(request, tmp_path_factory):
    "A miner behind a proxy: its own axon, and the proxy's ports for HTTP and TLS."
    with Axon(MINER, trusted_proxies=["127.0.0.1"]).attach(words) as axon:
        with running(request.param, tmp_path_factory.mktemp(request.param), axon) as proxy:
            yield proxy


def signed(question):
    body = write_body(question)
    return body, http_auth.sign(VALIDATOR, method="POST", path=question.path, body=body,
                                receiver_ss58=MINER.hotkey.ss58_address)  # fmt: skip


def post(connection, question, more=None):
    body, headers = signed(question)
    connection.request("POST", question.path, body, headers | (more or {}))
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def behind(proxy):
    return SimpleNamespace(hotkey=MINER.hotkey.ss58_address, axon=f"127.0.0.1:{proxy.plain}")


@pytest.mark.parametrize("kind", [Prompting, StreamPrompting])
def test_a_validator_asks_through_a_proxy(proxy, kind):
    with Dendrite(VALIDATOR, allow_private=True) as dendrite:
        answers = [dendrite.query([behind(proxy)], kind.ask("What is 6 times 7?"))[0] for _ in range(5)]
    assert [a.completion for a in answers] == ["It is 42."] * 5


def test_the_miner_sees_the_real_address_and_no_forged_one(proxy):
    seen.clear()
    for forged in ({}, {"X-Forwarded-For": "8.8.8.8"}):
        connection = http.client.HTTPConnection("127.0.0.1", proxy.plain, timeout=SECONDS, source_address=("127.0.5.1", 0))
        assert post(connection, Prompting.ask("x"), forged)[0] == 200
        connection.close()
    assert seen == ["127.0.5.1"] * 2


def streamed(dendrite, proxy, prompt):
    heard[prompt] = threading.Semaphore(0)
    stream, got = dendrite.stream(behind(proxy), StreamPrompting.ask(prompt), timeout=SECONDS), []
    for piece in stream:
        got.append(piece)
        heard[prompt].release()
    return got, stream.answer.dendrite.status_message


def test_streams_are_not_held_back(proxy):
    with Dendrite(VALIDATOR, allow_private=True) as dendrite:
        assert streamed(dendrite, proxy, "slowly") == (["It ", "is ", "42."], "Success")


def test_streams_are_whole_on_a_busy_machine(proxy):
    "Caddy cuts answers that begin while it is still reading the question, unless it buffers questions."
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        with Dendrite(VALIDATOR, allow_private=True) as dendrite:
            answers = [streamed(dendrite, proxy, f"slowly {i}") for i in range(300)]
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [a for a in answers if a != (["It ", "is ", "42."], "Success")] == []


@pytest.mark.parametrize("end", ["end", "reset", "unread"])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_connection_that_was_closed_as_the_question_came_costs_no_answer(name, end, tmp_path):
    "The miner has closed it: because of a limit, or to be started anew."
    with Keeping(end, hotkey=MINER.hotkey.ss58_address) as miner:
        with running(name, tmp_path, SimpleNamespace(address=miner.axon)) as proxy:
            with Dendrite(VALIDATOR, allow_private=True, require_signed=False) as dendrite:
                answers = [dendrite.query([behind(proxy)], Prompting.ask(f"{i}"))[0] for i in range(4)]
    assert [a.completion for a in answers] == ["42"] * 4, [a.dendrite for a in answers]


def test_nginx_closes_idle_connections_before_the_miner_does():
    assert float(re.search(r"keepalive_timeout (\d+)s", shown("nginx"))[1]) <= 0.8 * Limits().idle_timeout


def test_tls(proxy):
    class ToProxy(http.client.HTTPSConnection):
        def connect(self):
            sock = socket.create_connection(("127.0.0.1", proxy.tls), SECONDS)
            self.sock = self._context.wrap_socket(sock, server_hostname="miner.example.org")

    context = ssl.create_default_context(cafile=str(proxy.certificate))
    connection = ToProxy("miner.example.org", context=context)
    assert json.loads(post(connection, Prompting.ask("x"))[1]) == {"completion": "It is 42."}
    connection.close()


def test_an_upgrade_smuggles_no_request_through_a_proxy(proxy):
    smuggled = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.plain), SECONDS) as line:
        head = f"POST /Prompting HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\ncontent-length: {len(smuggled)}"
        line.sendall(head.encode() + b"\r\n\r\n" + smuggled)
        answers = line.recv(65536)
        line.settimeout(1.0)
        try:
            while more := line.recv(65536):
                answers += more
        except TimeoutError:
            pass
    assert answers.count(b"HTTP/1.1 ") == 1 and answers.startswith(b"HTTP/1.1 401")
