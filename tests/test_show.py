"""What objects show of themselves in a notebook is safe, whatever strangers have written into them, and readable."""

import importlib
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from bs4 import BeautifulSoup

from prompting_nb.baseminer.miner import Miner
from prompting_nb.reward.evaluation import RewardEvaluation
from prompting_nb.network.chain import EmbeddedChain, MetagraphTable, make_wallet
from prompting_nb.show import Bar, arguments_in_help, html_table
from prompting_nb.validators.gating import SentenceEmbedGatingModel
from prompting_nb.validators.event import Event

NASTY = "<script>alert('x')</script><img src=x onerror=alert(1)> \"&amp;\" é"


def table() -> str:
    return html_table(NASTY, (NASTY, "n"), [(NASTY, Bar(0.5, 0.5))])


def metagraph() -> str:
    neuron = dict(uid=0, hotkey=NASTY, total_stake=SimpleNamespace(amount=1.0), validator_permit=True, axon=NASTY)
    return MetagraphTable(SimpleNamespace(netuid=1, block=7, neurons=[SimpleNamespace(**neuron)]))._repr_html_()


def event() -> str:
    return Event(step=0, block=1, prompt=NASTY, uids=[0, 1], hotkeys=[NASTY, "b"], propensities=[0.5, 1.0],
                 rewards=[0.25, 0.0], scores=[0.1, 0.2], statuses=[200, 408], completions=[NASTY, None], loss=0.1,
                 seconds=[0.1, 1.0])._repr_html_()


def gate() -> str:
    made = SentenceEmbedGatingModel(SimpleNamespace(hotkeys=[NASTY, "b"]), model_name="minilm", num_uids=4)
    assert "no message was scored yet" in made._repr_html_()
    made(NASTY)
    return made._repr_html_()


def evaluation() -> str:
    return RewardEvaluation(0.75, (0.6, 0.9), 4, 20, float("nan"), 0, 0.1, [], 0.8, 0.5, 0.9, {}, [], [])._repr_html_()


def miner() -> str:
    class Named(Miner):
        @classmethod
        def add_args(cls, parser) -> None: ...

        def config(self): return {"miner": {"name": NASTY}}

        def prompt(self, synapse): ...

    chain, wallet = EmbeddedChain(), make_wallet("shown")
    chain.register(wallet)
    with chain.client() as client:
        made = Named(wallet=wallet, subtensor=client)
        made.runner.error = RuntimeError(NASTY)
        return made._repr_html_()


@pytest.fixture(params=[table, metagraph, event, gate, evaluation, miner], ids=lambda function: function.__name__)
def shown(request) -> str:
    return request.param()


def test_nothing_that_strangers_write_becomes_markup(shown, request):
    tree = BeautifulSoup(shown, "html.parser")
    assert {tag.name for tag in tree.find_all()} <= {"table", "caption", "b", "thead", "tbody", "tr", "th", "td", "span"}
    assert all(set(tag.attrs) <= {"style", "scope", "aria-hidden"} for tag in tree.find_all())
    if "evaluation" not in request.node.name:
        assert NASTY[:8] in tree.get_text()  # it is there to be read


