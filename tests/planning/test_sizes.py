"""Widths and parameters before any weight is read: the rules of `slice`, and the published sizes of known models."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig, PhiConfig

from compress.calibration.sites import Basis, StreamPoint, stream_points
from compress.numerics.frames import Frame
from compress.planning.plan import Plan
from compress.recipe import parse_recipe
from compress.stages.stream import Slice
from orders import planned
from recipes import slicegpt

# ---- widths ----


def points(width: int, num_blocks: int, branches: tuple[str, ...] = ("attention", "mlp")) -> list[StreamPoint]:
    return stream_points(width, num_blocks=num_blocks, branch_names=list(branches), seed=0)


def widths(stage: Slice, places: list[StreamPoint]) -> list[int | None]:
    return [stage.planned_width(point) for point in places]


@pytest.mark.parametrize(
    ("ratio", "dense", "round_to", "kept"),
    [
        (0.25, 4096, 8, 3072),
        (0.2, 768, 8, 608),  # 614.4
        (0.3, 4096, 8, 2864),  # 2867.2
        (0.3, 4096, 1, 2867),
        (0.3, 4096, 128, 2816),
        (0.1, 4096, 8, 3680),  # 3686.4
        (0.01, 64, 8, 56),  # 63.36: the next multiple below, however little was asked for
        (0.999, 64, 8, 8),  # never nothing
    ],
)
def test_a_ratio_deletes_at_least_its_share(ratio, dense, round_to, kept):
    found = widths(Slice(ratio=ratio, round_to=round_to), points(dense, 2))
    assert found == [kept, kept, kept, kept, dense]


def rotated(point: StreamPoint, eigenvalues: list[float]) -> StreamPoint:
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    frame = Frame(torch.eye(len(spectrum), dtype=torch.float64), spectrum)
    point.basis = Basis(frame, width=len(spectrum))
    return point


@pytest.mark.parametrize(
    ("share", "round_to", "kept"),
    [(0.5, 1, 1), (0.75, 1, 2), (0.76, 1, 3), (1.0, 1, 5), (0.76, 2, 2), (0.1, 4, 4), (0.95, 4, 4)],
)
def test_explained_variance_leaves_the_width_to_the_data(share, round_to, kept):
    stage = Slice(explained_variance=share, round_to=round_to)
    first, *_, last = (rotated(point, [8.0, 4.0, 2.0, 1.0, 1.0, 0.0]) for point in points(6, 2))
    assert stage.planned_width(first) is None
    stage.apply(first)
    assert first.width == kept
    stage.apply(last)
    assert last.width == 6


def test_faults_say_what_to_do():
    places = points(64, 3)
    assert Slice(ratio=0.25).problems(places) == []
    assert Slice(explained_variance=0.9).problems(places) == []
    assert Slice(block_ratios=(0.1, 0.2)).problems(places) == [
        "2 ratios are given for 3 blocks. Give one for each block."
    ]
    assert Slice(ratio=0.9, round_to=8).problems(places) == [
        "The ratio 0.9 leaves less than 8 of 64 dimensions (widths are multiples of 8). "
        "Use a smaller ratio or --round-to."
    ]
    assert Slice(ratio=0.9, round_to=2).problems(places) == []
    assert Slice(width=72).problems(places) == ["The width 72 is more than the model's hidden size of 64. Use less."]
    assert Slice(linear_ratios=(0, 0)).problems(places) == [
        "The ratio 0.0 deletes nothing of 64 dimensions. Use a larger one."
    ]
    assert Slice(block_ratios=(0, 0, 0.5)).problems(places) == []


# Facts of the models' config.json.
def opt(hidden: int, blocks: int, heads: int) -> OPTConfig:
    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden}
    return OPTConfig(vocab_size=50272, num_hidden_layers=blocks, num_attention_heads=heads, **sizes)


def llama(hidden: int, neurons: int, blocks: int, heads: int, groups: int, vocabulary: int = 32000) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": neurons, "num_hidden_layers": blocks}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary}
    return LlamaConfig(**sizes)


OPT_125M, OPT_6_7B = opt(768, 12, 12), opt(4096, 32, 32)
LLAMA_2_7B, LLAMA_2_70B = llama(4096, 11008, 32, 32, 32), llama(8192, 28672, 80, 64, 8)
LLAMA_3_8B = llama(4096, 14336, 32, 32, 8, 128256)
PHI_2 = PhiConfig(
    vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32
)

# Parameters as they are stored: OPT's head is its embeddings and counts once.
DENSE = {
    id(OPT_125M): 125_239_296,
    id(OPT_6_7B): 6_658_473_984,
    id(LLAMA_2_7B): 6_738_415_616,
    id(LLAMA_2_70B): 68_976_648_192,
    id(LLAMA_3_8B): 8_030_261_248,
    id(PHI_2): 2_779_683_840,
}


def name_of(value: Any) -> str | None:
    """Of a model in a test's name."""
    return f"{value.model_type}-{DENSE[id(value)] / 1e9:.1f}B" if id(value) in DENSE else None


def plan(config: Any, ratio: float) -> Plan:
    data = {"method": "slicegpt", "stages": slicegpt({"ratio": ratio}), "calibration": {"source": "wikitext2"}}
    return planned(config, parse_recipe(data))


@pytest.mark.parametrize(
    ("config", "percent", "removed"),
    [(LLAMA_2_7B, 25, 15.3), (LLAMA_3_8B, 25, 15.6), (OPT_6_7B, 10, -6.1), (PHI_2, 25, 19.2)],
    ids=name_of,
)
def test_the_share_that_is_removed(config, percent, removed):
    """Of the dense model as it is stored, a tied head counted once: slicing a little adds parameters."""
    sliced = plan(config, percent / 100).size
    assert round(100 * (1 - sliced.parameters / DENSE[id(config)]), 1) == removed


def test_a_plan_of_a_70b_model_takes_no_weights():
    found = plan(LLAMA_2_70B, 0.25)
    assert found.dense.parameters == DENSE[id(LLAMA_2_70B)]
    assert found.size is not None
    assert round(100 * found.removed, 1) == 16.0
    # One block (three MLP matrices and the attention's) in float32 twice, six D x D matrices in float64, the largest
    # matrix of all, the head, turned in float64, and 1 GiB of activations.
    block = 3 * 8192 * 28672 + 2 * 8192 * 8192 + 2 * 8192 * 1024 + 2 * 8192
    assert found.memory_bytes == 2 * block * 4 + 6 * 8192**2 * 8 + 32000 * 8192 * (8 + 8 + 4) + 2**30
    activations = 128 * 2048 * 8192 * 4
    assert found.disk_bytes == found.size.bytes + 2 * activations + activations
