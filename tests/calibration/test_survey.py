"""The survey of the dense model, taken block by block, against the whole stock model and autograd."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import oracles
import tiny
from compress.calibration.survey import Survey, Surveyor, num_steps

pytestmark = pytest.mark.usefixtures("exact_norms")
D = tiny.HIDDEN
WINDOWS = oracles.random_ids(5, 8, seed=2)
# Of a block: the norms, each of which reads a point of the stream. Then the final norm, and the epsilon.
ATTENTION_AND_MLP = ("input_layernorm", "post_attention_layernorm")
NORMS: dict[str, tuple[str, tuple[str, ...], str, float]] = {
    "llama": ("model.layers", ATTENTION_AND_MLP, "model.norm", 1e-4),
    "opt": (
        "model.decoder.layers",
        ("self_attn_layer_norm", "final_layer_norm"),
        "model.decoder.final_layer_norm",
        1e-5,
    ),
    "phi": ("model.layers", ("input_layernorm",), "model.final_layernorm", 1e-5),
}
MODELS = list(NORMS)
LAYER_NORMS = ("opt", "phi")
DEEP = 5
# The loss is taken in float32, whatever the model computes in.
OF_THE_LOSS = 1e-7


def surveyor(folder: Path, *, windows: Tensor = WINDOWS, **options: Any) -> Surveyor:
    return oracles.surveyor(folder, windows, **{"batch_size": 2, **options})


def norms_of(model: PreTrainedModel) -> list[nn.Module]:
    """In the order they are passed; what each is given is a point of the stream."""
    blocks, names, final_norm, _ = NORMS[model.config.model_type]
    all_blocks: Any = model.get_submodule(blocks)
    found = [block.get_submodule(name) for block in all_blocks for name in names]
    return [*found, model.get_submodule(final_norm)]


def by_autograd(model: PreTrainedModel, windows: Tensor) -> Survey:
    """The whole model at once, a window at a time; every token's outer products one by one."""
    model_type = model.config.model_type
    moment, gradient = torch.zeros(D, D).double(), torch.zeros(D, D).double()
    for ids in windows:
        points: list[Tensor] = []

        def note(_module: nn.Module, inputs: tuple[Tensor, ...], points: list[Tensor] = points) -> None:
            inputs[0].retain_grad()
            points.append(inputs[0])

        handles = [norm.register_forward_pre_hook(note) for norm in norms_of(model)]
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        losses = [-logits[i].log_softmax(-1)[ids[i + 1]] for i in range(len(ids) - 1)]
        torch.stack(losses).sum().backward()
        for handle in handles:
            handle.remove()
        assert len(points) == 1 + 2 * len(NORMS[model_type][1])
        for point in points:
            for x, by_x in zip(point.detach().view(-1, D), point.grad.view(-1, D), strict=True):
                if model_type in LAYER_NORMS:
                    x = x - x.mean()
                rms = ((x * x).mean() + NORMS[model_type][3]).sqrt()
                moment += torch.outer(x / rms, x / rms)
                gradient += torch.outer(rms * by_x, rms * by_x)
    model.zero_grad()
    return Survey(moment / windows.numel(), gradient / windows.numel())


def assert_close(a: Tensor | None, b: Tensor | None, share: float) -> None:
    assert float((a - b).abs().max()) < share * float(b.abs().max())


@pytest.mark.parametrize("model_type", MODELS)
def test_it_is_autograd_through_the_whole_model(model_type, models):
    model, folder = models(model_type)
    found, expected = surveyor(folder).run(gradient=True), by_autograd(model, WINDOWS)
    assert_close(found.moment, expected.moment, 1e-11)
    assert_close(found.gradient, expected.gradient, OF_THE_LOSS)
    assert float(found.moment.trace()) == pytest.approx(D * len(norms_of(model)), rel=1e-2)
    if model_type in LAYER_NORMS:
        # Neither has a component along the mean.
        for matrix in (found.moment, found.gradient):
            assert float(matrix.sum(0).abs().max()) < 1e-5 * float(matrix.abs().max())


def test_without_the_gradient_it_stops_at_the_head(models):
    _, folder = models("opt")
    steps: list[str] = []
    found = surveyor(folder).run(gradient=False, begin=steps.append)
    assert found.gradient is None
    assert found.tensors().keys() == {"moment"}
    assert len(steps) == num_steps(2, gradient=False)
    assert torch.equal(found.moment, surveyor(folder).run(gradient=True).moment)


def stream_bytes(windows: Tensor = WINDOWS) -> int:
    return windows.numel() * D * 8


def test_inputs_of_blocks_on_disk_change_nothing(models, monkeypatch):
    _, folder = models("llama", num_hidden_layers=DEEP)
    mapped: list[Any] = []
    from_file = torch.from_file

    def noting(*arguments: Any, **options: Any) -> Tensor:
        mapped.append(arguments)
        return from_file(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", noting)
    before = sorted(folder.iterdir())
    windows = WINDOWS[:3]
    found = {}
    for streams in (DEEP + 1, 1):
        survey = surveyor(folder, memory=streams * stream_bytes(windows), windows=windows)
        steps: list[str] = []
        found[streams] = survey.run(gradient=True, begin=steps.append)
        assert len(steps) == len(set(steps)) == num_steps(DEEP, gradient=True)
        assert bool(mapped) == (streams == 1)
    assert_close(found[1].moment, found[DEEP + 1].moment, 1e-12)
    assert_close(found[1].gradient, found[DEEP + 1].gradient, OF_THE_LOSS)
    assert sorted(folder.iterdir()) == before
