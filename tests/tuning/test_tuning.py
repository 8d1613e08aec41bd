"""The parts of a tuning: windows, losses, schedule, what is trained, rounding, early stopping, states."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress import families
from compress.checkpoints.metadata import AdapterMetadata, LinearMetadata, Metadata
from compress.errors import NumericalError, UsageError
from compress.models.packing import pack_bits, unsigned
from compress.models.stored_loading import load_stored
from compress.numerics.sparsity import Pattern
from compress.own_model.configuration_compress import CompressConfig
from compress.own_model.modeling_compress import CompressForCausalLM, StoredMatrix
from compress.tuning.looking import block_linears, chosen, stored_in_codes, trainable, why_not_merged
from compress.tuning.settings import Rate, Reader, Settings, share_of_rate
from compress.tuning.trained import (
    AdapterLinear,
    DequantizedLinear,
    Trained,
    TrainedMatrix,
    compact_adapters,
    dequantize,
    packed_adapters,
)
from compress.tuning.trained import lora as train_lora
from compress.tuning.training import Objective, Training
from compress.tuning.tuner import put_tensors
from matrices import args_of
from oracles import logits_of, random_ids
from stored import storage_of, write_compact, write_packed
from tiny import VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer, write_text

IDS = random_ids(6, 12, seed=1)
F32, CPU = torch.float32, torch.device("cpu")


def settings(**changes: Any) -> Settings:
    usual: dict[str, Any] = {"data": "text.txt", "steps": 6, "seq_len": 12, "batch_size": 2, "eval_every": 2}
    return Settings(**(usual | changes))


def training(model: Any, *, rate: float = 1e-2, teacher: Any = None, **changes: Any) -> Training:
    return Training(
        model, teacher, IDS, IDS[:3], settings(**changes), Rate(rate, relative=False), Accelerator(cpu=True)
    )


def lora(*, seed: int = 0, **options: Any) -> Trained:
    model = tiny_model("llama", dtype=F32, num_hidden_layers=1)
    torch.manual_seed(seed)
    return train_lora(model, block_linears(model, model.config), rank=2, alpha=4, **({"merge": True} | options))


def drift(trained: Any) -> None:
    """Other parameters than those it began with."""
    torch.manual_seed(5)
    for parameter in trained.parameters.values():
        parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(("model_type", "distilled"), [("qwen2", False), ("gemma2", True)])  # a tied head; a cap
def test_some_predictions_at_a_time_give_the_loss_and_the_gradients_of_all(monkeypatch, model_type, distilled):
    monkeypatch.setattr("compress.tuning.training.FEWEST", 5)
    monkeypatch.setattr("compress.tuning.training.LOGITS", {"cpu": 7 * VOCAB_SIZE})
    model, dense = (tiny_model(model_type, dtype=torch.float64, num_hidden_layers=1, seed=seed) for seed in (0, 3))
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    if distilled:
        wanted = logits_of(dense, IDS)[:, :-1].flatten(0, 1).log_softmax(-1)
        loss = nn.functional.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
    else:
        loss = nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
    parameters = dict(model.named_parameters())
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    objective = Objective(model, dense if distilled else None)
    torch.testing.assert_close(objective.loss(IDS), loss.detach())
    torch.testing.assert_close(objective.backward(IDS), loss.detach())
    torch.testing.assert_close({name: each.grad for name, each in parameters.items()}, expected)
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_the_rate_rises_straight_and_falls_as_a_half_cosine():
    rates = [share_of_rate(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * each for each in range(1, 11)])
    assert rates[54] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert all(now > later > 0 for now, later in itertools.pairwise(rates[9:]))
    assert share_of_rate(0, 1, 0.05) == 1
    assert share_of_rate(0, 3, 0.0) == 1


def reader() -> Reader:
    return Reader(tiny_tokenizer(), 16, 0, None)


def test_the_last_windows_of_a_file_are_held_out(tmp_path):
    file = write_text(tmp_path / "text.txt", lines=40)
    texts = reader().texts(str(file), None, ())
    assert texts.unlike is None
    whole = reader().all_of([file.read_text()])
    assert len(texts.held_out) == len(whole) // 10
    assert torch.equal(torch.cat([texts.train, texts.held_out]), whole)
    assert len(reader().texts(str(file), 5, ()).train) == 5
    short = tmp_path / "short.txt"
    short.write_text("a few bytes only")
    with pytest.raises(UsageError, match="holds 1 windows of 16 tokens, needed: 2"):
        reader().texts(str(short), None, ())


def test_a_data_set_is_held_out_by_its_validation_split(monkeypatch):
    def rows(source: str, split: str, data_dir: Path | None) -> list[str]:
        if source == "nowhere.txt":
            raise UsageError("There is no such file.")
        return [f"{split[0]} {source}\n" * 40] * (60 if split == "train" else 30)

    monkeypatch.setattr("compress.tuning.settings.load_rows", rows)
    texts = reader().texts("wood", 24, ("nowhere.txt", "wood", "field"))
    assert texts.train.shape == (24, 16)
    assert texts.held_out.shape == (64, 16)
    assert texts.unlike[0] == "field"  # the one is not on this machine, the other is the text itself
    read = [reader().tokenizer.decode(each.flatten()) for each in (texts.train, texts.held_out, texts.unlike[1])]
    assert ["t wood" in read[0], "v wood" in read[1], "v field" in read[2]] == [True] * 3
    assert ["v " in read[0], "t " in read[1], "t " in read[2]] == [False] * 3
    assert torch.equal(reader().texts("wood", 24, ()).train, texts.train)
    assert len(reader().texts("wood", None, ()).train) > 500


def thin_model() -> CompressForCausalLM:
    entries = {
        "model.layers.0.mlp.down_proj": {"rank": 5, "form": "factors", "bias": True},
        "model.layers.0.mlp.up_proj": {"rank": 6, "form": "pivot", "bias": True},
    }
    dense = tiny_config("llama", num_hidden_layers=1)
    config = CompressConfig(text_config=dense, structure=families.find(dense).structure(), factors=entries)
    torch.manual_seed(0)
    return CompressForCausalLM(config).eval()


def test_a_lora_is_on_every_linear_of_the_blocks_and_merges_exactly():
    trained = lora()
    layers = [path for path, module in trained.model.named_modules() if isinstance(module, AdapterLinear)]
    assert len(layers) == 7
    assert "lm_head" not in layers
    drift(trained)
    expected = logits_of(trained.model.eval(), IDS)
    settled = trained.settled()
    assert not settled.adapter
    plain = tiny_model("llama", dtype=F32, num_hidden_layers=1)
    before = logits_of(plain, IDS)
    missing = plain.load_state_dict(dict(settled.tensors), strict=False)
    assert not missing.unexpected_keys
    torch.testing.assert_close(logits_of(plain, IDS), expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.05


def metadata(**told: Any) -> Metadata:
    usual: dict[str, Any] = {"form": None, "adapter": None, "linears": [], "loads_without_our_code": True}
    return Metadata.model_construct(**(usual | told))


@pytest.mark.parametrize(
    ("told", "linear", "reason"),
    [
        ({}, {}, None),
        ({"loads_without_our_code": False}, {"form": "pivot", "rank": 4}, None),
        ({"form": "packed"}, {"bits": 4}, "stored in few bits"),
        ({}, {"bits": 4, "pattern": "2:4"}, "would fill the zeros"),
        ({}, {"bits": 4}, "grid of few bits"),
        ({}, {"form": "factors", "rank": 4}, "multiplied out from low ranks"),
    ],
)
def test_a_lora_is_merged_where_weights_stay_what_they_are(told, linear, reason):
    found = why_not_merged(metadata(linears=[LinearMetadata(linear="a", **linear)], **told))
    assert found is None if reason is None else reason in str(found)


def test_what_can_be_trained_follows_from_how_it_is_stored(tmp_path):
    plain, thin = tiny_model("llama", dtype=F32, num_hidden_layers=1), thin_model()
    assert trainable(metadata(), plain) == ("lora", "all")
    assert trainable(metadata(), thin) == ("factors", "lora", "all")
    assert trainable(metadata(form="packed"), plain) == ("lora",)
    assert trainable(metadata(form="packed", adapter=AdapterMetadata(r=3)), plain) == ("adapters",)
    assert trainable(metadata(adapter=AdapterMetadata(r=3)), plain) == ("adapters",)
    compact = write_compact(tmp_path / "compact", storage_of("compact", 4))
    with pytest.raises(UsageError, match=r"has no adapters, .* Make one with adapters: compress slim"):
        trainable(metadata(form="compact"), compact)
    assert chosen(settings(), ("factors", "lora")) == "factors"
    assert chosen(settings(train="lora"), ("factors", "lora")) == "lora"
    with pytest.raises(UsageError, match=r"--train all is not for this checkpoint\. It has: lora\."):
        chosen(settings(train="all"), ("lora",))


def stored_matrix(bits: int | None) -> StoredMatrix:
    quantization = None if bits is None else args_of(bits, 8).model_dump()
    matrix, draw = StoredMatrix(3, 20, quantization), torch.Generator().manual_seed(0)
    if bits is None:
        matrix.values = torch.randn(3, 20, generator=draw)
    else:
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 20), generator=draw)
        matrix.codes = pack_bits(unsigned(codes, bits), bits)
        matrix.scale = torch.rand(3, 3, generator=draw) + 0.1
    return matrix


@pytest.mark.parametrize("bits", [None, 3])
def test_a_trained_matrix_begins_as_what_is_stored_and_is_stored_as_what_it_gives(bits):
    stored = stored_matrix(bits)
    expected = stored.rows(0, 3, F32).clone()
    trained = TrainedMatrix(stored)
    assert torch.equal(trained(), expected)
    assert trained.tensors().keys() == {"values" if bits is None else "codes"}
    assert torch.equal(
        trained.tensors()["values" if bits is None else "codes"], stored.values if bits is None else stored.codes
    )
    trained.weight.data += 0.5 * torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    given = trained().detach().clone()
    assert not torch.equal(given, expected)
    for name, tensor in trained.tensors().items():
        assert tensor.shape == getattr(stored, name).shape
        setattr(stored, name, tensor)
    assert torch.equal(stored.rows(0, 3, F32), given)


def test_the_gradient_passes_straight_through_the_rounding_and_stops_where_codes_end():
    trained = TrainedMatrix(stored_matrix(4))
    scale: Any = trained.scale
    trained.weight.data[0, 0] = 20 * scale[0, 0]
    trained.weight.data[0, 1] = 0.4 * scale[0, 1]
    trained().sum().backward()
    gradient = trained.weight.grad
    assert gradient[0, 0] == 0
    assert gradient[0, 1] == 1
    assert torch.equal(gradient[1:], torch.ones(2, 20))


@pytest.mark.parametrize("adapter", [None, args_of(4, 16)], ids=["floats", "codes"])
def test_compact_adapters_are_trained_and_nothing_else_is_written(tmp_path, adapter):
    storage = storage_of("compact", 4, pattern=Pattern(2, 4), rank=3, adapter=adapter)
    model: Any = write_compact(tmp_path / "compact", storage)
    before = logits_of(model, IDS)
    trained = compact_adapters(model)
    assert torch.equal(logits_of(model, IDS), before)
    drift(trained)
    settled = trained.settled()
    assert {name.rpartition(".")[2] for name in settled.tensors} == {"codes" if adapter else "values"}
    again: Any = write_compact(tmp_path / "again", storage)
    state = again.state_dict()
    assert all(state[name].shape == tensor.shape for name, tensor in settled.tensors.items())
    again.load_state_dict(dict(settled.tensors), strict=False)
    torch.testing.assert_close(logits_of(again, IDS), logits_of(model, IDS))


STORED = {
    "zero points": storage_of("packed", 4, group=16, symmetric=False),
    "bytes, rounded inputs": storage_of("packed", 8, input_activations="int8"),
    "compact": storage_of("compact", 3, pattern=Pattern(2, 4), rank=3, adapter=args_of(4, 16)),
}


def frozen_gradients(trained: Any) -> dict[str, Tensor]:
    Objective(trained.model.train()).backward(IDS)
    return {name: each.grad for name, each in trained.parameters.items()}


@pytest.mark.parametrize("kind", STORED)
def test_weights_held_dense_give_the_same_logits_and_gradients(tmp_path, kind):
    def opened(folder: Path) -> Any:
        storage = STORED[kind]
        torch.manual_seed(0)
        if storage.form == "compact":
            return compact_adapters(write_compact(folder, storage))
        write_packed(folder, storage, num_hidden_layers=1)
        model = load_stored(folder, dtype=F32, device=CPU)
        if storage.rank:
            return packed_adapters(model)
        return train_lora(model, block_linears(model, model.config), rank=2, alpha=2, merge=False)

    stored, dense = opened(tmp_path / "stored"), opened(tmp_path / "dense")
    count = len(stored_in_codes(dense.model))
    dequantize(dense.model, F32)
    assert not stored_in_codes(dense.model)
    assert count == sum(isinstance(each, DequantizedLinear) for each in dense.model.modules()) > 0
    torch.testing.assert_close(logits_of(dense.model, IDS), logits_of(stored.model, IDS))
    drift(stored)
    drift(dense)
    torch.testing.assert_close(frozen_gradients(dense), frozen_gradients(stored))


def test_it_ends_after_looks_that_are_no_better_and_keeps_what_it_began_with(monkeypatch):
    losses = iter([2.0, 3.0, 3.5, 3.0, 3.2])
    monkeypatch.setattr(Training, "held_out_loss", lambda _self: next(losses))
    steps = training(lora(), steps=40, eval_every=1, patience=3)
    beginning = {name: each.detach().clone() for name, each in steps.trained.parameters.items()}
    steps.run(lambda _now: None, lambda *_: None)
    assert steps.course.best[0] == 0
    assert steps.course.step == 4
    steps.take_best()
    assert all(torch.equal(steps.trained.parameters[name], each) for name, each in beginning.items())


def test_a_loss_that_is_no_number_ends_the_run():
    steps = training(lora())
    next(iter(steps.trained.parameters.values())).data[:] = math.nan
    with pytest.raises(NumericalError, match=r"of step 1 is .* gradient nan\. Use a smaller --lr"):
        steps.step()


def test_dropout_is_off():
    model = tiny_model("opt", dtype=F32, num_hidden_layers=1, dropout=0.5, attention_dropout=0.5, layerdrop=0.9)
    steps = training(train_lora(model, block_linears(model, model.config), rank=2, alpha=2, merge=True))
    assert steps.trained.model.training
    assert float(steps.objective.loss(IDS)) == float(steps.objective.loss(IDS))
    torch.testing.assert_close(steps.objective.loss(IDS[:3]).double(), torch.tensor(steps.held_out_loss()).double())


def test_new_numbers_take_the_place_of_the_old_ones_and_nothing_else_changes(tmp_path):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    tensors = {"x": torch.randn(3, 5).to(torch.bfloat16), "y": torch.arange(7), "z": torch.randn(4)}
    save_file(tensors, source, metadata={"format": "pt"})
    new = torch.randn(3, 5)
    put_tensors(source, target, {"x": new})
    found = load_file(target)
    assert torch.equal(found["x"], new.to(torch.bfloat16))
    assert torch.equal(found["y"], tensors["y"])
    assert torch.equal(found["z"], tensors["z"])
    assert target.stat().st_size == source.stat().st_size
    changed = [
        n for n, pair in enumerate(zip(source.read_bytes(), target.read_bytes(), strict=True)) if pair[0] != pair[1]
    ]
    assert max(changed) - min(changed) < 30
