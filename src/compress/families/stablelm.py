"""StableLM: LayerNorm, rotary positions on a part of each head, dropout after the MLP."""

from dataclasses import replace
from typing import Any

from compress.families import Family
from compress.families._blocks import ATTENTION, GATED_MLP, PARALLEL

MLP_PATH = ("mlp", "dropout")
SEQUENTIAL_FAMILY = Family(
    branches=(ATTENTION, replace(GATED_MLP, paths=(MLP_PATH,))), norm="layer", norm_eps="layer_norm_eps"
)
PARALLEL_FAMILY = replace(SEQUENTIAL_FAMILY, branches=(replace(PARALLEL, paths=(*ATTENTION.paths, MLP_PATH)),))


def family(config: Any) -> Family:
    return PARALLEL_FAMILY if config.use_parallel_residual else SEQUENTIAL_FAMILY
