"""What happens along the depth of the model: energy kept of the stream, and errors of the stream and of linears."""

from typing import TYPE_CHECKING

from compress.checkpoints.facts import Point
from compress.inspection.linears import linear_names
from compress.inspection.plots.style import BLUE, COLOURS, GREY, MARKERS, ORANGE, Drawing, axes, shortened
from compress.inspection.summary import Inspection, point_place

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_energy(seen: Inspection) -> list[Drawing]:
    """Widths of the stream, and the share of its energy that the kept directions hold; where it was rotated."""
    points = [point for point in (seen.facts.points if seen.facts else []) if point.kept_energy is not None]
    if not points:
        return []
    figure, (upper, lower) = axes(8.0, 5.8, title=shortened(seen.name, 70), rows=(1, 1))
    places, kept = list(range(len(points))), [100 * (point.kept_energy or 0) for point in points]
    upper.plot(places, kept, color=BLUE, marker="o", clip_on=False)
    upper.set_ylabel("energy kept [%]")
    upper.set_ylim(min(99.0, *kept) - 0.1 * (100 - min(99.0, *kept)), 100)
    upper.set_title("energy of the stream in the kept directions")
    lower.step(places, [point.width for point in points], where="mid", color=BLUE, label="kept")
    lower.step(places, [point.dense_width for point in points], where="mid", color=GREY, linestyle="--", label="dense")
    lower.set_ylabel("width [dimensions]")
    lower.set_title("width of the stream")
    lower.set_ylim(0, 1.12 * max(point.dense_width for point in points))
    lower.legend(loc="lower right", ncols=2)
    for each in (upper, lower):
        label_points(each, points)
    return [Drawing("energy", figure)]


def label_points(plot: "Axes", points: list[Point]) -> None:
    """A tick a block, at its first point."""
    first: dict[int | str, int] = {}
    for place, point in enumerate(points):
        first.setdefault(point_place(point), place)
    step = max(1, len(first) // 16)
    shown = [place for place in first if (step == 1 if isinstance(place, str) else place % step == 0)]
    names = [str(place).replace("embeddings", "emb.") for place in shown]
    plot.set_xticks([first[place] for place in shown], names)
    plot.set_xlabel("block, after each of its branches")
    plot.grid(visible=False, axis="x")


def plot_errors(seen: Inspection) -> list[Drawing]:
    """How far the stream is from the dense model's along the depth, and what each linear lost; what is recorded."""
    points = [point for point in (seen.facts.points if seen.facts else []) if point.relative_error is not None]
    lost = losses(seen)
    panels = [draw for draw, there in ((draw_stream, points), (draw_losses, lost)) if there]
    if not panels:
        return []
    figure, plots = axes(8.0, 0.4 + 3.3 * len(panels), title=shortened(seen.name, 70), rows=[1] * len(panels))
    for draw, plot in zip(panels, plots, strict=True):
        draw(plot, seen)
    return [Drawing("errors", figure)]


def draw_stream(plot: "Axes", seen: Inspection) -> None:
    assert seen.facts is not None
    points = [point for point in seen.facts.points if point.relative_error is not None]
    plot.plot(range(len(points)), [100 * (point.relative_error or 0) for point in points], color=ORANGE, marker="o")
    plot.set_ylim(bottom=0)
    plot.set_ylabel("relative error [%]")
    plot.set_title("how far the stream is from the dense model's")
    label_points(plot, points)


def draw_losses(plot: "Axes", seen: Inspection) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator

    for number, (name, found) in enumerate(losses(seen).items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        line = "-" if number < len(COLOURS) else ":"
        plot.plot(list(found), [100 * value for value in found.values()], line, color=colour, marker=marker, label=name)
    plot.set_yscale("log")
    plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plot.yaxis.set_major_formatter("{x:g}")
    plot.yaxis.set_minor_formatter("")
    plot.set_ylabel("energy lost [%]")
    plot.set_xlabel("block")
    plot.set_title("energy of the outputs that each linear lost")
    plot.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def losses(seen: Inspection) -> dict[str, dict[int, float]]:
    """By a linear's name in its block: the share of its outputs' energy that is gone, by the block's number."""
    found: dict[str, dict[int, float]] = {name: {} for name in linear_names(seen.linears)}
    for linear in seen.linears:
        if linear.block is not None and linear.facts and linear.facts.lost:
            found[linear.name][linear.block] = max(linear.facts.lost, 0.0)
    return {name: by_block for name, by_block in found.items() if by_block}
