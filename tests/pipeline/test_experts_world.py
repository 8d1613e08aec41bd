"""Whole runs on models with experts: written, read back by others, run, gone on with, compressed again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress import pipeline
from compress.errors import CompressError
from compress.planning.prepare import Job
from recipes import anchored, lowrank
from runs import job_of, proved_here, run_here

pytestmark = pytest.mark.slow
Stages = list[dict[str, Any]]
ADAPTED: Stages = [{"stage": "slim", "quantize": {"strategy": "channel"}, "adapt": {"rank": 0.1}, "form": "compact"}]
PER_LAYER: Stages = anchored({"ratio": 0.25}, rotation="per-layer", round_to=8)
NARROW: Stages = anchored({"width": 24}, rotation="shared", round_to=8)
FEWER: Stages = anchored({"width": 24}, rotation="shared", round_to=8, units={"neurons": {"keep": 40}})
TOGETHER: Stages = [*NARROW, *lowrank("anchored", {"rank_frac": 0.5}, refit=False), *ADAPTED]
FEW = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": False},
}
# What their own names, norms and shared experts have a part in; test_every_family.py has single methods.
MADE = {"qwen3_moe": PER_LAYER, "qwen2_moe": TOGETHER}


def few_experts(folder: Path, model_type: str, stages: Stages, *, samples: int = 24) -> Job:
    changes = {"num_hidden_layers": 2, **FEW[model_type]}
    return job_of(folder, model_type, stages, changes=changes, samples=samples, dtype="float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Every checkpoint, and beside it the probe that its walk computed."""
    root = tmp_path_factory.mktemp("made")
    for model_type, stages in MADE.items():
        folder = root / model_type
        folder.mkdir()

        def overhear(_out: Path, ids: Tensor, logits: Tensor, folder: Path = folder, **_options: Any) -> float:
            save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, folder / "probe.safetensors")
            return 0.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "verify", overhear)
            result = pipeline.run(few_experts(folder, model_type, stages))
        assert not result.metadata.loads_without_our_code
    return root


@pytest.fixture(scope="module")
def reloaded(made) -> dict[str, dict[str, Any]]:
    """As the proof reloads each, in this process; test_every_family.py does so without this package."""
    found = {}
    with proved_here(made / "modules"):
        for key in MADE:
            folder = made / key
            found[key] = run_here(folder / "out", folder / "probe.safetensors", 2**33, folder)
    return found


@pytest.mark.parametrize("model_type", MADE)
def test_others_read_what_the_walk_computed(model_type, reloaded):
    found = reloaded[model_type]
    assert not found["missing"] + found["unexpected"] + found["mismatched"]
    assert found["difference"] < 1e-5 * found["largest_logit"]


def test_experts_that_few_tokens_reach_are_told_of_and_harm_nothing(tmp_path):
    """With a single window most experts see less than a handful."""
    for number, stages in enumerate((FEWER, ADAPTED)):
        (tmp_path / str(number)).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)
            result = pipeline.run(few_experts(tmp_path / str(number), "qwen3_moe", stages, samples=2))
        (note,) = (note for note in result.notes if "experts saw fewer" in note)
        assert note.startswith("10 of 10 experts saw fewer calibration tokens than they have inputs (the least, ")
        for file in result.out.glob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


REFUSED: dict[str, tuple[Stages, str]] = {
    "packed": (
        [{"stage": "slim", "quantize": {"strategy": "channel"}}],
        "A model with experts cannot be packed: transformers fuses them while it loads, looks for the packed parts of "
        "all, and has no linears for an adapter. Store it with --compact, or merge it with --materialize.",
    ),
    "a width that grouped products do not take": (
        anchored({"width": 20}, rotation="shared", round_to=4),
        "transformers multiplies experts in groups, which takes multiples of 8: not a hidden size of 20 with 48 "
        "neurons. Use --round-to 8.",
    ),
    "widths block by block": (
        anchored({"width": 24}, rotation="per-layer", round_to=8, units={"neurons": {"keep": [40, 48]}}),
        "Experts have as many neurons in every block. Give one number for all blocks.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused_beforehand(name, tmp_path):
    stages, reason = REFUSED[name]
    with pytest.raises(CompressError) as error:
        pipeline.plan_only(few_experts(tmp_path, "mixtral", stages))
    assert str(error.value) == reason
