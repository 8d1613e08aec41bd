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


def assert_close(a: Tensor, b: Tensor, share: float) -> None:
    assert a.shape == b.shape
    assert float((a.double() - b).abs().max()) <= share * float(b.abs().max())


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "opt", "gpt_bigcode", "mixtral")},
    # Where the stock model does more.
    "clipped": ("olmo", {"clip_qkv": 0.5}),
    "multipliers": ("granite", {}),
    "scaled logits": ("cohere", {}),
    "capped logits": ("gemma2", {}),  # whose attention weights are float32 whatever it is given
    "norms behind": ("olmo2", {}),
    "opt 350m": ("opt", tiny.OPT_350M),
    "no final norm": ("opt", {"_remove_final_layer_norm": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_energies_gradients_and_what_the_loss_feels_are_autograds(kind, models, tmp_path):
    """Energies are of the outputs, about their mean where a bias holds it; gradients a file a block, a diagonal of what
    is wider than twice the stream; the loss feels eigenvalues of the covariance in the metric, in one unit.
    """
    model_type, changes = KINDS[kind]
    exact = kind in (*tiny.FAMILIES, "llama")
    model, folder = models(model_type, **changes)
    plain, watch = InMemory(model), Factorize(gradient_weight=0.9, allocation="fisher").requires.watch
    found = surveyed(folder, watch, tmp_path, gradient=True)
    assert found.spectra.keys() == plain.linears.keys()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"finding-gradients-0000{block}.safetensors" for block in range(2)
    ]
    assert {entry.file for entry in found.gradients.written} == {file.name for file in tmp_path.iterdir()}
    told = set()
    for block in range(2):
        for path, moment in load_file(tmp_path / f"finding-gradients-{block:05d}.safetensors").items():
            assert f".{block}." in path
            told.add(path)
            G = plain.moment(path)
            is_wide = len(G) > 2 * D
            assert moment.dtype == torch.float32
            assert_close(moment, G.diagonal() if is_wide else G, IN_FILES if exact else 1e-5)
            assert torch.equal(found.gradient_at(path, block, torch.device("cpu")), moment)
            spectrum, linear = found.spectra[path], plain.linears[path]
            C, rank = plain.spread(path, centered=linear.bias is not None), min(linear.weight.shape)
            assert_close(spectrum.energy, torch.linalg.eigvalsh(C).flip(0)[:rank], 1e-9 if exact else 1e-5)
            M = 0.1 * G.diagonal().mean() * torch.eye(len(G)).double() + 0.9 * (
                torch.diag(G.diagonal()) if is_wide else G
            )
            felt = torch.linalg.eigvals(M @ C).real.sort(descending=True).values[:rank]
            assert_close(spectrum.felt, felt, 1e-7 if exact else 1e-5)
    assert told == plain.linears.keys()
    assert found.gradient_at("no such linear", 0, torch.device("cpu")) is None
    assert found.gradient_at(next(iter(told)), 2, torch.device("cpu")) is None


def test_energies_of_a_forward_pass_alone(models, tmp_path):
    model, folder = models("opt")
    plain, watch = InMemory(model), Factorize(method="anchored", allocation="energy").requires.watch
    for path, spectrum in surveyed(folder, watch, tmp_path, gradient=False).spectra.items():
        energies = torch.linalg.eigvalsh(plain.spread(path, centered=True)).flip(0)
        assert_close(spectrum.energy, energies[: min(plain.linears[path].weight.shape)], 1e-9)
        assert spectrum.felt is None
