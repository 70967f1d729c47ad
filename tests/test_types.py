"""The package says truly what it takes and returns, and the code keeps to the rules of `ruff.toml`."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
USER = '''
import torch

from prompting_nb.baseminer.miner import Miner
from prompting_nb.config import Config, read_config
from prompting_nb.protocol import Prompting
from prompting_nb.reward import PairwiseLoss, RewardModel

model = RewardModel("minilm", device=None)
ids = torch.zeros(2, 3, dtype=torch.long)
rewards: torch.Tensor = model.forward(ids)
loss: torch.Tensor = PairwiseLoss()(rewards, rewards - 1) + model.score(["a"], ["b"]).mean()
model.forward("a text")  # WRONG
reveal_type(model.score(["a"])[0])  # a tensor, and not unknown


class Mine(Miner):
    @classmethod
    def add_args(cls, parser) -> None: ...

    def config(self) -> Config:
        return read_config(self.add_args)

    async def prompt(self, synapse: Prompting) -> Prompting:
        synapse.completion = 42  # WRONG
        return synapse


class Declared(Miner):
    Settings = dict

    def prompt(self, synapse: Prompting) -> Prompting:
        return synapse


Declared({})  # `Settings` stands for `config` and `add_args`
'''


def pyright(folder: Path) -> list[dict]:
    "What pyright says about the project of a folder, as it is configured there."
    if find_spec("basedpyright") is None:
        pytest.skip("basedpyright is not installed")
    command = [sys.executable, "-m", "basedpyright", "-p", folder, "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.stdout.lstrip().startswith("{"), done.stdout + done.stderr
    return json.loads(done.stdout)["generalDiagnostics"]


@pytest.mark.slow
def test_pyright_has_nothing_to_say():
    assert (ROOT / "prompting_nb" / "py.typed").exists()
    found = [f"{Path(d['file']).name}:{d['range']['start']['line'] + 1}: {d['message']}" for d in pyright(ROOT)]
    assert found == []


@pytest.mark.slow
def test_the_types_help_who_uses_the_package(tmp_path):
    "What is right passes, what is wrong is seen: the annotations are neither empty nor in the way."
    (tmp_path / "user.py").write_text(USER)
    settings = {"include": ["user.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    found = pyright(tmp_path)
    wrong = {number for number, line in enumerate(USER.splitlines()) if "# WRONG" in line}
    assert {d["range"]["start"]["line"] for d in found if d["severity"] == "error"} == wrong
    assert ["Tensor" in d["message"] for d in found if d["severity"] == "information"] == [True]


@pytest.mark.slow
def test_the_example_of_the_miner_page_has_types(tmp_path):
    "A user's type checker has nothing against the first example, and knows the settings."
    cells = json.loads((ROOT / "nbs" / "baseminer" / "00_miner.ipynb").read_text())["cells"]
    example = next(code for cell in cells if "class CustomMiner(Miner)" in (code := "".join(cell["source"])))
    used = """
miner = CustomMiner({"miner.retries": 3})
reveal_type(miner.settings.miner.retries)
reveal_type(miner.settings.miner.blacklist.whitelist)
miner.settings.miner.retires  # WRONG
"""
    (tmp_path / "page.py").write_text(example + used)
    settings = {"include": ["page.py"], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    found = pyright(tmp_path)
    wrong = [number for number, line in enumerate((example + used).splitlines()) if "# WRONG" in line]
    assert [d["range"]["start"]["line"] for d in found if d["severity"] == "error"] == wrong, found
    shown = [d["message"] for d in found if d["severity"] == "information"]
    assert ['"int"' in shown[0], '"list[str]"' in shown[1]] == [True, True], shown


def test_ruff_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--output-format", "concise", ROOT],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout
