"""Perplexity against a loop over tokens, and what it says when a model is broken."""

import math
import statistics

import pytest
import torch
from torch import nn

from compress.errors import NumericalError, UsageError
from compress.evaluation.windows import perplexity
from tiny import VOCAB_SIZE, tiny_model


def opt():
    return tiny_model("opt", dtype=torch.float32, num_hidden_layers=2, dropout=0.5)


def llama():
    return tiny_model("llama", dtype=torch.float32, num_hidden_layers=2)


def random_windows(count: int, seq_len: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (count, seq_len), generator=torch.Generator().manual_seed(1))


def slow_losses(model: nn.Module, windows: torch.Tensor) -> list[float]:
    """Token by token: the model reads a prefix and gives the next token's probability."""
    losses = []
    for window in windows:
        total = 0.0
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :position]).logits[0, -1].tolist()
            normalizer = math.log(math.fsum(math.exp(logit) for logit in logits))
            total += normalizer - logits[window[position]]
        losses.append(total / (len(window) - 1))
    return losses


@pytest.mark.parametrize("make", [opt, llama])
def test_a_loop_over_tokens_agrees(make):
    model = make().double()
    windows = random_windows(4, 6)
    losses = slow_losses(model, windows)
    answer = perplexity(model, windows, dataset="random", batch_size=2)
    assert answer.nll == pytest.approx(statistics.fmean(losses), rel=1e-12)
    assert answer.ppl == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-12)
    assert answer.standard_error == pytest.approx(answer.ppl * statistics.stdev(losses) / math.sqrt(4), rel=1e-10)
    assert (answer.dataset, answer.tokens, answer.windows, answer.seq_len) == ("random", 20, 4, 6)
    assert answer.seconds > 0


def test_dropout_is_off_and_training_modes_are_put_back():
    model = opt().train()
    found = [perplexity(model, random_windows(2, 8), dataset="random", batch_size=2).nll for _ in range(2)]
    assert found[0] == found[1]
    model.model.decoder.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    perplexity(model, random_windows(2, 8), dataset="random", batch_size=2)
    assert {name: module.training for name, module in model.named_modules()} == modes
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError):
        perplexity(model, random_windows(2, 8), dataset="random", batch_size=2)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize(("value", "loss"), [(math.nan, "nan"), (math.inf, "nan")])
def test_a_loss_that_is_no_number_names_the_window(value, loss):
    model = llama()
    windows = random_windows(6, 8).clamp_max(VOCAB_SIZE - 2)
    windows[3, 0] = VOCAB_SIZE - 1
    model.model.embed_tokens.weight.data[VOCAB_SIZE - 1] = value
    done = []
    with pytest.raises(NumericalError) as error:
        perplexity(model, windows, dataset="wikitext2", batch_size=2, on_batch=done.append)
    assert str(error.value) == (
        f"The loss on 'wikitext2', window 3, is {loss}: a NaN or Inf comes up first in the weights of "
        "model.embed_tokens. Check the weights, or try --dtype float32."
    )
    assert done == [2]


def test_a_window_needs_a_target():
    with pytest.raises(UsageError) as error:
        perplexity(llama(), random_windows(2, 1), dataset="random", batch_size=1)
    assert str(error.value) == "Perplexity needs windows of at least 2 tokens, --seq-len is 1."


@pytest.mark.gpu
def test_the_model_may_be_on_a_gpu():
    windows = random_windows(4, 8)
    here = perplexity(opt().double(), windows, dataset="random", batch_size=2)
    there = perplexity(opt().double().cuda(), windows, dataset="random", batch_size=2)
    assert there.ppl == pytest.approx(here.ppl, rel=1e-10)
