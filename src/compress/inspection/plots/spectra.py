"""How the stream's energy falls off over the directions of its basis, and where it was cut."""

from compress.checkpoints.facts import Point
from compress.inspection.plots.style import GREY, MAP, ORANGE, Drawing, axes, shortened
from compress.inspection.summary import Inspection


def plot_spectra(seen: Inspection) -> list[Drawing]:
    """A curve a point, or one for all where they share a basis; the cut is where each has its width."""
    points = [point for point in (seen.facts.points if seen.facts else []) if point.spectrum]
    if not points:
        return []
    import matplotlib as mpl

    figure, (plot,) = axes(8.0, 4.6, title=shortened(seen.name, 70))
    colours = mpl.colormaps[MAP].resampled(len(points) + 1)
    for number, point in enumerate(points):
        directions, shares = curve(point)
        label = {0: f"after {point.point}", len(points) - 1: f"after {points[-1].point}"}.get(number)
        plot.plot(directions, shares, color=colours(number), linewidth=1.2, label=None if len(points) == 1 else label)
    for width in sorted({point.width for point in points if point.width < point.dense_width}):
        plot.axvline(width, color=ORANGE, linewidth=1.2, linestyle="--")
        plot.annotate(
            f"{width} kept", (width, 1), xycoords=("data", "axes fraction"), xytext=(4, -12), textcoords="offset points"
        )
    dense = points[0].dense_width
    plot.axhline(100 / dense, color=GREY, linewidth=1, linestyle=":", label="all alike")
    plot.set_yscale("log")
    plot.yaxis.set_major_formatter("{x:g}")
    plot.set_xlim(0, dense)
    plot.set_xlabel("direction of the basis")
    plot.set_ylabel("share of the energy [%]")
    shared = "one basis for all points" if len(points) == 1 else f"{len(points)} points of the stream, early ones dark"
    plot.set_title(f"spectrum of the stream: {shared}")
    plot.legend(loc="lower left")
    return [Drawing("spectra", figure)]


def curve(point: Point) -> tuple[list[float], list[float]]:
    """The middle of each stretch of directions, and a direction's share there in percent; none where it is zero."""
    assert point.spectrum is not None
    step = point.dense_width / len(point.spectrum)
    found = [((place + 0.5) * step, 100 * share) for place, share in enumerate(point.spectrum) if share > 0]
    return [place for place, _ in found], [share for _, share in found]
