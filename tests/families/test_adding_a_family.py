"""docs/adding-a-family.md, followed: what it says to write is written, and the contract run on it."""

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_families
import torch

import contract
import oracles
import tiny
from compress import families
from contract import METHODS, Row

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"```python\n# (\S+)\n(.*?)```", re.DOTALL)
BLOCKS = dict(BLOCK.findall((DOCS / "adding-a-family.md").read_text(encoding="utf-8")))
FILE, NAME = "src/compress/families/persimmon.py", "persimmon"
TABLE_TESTS = [
    test
    for name, test in vars(test_families).items()
    if name.startswith("test_") and list(inspect.signature(test).parameters) == ["pair"]
]
KINDS = {"one basis": "compress", "lord": "compress", "slim, packed": "stock"}


@pytest.fixture(scope="module", autouse=True)
def _added(tmp_path_factory) -> Iterator[None]:
    """The family in a folder beside the package's own, its tiny model among the others."""
    assert NAME not in families.names()
    folder = tmp_path_factory.mktemp("families")
    (folder / Path(FILE).name).write_text(BLOCKS[FILE], encoding="utf-8")
    others: dict[str, dict[str, Any]] = {}
    exec(BLOCKS["tests/tiny.py"], {"OTHERS": others})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "__path__", [*families.__path__, str(folder)])
        patch.setitem(tiny.EVERY, NAME, others[NAME])
        yield


def test_it_is_found():
    assert NAME in families.names()


@pytest.mark.parametrize("test", TABLE_TESTS, ids=lambda test: test.__name__)
def test_its_table_is_true(test: Callable[..., None]):
    test(test_families.make(NAME))


def test_it_can_be_rotated(tmp_path):
    model, ids = tiny.tiny_model(NAME, layer_norm_eps=1e-2), oracles.random_ids(2, 24)
    model.save_pretrained(tmp_path)
    stages = oracles.slicegpt({"linear_ratios": (0, 0), "slice_head": True}, signal="normed")
    sliced = oracles.sliced_model(oracles.walked(tmp_path, stages, oracles.random_ids(3, 24, seed=2)))
    assert oracles.largest_difference(oracles.logits_of(sliced, ids), oracles.logits_of(model, ids)) < 1e-9


def test_methods_of_every_kind_work(tmp_path):
    row = Row(NAME)
    contract.write_inputs(tmp_path, [row], torch.float64)
    written = {name: contract.write(row, METHODS[name], tmp_path, tmp_path / f"out {name}") for name in KINDS}
    assert {name: contract.written_kind(made.out, NAME) for name, made in written.items()} == KINDS
    assert {name: contract.cell(row, METHODS[name]).kind for name in KINDS} == KINDS
    looked = contract.look_at(written, tmp_path)
    for name, made in written.items():
        looked.agrees(name, made)
