"""Block-by-block distillation: streams and gradients against whole models, and what of a checkpoint may change."""

import itertools
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import oracles
import tiny
from compress.errors import UsageError
from compress.models.configuration_compact_sliced import CompactSlicedConfig
from compress.models.configuration_lowrank import LowRankConfig
from compress.models.loading import load_model
from compress.models.modeling_compact_sliced import CompactSlicedForCausalLM
from compress.models.modeling_lowrank import LowRankForCausalLM
from compress.models.storage import Storage
from compress.models.stored_loading import is_stored, load_stored
from compress.numerics.sparsity import Pattern, keep_mask
from compress.tuning import blockwise
from compress.tuning.blocks_files import FILES, KeptTensors
from compress.tuning.blocks_trainable import TrainableLinear, stored, trainable, trainable_linear
from compress.tuning.blockwise import BlockSettings, Distillation, Lesson, Pupil, tune_blocks
from compress.tuning.writing import write_weights
from stored import label, random_parts, store_linears, write_compact, write_packed

HALF = Pattern(2, 4)
WINDOWS = oracles.random_ids(6, 12)
HELD_OUT = oracles.random_ids(3, 12, seed=2)
CPU = torch.device("cpu")


def dense_model() -> Any:
    """The one that `write_packed` and `write_compact` begin with, in float64."""
    model: Any = tiny.tiny_model("llama", dtype=torch.float32)
    return model.double()


def write_thin(folder: Path, dense: Path) -> None:
    """Half of each linear's rank, in both forms."""
    inner: Any = dense_model()
    forms = itertools.cycle(["factors", "pivot"])
    linears = [(name, module) for name, module in inner.named_modules() if isinstance(module, nn.Linear)]
    entries = {
        name: {"rank": min(linear.weight.shape) // 2, "form": next(forms), "bias": linear.bias is not None}
        for name, linear in linears
        if name != "lm_head"
    }
    torch.manual_seed(3)
    model = LowRankForCausalLM(LowRankConfig(text_config=inner.config, factors=entries)).double()
    model.load_state_dict({f"model.{name}": tensor for name, tensor in inner.state_dict().items()}, strict=False)
    for name, parameter in model.named_parameters():
        if ".first." in name or ".second." in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def write_stock(folder: Path, dense: Path) -> None:
    """The dense model pruned 2:4 and stored as it is."""
    model = dense_model()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.weight"):
            parameter.data *= keep_mask(parameter.data.abs(), HALF)
    model.save_pretrained(folder)


def write_rotated(folder: Path, dense: Path, width: int = tiny.HIDDEN) -> None:
    """Sliced to a width; at the dense one the same function in another basis at every point."""
    stages = oracles.slicegpt({"ratio": 1 - width / tiny.HIDDEN}) if width < tiny.HIDDEN else oracles.fold_and_rotate()
    result = oracles.walked(dense, stages, oracles.random_ids(20, 16, seed=4))
    oracles.sliced_model(result).save_pretrained(folder)


def write_compact_sliced(folder: Path, dense: Path) -> None:
    result = oracles.walked(dense, oracles.slicegpt({"ratio": 0.25}), oracles.random_ids(20, 16, seed=4))
    inner = oracles.sliced_model(result)
    storage = STORAGES["compact"]
    parts = store_linears(inner, storage, torch.float64)
    entries = {path: storage.entry(bias=part.bias is not None) for path, part in parts.items()}
    config = CompactSlicedConfig(text_config=inner.config, linears=entries, architectures=["CompactSlicedForCausalLM"])
    with torch.device("meta"):
        model = CompactSlicedForCausalLM(config)
    model.model = inner
    model.save_pretrained(folder)


def quantized(storage: Storage) -> Callable[[Path, Path], object]:
    write = write_packed if storage.form == "packed" else write_compact
    return lambda folder, _dense: write(folder, storage, dtype=torch.float64)


STORAGES = {
    "packed": Storage("packed", 4, group=16, pattern=HALF, rank=4),
    "packed, asymmetric": Storage("packed", 3, group="tensor", symmetric=False),
    "packed, 8-bit floats": Storage("packed", 8, floating=True, inputs="fp8", rank=3),
    "packed, not quantized": Storage("packed", None, pattern=HALF, rank=4),
    "compact": Storage("compact", 4, group=12, pattern=HALF, rank=5, adapter_bits=4, adapter_group=16),
    "compact, finer": Storage("compact", 3, group="channel", finer=True, rank=3),
    "compact, not quantized": Storage("compact", None, pattern=HALF, rank=5),
}
KINDS: dict[str, Callable[[Path, Path], object]] = {
    "thin": write_thin,
    "stock": write_stock,
    "sliced": lambda folder, dense: write_rotated(folder, dense, 24),
    "compact, sliced": write_compact_sliced,
    **{name: quantized(storage) for name, storage in STORAGES.items()},
}
SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 2}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with oracles.exact_norms():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("blockwise")
    with oracles.exact_norms():
        dense_model().save_pretrained(root / "dense")
        for kind, write in KINDS.items():
            write(root / kind, root / "dense")
    return root


