"""A budget spent on ladders against all ways of spending it."""

import itertools
from collections.abc import Mapping

import pytest
import torch

from compress.numerics.allocation import Ladder, spend

SEEDS = range(40)


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
def test_it_is_never_over_budget_and_none_where_nothing_fits(kind):
    for seed in SEEDS:
        ladders = problem(kind, seed)
        least = sum(ladder.costs[0] for ladder in ladders.values())
        assert spend(ladders, least - 1) is None
        for budget in budgets(ladders):
            places = spend(ladders, budget)
            assert places is not None
            assert places.keys() == ladders.keys()
            assert cost(ladders, places) <= budget


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_and_the_most_that_can_be_bought(kind):
    for seed in SEEDS:
        ladders = problem(kind, seed)
        least = sum(ladder.costs[0] for ladder in ladders.values())
        most = sum(ladder.costs[-1] for ladder in ladders.values())
        assert spend(ladders, least) == dict.fromkeys(ladders, 0)
        places = spend(ladders, most)
        assert places is not None
        assert error(ladders, places) == sum(min(ladder.errors) for ladder in ladders.values())


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_best_way_but_for_one_step(kind):
    """What no way can beat is the hull's steps with the last bought in part (Lagrange): that is what it can cost."""
    for seed in SEEDS[:25]:
        ladders = problem(kind, seed)
        every = ways(ladders)
        for budget in budgets(ladders):
            places = spend(ladders, budget)
            assert places is not None
            above = error(ladders, places) - best(ladders, every, budget)
            assert 0 <= above <= largest_drop(ladders)
            assert above == 0 or above < largest_drop(ladders)


def test_steps_of_one_price_are_spent_best():
    for seed in SEEDS:
        ladders = problem("of one price", seed)
        every = ways(ladders)
        for budget in budgets(ladders):
            places = spend(ladders, budget)
            assert places is not None
            assert error(ladders, places) == best(ladders, every, budget)


@pytest.mark.parametrize("kind", KINDS)
def test_where_it_buys_hull_steps_alone_to_the_last_unit_nothing_is_better(kind):
    """A budget that a multiplier comes to: each ladder at the place that is best for the price of a unit."""
    for seed in SEEDS[:25]:
        ladders = problem(kind, seed)
        every = ways(ladders)
        for price in (0.5, 3.5, 8.5, 17.5, 31.5):
            at_price = {
                name: min(range(len(ladder.costs)), key=lambda i, one=ladder: one.errors[i] + price * one.costs[i])
                for name, ladder in ladders.items()
            }
            budget = cost(ladders, at_price)
            places = spend(ladders, budget)
            assert places is not None
            assert error(ladders, places) == error(ladders, at_price) == best(ladders, every, budget)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_helps_is_left_unbought(kind):
    for seed in SEEDS:
        ladders = problem(kind, seed)
        for budget in budgets(ladders):
            places = spend(ladders, budget)
            assert places is not None
            left = budget - cost(ladders, places)
            for name, ladder in ladders.items():
                here = places[name]
                for place in range(here + 1, len(ladder.costs)):
                    affordable = ladder.costs[place] - ladder.costs[here] <= left
                    assert not (affordable and ladder.errors[place] < ladder.errors[here])


@pytest.mark.parametrize("kind", ["convex", "of one price", "with a dense option"])
def test_against_the_same_place_everywhere(kind):
    """No worse where steps have one price; nowhere by more than a step, though the budget is the uniform way's own."""
    for seed in SEEDS:
        ladders = problem(kind, seed)
        for place in range(min(len(ladder.costs) for ladder in ladders.values())):
            uniform = dict.fromkeys(ladders, place)
            places = spend(ladders, cost(ladders, uniform))
            assert places is not None
            above = error(ladders, places) - error(ladders, uniform)
            assert above <= 0 or (kind != "of one price" and above < largest_drop(ladders))


def test_the_hull_is_below_every_place():
    """It starts at the cheapest, ends at the least error, its steps take off less and less, and none lies below it."""
    for kind, seed in itertools.product(KINDS, SEEDS):
        for ladder in problem(kind, seed).values():
            hull = ladder.hull()
            assert hull[0] == 0
            assert hull == sorted(set(hull))
            assert ladder.errors[hull[-1]] == min(ladder.errors)
            rates = [ladder.gain(start, end) for start, end in itertools.pairwise(hull)]
            assert all(rate > 0 for rate in rates)
            assert all(a >= b for a, b in itertools.pairwise(rates))
            for start, end in itertools.pairwise(hull):
                for place in range(start, end + 1):
                    line = ladder.errors[start] - ladder.gain(start, end) * (ladder.costs[place] - ladder.costs[start])
                    assert ladder.errors[place] >= line - 1e-9


def test_a_step_that_lies_off_the_hull_is_bought_with_what_is_left():
    """The dense option is too dear, the step before it is no corner of the hull."""
    ladders = {"a": Ladder([1, 2, 9], [10.0, 9.9, 0.0])}
    assert ladders["a"].hull() == [0, 2]
    assert spend(ladders, 5) == {"a": 1}
    assert spend(ladders, 9) == {"a": 2}


def test_places_in_a_line_are_steps_of_their_own():
    """One of a's steps of 5 is better than b's of 4, though for both of a's the budget is too small."""
    ladders = {"a": Ladder([0, 3, 6], [10.0, 5.0, 0.0]), "b": Ladder([0, 3], [4.0, 0.0])}
    assert spend(ladders, 3) == {"a": 1, "b": 0}


def test_a_ladder_of_one_place_is_paid_for():
    ladders = {"fixed": Ladder([5], [1.0]), "open": Ladder([1, 2], [3.0, 0.0])}
    assert spend(ladders, 5) is None
    assert spend(ladders, 6) == {"fixed": 0, "open": 0}
    assert spend(ladders, 7) == {"fixed": 0, "open": 1}
    assert spend({}, 0) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_ladders_does_not_matter(kind):
    """Nor what was spent before; ties go by name."""
    for seed in SEEDS:
        ladders = problem(kind, seed)
        same = {**ladders, "e": ladders["a"], "f": ladders["a"]}
        for budget in budgets(same)[::3]:
            expected = spend(same, budget)
            assert expected == spend(same, budget)
            assert expected == spend(dict(reversed(same.items())), budget)


def test_what_it_is_given_stays_as_it_was():
    ladders = problem("jagged", 1)
    before = {name: (list(ladder.costs), list(ladder.errors)) for name, ladder in ladders.items()}
    spend(ladders, budgets(ladders)[-3])
    assert {name: (list(ladder.costs), list(ladder.errors)) for name, ladder in ladders.items()} == before
