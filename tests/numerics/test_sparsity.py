"""Masks against trying every one that there is."""

import itertools
import math
import re
from fractions import Fraction

import pytest
import torch

from compress.numerics.sparsity import Pattern, free_mask, keep_mask, wanda
from matrices import random

GROUPED = ("2:4", "4:8", "1:4", "1:2", "5:12")
SHARES = ("50%", "10%", "90%", "33.3%", "70%", "12.5%", "66.7%")


def numbers_of(text: str) -> tuple[int, int]:
    keep, group = text.split(":")
    return int(keep), int(group)


def deleted_of(text: str, count: int) -> int:
    """In fractions: no rounding error makes a weight more or less of it."""
    return math.floor(Fraction(text.removesuffix("%")) / 100 * count)


@pytest.mark.parametrize("text", ["", "4:4", "0:4", "2:17", "2:4:8", "2/4", "100%", "-5%", "50", "50 %"])
def test_what_is_no_pattern_is_told_the_rule(text):
    message = f"a pattern is keep:group such as 2:4, groups up to 16, or a share such as 50%; got {text!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", GROUPED)
def test_of_every_group_the_best_choice_of_all_is_kept(text):
    keep, group = numbers_of(text)
    scores = random(3, 3 * group).abs()
    mask = keep_mask(scores, Pattern.parse(text))
    for row, first in itertools.product(range(3), range(0, 3 * group, group)):
        choices = itertools.combinations(range(first, first + group), keep)
        best = max(choices, key=lambda some: float(scores[row, list(some)].sum()))
        kept = [first + j for j in range(group) if mask[row, first + j]]
        assert kept == list(best)


@pytest.mark.parametrize("text", SHARES)
@pytest.mark.parametrize("n", [7, 64])
def test_a_share_is_counted_exactly_in_each_row_and_in_the_whole(text, n):
    scores, density = random(6, n).abs(), Pattern.parse(text).density
    by_row, whole = (free_mask(scores, density, by_row=flag) for flag in (True, False))
    assert (by_row.sum(1) == n - deleted_of(text, n)).all()
    assert int(whole.sum()) == 6 * n - deleted_of(text, 6 * n)


def test_magnitude_compares_the_whole_matrix_and_others_each_row():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]).double()
    half = Pattern.parse("50%")
    assert keep_mask(scores, half, by_row=False).tolist() == [[False] * 4, [True] * 4]
    assert keep_mask(scores, half).tolist() == [[False, False, True, True]] * 2
    groups = Pattern.parse("2:4")
    assert torch.equal(keep_mask(scores, groups, by_row=False), keep_mask(scores, groups))


def test_wandas_score_is_the_weight_times_the_norm_of_its_input():
    """Up to one factor for all, the square root of the number of tokens."""
    W, X = random(3, 8), random(50, 8, seed=1) + 0.5
    second = sum((torch.outer(x, x) for x in X), torch.zeros(8, 8).double()) / len(X)
    found = wanda(W, second)
    for i, j in itertools.product(range(3), range(8)):
        norm = math.sqrt(sum(float(x[j]) ** 2 for x in X))
        assert float(found[i, j]) == pytest.approx(abs(float(W[i, j])) * norm / math.sqrt(50), rel=1e-12)
