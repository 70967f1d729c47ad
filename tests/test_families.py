"""The grid: what becomes of a classifier of each family of transformers, by padding, saving, export, adapters and packing.

Each test prints its part of the table; `python tests/families.py` prints it whole.
"""

import pytest
import transformers as hf
from families import COLUMNS, NO_LORA, READ, REFUSED, examine, table
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS

from prompting_nb.reward.fast.packing import PACKING, SHARING

KINDS = [kind for kind in READ if kind in CLASSIFIERS]  # an older transformers knows fewer
PARTS = 8


@pytest.fixture(autouse=True)
def quiet():
    before = hf.utils.logging.get_verbosity()
    hf.utils.logging.set_verbosity_error()
    yield
    hf.utils.logging.set_verbosity(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_the_grid(tmp_path, capsys, part):
    rows = []
    for kind in KINDS[part::PARTS]:
        rows.append(examine(kind, tmp_path / kind))
        row = rows[-1]
        assert row["pooling"] == READ[kind], row
        if kind in REFUSED:
            assert REFUSED[kind] in row["score"], row
            continue
        expected = dict.fromkeys(COLUMNS[2:-1], "ok")
        if kind in NO_LORA:
            assert NO_LORA[kind] in row.pop("lora")
            expected.pop("lora")
        assert {name: row[name] for name in expected} == expected, kind
        packs = kind in (SHARING if READ[kind] == "last" else PACKING) and READ[kind] != "classifier"
        assert row["packed"] == "ok" if packs else row["packed"].startswith("refused"), row
    with capsys.disabled():
        print(f"\n{table(rows)}")


def test_the_grid_is_large_enough():
    assert len(KINDS) - len(REFUSED) >= 60
