"""Activation caches in memory and on disk, and equal arguments held once."""

import pytest
import torch

from compress.calibration.streams import ActivationCache, Interner

CPU = torch.device("cpu")
SHAPES = [(2, 3), (2, 3), (1, 3)]


@pytest.fixture(params=["in memory", "on disk"])
def cache(request, tmp_path):
    file = tmp_path / "activations" if request.param == "on disk" else None
    return ActivationCache(SHAPES, 8, torch.float64, device=CPU, file=file)


def batch(index: int, width: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + index)
    return torch.randn(*SHAPES[index], width, dtype=torch.float64, generator=generator)


def test_batches_are_replaced_at_other_widths(cache):
    """Narrower and wide again: each batch stays its own, whatever its neighbors do."""
    for i in range(3):
        cache.put(i, batch(i, 8))
    for seed, width in enumerate((5, 8, 1, 8), 1):
        for i in range(3):
            cache.put(i, batch(i, width, seed=seed))
            neighbors = [(j, width, seed) if j <= i else (j, (8, 5, 8, 1, 8)[seed - 1], seed - 1) for j in range(3)]
            for j, stored_width, stored_seed in neighbors:
                assert torch.equal(cache.get(j, CPU), batch(j, stored_width, seed=stored_seed))


def test_the_file_leaves_no_trace(tmp_path):
    cache = ActivationCache(SHAPES, 8, torch.float32, device=CPU, file=tmp_path / "activations")
    cache.put(0, torch.ones(2, 3, 8))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(cache.get(0, CPU), torch.ones(2, 3, 8))


def test_equal_tensors_are_held_once():
    intern = Interner()
    first = intern({"mask": torch.ones(2, 2), "rest": [torch.zeros(3), (torch.ones(2, 2), "word", None, 4)]})
    second = intern({"mask": torch.ones(2, 2), "rest": [torch.zeros(3)]})
    assert first["rest"][1][0] is first["mask"]
    assert second["mask"] is first["mask"]
    assert second["rest"][0] is first["rest"][0]
    assert first["rest"][1][1:] == ("word", None, 4)
    assert isinstance(first["rest"], list)
    assert isinstance(first["rest"][1], tuple)
