"""What is found out about every linear before the walk, against the whole stock model and autograd."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import oracles
import tiny
from compress import families
from compress.calibration.observers import GradientFiles, LinearFilter, LinearObserver
from compress.calibration.survey import Survey
from compress.stages.factorize import Factorize

pytestmark = pytest.mark.usefixtures("exact_norms")
D = tiny.HIDDEN
WINDOWS = oracles.random_ids(6, 24, seed=2)
# The gradients' moments lie in files of float32.
IN_FILES = 1e-6
EVERY_KIND = pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_bigcode", "mixtral"])


def surveyed(folder: Path, watch: LinearFilter, findings: Path, *, gradient: bool, **options: Any) -> Survey:
    options = {"batch_size": 2, **options}
    surveyor = oracles.surveyor(
        folder, WINDOWS, observe=lambda decoder: LinearObserver(watch, GradientFiles(findings), decoder), **options
    )
    return surveyor.run(gradient=gradient)


class InMemory:
    """Outputs of all block linears, and the loss's gradients by them, of the whole model at once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        prefix = families.find(model.config).blocks
        self.linears = {
            f"{prefix}.{name}": module
            for name, module in model.get_submodule(prefix).named_modules()
            if isinstance(module, nn.Linear) and not name.endswith(tiny.ROUTERS)
        }
        seen: dict[str, Tensor] = {}

        def note(path: str) -> Callable[..., Tensor]:
            def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                seen[path] = output
                return output.clone()  # OLMo clips it in place

            return keep

        handles = [linear.register_forward_hook(note(path)) for path, linear in self.linears.items()]
        logits = model(input_ids=WINDOWS, use_cache=False).logits
        for handle in handles:
            handle.remove()
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, WINDOWS[:, 1:, None])
        found = torch.autograd.grad(-chosen.sum(), list(seen.values()))
        for (path, output), g in zip(seen.items(), found, strict=True):
            self.outputs[path] = output.detach().reshape(-1, output.shape[-1])
            self.gradients[path] = g.reshape(-1, g.shape[-1])

    def spread(self, path: str, *, centered: bool) -> Tensor:
        Y = self.outputs[path]
        Y = Y - Y.mean(0) if centered else Y
        return Y.T @ Y / len(Y)

    def moment(self, path: str) -> Tensor:
        g = self.gradients[path]
        return g.T @ g / WINDOWS.numel()


def eigenvalues(C: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(C).flip(0)


def assert_close(a: Tensor, b: Tensor, share: float) -> None:
    assert a.shape == b.shape
    assert float((a.double() - b).abs().max()) <= share * float(b.abs().max())


def rank_of(linear: nn.Linear) -> int:
    return min(linear.weight.shape)


@EVERY_KIND
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
def test_energies_are_those_of_the_outputs(model_type, gradient, models, tmp_path):
    """About their mean where the linear has a bias to hold it; from either pass."""
    model, folder = models(model_type)
    plain = InMemory(model)
    watch = Factorize(method="anchored", allocation="energy").requires.watch
    found = surveyed(folder, watch, tmp_path, gradient=gradient)
    assert found.spectra.keys() == plain.linears.keys()
    for path, spectrum in found.spectra.items():
        linear = plain.linears[path]
        expected = eigenvalues(plain.spread(path, centered=linear.bias is not None))[: rank_of(linear)]
        assert_close(spectrum.energy, expected, 1e-9)
        assert (spectrum.felt is not None) == gradient


@EVERY_KIND
def test_gradients_are_autograds(model_type, models, tmp_path):
    """One file a block; a diagonal of what is wider than twice the stream."""
    model, folder = models(model_type)
    plain = InMemory(model)
    watch = Factorize(gradient_weight=0.9).requires.watch
    found = surveyed(folder, watch, tmp_path, gradient=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "finding-gradients-00000.safetensors",
        "finding-gradients-00001.safetensors",
    ]
    assert {entry.file for entry in found.gradients.written} == {file.name for file in tmp_path.iterdir()}
    told = set()
    for block in range(2):
        for path, moment in load_file(tmp_path / f"finding-gradients-{block:05d}.safetensors").items():
            assert f".{block}." in path
            told.add(path)
            expected = plain.moment(path)
            expected = expected.diagonal() if len(expected) > 2 * D else expected
            assert moment.dtype == torch.float32
            assert_close(moment, expected, IN_FILES)
            again = found.gradient_at(path, block, torch.device("cpu"))
            assert torch.equal(again, moment)
    assert told == plain.linears.keys()
    assert found.gradient_at("no such linear", 0, torch.device("cpu")) is None
    assert found.gradient_at(next(iter(told)), 2, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("olmo", {"clip_qkv": 0.5}),
        ("granite", {}),
        ("cohere", {}),
        ("gemma2", {}),
        ("olmo2", {}),
        ("opt", tiny.OPT_350M),
        ("opt", {"_remove_final_layer_norm": True}),
    ],
    ids=["clipped", "multipliers", "scaled logits", "capped logits", "norms behind", "opt 350m", "no final norm"],
)
def test_outputs_and_gradients_where_the_stock_model_does_more(model_type, changes, models, tmp_path):
    """Gemma 2's attention weights are float32 whatever it is given."""
    model, folder = models(model_type, **changes)
    plain = InMemory(model)
    found = surveyed(
        folder, Factorize(gradient_weight=0.9, allocation="fisher").requires.watch, tmp_path, gradient=True
    )
    assert found.spectra.keys() == plain.linears.keys()
    for block in range(2):
        for path, moment in load_file(tmp_path / f"finding-gradients-{block:05d}.safetensors").items():
            expected = plain.moment(path)
            assert_close(moment, expected.diagonal() if len(expected) > 2 * D else expected, 1e-5)
            expected = eigenvalues(plain.spread(path, centered=plain.linears[path].bias is not None))
            assert_close(found.spectra[path].energy, expected[: rank_of(plain.linears[path])], 1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.9])
@EVERY_KIND
def test_what_the_loss_feels(model_type, weight, models, tmp_path):
    """The eigenvalues of the outputs' covariance in the metric, in units that compare across linears."""
    model, folder = models(model_type)
    plain = InMemory(model)
    watch = Factorize(gradient_weight=weight, allocation="fisher").requires.watch
    found = surveyed(folder, watch, tmp_path, gradient=True)
    for path, spectrum in found.spectra.items():
        linear, G = plain.linears[path], plain.moment(path)
        G = torch.diag(G.diagonal()) if len(G) > 2 * D else G
        scale = G.diagonal().mean()
        M = scale * ((1 - weight) * torch.eye(len(G)).double() + weight * G / scale)
        C = plain.spread(path, centered=linear.bias is not None)
        expected = torch.linalg.eigvals(M @ C).real.sort(descending=True).values[: rank_of(linear)]
        assert_close(spectrum.felt, expected, 1e-7)