def tune(root: Path, kind: str, out: Path, **settings: Any) -> blockwise.BlocksTuned:
    out.mkdir(exist_ok=True)
    asked = BlockSettings(**(SETTINGS | settings))
    tuned = tune_blocks(root / kind, root / "dense", WINDOWS, HELD_OUT, out, asked, lambda *_heard: None)
    settle(root / kind, out)
    return tuned


def settle(folder: Path, out: Path) -> None:
    """The whole tuned checkpoint in the place of its blocks."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    write_weights(folder, out, KeptTensors(out))
    for file in out.glob(FILES):
        file.unlink()


@pytest.fixture(scope="module")
def tuned(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, blockwise.BlocksTuned]]:
    """A kind tuned, once for all tests; the folder can be loaded."""
    done: dict[str, tuple[Path, blockwise.BlocksTuned]] = {}

    def tuned_kind(kind: str) -> tuple[Path, blockwise.BlocksTuned]:
        if kind not in done:
            out = tmp_path_factory.mktemp("tuned") / "out"
            done[kind] = out, tune(root, kind, out)
            for file in (root / kind).rglob("*.json"):
                shutil.copy(file, out / file.relative_to(root / kind))
        return done[kind]

    return tuned_kind


def whole(folder: Path) -> Any:
    load = load_stored if is_stored(folder) else load_model
    return load(folder, dtype=torch.float64, device=CPU)


def blocks_of(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1)


@contextmanager
def hooked(model: Any, ids: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What goes into each block and what comes out, by hooks on the whole model."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_block: nn.Module, given: tuple[Tensor, ...], kwargs: dict[str, Tensor], found: Any) -> None:
        stream = given[0] if given else kwargs["hidden_states"]
        seen.append((stream, found[0] if isinstance(found, tuple) else found))

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks_of(model)]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    yield seen


def relative_error(stream: Tensor, dense: Tensor, eps: float) -> Tensor:
    """The loss as the module says it, of one basis for both."""
    return ((stream - dense).square().sum(-1) / (dense.square().mean(-1) + eps)).mean() / dense.shape[-1]


def divergence(model: Any, dense: Any) -> float:
    """Of the next token on the held-out windows, in nats."""
    p, q = (oracles.logits_of(each, HELD_OUT).double().softmax(-1) for each in (dense, model))
    return float((p * (p / q).log()).sum(-1).mean())


def distillation(root: Path, kind: str, out: Path, **settings: Any) -> Distillation:
    asked = BlockSettings(**(SETTINGS | settings))
    return Distillation(root / kind, root / "dense", WINDOWS, HELD_OUT, out, asked)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_streams_are_those_of_the_whole_models(kind, root, tmp_path):
    model, dense = whole(root / kind), whole(root / "dense")
    ids = torch.cat([WINDOWS, HELD_OUT])
    with hooked(model, ids) as own, hooked(dense, ids) as wanted:
        pass
    distilled = distillation(root, kind, tmp_path, epochs=0)
    for index, _ in enumerate(distilled.blocks()):
        given = torch.cat([distilled.given.now(batch) for batch in distilled.batches])
        target = torch.cat([distilled.wanted.now(batch) for batch in distilled.batches])
        assert oracles.largest_difference(given, own[index][0]) < 1e-10
        assert oracles.largest_difference(target, wanted[index][1]) < 1e-10
    last = torch.cat([distilled.given.now(batch) for batch in distilled.batches])
    assert oracles.largest_difference(last, own[-1][1]) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_without_epochs_every_file_stays_as_it_is(kind, root, tmp_path):
    done = tune(root, kind, tmp_path / "out", epochs=0)
    files = sorted(file.relative_to(root / kind) for file in (root / kind).rglob("*.safetensors"))
    assert sorted(file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*.safetensors")) == files
    assert all((root / kind / file).read_bytes() == (tmp_path / "out" / file).read_bytes() for file in files)
    assert [(block.epoch, block.after) for block in done.blocks] == [(0, block.before) for block in done.blocks]


INTEGERS = ("weight_packed", "weight_shape", "weight_zero_point", "weight.codes", "places", "order", "shares")


@pytest.mark.parametrize("kind", KINDS)
def test_what_may_not_change_keeps_its_bytes(kind, root, tuned):
    out, _ = tuned(kind)
    changed = set()
    for file in (root / kind).rglob("*.safetensors"):
        ours = out / file.relative_to(root / kind)
        (length,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert ours.read_bytes()[: 8 + length] == file.read_bytes()[: 8 + length]
        assert ours.stat().st_size == file.stat().st_size
        before, after = load_file(file), load_file(ours)
        for name, tensor in before.items():
            if not torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)):
                changed.add(name)
            if tensor.is_floating_point() and tensor.ndim == 2 and tensor.dtype == torch.float64:
                zeros = tensor == 0
                assert not after[name][zeros].any(), name
    assert changed
    assert all(".layers." in name for name in changed)
    assert not any(name.endswith(INTEGERS) for name in changed)
    for end in {"first.codes", "lora_A.weight", "norm.weight", "values", "scale", "bias", "second.weight"}:
        found = [name for name in names_of(root / kind) if name.endswith(end) and ".layers." in name]
        assert not found or changed & set(found), end


def names_of(folder: Path) -> list[str]:
    return [name for file in folder.rglob("*.safetensors") for name in load_file(file)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith("sliced")])
def test_no_block_is_worse_on_held_out_windows_and_the_files_give_what_is_said(kind, root, tuned):
    out, done = tuned(kind)
    model, dense = whole(out), whole(root / "dense")
    with torch.no_grad(), hooked(model, HELD_OUT) as own, hooked(dense, HELD_OUT) as wanted:
        errors = [float(relative_error(s, x, 1e-4)) for (_, s), (_, x) in zip(own, wanted, strict=True)]
    errors[-1] = divergence(model, dense)
    assert errors == pytest.approx([block.after for block in done.blocks], rel=1e-9)
    assert all(block.after <= block.before for block in done.blocks)
    assert done.blocks[0].after < done.blocks[0].before
    assert all((block.epoch == 0) == (block.after == block.before) for block in done.blocks)


@pytest.mark.parametrize("kind", ["thin", "stock", "packed", "compact"])
def test_one_step_is_the_whole_models_by_hand(kind, root, tmp_path):
    """Adam's first step by the gradient that a loss on the whole model's hidden states has."""
    model, dense, ids, rate = whole(root / kind), whole(root / "dense"), WINDOWS[:2], 1e-3
    block = blocks_of(model)[0]
    block.requires_grad_(True)
    with hooked(model, ids) as own, torch.no_grad(), hooked(dense, ids) as wanted:
        target = wanted[0][1]
    relative_error(own[0][1], target, 1e-4).backward()
    by_hand = {}
    for name, parameter in block.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad * (parameter != 0) if name.endswith("_proj.weight") else parameter.grad
            size = float(parameter.detach().square().mean().sqrt())
            by_hand[name] = parameter.detach() - rate * size * gradient / (gradient.abs() + 1e-8)
    distilled = distillation(root, kind, tmp_path, rate=rate)
    with distilled.student.embeddings():
        distilled.given.embed(distilled.student)
    with distilled.loader.embeddings():
        distilled.wanted.embed(distilled.dense)
    with distilled.loader.block(0):
        distilled.wanted.advance(distilled.dense.blocks[0], 0)
    with distilled.student.block(0) as untuned:
        pupil = Pupil(distilled.student.blocks[0], untuned, distilled.settings, steps=10)
        lesson = Lesson(0, distilled.given, distilled.wanted, distilled.own.error)
        pupil.step(lesson, distilled.batches[0])
        found = pupil.stored()
    assert by_hand.keys() <= found.keys()
    assert by_hand
    for name, expected in by_hand.items():
        assert torch.allclose(found[name], expected, atol=1e-9, rtol=0), name


ALL = [*STORAGES.values(), Storage("packed", 8), Storage("compact", 5, group="tensor", rank=2, adapter_bits=8)]


@pytest.mark.parametrize("storage", ALL, ids=label)
def test_a_trainable_linear_is_the_stored_one(storage):
    """The same function, before training and, stored again, after every parameter has moved."""
    linear = random_parts(storage, 24, 32, torch.float64).stored(storage, torch.float64)
    block = nn.ModuleDict({"linear": linear})
    copied, x = trainable(block), torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.allclose(copied["linear"](x), linear(x), atol=1e-12)
    names = dict(copied.named_parameters())
    assert all(parameter.requires_grad for parameter in names.values())
    with torch.no_grad():
        for parameter in names.values():
            parameter *= 1 + 0.05 * torch.randn_like(parameter)
    put_back = stored(copied, torch.float64)
    linear.load_state_dict({name.removeprefix("linear."): value for name, value in put_back.items()}, strict=False)
    assert torch.allclose(copied["linear"](x), linear(x), atol=1e-12)
    copied["linear"](x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in names.values())


def test_plain_modules_are_trained_as_they_are_and_exact_zeros_stay():
    dense, sparse = nn.Linear(8, 4), nn.Linear(8, 4)
    sparse.weight.data[:, ::2] = 0
    assert trainable_linear(dense) is None
    twin = trainable_linear(sparse)
    assert isinstance(twin, TrainableLinear)
    twin(torch.randn(5, 8)).square().sum().backward()
    torch.optim.Adam(twin.parameters()).step()
    weight = twin.stored(torch.float32)["weight"]
    assert not weight[:, ::2].any()
    assert not torch.equal(weight[:, 1::2], sparse.weight[:, 1::2])


def test_rounded_weights_are_what_is_judged_and_what_the_next_block_sees(root, tmp_path):
    """A checkpoint in bfloat16: the reported errors are those of its files."""
    tiny.write_model(tmp_path / "dense", "llama", dtype=torch.float32)
    write_packed(tmp_path / "packed", STORAGES["packed"], dtype=torch.bfloat16)
    out = tmp_path / "out"
    done = tune(tmp_path, "packed", out)
    for file in (tmp_path / "packed").rglob("*.json"):
        shutil.copy(file, out / file.relative_to(tmp_path / "packed"))
    model, dense = load_stored(out, dtype=torch.float32, device=CPU), whole(tmp_path / "dense")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {
        torch.bfloat16,
        torch.int32,
        torch.int64,
    }
    with torch.no_grad(), hooked(model, HELD_OUT) as own, hooked(dense, HELD_OUT) as wanted:
        errors = [float(relative_error(s.double(), x, 1e-4)) for (_, s), (_, x) in zip(own, wanted, strict=True)]
    errors[-1] = divergence(model, dense)
    assert errors == pytest.approx([block.after for block in done.blocks], rel=1e-4)
    assert all(block.after < block.before for block in done.blocks)


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in tiny.SPARSE])
def test_every_family_comes_to_its_own_streams(family, tmp_path):
    """A model as its own student: blocks are found, and called with what their stock loop calls them with."""
    model = tiny.write_model(tmp_path, family, num_hidden_layers=2)
    own = Distillation(tmp_path, tmp_path, WINDOWS[:2], HELD_OUT, tmp_path, BlockSettings(epochs=0))
    assert all(abs(block.before) < 1e-12 for block in own.blocks())
    last = torch.cat([own.given.now(batch) for batch in own.batches])
    with torch.no_grad(), hooked(model, torch.cat([WINDOWS[:2], HELD_OUT])) as streams:
        assert oracles.largest_difference(last, streams[-1][1]) < 1e-9


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_rotated_model_is_found_to_be_the_dense_one(family, tmp_path):
    """In any basis, and without the mean that a LayerNorm does not see: nothing is left to learn."""
    tiny.write_model(tmp_path / "dense", family)
    write_rotated(tmp_path / "rotated", tmp_path / "dense")
    many = oracles.random_ids(40, 12)
    distilled = Distillation(
        tmp_path / "rotated", tmp_path / "dense", many, HELD_OUT, tmp_path, BlockSettings(epochs=0)
    )
    assert all(block.before < 1e-9 for block in distilled.blocks())
    assert not distilled.shared


def test_one_block_of_each_model_at_a_time_has_weights(root, tmp_path, monkeypatch):
    distilled = distillation(root, "packed", tmp_path)
    error = Lesson.error

    def watched(lesson: Lesson, block: nn.Module, batch: Any) -> Tensor:
        student, dense = distilled.student, distilled.dense
        filled = [any(not t.is_meta for t in each.state_dict().values()) for each in student.blocks]
        assert filled == [index == lesson.index for index in range(len(filled))]
        assert all(parameter.is_meta for parameter in nn.ModuleList(dense.blocks).parameters())
        assert all(parameter.is_meta for parameter in dense.model.get_input_embeddings().parameters())
        heads = [*student.model.lm_head.parameters(), *dense.model.lm_head.parameters()]
        assert {parameter.is_meta for parameter in heads} == {lesson.index < len(filled) - 1}
        assert all(parameter.is_meta for parameter in student.model.get_input_embeddings().parameters())
        return error(lesson, block, batch)

    monkeypatch.setattr(Lesson, "error", watched)
    assert len(list(distilled.blocks())) == tiny.NUM_BLOCKS


@pytest.mark.parametrize("kind", ["packed", "sliced"])
def test_a_killed_run_goes_on_to_the_same_bytes(kind, root, tuned, tmp_path):
    """With the activations on disk, and without a block being tuned again."""
    out, undisturbed = tuned(kind)
    again = tmp_path / "out"
    again.mkdir()
    asked = BlockSettings(**SETTINGS)

    def killed(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_blocks(root / kind, root / "dense", WINDOWS, HELD_OUT, again, asked, killed)
    assert len(list(again.glob(FILES))) == 2
    with pytest.MonkeyPatch.context() as patch:
        tuned_now = []
        learn = Pupil.learn
        patch.setattr(Pupil, "learn", lambda pupil, lesson: (tuned_now.append(lesson.index), learn(pupil, lesson)))
        assert tune(root, kind, again, cache_memory=0) == undisturbed
    assert set(tuned_now) == {2}
    for file in out.rglob("*.safetensors"):
        assert (again / file.relative_to(out)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "has 3 blocks, .* has 2. Name the dense model that it was made from."),
        ({"vocab_size": 300}, "has 259 tokens, .* has 300. Name the dense model that it was made from."),
    ],
)
def test_another_models_teacher_is_refused(changes, message, root, tmp_path):
    tiny.tiny_model("llama", **changes).save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match=message):
        tune_blocks(
            root / "thin", tmp_path / "other", WINDOWS, HELD_OUT, tmp_path, BlockSettings(), lambda *_heard: None
        )
