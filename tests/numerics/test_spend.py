"""A budget spent on ladders against all ways of spending it."""

import itertools
from collections.abc import Mapping

import pytest
import torch

from compress.numerics.allocation import Ladder, spend

SEEDS = range(20)


def drawn(seed: int, *shape: int, low: int, high: int) -> list[int]:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).flatten().tolist()


def convex(seed: int, *, places: int, price: int | None = None) -> Ladder:
    """Steps that take less and less off the error per unit of cost."""
    prices = [price] * (places - 1) if price else drawn(seed, places - 1, low=1, high=9)
    rates = sorted(drawn(seed + 1000, places - 1, low=1, high=50), reverse=True)
    drops = [rate * step for rate, step in zip(rates, prices, strict=True)]
    costs = list(itertools.accumulate(prices, initial=drawn(seed + 2000, 1, low=0, high=6)[0]))
    left = drawn(seed + 3000, 1, low=0, high=20)[0]
    return Ladder(costs, [float(left + sum(drops[place:])) for place in range(places)])


def with_dense(ladder: Ladder) -> Ladder:
    """And one step more, far dearer than what it takes off the error, to none at all."""
    return Ladder([*ladder.costs, 2 * ladder.costs[-1] + 7], [*ladder.errors, 0.0])


def jagged(seed: int, *, places: int) -> Ladder:
    """Neither convex nor falling."""
    costs = list(itertools.accumulate(drawn(seed, places, low=1, high=9)))
    return Ladder(costs, list(map(float, drawn(seed + 1000, places, low=0, high=60))))


def problem(kind: str, seed: int) -> dict[str, Ladder]:
    made = {
        "convex": lambda s: convex(s, places=4),
        "of one price": lambda s: convex(s, places=4, price=3),
        "with a dense option": lambda s: with_dense(convex(s, places=3)),
        "jagged": lambda s: jagged(s, places=4),
    }[kind]
    return {name: made(7 * seed + 100_000 * i) for i, name in enumerate("abcd")}


KINDS = ["convex", "of one price", "with a dense option", "jagged"]


def cost(ladders: Mapping[str, Ladder], places: Mapping[str, int]) -> int:
    return sum(ladder.costs[places[name]] for name, ladder in ladders.items())


def error(ladders: Mapping[str, Ladder], places: Mapping[str, int]) -> float:
    return sum(ladder.errors[places[name]] for name, ladder in ladders.items())


def ways(ladders: Mapping[str, Ladder]) -> list[dict[str, int]]:
    """All that there are."""
    ranges = [range(len(ladder.costs)) for ladder in ladders.values()]
    return [dict(zip(ladders, places, strict=True)) for places in itertools.product(*ranges)]


def budgets(ladders: Mapping[str, Ladder]) -> list[int]:
    least = sum(ladder.costs[0] for ladder in ladders.values())
    most = sum(ladder.costs[-1] for ladder in ladders.values())
    return sorted({least, most, most + 5, *range(least, most, max((most - least) // 12, 1))})


def best(ladders: Mapping[str, Ladder], every: list[dict[str, int]], budget: int) -> float:
    return min(error(ladders, places) for places in every if cost(ladders, places) <= budget)


def largest_drop(ladders: Mapping[str, Ladder]) -> float:
    return max(
        ladder.errors[start] - ladder.errors[end]
        for ladder in ladders.values()
        for start, end in itertools.pairwise([*ladder.hull(), ladder.hull()[-1]])
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_never_over_budget_and_the_best_way_but_for_one_step(kind):
    """What no way can beat is the hull's steps with the last bought in part (Lagrange): that is what it can cost.

    Nothing that helps and is affordable is left unbought.
    """
    for seed in SEEDS:
        ladders = problem(kind, seed)
        every = ways(ladders)
        assert spend(ladders, sum(ladder.costs[0] for ladder in ladders.values()) - 1) is None
        for budget in budgets(ladders):
            places = spend(ladders, budget)
            left = budget - cost(ladders, places)
            assert places.keys() == ladders.keys()
            assert left >= 0
            above = error(ladders, places) - best(ladders, every, budget)
            assert above == 0 or 0 < above < largest_drop(ladders)
            for name, ladder in ladders.items():
                here = places[name]
                for place in range(here + 1, len(ladder.costs)):
                    affordable = ladder.costs[place] - ladder.costs[here] <= left
                    assert not (affordable and ladder.errors[place] < ladder.errors[here])


def test_a_ladder_of_one_place_is_paid_for():
    ladders = {"fixed": Ladder([5], [1.0]), "open": Ladder([1, 2], [3.0, 0.0])}
    assert spend(ladders, 5) is None
    assert spend(ladders, 6) == {"fixed": 0, "open": 0}
    assert spend(ladders, 7) == {"fixed": 0, "open": 1}
    assert spend({}, 0) == {}
