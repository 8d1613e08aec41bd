"""The types of matrices at many sizes, from one survey, and all that one of the sizes needs.

FRONTIER/frontier.json    costs by matrix and type, what trials corrected, the sizes
FRONTIER/trials.jsonl     the trials
FRONTIER/frontier.png     the picture, where matplotlib is installed
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from compress.checkpoints.metadata import Record, validated
from compress.errors import UsageError
from compress.io import atomic_write
from compress.models.untrusted import read_json
from compress.planning.types import TypeSearch, TypeSpace

FRONTIER = "frontier.json"


class Point(Record):
    """A size of a frontier. bytes: of the file. predicted, measured: divergence in nats a token. types: by path."""

    bytes: int
    predicted: float
    measured: float | None = None
    types: dict[str, str]


class Frontier(Record):
    """The types of matrices at many sizes: all of frontier.json.

    model: its fingerprint. recipe: what makes any point, but for its size. costs, factors, scale: as `TypeSearch` has
    them.
    """

    format: int = 1
    base_model: str
    model: str
    recipe: dict[str, Any]
    costs: dict[str, dict[str, float]]
    factors: dict[str, float]
    scale: float
    points: list[Point]

    def write(self, folder: Path) -> None:
        """Write it, and draw divergence by size where matplotlib is installed."""
        with atomic_write(folder / FRONTIER) as unfinished:
            unfinished.write_text(json.dumps(self.model_dump(mode="json")) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            return
        from compress.inspection.drawing import Drawing, axes, look, save, style

        with style():
            figure, (plot,) = axes(6, 4, title=f"{self.base_model}, a type for each matrix")
            lines = (("predicted", self.points), ("measured", [each for each in self.points if each.measured]))
            for number, (name, points) in enumerate(lines):
                values = [getattr(point, name) for point in points]
                plot.plot([point.bytes / 1e6 for point in points], values, label=name, **look(number))
            plot.set(xlabel="MB", ylabel="divergence, nats a token", xscale="log", yscale="log")
            plot.legend()
            save([Drawing("frontier", figure)], folder)

    def search(self, space: TypeSpace) -> TypeSearch:
        """Raises UsageError where it is of other matrices."""
        if {path: {*costs} for path, costs in self.costs.items()} != {p: {*each} for p, each in space.rungs.items()}:
            raise UsageError("The frontier is of other matrices or types. Make it again with --frontier.")
        ordered = {path: {name: self.costs[path][name] for name in rungs} for path, rungs in space.rungs.items()}
        return TypeSearch(space, ordered, self.factors, self.scale)


def read_frontier(folder: Path) -> Frontier:
    """Raises UsageError for a folder that has none, CheckpointError for a damaged file."""
    if not (folder / FRONTIER).is_file():
        raise UsageError(
            f"{folder} has no {FRONTIER}. Make one: compress auto --model M --frontier 40MB:120MB --out F."
        )
    found = validated(Frontier, read_json(folder / FRONTIER), folder / FRONTIER, "Make it again.")
    numbers = [*found.factors.values(), *(cost for costs in found.costs.values() for cost in costs.values())]
    if found.format != 1 or any(number < 0 for number in numbers):
        raise UsageError(f"{folder / FRONTIER} is of another version, or damaged. Make it again.")
    return found
