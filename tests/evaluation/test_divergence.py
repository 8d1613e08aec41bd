"""The divergence from the dense model, against a sum over the vocabulary, and what keeps memory small."""

import math
import statistics
from typing import Any

import pytest
import torch

from compress.checkpoints.quality import Divergence
from compress.errors import NumericalError, UnsupportedModel
from compress.evaluation import windows as module
from compress.evaluation.windows import divergence, remember
from tiny import VOCAB_SIZE, tiny_model


def windows(count: int = 4, seq_len: int = 6) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (count, seq_len), generator=torch.Generator().manual_seed(1))


def measured(dense: Any, model: Any, batch: torch.Tensor, batch_size: int = 3) -> Divergence:
    reference = remember(dense, batch, name="the dense one", batch_size=batch_size)
    return divergence(model, reference, batch, dataset="random", batch_size=batch_size)


def slow(dense: Any, model: Any, batch: torch.Tensor) -> tuple[list[float], float]:
    """Each window's mean divergence, and the share of tokens with one top token; by plain sums."""
    means, same = [], []
    with torch.no_grad():
        for window in batch:
            total = 0.0
            p_logits, q_logits = (each(input_ids=window[None]).logits[0, :-1].tolist() for each in (dense, model))
            for p_row, q_row in zip(p_logits, q_logits, strict=True):
                p_sum, q_sum = (math.fsum(math.exp(x) for x in row) for row in (p_row, q_row))
                for p, q in zip(p_row, q_row, strict=True):
                    total += math.exp(p) / p_sum * ((p - math.log(p_sum)) - (q - math.log(q_sum)))
                same.append(p_row.index(max(p_row)) == q_row.index(max(q_row)))
            means.append(total / (len(window) - 1))
    return means, statistics.fmean(same)


def test_a_sum_over_the_vocabulary_agrees():
    dense, model = tiny_model("llama"), tiny_model("llama", seed=1)
    means, agreement = slow(dense, model, windows())
    found = measured(dense, model, windows())
    assert found.kl == pytest.approx(statistics.fmean(means), rel=1e-10)
    assert found.standard_error == pytest.approx(statistics.stdev(means) / 2, rel=1e-9)
    assert found.agreement == agreement
    assert (found.dataset, found.dense, found.tokens) == ("random", "the dense one", 20)
    assert (found.windows, found.seq_len) == (4, 6)
    assert found.seconds > 0


@pytest.mark.parametrize("model_type", ["opt", "qwen2", "mixtral"])
def test_a_model_does_not_diverge_from_itself(model_type):
    model = tiny_model(model_type, num_hidden_layers=1)
    found = measured(model, model, windows())
    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.agreement == 1


def test_logits_are_never_all_there(monkeypatch):
    """The head is given a few rows at a time, and the dense model may be freed but for it."""
    dense, model = tiny_model("llama"), tiny_model("llama", seed=1)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * VOCAB_SIZE)
    reference = remember(dense, windows(), name="dense", batch_size=3)
    assert reference.head is dense.lm_head
    assert reference.states.shape == (4, 6, dense.config.hidden_size)
    for parameter in dense.model.parameters():
        parameter.data.fill_(math.nan)
    read = []
    handle = model.lm_head.register_forward_hook(lambda _module, _given, made: read.append(made.shape))
    found = divergence(model, reference, windows(), dataset="random", batch_size=3)
    handle.remove()
    assert math.isfinite(found.kl)
    # Passed on, the head gives what it reads; otherwise two rows of logits, but for the one window that is checked.
    logits = [shape for shape in read if shape[-1] == VOCAB_SIZE]
    assert max(shape.numel() for shape in logits[2:]) <= 2 * VOCAB_SIZE
    assert "forward" not in vars(dense.lm_head) | vars(model.lm_head)


def test_more_than_a_head_is_refused():
    """Gemma 2 bends its logits: a divergence of what the head alone gives would be another number."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCAB_SIZE}
    model = AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.05)).eval()
    with pytest.raises(UnsupportedModel, match="its logits are not what its head gives"):
        measured(model, model, windows())


@pytest.mark.parametrize("broken", ["dense", "model"])
def test_a_divergence_that_is_no_number_is_an_error(broken):
    dense, model = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1)
    batch = windows().clamp_max(VOCAB_SIZE - 2)
    batch[2, 0] = VOCAB_SIZE - 1
    (dense if broken == "dense" else model).model.embed_tokens.weight.data[VOCAB_SIZE - 1] = math.nan
    with pytest.raises(NumericalError, match=r"^The loss on 'random', window 2, is nan"):
        measured(dense, model, batch)
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalError):
        measured(dense, model, windows())


@pytest.mark.gpu
def test_on_a_gpu():
    dense, model = tiny_model("llama"), tiny_model("llama", seed=1)
    here = measured(dense, model, windows())
    there = measured(dense.to("cuda"), model.to("cuda"), windows())
    assert there.kl == pytest.approx(here.kl, rel=1e-9)
