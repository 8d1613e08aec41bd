"""Allocate one budget to many items, each with a ladder of costs and the error left at each cost.

    minimise sum_i error_i(c_i)  so that  sum_i c_i <= budget

By Lagrange: on the lower convex hull of each ladder, steps are bought in the order of what they take off the error per
unit of cost, until the budget is spent; what is left over goes to the best single steps, hull or not, that still fit.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ladder:
    """Increasing costs and the errors that they leave; the first rung is mandatory."""

    costs: Sequence[int]
    errors: Sequence[float]

    def hull(self) -> list[int]:
        """Rungs of the lower convex hull, from the cheapest; errors fall along it."""
        places: list[int] = []
        for place in range(len(self.costs)):
            if places and self.errors[place] >= self.errors[places[-1]]:
                continue
            while len(places) > 1 and self.gain(places[-2], places[-1]) < self.gain(places[-1], place):
                places.pop()
            places.append(place)
        return places

    def gain(self, start: int, end: int) -> float:
        """Decrease of the error per unit of cost."""
        return (self.errors[start] - self.errors[end]) / max(self.costs[end] - self.costs[start], 1e-9)


def spend(ladders: Mapping[str, Ladder], budget: int) -> dict[str, int] | None:
    """Choose a rung on each ladder; None where not even all the cheapest fit."""
    places = dict.fromkeys(ladders, 0)
    left = budget - sum(ladder.costs[0] for ladder in ladders.values())
    if left < 0:
        return None
    steps = [
        (-ladder.gain(start, end), name, start, end)
        for name, ladder in ladders.items()
        for start, end in itertools.pairwise(ladder.hull())
    ]
    for _, name, start, end in sorted(steps):
        price = ladders[name].costs[end] - ladders[name].costs[start]
        if places[name] == start and price <= left:
            places[name], left = end, left - price
    while True:  # the best single steps that still fit
        affordable = [
            (-ladder.gain(here, place), name, place)
            for name, ladder in ladders.items()
            for here in [places[name]]
            for place in range(here + 1, len(ladder.costs))
            if ladder.costs[place] - ladder.costs[here] <= left and ladder.errors[place] < ladder.errors[here]
        ]
        if not affordable:
            return places
        _, name, place = min(affordable)
        left -= ladders[name].costs[place] - ladders[name].costs[places[name]]
        places[name] = place
