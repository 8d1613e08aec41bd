"""The contract of every family: what the table of docs/families.md has is compressed, reloads and generates.

One whole run of each tiny model, by one of the methods in turn; benchmarks/family_table.py runs all there is.
What is asked for is written first, then one clean process, which has no code of ours, loads all of it (stock_probe.py).
That folding, rotating and slicing at the full width are exact is in test_exactness.py, for every family.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import contract
import tiny
from compress import pipeline
from compress.errors import CompressError
from contract import METHODS, ROWS, Looked, Row, Written

TURNS = ("one basis", "lord", "slim, packed", "slim, compact")


def turns() -> dict[tuple[str, str], Row]:
    """By row and method: a method for each family, the next one where the family is refused by it."""
    found, taken = {}, 0
    for row in [row for row in ROWS if not row.what] + [Row("opt", "350M: norms behind", tiny.OPT_350M)]:
        refused = {"one basis"} if contract.cell(row, METHODS["one basis"]).kind == "refused" else set()
        refused |= {"slim, packed"} if row.model_type in tiny.SPARSE else set()
        while TURNS[taken % len(TURNS)] in refused:
            taken += 1
        found[row.name, TURNS[taken % len(TURNS)]] = row
        taken += 1
    return found


WRITTEN = turns()
REFUSED = {("gemma2", "one basis"): Row("gemma2"), ("mixtral", "slim, packed"): Row("mixtral")}
CELLS = WRITTEN | REFUSED


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("dense")
    contract.write_inputs(folder, list(CELLS.values()), torch.float64)
    return folder


@pytest.fixture(scope="module")
def written(inputs, tmp_path_factory) -> Callable[[tuple[str, str]], Written]:
    """What a method writes of a row's model, once."""
    root = tmp_path_factory.mktemp("written")
    return functools.cache(
        lambda key: contract.write(CELLS[key], METHODS[key[1]], inputs, root / str([*CELLS].index(key)))
    )


@pytest.fixture(scope="module")
def looked(request, written, tmp_path_factory) -> Looked:
    """At what the selected tests ask for."""
    items = [item for item in request.session.items if item.path == request.path and "looked" in item.fixturenames]
    keys = [item.callspec.params["key"] for item in items]
    return contract.look_at({": ".join(key): written(key) for key in keys}, tmp_path_factory.mktemp("looked"))


def test_every_family_is_there():
    assert {row.model_type for row in CELLS.values()} == set(tiny.EVERY)


@pytest.mark.parametrize("key", WRITTEN, ids=": ".join)
def test_what_is_written_is_what_the_plan_says(key, written):
    row, made = CELLS[key], written(key)
    kind = contract.written_kind(made.out, row.model_type)
    assert kind == contract.cell(row, METHODS[key[1]]).kind
    assert made.result.metadata.loads_without_our_code is (kind != "compress")


@pytest.mark.parametrize("key", WRITTEN, ids=": ".join)
def test_a_clean_process_computes_what_the_walk_did(key, written, looked):
    looked.agrees(": ".join(key), written(key))


@pytest.mark.parametrize("key", REFUSED, ids=": ".join)
def test_what_cannot_be_done_is_refused_before_it_begins(key, inputs, tmp_path):
    row, method = CELLS[key], METHODS[key[1]]
    expected = contract.cell(row, method)
    assert expected.kind == "refused"
    with pytest.raises(CompressError) as error:
        pipeline.run(contract.job_of(row, method, inputs, tmp_path / "out"))
    assert str(error.value) == expected.why
    assert not (tmp_path / "out.partial").exists()
