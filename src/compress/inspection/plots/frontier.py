"""Size against quality of several checkpoints, and the line of those that no other beats in both."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from compress.checkpoints.measures import Measure
from compress.inspection.plots.style import BLUE, GREY, Drawing, axes, byte_unit, shortened
from compress.inspection.summary import Inspection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

HELD_OUT = "divergence from dense, held out while compressing"
LONGEST = 100  # characters of a file's name
MARK = 7  # pixels around a point or a line that no label covers
FAR = 16  # points from a label to its own, past which a line joins them
Place = tuple[float, float, Literal["left", "center", "right"], Literal["bottom", "center", "top"]]
# Where a label may stand beside its point: points to the right and up, and how the text is aligned. The best first, and
# then the same further and further away.
BESIDE: tuple[Place, ...] = (
    (9.0, 0.0, "left", "center"),
    (-9.0, 0.0, "right", "center"),
    (0.0, 9.0, "center", "bottom"),
    (0.0, -9.0, "center", "top"),
    (7.0, 7.0, "left", "bottom"),
    (7.0, -7.0, "left", "top"),
    (-7.0, 7.0, "right", "bottom"),
    (-7.0, -7.0, "right", "top"),
)
PLACES = [
    (reach * x, reach * y, across, along)
    for reach in (1.0, 2.2, 3.6, 5.0, 6.5, 8.0, 10.0)
    for x, y, across, along in BESIDE
]


@dataclass(frozen=True)
class Mark:
    name: str
    bytes: int
    measure: Measure

    @property
    def badness(self) -> float:
        return self.measure.value if self.measure.lower_is_better else -self.measure.value


def plot_frontiers(seen: Sequence[Inspection]) -> list[Drawing]:
    """A drawing for each measure that two checkpoints or more have."""
    measures: dict[str, list[Mark]] = {}
    for each in seen:
        for measure in [*(each.quality.listed() if each.quality else []), *held_out(each, seen)]:
            measures.setdefault(measure.name, []).append(Mark(each.name, each.bytes, measure))
    return [draw(name, marks) for name, marks in measures.items() if len(marks) > 1]


def held_out(one: Inspection, seen: Sequence[Inspection]) -> list[Measure]:
    """What was measured while compressing, where all of ours did so on the same text and against the same model."""
    facts = [each.facts for each in seen if each.facts is not None]
    same = len({(str(each.fingerprints), str(each.recipe.calibration)) for each in facts}) == 1
    if one.facts is None or one.facts.held_out_divergence is None or not same:
        return []
    return [Measure(HELD_OUT, one.facts.held_out_divergence, None, "nats a token")]


def frontier(marks: Sequence[Mark]) -> list[Mark]:
    """Those that no other is at least as small as and better than, by size."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.bytes, mark.badness)):
        if not best or mark.badness < best[-1].badness:
            best.append(mark)
    return best


def draw(name: str, marks: Sequence[Mark]) -> Drawing:
    figure, (plot,) = axes(9.0, 5.5, title="size and quality")
    unit, scale = byte_unit(max(mark.bytes for mark in marks))
    line = frontier(marks)
    sizes, values = [mark.bytes / scale for mark in line], [mark.measure.value for mark in line]
    plot.plot(sizes, values, color=BLUE, drawstyle="steps-post", marker="o", zorder=1, label="none smaller is as good")
    for mark in marks:
        colour, error = BLUE if mark in line else GREY, mark.measure.error
        place = mark.bytes / scale, mark.measure.value
        plot.errorbar(*place, yerr=error, color=colour, marker="o", markersize=7, capsize=3)
    plot.margins(x=0.12, y=0.14)
    plot.set_xlabel(f"stored [{unit}]")
    plot.set_ylabel(name if marks[0].measure.unit is None else f"{name}\n[{marks[0].measure.unit}]")
    plot.legend(loc="best")
    label(plot, marks, scale)
    return Drawing(re.sub(r"[^\w.]+", "-", f"size {name}").strip("-")[:LONGEST], figure)


def label(plot: "Axes", marks: Sequence[Mark], scale: float) -> None:
    """Each point's name, at the first place beside it where it covers no other name, no point and no line."""
    whole = plot.get_figure(root=True)
    assert whole is not None
    whole.draw_without_rendering()  # after which it is known where points lie
    legend = plot.get_legend()
    taken = [] if legend is None else [legend.get_window_extent()]
    taken += [around(plot.transData.transform(segment)) for segment in segments(marks, scale)]
    for mark in marks:
        for place in PLACES:
            text = written(plot, mark, scale, place)
            box = text.get_window_extent()
            if plot.bbox.containsx(box.x0) and plot.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                break
            if place is not PLACES[-1]:
                text.remove()
        taken.append(box)
        join(plot, text)


def segments(marks: Sequence[Mark], scale: float) -> list[list[tuple[float, float]]]:
    """From point to point: the error bars, and the steps of the frontier's line."""
    bars = [(mark.bytes / scale, mark.measure.value, mark.measure.error or 0.0) for mark in marks]
    found = [[(x, y - error), (x, y + error)] for x, y, error in bars]
    line = [(mark.bytes / scale, mark.measure.value) for mark in frontier(marks)]
    for (x, y), (next_x, next_y) in itertools.pairwise(line):
        found += [[(x, y), (next_x, y)], [(next_x, y), (next_x, next_y)]]
    return found


def around(segment: Any) -> "Bbox":
    """
    segment: two points in pixels.
    """
    from matplotlib.transforms import Bbox

    return Bbox([segment.min(0) - MARK, segment.max(0) + MARK])


def written(plot: "Axes", mark: Mark, scale: float, place: Place) -> "Annotation":
    """The name beside its point."""
    x, y, across, along = place
    return plot.annotate(
        shortened(mark.name, 40),
        (mark.bytes / scale, mark.measure.value),
        (x, y),
        textcoords="offset points",
        horizontalalignment=across,
        verticalalignment=along,
        fontsize=9,
    )


def join(plot: "Axes", name: "Annotation") -> None:
    """A line from a name to its point, where that is far."""
    if sum(map(abs, name.xyann)) > FAR:
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        plot.annotate("", name.xy, name.xyann, textcoords="offset points", arrowprops=line)
