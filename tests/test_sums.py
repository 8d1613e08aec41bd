"""Sums that do not depend on the order of their terms, against exact ones of fractions."""

from fractions import Fraction

import pytest
import torch

from compress.numerics import sums
from compress.numerics.sums import ReproducibleSum, take

CPU = torch.device("cpu")


def terms(count: int, *shape: int) -> list[torch.Tensor]:
    """Of very different sizes and both signs, so that most additions round."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(count, *shape, generator=generator, dtype=torch.float64) * 12
    return list(torch.randn(count, *shape, generator=generator, dtype=torch.float64) * scales.exp())


def summed(given: list[torch.Tensor]) -> torch.Tensor:
    total = ReproducibleSum(*given[0].shape, device=CPU)
    for term in given:
        total.add(term)
    return total.close()


def test_a_sum_is_the_exact_one_rounded():
    given = terms(200, 40)
    exact = [float(sum(Fraction(float(term[place])) for term in given)) for place in range(40)]
    assert summed(given).tolist() == exact


def test_the_order_does_not_matter_where_float64_alone_rounds_differently():
    given = terms(300, 50)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = [given[place] for place in order]
    assert not torch.equal(torch.stack(given).cumsum(0)[-1], torch.stack(shuffled).cumsum(0)[-1])
    assert torch.equal(summed(given), summed(shuffled))


def test_sums_of_sums_are_the_sum_of_all():
    given = terms(90, 30)
    parts = []
    for start in range(3):
        parts.append(ReproducibleSum(30, device=CPU))
        for term in given[start::3]:
            parts[-1].add(term)
    first, *others = parts
    for other in others:
        first.low += other.low
        take(first.high, first.low, other.high)
    assert torch.equal(first.close(), summed(given))


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_products_are_added_some_rows_at_a_time(monkeypatch, at_once):
    monkeypatch.setattr(sums, "AT_ONCE", at_once)
    A, B = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    total = ReproducibleSum(5, 3, device=CPU)
    total.add_product(A, B)
    total.add_product(2 * A, B)
    assert (total.close() - 3 * A.T @ B).abs().max() < 1e-13


def test_a_sum_without_numbers_takes_any_product():
    total = ReproducibleSum(4, 0, device=CPU)
    total.add_product(torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 0, dtype=torch.float64))
    assert total.close().shape == (4, 0)
