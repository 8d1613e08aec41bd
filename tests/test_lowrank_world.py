"""What others do with a factorized model: train it, adapt it, quantize it, generate, each by its own tools.

The model is the shipped demo, which has been trained: on random weights a loss says little.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import compress
from compress import pipeline
from compress.datasets.windows import calibration_windows
from compress.models.hub import find_model
from compress.models.loading import load_tokenizer
from compress.own_model.modeling_compress import CompressForCausalLM, LowRankLinear, PivotLinear
from compress.planning.prepare import Job
from compress.recipe import parse_recipe
from oracles import logits_of
from recipes import lowrank

pytestmark = pytest.mark.slow
DEMO = Path(compress.__file__).parent / "assets/demo"
FORMS = ["pivot"]


@pytest.fixture(scope="module")
def factorized(tmp_path_factory) -> dict[str, Path]:
    """Cut so hard that there is something to win back."""
    root, made = tmp_path_factory.mktemp("factorized"), {}
    for form in FORMS:
        stages = lowrank("lord", {"rank_frac": 0.3}, form=form)
        calibration = {"source": "stdlib", "samples": 16, "seq_len": 64}
        recipe = parse_recipe({"method": "lord", "stages": stages, "calibration": calibration, "dtype": "float32"})
        job = Job(model=find_model("demo"), recipe=recipe, out=root / form, command="compress lord")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "verify", lambda *_arguments, **_options: 0.0)  # the tests load it themselves
            pipeline.run(job)
        made[form] = root / form
    return made


@pytest.fixture(scope="module")
def ids() -> Tensor:
    tokenizer = load_tokenizer(DEMO)
    return calibration_windows("stdlib", tokenizer, num_samples=16, seq_len=64, seed=3, data_dir=None)


def load(folder: Path, **options: Any) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    model, info = loaded
    assert not any(info.values())
    return model.eval()


def trained(model: Any, parameters: list[nn.Parameter], ids: Tensor, *, lr: float) -> list[float]:
    """The loss on the text before each of a few steps."""
    optimizer, losses = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def thin(model: nn.Module) -> list[LowRankLinear | PivotLinear]:
    return [module for module in model.modules() if isinstance(module, LowRankLinear | PivotLinear)]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("form", FORMS)
def test_adapters_on_the_factors_can_be_trained_and_merged(factorized, ids, form, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first", "second"], task_type="CAUSAL_LM")
    model = load(factorized[form])
    size = sum(parameter.numel() for parameter in model.parameters())
    adapted: Any = peft.get_peft_model(model, config).train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(parameters) == 2 * 2 * len(thin(model))
    losses = trained(adapted, parameters, ids, lr=1e-2)
    assert losses[-1] < 0.9 * losses[0]

    adapted.eval()
    expected = logits_of(adapted, ids[:2])
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is CompressForCausalLM
    assert sum(parameter.numel() for parameter in again.parameters()) == size
    assert distance(logits_of(again, ids[:2]), expected) < 1e-5


def distance(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
