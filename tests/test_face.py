"""What one meets first: `from prompting_nb import ...`, tab completion, and `help`."""

import inspect
import json
import pydoc
import subprocess
import sys

import pytest

import prompting_nb

NAMES = ["RewardModel", "PairwiseLoss", "GatingModel", "SentenceEmbedGatingModel", "Miner", "Validator"]


def in_a_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_lists_its_main_objects_without_importing_anything_large():
    script = """
import json, sys, prompting_nb
listed = dir(prompting_nb)
print(json.dumps([listed, sorted({name.split(".")[0] for name in sys.modules})]))
"""
    listed, modules = json.loads(in_a_process(script))
    assert set(NAMES) <= set(listed) and "__version__" in listed
    assert not {"torch", "bittensor", "transformers", "numpy", "jsonargparse", "pydantic"} & set(modules)


def test_a_miner_needs_no_torch():
    in_a_process("import sys; from prompting_nb import Miner; assert 'torch' not in sys.modules")


@pytest.mark.parametrize("name", NAMES)
def test_main_objects_can_be_imported_from_the_package(name):
    found = getattr(prompting_nb, name)
    assert inspect.isclass(found) and found.__name__ == name
    assert getattr(__import__(found.__module__, fromlist=[name]), name) is found


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'prompting_nb' has no attribute 'Missing'"):
        prompting_nb.Missing


HELP = {  # class -> words of its help: a parameter's comment, and a shape where it has one
    "reward.RewardModel": ["model_name: ", "max_length: ", "TensorType['batch_size', 'seq_len']"],
    "validators.gating.GatingModel": ["metagraph: ", "num_uids: ", "TensorType['metagraph.n']"],
    "validators.gating.SentenceEmbedGatingModel": ["metagraph: ", "num_uids: ", "TensorType['metagraph.n']"],
    "baseminer.miner.Miner": ["axon: ", "wallet: ", "subtensor: "],
    "network.dendrite.Dendrite": ["wallet: ", "max_answer: "],
    "network.axon.Axon": ["wallet: ", "workers: "],
    "encoding.encoder.Encoder": ["model_name: "],
    "baseminer.blacklist.Caller": ["stake: "],
    "validators.validator.Policy": ["k: uids asked at once", "timeout: seconds"],
}


@pytest.mark.parametrize("name", HELP)
def test_help_shows_arguments_with_their_comments_and_shapes(name):
    module, _, name = name.rpartition(".")
    cls = getattr(__import__(f"prompting_nb.{module}", fromlist=[name]), name)
    text = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    arguments = inspect.getdoc(cls).split("Arguments:\n")[1]  # Shift-Tab shows this docstring
    assert [word for word in HELP[f"{module}.{name}"] if word not in text] == []
    assert all(word in arguments for word in HELP[f"{module}.{name}"] if word.endswith(": "))
    assert "Initialize internal Module state" not in text and "Annotated[" not in text