def luminance(colour: str) -> float:
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_colour_of_the_page_and_bars_stand_out_from_it(shown):
    styles = ";".join(tag["style"] for tag in BeautifulSoup(shown, "html.parser").find_all(style=True))
    assert set(re.findall(r"(?<![-\w])color:([^;]+)", styles)) <= {"inherit"}  # light or dark: the page knows
    for bar in set(re.findall(r"background:(#\w{6})", styles)):
        for page in ("#ffffff", "#111111"):
            bright, dim = sorted((luminance(bar), luminance(page)), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= 3  # WCAG 2.2, 1.4.11: graphics


def test_rows_are_in_the_order_that_one_looks_for():
    neurons = [SimpleNamespace(uid=i, hotkey=f"hotkey-{i}", total_stake=SimpleNamespace(amount=float(i)),
                               validator_permit=False, axon=None) for i in range(12)]
    tree = BeautifulSoup(MetagraphTable(SimpleNamespace(netuid=1, block=7, neurons=neurons))._repr_html_(), "html.parser")
    assert [row.td.get_text() for row in tree.tbody.find_all("tr")] == [str(uid) for uid in range(11, 1, -1)]
    assert "10 of 12 uids" in tree.caption.get_text()


def test_a_gate_forgets_what_it_showed_when_the_uids_change():
    gate = SentenceEmbedGatingModel(SimpleNamespace(hotkeys=["a", "b"]), model_name="minilm", num_uids=2)
    with torch.no_grad():
        gate.head.bias.copy_(torch.tensor([0.0, 9.0]))
    gate("Who?")
    assert gate._repr_html_().index(">b<") < gate._repr_html_().index(">a<")
    gate.resync(None, SimpleNamespace(hotkeys=["b", "a"]))
    assert "no message was scored yet" in gate._repr_html_()


def test_a_heading_stands_above_its_numbers(browser):
    "And not above the bars beside them; a column with a text anywhere stands on the left."
    page = browser.new_page()
    page.set_content(event() + html_table("t", ("a", "b", "c"), [(None, Bar(None, 0), 1), ("x", Bar(0.5, 1), 2)]))
    edges = page.evaluate("""() => [...document.querySelectorAll("table")].flatMap((table) =>
        [...table.tHead.rows[0].cells].map((head, i) => {
          const right = (cell) => { const range = document.createRange(); range.selectNodeContents(cell.firstChild ?? cell); return range }
          const numbers = [...table.tBodies[0].rows].map((row) => row.cells[i]).filter((cell) => cell.innerText.trim())
          const left = getComputedStyle(head).textAlign === "left"
          return numbers.map((cell) => { const a = right(head).getBoundingClientRect(), b = right(cell).getBoundingClientRect()
            return Math.abs(left ? a.left - b.left : a.right - b.right) })
        }).flat())""")
    page.close()
    assert len(edges) > 10 and max(edges) < 6  # pixels
    (first,) = BeautifulSoup(html_table("t", ("a",), [(None,), ("x",)]), "html.parser").select("th")
    assert first["style"].endswith("text-align:left")


def shown_objects() -> dict:
    "One of each that is shown, with what a stranger wrote in it where it can hold that."
    from prompting_nb.loop.run import Holder, Trace
    from prompting_nb.loop.tasks import Arena
    from prompting_nb.protocol import Prompting
    from prompting_nb.reward.preferences import Ranking
    from prompting_nb.reward.training import History

    ranking = Ranking(NASTY, [NASTY, "b"], [0.5, 1.0], [NASTY, "y"])
    step = Event(step=0, block=1, prompt=NASTY, uids=[1], hotkeys=["b"], propensities=[0.5], rewards=[0.25], scores=[0.1, 0.2],
                 statuses=[200], completions=[NASTY], loss=0.1, seconds=[0.1], grades=[0.75])
    asked = Prompting.ask(NASTY)
    asked.completion, asked.dendrite.status_code = NASTY, 200
    chain = EmbeddedChain()
    chain.register(make_wallet("shown"), stake=3.0, validator_permit=True)
    arena = Arena(NASTY, [NASTY, "p"], [], None, [ranking], [], kinds={NASTY: NASTY})
    steps = [{"loss": 0.7}, {"loss": 0.1}]
    return {"Ranking": ranking, "Trace": Trace(k=1, events=[step], holders=[Holder(1, NASTY, "b")]), "Arena": arena,
            "Prompting": asked, "EmbeddedChain": chain, "History": History(steps, [{"accuracy": 0.875}], seconds=1.23)}


@pytest.mark.parametrize("kind, parts", {
    "Ranking": ["1.000", "0.500"], "Trace": ["1 step, 1 uid asked at each", "0.750"], "Arena": ["2 prompts for 0 workers"],
    "Prompting": ["user", "status 200"], "EmbeddedChain": ["netuid 1, block 1, 1 uid", "3.000", "yes"],
    "History": ["from 0.700 to 0.100", "0.875", "1.2", "finished"]}.items())
def test_objects_show_themselves(kind, parts):
    value = shown_objects()[kind]
    tree = BeautifulSoup(value._repr_html_(), "html.parser")
    assert all(part in tree.get_text() for part in parts), tree.get_text()
    assert not tree.select("script, img") and "<script" not in value._repr_html_() and tree.table.caption.get_text()
    assert kind in repr(value) and (kind in ("Ranking", "History", "Arena") or len(repr(value)) < 300)


def test_a_reward_model_is_one_line():
    from prompting_nb.reward import RewardModel

    model = RewardModel("minilm", device="cpu", length=0.5, bound=4.0).eval()
    said = repr(model)
    assert said == str(model) and "\n" not in said and len(said) < 200
    for part in ("'minilm'", "bert", "mean pooling", "at most 512 tokens", "22.7 million weights", "length 0.500", "bound 4.0",
                 "eval mode", "on cpu"):
        assert part in said


@arguments_in_help
@dataclass
class Fields:
    "Two numbers."

    first: int  # the smaller one
    second: int = 1
    third: list = field(
        default_factory=list
    )  # the rest
    _hidden: int = 0  # not shown


@arguments_in_help
class Row(NamedTuple):
    "A row."

    name: str  # of whom


class Layer(torch.nn.Module):
    "Inherits a constructor without comments."


def test_help_shows_what_stands_beside_fields():
    assert Fields.__doc__ == "Two numbers.\n\nArguments:\n    first: the smaller one\n    third: the rest"
    assert Fields(1).__doc__ == Fields.__doc__ == inspect.getdoc(Fields)
    assert Row.__doc__ == "A row.\n\nArguments:\n    name: of whom" and Row("a") == ("a",)
    assert arguments_in_help(Layer).__doc__ == "Inherits a constructor without comments."


def public_classes() -> list[type]:
    "Every class that a module of the package offers."
    import prompting_nb

    root, found = Path(prompting_nb.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        if path.name not in ("__init__.py", "_modidx.py"):
            module = importlib.import_module(".".join(("prompting_nb", *path.relative_to(root).with_suffix("").parts)))
            found += [value for name in module.__all__ if isinstance(value := getattr(module, name), type)]
    return found


def test_no_public_class_shows_an_address_in_memory():
    classes = public_classes()
    silent = [cls.__name__ for cls in classes if cls.__repr__ is object.__repr__ and not getattr(cls, "_is_protocol", False)]
    assert len(classes) > 200 and silent == ["HelpFormatter"]  # which argparse makes and nobody sees


def test_secrets_are_not_shown():
    @arguments_in_help
    class Client:
        def __init__(self):
            self.base_url, self.model, self.api_key = "http://127.0.0.1", "small", "sk-secret"
            self.store, self.status_token, self.hotkey = "redis://:pass@host", "t", "5F"
            self.waiting, self._inside = {"a": 1}, 1

    assert repr(Client()) == "Client(base_url='http://127.0.0.1', model='small', hotkey='5F', len(waiting)=1)"


def test_what_holds_a_model_is_one_line():
    from prompting_nb.encoding.encoder import Encoder
    from prompting_nb.reward.model import TextEncoder

    assert repr(Encoder("minilm")) == "Encoder('minilm', 384 dimensions, windows of 256 tokens)"
    assert repr(TextEncoder("minilm", device="cpu")) == "TextEncoder('minilm', mean pooling, 384 dimensions, at most 512 tokens)"


def test_records_of_runs_do_not_grow_with_their_steps():
    from prompting_nb.network.incentives import Honest, Laboratory, Steady
    from prompting_nb.reward.training import History
    from prompting_nb.validators.simulate import Always, made_up, simulate

    run = Laboratory({"ann": Honest()}, [1], {"good": Steady(0.9)}).run(50)
    assert repr(run) == "Run(50 epochs, validators ['ann'], miners ['good'])"
    steps = [{"step": n, "loss": 0.5} for n in range(50)]
    assert repr(History(steps)).startswith("History(50 steps in 1 epoch") and len(repr(History(steps))) < 250
    cut = History(steps, stopped="patience", epochs=3)
    assert cut.summary().startswith("50 steps, not all of 3 epochs (ended by patience), in batches of at most 4096 tokens")
    policies = {"always": lambda subnet, seed: Always([0, 1])}
    found = simulate(lambda seed: made_up(uids=4, topics=2, seed=seed), policies, seeds=2, steps=9, k=2)
    one = found.runs["always"][0]
    assert repr(one) == f"Run(seed {one.seed}, 9 steps, 2 of {len(one.grades[0])} uids at each)"
