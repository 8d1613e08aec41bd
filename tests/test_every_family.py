"""The contract of every family: whatever the table of docs/families.md has is compressed, reloads and generates.

The models are tiny and every method runs once on each. What the selected tests ask for is written first, then one clean
process, which has no code of ours, loads all of it (stock_probe.py). That folding, rotating and slicing at the full
width are exact is in test_exactness.py, that a refit is, in test_refit.py and test_writers.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import contract
import oracles
import tiny
from cli_runner import snapshot
from compress import pipeline
from compress.errors import UnsupportedModel
from contract import METHODS, ROWS, Cell, Row

PROBE = Path(__file__).with_name("stock_probe.py")
PROMPT = oracles.random_ids(2, 6, seed=4).clamp_min(3)
CELLS = {(row.name, name): (row, name) for row in ROWS for name in METHODS}
# Stock norms compute in float32; scales and adapters of what is packed are of the model's dtype.
CLOSE = 1e-5


def is_refused(row: Row, name: str) -> bool:
    return name in ("slicegpt", "per layer", "one basis") and bool(contract.family_of(row).not_exact(row.config))


WRITTEN = [key for key, (row, name) in CELLS.items() if not is_refused(row, name)]
REFUSED = [key for key in CELLS if key not in WRITTEN]


@dataclass(frozen=True)
class Written:
    out: Path
    result: pipeline.Result
    probe: tuple[Tensor, Tensor]

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / name).read_text(encoding="utf-8"))
        return found


class Noted:
    """In the place of the proof: notes what is to be proved, the probe's tokens and the walk's logits for them."""

    probe: tuple[Tensor, Tensor]

    def __call__(self, folder: Path, ids: Tensor, logits: Tensor, *, memory: int) -> float:
        self.probe = ids, logits
        return 0.0


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("dense")
    contract.write_inputs(folder, ROWS, torch.float64)
    return folder


@pytest.fixture(scope="module")
def written(request, inputs, tmp_path_factory) -> dict[tuple[str, str], Written]:
    """What the selected tests ask for, unproved: one clean process proves all of it."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = dict.fromkeys(item.callspec.params["key"] for item in items if "written" in item.fixturenames)
    root, made = tmp_path_factory.mktemp("written"), dict[tuple[str, str], Written]()
    with pytest.MonkeyPatch.context() as patch:
        for number, key in enumerate(asked):
            noted = Noted()
            patch.setattr(pipeline, "verify", noted)
            row, name = CELLS[key]
            result = pipeline.run(contract.job_of(row, METHODS[name], inputs, root / f"{number}"))
            made[key] = Written(root / f"{number}", result, noted.probe)
    return made


@pytest.fixture(scope="module")
def looked(written, tmp_path_factory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    root = tmp_path_factory.mktemp("looked")
    request = {
        "/".join(key): {
            "folder": str(made.out),
            "trust": "auto_map" in made.read("config.json"),
            "unpack": made.read("compress.json")["unpacks_while_loading"],
            "ids": {"probe": made.probe[0].tolist()},
            "prompt": PROMPT.tolist(),
        }
        for key, made in written.items()
    }
    (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [sys.executable, "-I", str(PROBE), str(root / "request.json"), str(root / "answers")]
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((root / "answers" / "found.json").read_text(encoding="utf-8"))
    assert found["ours"] == []
    return load_file(root / "answers" / "logits.safetensors"), found["models"]


@pytest.mark.parametrize("key", WRITTEN, ids=": ".join)
def test_what_is_written_is_what_the_plan_says(key, written):
    row, name = CELLS[key]
    expected, made = contract.cell(row, METHODS[name]), written[key]
    model_type = made.read("config.json")["model_type"]
    assert expected.kind == ("stock" if model_type == row.model_type else model_type)
    assert made.result.is_stock is (not model_type.startswith("compress_"))
    assert made.result.size.parameters <= made.result.dense.parameters or name not in ("one basis", "lord")


@pytest.mark.parametrize("key", WRITTEN, ids=": ".join)
def test_a_clean_process_computes_what_the_walk_did(key, written, looked):
    logits, models = looked
    name, made = "/".join(key), written[key]
    assert not models[name]["info"].keys() & {"missing_keys", "unexpected_keys", "mismatched_keys"}
    expected = made.probe[1]
    assert oracles.largest_difference(logits[f"{name}/probe"], expected) < CLOSE * float(expected.abs().max())
    assert models[name]["cached"] == models[name]["greedy"]


@pytest.mark.parametrize("key", REFUSED, ids=": ".join)
def test_what_cannot_be_done_is_refused_before_it_begins(key, inputs, tmp_path):
    row, name = CELLS[key]
    expected = contract.cell(row, METHODS[name])
    assert expected.kind == "refused"
    with pytest.raises(UnsupportedModel) as error:
        pipeline.run(contract.job_of(row, METHODS[name], inputs, tmp_path / "out"))
    assert str(error.value) == expected.why
    assert not (tmp_path / "out.partial").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_run_that_was_killed_goes_on_and_writes_the_same_bytes(row, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)

    def kill(name: str, done: int, total: int) -> None:
        if name == "block 0":
            raise Killed

    method = METHODS["lord"]
    pipeline.run(contract.job_of(row, method, inputs, tmp_path / "whole" / "out"))
    with pytest.raises(Killed):
        pipeline.run(contract.job_of(row, method, inputs, tmp_path / "killed" / "out"), kill)
    resumed = pipeline.run(contract.job_of(row, method, inputs, tmp_path / "killed" / "out", resume=True))
    assert resumed.resumed_parts == 2
    assert snapshot(tmp_path / "killed") == snapshot(tmp_path / "whole")


def test_every_family_is_there():
    assert {row.model_type for row in ROWS} == set(tiny.EVERY)
    assert Cell("stock") in {contract.cell(row, METHODS["one basis"]) for row in ROWS[:3]}
