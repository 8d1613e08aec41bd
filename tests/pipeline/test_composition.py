"""Storing linears after they were sliced and factorized, in one walk: the form they are written in, what they lose."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import oracles
from compress import pipeline
from compress.calibration.linears import LinearSite
from compress.datasets.windows import calibration_windows
from compress.models.loading import load_tokenizer
from compress.models.stored_loading import load
from compress.planning.prepare import Job
from compress.stages._stage import StageConfig
from runs import job_of

Stages = Sequence[StageConfig | dict[str, Any]]
SLICE: Stages = [
    {"stage": "fold_norms"},
    {"stage": "rotate_shared", "gradient_weight": 0.0},
    {"stage": "slice", "ratio": 0.25, "slice_head": True, "round_to": 1},
    {"stage": "refit"},
]
FACTORS: Stages = [{"stage": "refit"}, {"stage": "factorize", "method": "anchored", "rank_frac": 0.5}]
STOCK = ["llama", "phi", "gemma"]
DOUBLE = {"dtype": torch.float64}


class Look(StageConfig):
    """Takes linears in their written form, notes what they are given there, and leaves them as they are."""

    site: ClassVar = LinearSite
    in_written_form: ClassVar = True
    seen: ClassVar[dict[str, LinearSite]] = {}
    stage: Literal["look"] = "look"

    def apply(self, site: LinearSite) -> None:
        self.seen[site.shape.path] = site


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
    Look.seen.clear()
    with oracles.exact_norms():
        yield


def windows_of(job: Job) -> Tensor:
    tokenizer = load_tokenizer(job.model.whole_folder())
    return calibration_windows(
        job.recipe.calibration.source, tokenizer, num_samples=16, seq_len=16, seed=job.recipe.seed, data_dir=None
    )


@pytest.mark.parametrize("model_type", STOCK)
def test_the_walk_goes_on_with_what_will_be_written(model_type, tmp_path):
    """A stage that only looks at the written form changes nothing, and what it sees is what the stock model has."""
    plain = pipeline.run(job_of(tmp_path, model_type, SLICE, changes=DOUBLE, out="plain"))
    job = job_of(tmp_path, model_type, [*SLICE, Look()], out="looked")
    looked = pipeline.run(job)
    models = [AutoModelForCausalLM.from_pretrained(run.out, dtype=torch.float64) for run in (plain, looked)]
    assert looked.metadata.loads_without_our_code
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-8, atol=1e-8 * float(tensor.abs().max()))
    readers = [path for path in Look.seen if path.endswith(("q_proj", "up_proj", "c_fc", "query_key_value", "fc1"))]
    assert readers
    for path, (X, _) in oracles.passed_through(models[1], readers, windows_of(job)).items():
        site = Look.seen[path]
        assert (site.shape.m, site.shape.n) == models[1].get_submodule(path).weight.shape
        # Of a matrix: single numbers of it may be nothing but rounding.
        torch.testing.assert_close(
            site.inputs.second, X.T @ X / len(X), rtol=0, atol=1e-8 * float(site.inputs.second.abs().max())
        )


def logits_on(folder: Path, windows: Tensor) -> Tensor:
    return oracles.logits_of(load(str(folder), torch.float64, torch.device("cpu")), windows)


TOGETHER: dict[str, Stages] = {
    "slicegpt": [{"stage": "fold_norms"}, {"stage": "rotate"}, {"stage": "slice", "ratio": 0.25}],
    "sliced": SLICE,
    "factorized": FACTORS,
    "both": [*SLICE, FACTORS[1]],
}


@pytest.mark.parametrize(
    ("before", "model_type", "form"),
    [
        ("slicegpt", "opt", "compact"),
        ("sliced", "llama", "packed"),
        ("sliced", "opt", "compact"),
        ("factorized", "opt", "dense"),
        ("both", "llama", "compact"),
    ],
)
def test_8_bits_keep_what_was_there_before(before, model_type, form, tmp_path):
    """Sliced and factorized models, stock and ours, in every form: loaded again they compute what they did."""
    job = job_of(tmp_path, model_type, TOGETHER[before], changes=DOUBLE, out="plain")
    plain = pipeline.run(job)
    slim = {"stage": "slim", "quantize": {"num_bits": 8, "strategy": "channel"}, "form": form}
    found = pipeline.run(job_of(tmp_path, model_type, [*TOGETHER[before], slim], out="stored"))
    assert found.metadata.loads_without_our_code == (plain.metadata.loads_without_our_code and form != "compact")
    assert (found.size.bytes == plain.size.bytes) if form == "dense" else (found.size.bytes < plain.size.bytes)
    # On the calibration text: what was fitted to it was so again behind the rounding, and elsewhere differs by more.
    windows = windows_of(job)
    expected = logits_on(plain.out, windows)
    difference = oracles.largest_difference(logits_on(found.out, windows), expected)
    assert 1e-9 < difference < 0.03 * float(expected.abs().max())
