"""The count of mutants: what was changed is written in short, and each change that no test notices is explained."""

import re
from pathlib import Path

import pytest

from tools.mutants import TESTS, apply_later, change_of, function_of

ROOT = Path(__file__).resolve().parent.parent
SURVIVORS = (ROOT / "tests" / "survivors.md").read_text()


def test_a_mutant_is_named_by_its_function():
    prefix = "prompting_nb.network.auth"
    names = {"x_sign_request__mutmut_18": "sign_request", "x__new__mutmut_2": "_new", "xǁSpansǁ__init____mutmut_1": "Spans.__init__",
             "xǁ_Lineǁleave__mutmut_3": "_Line.leave"}  # fmt: skip
    assert {name: function_of(f"{prefix}.{name}") for name in names} == names


@pytest.mark.parametrize("before, after, shown", [
    ("x = 1", "x = 2", "`x = 1` -> `x = 2`"), ("'' or 0", "'' or 1", "`'' or 0` -> `'' or 1`"),
    (f"{'a' * 50}(0, {'b' * 30})", f"{'a' * 50}(1, {'b' * 30})",
     f"`...{'a' * 39}(0, {'b' * 18}...` -> `...{'a' * 39}(1, {'b' * 18}...`"),
    ("f(0, 0)", "f(0)", "`f(0, 0)` -> `f(0)`"), ("'a `b`'", "'XX'", "`` 'a `b`' `` -> `'XX'`"),
])  # fmt: skip
def test_a_change_is_written_with_a_few_words_around_it(before, after, shown):
    diff = f"--- a.py\n+++ a.py\n@@ -1,2 +1,2 @@\n def f():\n-    {before}\n+    {after}\n     return x\n"
    assert change_of(diff) == shown


def test_decorators_of_functions_are_applied_below_them():
    source = "class A:\n    @property\n    def b(self):\n        return 1\n\n    @staticmethod\n    def c():\n        return 2\n"
    changed = apply_later(source)
    assert "    b = property(b)\n" in changed and "@property" not in changed and "@staticmethod" in changed
    names = {}
    exec(changed, names)
    assert (names["A"]().b, names["A"].c()) == (1, 2)


@pytest.mark.parametrize("module", TESTS)
def test_each_change_that_no_test_notices_is_explained(module):
    "As many lines as the table of CONTRIBUTING counts, each with a reason; at least nine of ten changes are noticed."
    count, noticed = map(int, re.search(rf"\| `{module}` \| (\d+) \| (\d+) \|", (ROOT / "CONTRIBUTING.md").read_text()).groups())
    section = re.search(rf"^## {module}\n(.*?)(?=^## |\Z)", SURVIVORS, re.M | re.S)[1]
    lines = [re.fullmatch(r"- `[\w.]+`: `.+` -> `.*`(?: \((\d+)\))?: .+", line) for line in section.strip().splitlines()]
    assert all(lines) and sum(int(line[1] or 1) for line in lines) == count - noticed
    assert noticed >= 0.9 * count
