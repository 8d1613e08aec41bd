"""What a branch's writers are fitted to where a norm or a multiplier lies between them and the stream."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import oracles
import tiny
from compress import families
from compress.calibration.groups import LinearGroup, Readers, Writers
from compress.calibration.sites import Requirements, Site
from compress.families import BranchTable, Family
from compress.numerics.ridge import NormalEquations, ridge
from compress.stages.stream import MeasureError

pytestmark = pytest.mark.usefixtures("exact_norms")
WINDOWS = oracles.random_ids(6, 24, seed=2)
UNTIED = {"tie_word_embeddings": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", UNTIED),
    "gemma3_text": ("gemma3_text", UNTIED),
    "glm4": ("glm4", UNTIED),
    "olmo2": ("olmo2", UNTIED),
    "olmo3": ("olmo3", UNTIED),
    "granite": ("granite", UNTIED),
    "opt, norms behind": ("opt", {**UNTIED, "do_layer_norm_before": False}),
    "opt, 350m": ("opt", {**UNTIED, **tiny.OPT_350M}),
    "opt, no final norm": ("opt", {**UNTIED, "_remove_final_layer_norm": True}),
}
EVERY_MODEL = pytest.mark.parametrize("variant", MODELS)
# Gemma 2's attention weights are float32 whatever it is given.
CLOSE = 1e-5


@dataclass
class Fit:
    """A stage that solves every group, almost without damping, and notes the equations of writers by their names.

    spoils: the name of a group that becomes worse instead, so that the prefix of all behind it is not the dense one.
    """

    spoils: str = ""
    fits: bool = True
    site: ClassVar[type[Site]] = LinearGroup
    reshapes: ClassVar[bool] = False
    in_written_form: ClassVar[bool] = False
    requires: ClassVar[Requirements] = Requirements()

    def __post_init__(self) -> None:
        self.seen: dict[str, NormalEquations] = {}

    def apply(self, group: LinearGroup) -> None:
        if isinstance(group, Writers):
            self.seen[group.name] = group.fit
        if group.name == self.spoils:
            assert isinstance(group, Readers)
            group.matrix = 0.7 * group.matrix + 0.3 * group.matrix.roll(1, dims=1)
        elif self.fits:
            group.matrix = ridge(group.fit, group.matrix, 1e-3, name=group.name)


@EVERY_MODEL
def test_a_walk_without_a_change_keeps_the_model(variant, models):
    """The blocks as chains of branches, what is before them and what is behind, against the stock model."""
    model, folder = models(MODELS[variant][0], **MODELS[variant][1])
    result = oracles.walked(folder, [MeasureError()], WINDOWS)
    assert oracles.largest_difference(result.probe_logits, oracles.logits_of(model, WINDOWS[:1])) < CLOSE
    state = model.state_dict()
    assert result.tensors.keys() == state.keys()
    assert all(torch.equal(result.tensors[name], tensor) for name, tensor in state.items())


@dataclass
class Seen:
    """What the modules of a model are given and give on the calibration windows, one row a token."""

    given: dict[str, Tensor]
    gave: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> "Seen":
        seen = cls({}, {})

        def note(name: str) -> Any:
            def hook(_module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
                x, y = (*inputs, kwargs.get("hidden_states"))[0], output[0] if isinstance(output, tuple) else output
                if isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point():
                    seen.given[name], seen.gave[name] = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])

            return hook

        handles = [m.register_forward_hook(note(name), with_kwargs=True) for name, m in model.named_modules() if name]
        model(input_ids=WINDOWS, use_cache=False)
        for handle in handles:
            handle.remove()
        return seen

    def stream(self, family: Family, block: int, branch: BranchTable) -> Tensor:
        """Before a branch of a block: what its first norm or reader is given."""
        return self.given[f"{family.blocks}.{block}.{(*branch.norms, *branch.readers)[0]}"]

    def stream_behind(self, family: Family, block: int, branch: BranchTable) -> Tensor:
        place = family.branches.index(branch)
        if place + 1 < len(family.branches):
            return self.stream(family, block, family.branches[place + 1])
        return self.gave[f"{family.blocks}.{block}"]


def equations(model: PreTrainedModel, compressed: PreTrainedModel) -> dict[str, NormalEquations]:
    """Token by token, from what stock code computes: sums of w u u^T and w u t^T for each branch's writer."""
    config: Any = model.config
    family, dense, now = families.find(config), Seen.of(model), Seen.of(compressed)
    eps, found = family.epsilon(config), {}
    for block in range(config.num_hidden_layers):
        for branch in family.branches:
            (writer,) = branch.writers
            path = f"{family.blocks}.{block}."
            U = now.given[path + writer]
            if model.get_submodule(path + writer).bias is not None:
                U = torch.cat([U, U.new_ones(len(U), 1)], dim=1)
            x, z = dense.stream_behind(family, block, branch), now.stream(family, block, branch)
            if branch.post_norm is None:
                T = (x - z) / family.scale(config)
            elif branch.post_norm_of == "update":
                T = dense.gave[path + writer]
            else:
                T = dense.given[path + branch.post_norm] - z
            G, B, tokens = (
                torch.zeros(U.shape[1], U.shape[1]).double(),
                torch.zeros(U.shape[1], T.shape[1]).double(),
                0.0,
            )
            for place, (u, t) in enumerate(zip(U, T, strict=True)):
                w = 1 / (energy(x[place], family) + eps)
                if branch.post_norm is not None:
                    w = w / (energy(dense.given[path + branch.post_norm][place], family) + eps)
                G += w * torch.outer(u, u)
                B += w * torch.outer(u, t)
                tokens += float(w)
            found[f"block {block} {branch.name} writers"] = NormalEquations(G, B, tokens)
    return found


def energy(x: Tensor, family: Family) -> Tensor:
    return (x - x.mean() if family.norm == "layer" else x).square().mean()


@EVERY_MODEL
def test_writers_are_fitted_to_what_the_dense_model_has_at_their_place(variant, models):
    model, folder = models(MODELS[variant][0], **MODELS[variant][1])
    fit = Fit(spoils="block 0 attention readers")
    result = oracles.walked(folder, [fit], WINDOWS)
    compressed = copy.deepcopy(model)
    compressed.load_state_dict(result.tensors)
    expected = equations(model, compressed)
    assert fit.seen.keys() == expected.keys()
    for name, found in fit.seen.items():
        assert found.tokens == pytest.approx(expected[name].tokens, rel=CLOSE)
        for key in ("G", "B"):
            wanted = getattr(expected[name], key)
            assert oracles.largest_difference(getattr(found, key), wanted) < CLOSE * float(wanted.abs().max())
