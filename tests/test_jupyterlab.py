"""JupyterLab itself, as a reader meets it: a browser runs a tutorial to its last picture, and interrupt and restart of a
kernel leave no server behind."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from jupyter_client.manager import KernelManager

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SETTINGS = '{"windowingMode": "none"}'  # cells that are not in sight exist as well


# ---- a browser

@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab on loopback that serves a copy of the notebooks."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    settings = tmp_path / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(SETTINGS)
    environment = ENVIRONMENT | {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "HOME": str(tmp_path),
                                 "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
               "--IdentityProvider.token=abc", f"--ServerApp.root_dir={tmp_path / 'nbs'}",
               f"--ServerApp.info_file={tmp_path}/info",
               "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate"]
    with open(tmp_path / "lab.log", "w+") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as server:
        try:
            deadline, found = time.monotonic() + 300, None
            while not found and time.monotonic() < deadline and server.poll() is None:
                found = re.search(r"http://127\.0\.0\.1:(\d+)/", (tmp_path / "lab.log").read_text())
                time.sleep(0.2)  # the server has no other sign of being ready
            assert found, (tmp_path / "lab.log").read_text()
            with urlopen(f"{found[0]}api?token=abc") as answer:
                assert answer.status == 200
            yield found[0]
        finally:
            server.terminate()


SHORT = "ranking_k_answers"  # trains, and shows three pictures; `make test-long` opens all of them
TUTORIALS = [name if name == SHORT else pytest.param(name, marks=pytest.mark.long)
             for name in sorted(path.stem for path in (ROOT / "nbs/tutorials").glob("*.ipynb"))
             if name != "start_here"]  # which has no code of its own


def opened(lab, browser, name):
    "The page of a notebook in JupyterLab, its kernel ready and its outputs cleared, and the locator of its code cells."
    from playwright.sync_api import expect

    notebook = json.loads((ROOT / f"nbs/tutorials/{name}.ipynb").read_text())
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(120_000)  # other tests may keep the machine busy
    page.goto(f"{lab}lab/tree/tutorials/{name}.ipynb?token=abc")
    cells = page.locator(".jp-NotebookPanel .jp-CodeCell")
    expect(cells).to_have_count(sum(cell["cell_type"] == "code" for cell in notebook["cells"]), timeout=120_000)  # they come one by one
    page.locator('.jp-NotebookPanel [data-status="idle"]').first.wait_for()
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_text("Clear Outputs of All Cells", exact=True).click()
    expect(page.locator(".jp-NotebookPanel .jp-OutputArea-output")).to_have_count(0, timeout=120_000)
    shown = sum("image/png" in output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", []))
    return page, cells, shown


@pytest.mark.parametrize("name", TUTORIALS)
def test_the_tutorial_runs_in_jupyterlab_to_its_last_cell(lab, browser, name):
    from playwright.sync_api import expect

    page, cells, shown = opened(lab, browser, name)
    prompt = lambda cell: cell.locator(".jp-InputPrompt").first
    for attempt in range(6):  # on a busy machine a kernel may say that it is idle, and not take the cells yet
        for button in page.locator(".jp-Dialog button.jp-mod-accept").all():  # it asks, or says that the kernel is not there yet
            button.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        with suppress(AssertionError) if attempt < 5 else nullcontext():
            expect(prompt(cells.last)).to_have_text(re.compile(r"\[[*\d]+\]:"), timeout=20_000)  # it is in the queue
            break
    # the last cell has its number once everything before it has run
    expect(prompt(cells.last)).to_have_text(re.compile(r"\[\d+\]:"), timeout=900_000)
    assert page.locator('.jp-NotebookPanel [data-mime-type="application/vnd.jupyter.stderr"]:has-text("Traceback")').count() == 0
    pictures = page.locator(".jp-NotebookPanel .jp-RenderedImage img")
    assert shown > 0 or name != SHORT
    if shown:
        pictures.nth(shown - 1).wait_for(state="attached")  # a cell has its number before its picture is there
        pictures.last.scroll_into_view_if_needed()
        page.wait_for_function("picture => picture.naturalWidth > 300", arg=pictures.last.element_handle())
    page.close()


# ---- kernels

@pytest.fixture
def kernel():
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=300)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


START = """
from prompting_nb.baseminer.miners import TemplateMiner
from prompting_nb.network.chain import EmbeddedChain, make_wallet
chain, wallet = EmbeddedChain(), make_wallet("miner")
chain.register(wallet)
miner = TemplateMiner(wallet=wallet, subtensor=chain.client())
"""


def said(client, code: str, until: str) -> str:
    "Run code, and return what it printed as soon as that has `until` in it."
    mine = client.execute(code, stop_on_error=False)  # an interrupt is no reason to forget what comes next
    text = ""
    while until not in text:
        message = client.get_iopub_msg(timeout=300)
        if message["parent_header"].get("msg_id") != mine:
            continue  # the end of what ran before
        assert message["msg_type"] != "error", "\n".join(message["content"]["traceback"])
        text += message["content"].get("text", "") if message["msg_type"] == "stream" else ""
    return text


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def stops(port: int, seconds: float = 200.0) -> bool:
    "Does the port fall silent? (Another process ends: there is nothing to wait for but the port.)"
    deadline = time.monotonic() + seconds
    while listens(port) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not listens(port)


def test_shift_tab_shows_arguments_and_shapes(kernel):
    "JupyterLab asks the kernel for this text when a reader presses Shift-Tab."
    _, client = kernel
    said(client, "from prompting_nb import RewardModel; model = RewardModel; print('here .')", " .")

    def inspected(code):
        client.inspect(code, len(code))
        text = client.get_shell_msg(timeout=300)["content"]
        while "data" not in text:  # the answer to what ran before
            text = client.get_shell_msg(timeout=300)["content"]
        return re.sub(r"\x1b\[[0-9;]*m", "", text["data"]["text/plain"])

    shown = inspected("RewardModel")
    assert "model_name" in shown and "max_length" in shown and "Initialize internal Module state" not in shown
    shown = inspected("RewardModel.forward")
    assert "TensorType['batch_size', 'seq_len']" in shown.replace('"', "'") and "Annotated" not in shown


def test_interrupt_leaves_no_server_behind(kernel):
    manager, client = kernel
    port = int(said(client, START + "import time\nwith miner:\n    print('port', miner.axon.port, '.', flush=True)\n"
                    "    time.sleep(600)", " .").split()[1])
    assert listens(port)
    manager.interrupt_kernel()
    assert stops(port)
    assert said(client, "print('alive', miner.axon.is_running, '.')", " .").strip() == "alive False ."


def test_restart_leaves_no_server_behind(kernel):
    manager, client = kernel
    port = int(said(client, START + "miner.__enter__()\nprint('port', miner.axon.port, '.', flush=True)", " .").split()[1])
    assert listens(port)
    manager.restart_kernel(now=False)
    assert stops(port)
