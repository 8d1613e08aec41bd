"""Plots of one checkpoint: spectra, energy kept, errors and ranks along the depth, where the bytes are; and of several:
size against quality.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.checkpoints.metadata import Point
from compress.checkpoints.quality import Measure
from compress.errors import UsageError
from compress.inspection import drawing
from compress.inspection.checkpoint import Inspection, bits_of_matrices, place_of, point_place
from compress.inspection.linears import BLOCK, StoredLinear, bits_per_weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDEST = 16.0  # inches, of a map of ranks
WRITTEN = 260  # cells of it up to which each says its rank
HELD_OUT = "divergence from dense, held out while compressing"
LONGEST = 100  # characters of a file's name
ADAPTERS = ("lora_", "first.", "second.")
# What else a tensor is for, by the end of its name.
PURPOSES = {
    **dict.fromkeys(
        ("scale", "weight_scale", "weight_global_scale", "weight_zero_point", "weight_shape", "shares"),
        "scales and zero points",
    ),
    **{"places": "places of kept weights", "order": "order of outputs", "bias": "biases"},
}


def plot_inspection(seen: Inspection, folder: Path) -> list[Path]:
    """What there is to draw of a checkpoint, as PNG files. Raises OutputError for a full disk."""
    with drawing.style():
        plots = (plot_spectra, plot_energy, plot_errors, plot_bits, plot_ranks, plot_sizes)
        return drawing.save([each for plot in plots for each in plot(seen)], folder)


# Along the depth.


def plot_spectra(seen: Inspection) -> list[drawing.Drawing]:
    """A curve a point, or one for all where they share a basis; the cut is where each has its width."""
    points = [point for point in seen.points if point.spectrum]
    if not points:
        return []
    import matplotlib as mpl

    figure, (plot,) = drawing.axes(8.0, 4.6, title=seen.name)
    # Between the ends of the map, which are too near to dark and bright pages.
    colors = [mpl.colormaps[drawing.MAP](0.25 + 0.6 * number / len(points)) for number in range(len(points))]
    ends = {0: f"after {points[0].point}", len(points) - 1: f"after {points[-1].point}"} if len(points) > 1 else {}
    for number, point in enumerate(points):
        spectrum = point.spectrum or []
        step = point.dense_width / len(spectrum)  # of directions, each stretch at its middle
        curve = {(place + 0.5) * step: 100 * share for place, share in enumerate(spectrum) if share > 0}
        plot.plot(list(curve), list(curve.values()), color=colors[number], linewidth=1.2, label=ends.get(number))
    for width in sorted({point.width for point in points if point.width < point.dense_width}):
        plot.axvline(width, color=drawing.ORANGE, linewidth=1.2, linestyle="--", label=f"{width} kept")
    dense = points[0].dense_width
    plot.axhline(100 / dense, color=drawing.GREY, linewidth=1, linestyle=":", label="all alike")
    plot.set(xlim=(0, dense), xlabel="direction of the basis", yscale="log", ylabel="share of the energy [%]")
    plot.yaxis.set_major_formatter("{x:g}")
    shared = "one basis for all points" if len(points) == 1 else f"{len(points)} points of the stream, early ones dark"
    plot.set_title(f"spectrum of the stream: {shared}")
    plot.legend(loc="lower left")
    return [drawing.Drawing("spectra", figure)]


def plot_energy(seen: Inspection) -> list[drawing.Drawing]:
    """Widths of the stream, and the share of its energy that the kept directions hold; where it was rotated."""
    points = [point for point in seen.points if point.kept_energy is not None]
    if not points:
        return []
    figure, (upper, lower) = drawing.axes(8.0, 5.8, title=seen.name, rows=(1, 1))
    places, kept = range(len(points)), [100 * (point.kept_energy or 0) for point in points]
    lowest = min(99.0, *kept)
    upper.plot(places, kept, color=drawing.BLUE, marker="o", clip_on=False)
    upper.set(ylabel="energy kept [%]", ylim=(lowest - 0.1 * (100 - lowest), 100))
    upper.set_title("energy of the stream in the kept directions")
    dense = [point.dense_width for point in points]
    lower.step(places, [point.width for point in points], where="mid", color=drawing.BLUE, label="kept")
    lower.step(places, dense, where="mid", color=drawing.GREY, linestyle="--", label="dense")
    lower.set(ylabel="width [dimensions]", ylim=(0, 1.12 * max(dense)))
    lower.set_title("width of the stream")
    lower.legend(loc="lower right", ncols=2)
    for each in (upper, lower):
        label_points(each, points)
    return [drawing.Drawing("energy", figure)]


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


def plot_errors(seen: Inspection) -> list[drawing.Drawing]:
    """How far the stream is from the dense model's along the depth, and what each linear lost; what is recorded."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    points, lost = [point for point in seen.points if point.relative_error is not None], losses(seen)
    count = bool(points) + bool(lost)
    if not count:
        return []
    figure, plots = drawing.axes(8.0, 0.4 + 3.3 * count, title=seen.name, rows=[1] * count)
    if points:
        plot = plots[0]
        plot.plot(
            range(len(points)),
            [100 * (point.relative_error or 0) for point in points],
            color=drawing.ORANGE,
            marker="o",
        )
        plot.set_ylim(bottom=0)
        plot.set_ylabel("relative error [%]")
        plot.set_title("how far the stream is from the dense model's")
        label_points(plot, points)
    if lost:
        plot = plots[-1]
        for number, (name, found) in enumerate(lost.items()):
            plot.plot(list(found), [100 * value for value in found.values()], **drawing.look(number), label=name)
        plot.set(xlabel="block", yscale="log", ylabel="energy lost [%]")
        plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plot.yaxis.set_major_formatter("{x:g}")
        plot.yaxis.set_minor_formatter("")
        plot.xaxis.set_major_locator(MaxNLocator(integer=True))
        plot.set_title("energy of the outputs that each linear lost")
        drawing.legend_beside(plot)
    return [drawing.Drawing("errors", figure)]


def losses(seen: Inspection) -> dict[str, dict[int, float]]:
    """By a linear's name in its block: the share of its outputs' energy that is gone, by the block's number."""
    found: dict[str, dict[int, float]] = {}
    for linear in seen.reports:
        if (place := BLOCK.search(linear.linear)) and linear.lost:
            found.setdefault(place[2], {})[int(place[1])] = max(linear.lost, 0.0)
    return found


def plot_search(seen: Inspection) -> list[drawing.Drawing]:
    """What a budget's search tried: predicted and measured divergence by size; in order where sizes are alike."""
    trials = seen.metadata.trials if seen.metadata else []
    if not trials:
        return []
    sizes = [trial.get("bytes", 0) for trial in trials]
    by_size = max(sizes) > 1.01 * min(sizes) > 0
    places = [size / 1e6 for size in sizes] if by_size else [*range(1, 1 + len(trials))]
    figure, (plot,) = drawing.axes(6.0, 4.0, title="what the search tried")
    for number, (name, key) in enumerate((("predicted", "predicted"), ("measured", "divergence"))):
        known = [(x, trial[key]) for x, trial in zip(places, trials, strict=True) if trial.get(key) is not None]
        if known:
            plot.plot(*zip(*known, strict=True), **drawing.look(number), label=name, linestyle="-" if by_size else "")
    if by_size:
        plot.axvline(seen.bytes / 1e6, color=drawing.GREY, zorder=1, label="this one")
    plot.set(xlabel="MB" if by_size else "trial", ylabel="divergence, nats a token")
    drawing.legend_beside(plot)
    return [drawing.Drawing("search", figure)]


# By layer: maps, blocks by linears. Of a linear in a block a number, and the text that says it.
Cells = Mapping[tuple[str, int], tuple[float, str]]


def plot_ranks(seen: Inspection) -> list[drawing.Drawing]:
    """Colored by the share of the full rank that factors or adapters have."""
    cells = {
        (each.name, each.block): (each.rank / min(each.form.m, each.form.n), str(each.rank))
        for each in seen.linears
        if each.block is not None and each.rank
    }
    how = {"title": "rank of each linear that has factors or an adapter", "label": "share of the full rank"}
    return [drawing.Drawing("ranks", draw_map(seen, cells, **how))] if cells else []


def plot_bits(seen: Inspection) -> list[drawing.Drawing]:
    """Bits of a weight, everything counted but biases; where they are not all alike."""
    found = {(each.name, each.block): bits_per_weight([each]) for each in seen.linears if each.block is not None}
    for tensor in seen.tensors if seen.is_gguf else ():
        if (place := BLOCK.search(tensor.name)) and len(tensor.shape) == 2:
            found[place[2].removesuffix(".weight"), int(place[1])] = bits_of_matrices([tensor])
    cells = {place: (bits, f"{bits:.1f}") for place, bits in found.items() if bits is not None}
    if len({text for _, text in cells.values()}) < 2:
        return []
    how = {"title": "bits of a weight, everything counted but biases", "label": "bits"}
    return [drawing.Drawing("bits", draw_map(seen, cells, **how))]


def draw_map(seen: Inspection, cells: Cells, *, title: str, label: str) -> "Figure":
    names = list(dict.fromkeys(name for name, _ in cells))
    blocks = 1 + max(block for _, block in cells)
    values = [[cells.get((name, block), (float("nan"), ""))[0] for block in range(blocks)] for name in names]
    width = min(max(6.0, 2.6 + 0.38 * blocks), WIDEST)
    figure, (plot,) = drawing.axes(width, 1.6 + 0.3 * len(names), title=seen.name)
    highest = max(value for value, _ in cells.values())
    image = plot.pcolormesh(
        values, cmap=drawing.MAP, vmin=0, vmax=highest, edgecolors="face", linewidth=0.1, clip_on=False
    )
    for (name, block), (value, text) in cells.items() if len(cells) <= WRITTEN else ():
        color = drawing.INK if value > 0.55 * highest else "white"
        plot.text(block + 0.5, names.index(name) + 0.5, text, ha="center", va="center", color=color, fontsize=9)
    plot.set_yticks([0.5 + place for place in range(len(names))], names)
    shown = range(0, blocks, max(1, blocks // 16))
    plot.set_xticks([0.5 + place for place in shown], [str(place) for place in shown])
    plot.invert_yaxis()
    plot.set_xlabel("block")
    plot.grid(visible=False)
    plot.set_title(title)
    bar = figure.colorbar(image, ax=plot, label=label, pad=0.02)
    bar.ax.yaxis.set_major_formatter("{x:.0%}" if highest <= 1 else "{x:g}")
    return figure


# Sizes.


def plot_sizes(seen: Inspection) -> list[drawing.Drawing]:
    """Where the bytes are, and how many bits a weight takes."""
    names, kinds = [*dict.fromkeys(each.name for each in seen.linears if each.block is not None)], bytes_by_kind(seen)
    if not names:
        return []
    figure, (upper, lower) = drawing.axes(
        8.5, 3.1 + 0.3 * (len(kinds) + len(names)), title=seen.name, rows=(len(kinds), len(names) + 1)
    )
    unit, scale = drawing.byte_unit(seen.bytes)
    found = dict(sorted(kinds.items(), key=lambda item: item[1]))
    bars = upper.barh(list(found), [count / scale for count in found.values()], color=drawing.BLUE)
    labels = [f"{drawing.byte_text(count)}, {count / seen.bytes:.1%}" for count in found.values()]
    upper.bar_label(bars, labels, padding=4, fontsize=10)
    upper.margins(x=0.25)
    upper.set_xlabel(f"stored [{unit}]")
    dense = f"; dense it has {drawing.byte_text(seen.metadata.dense_size.bytes)}" if seen.metadata else ""
    upper.set_title(f"where its {drawing.byte_text(seen.bytes)} are{dense}")
    linears = {name: [linear for linear in seen.linears if linear.name == name] for name in reversed(names)}
    bits = {"all": seen.bits_per_weight or 0} | {name: bits_per_weight(each) or 0 for name, each in linears.items()}
    bars = lower.barh(list(bits), list(bits.values()), color=[drawing.GREY] + [drawing.ORANGE] * len(names))
    lower.bar_label(bars, [f"{value:.2f}" for value in bits.values()], padding=4, fontsize=10)
    lower.margins(x=0.12)
    lower.set_xlabel("stored [bits a weight]")
    lower.set_title("linears of the blocks, everything counted but biases")
    for plot in (upper, lower):
        plot.grid(visible=False)
    return [drawing.Drawing("sizes", figure)]


def bytes_by_kind(seen: Inspection) -> Counter[str]:
    """By what they are for: weights of attention and of MLPs apart, and what is stored beside them."""
    found: Counter[str] = Counter()
    in_linears = set()
    for linear in seen.linears:
        for name, tensor in linear.tensors.items():
            in_linears.add((tensor.file, tensor.name))
            found[kind_of(linear, name)] += tensor.bytes
    for tensor in seen.tensors:
        if (tensor.file, tensor.name) not in in_linears:
            place, other = place_of(tensor), "other tensors" if len(tensor.shape) > 1 else "norms"
            is_named = place == "embeddings" or (place == "head" and other != "norms")
            found[str(place) if is_named else other] += tensor.bytes
    return found


def kind_of(linear: StoredLinear, name: str) -> str:
    if len(linear.weights) > 1:  # a product of two
        name = name.removeprefix("first.").removeprefix("second.")
    if name.startswith(ADAPTERS):
        return "adapters"
    if (purpose := PURPOSES.get(name.rpartition(".")[2])) is not None:
        return purpose
    if linear.block is None:
        return str(place_of(next(iter(linear.tensors.values()))))
    if "shortcut" in linear.name:
        return "shortcuts"
    return "attention weights" if "att" in linear.name else "MLP weights"


# Several checkpoints.


@dataclass(frozen=True)
class Mark:
    name: str
    bytes: int
    measure: Measure

    @property
    def badness(self) -> float:
        return self.measure.value if self.measure.lower_is_better else -self.measure.value


def plot_comparison(seen: Sequence[Inspection], folder: Path) -> list[Path]:
    """A file for each measure that two checkpoints or more have. Raises UsageError where there is none."""
    # What was measured while compressing compares where all of ours did so on the same text, against the same model.
    metadata = [each.metadata for each in seen if each.metadata is not None]
    is_same = len({(str(each.fingerprints), str(each.recipe.calibration)) for each in metadata}) == 1
    marks: dict[str, list[Mark]] = {}
    for each in seen:
        measures = list(each.quality.measures) if each.quality else []
        if is_same and each.metadata is not None and each.metadata.held_out_divergence is not None:
            measures.append(Measure(HELD_OUT, each.metadata.held_out_divergence, None, "nats a token"))
        for measure in measures:
            marks.setdefault(measure.name, []).append(Mark(each.name, each.bytes, measure))
    shared = {name: found for name, found in marks.items() if len(found) > 1}
    if not shared:
        raise UsageError(
            "There is no measure that two of these checkpoints have. Measure them alike: compress eval --save."
        )
    with drawing.style():
        return drawing.save([draw(name, found) for name, found in shared.items()], folder)


def frontier(marks: Sequence[Mark]) -> list[Mark]:
    """Those that no other is at least as small as and better than, by size."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.bytes, mark.badness)):
        if not best or mark.badness < best[-1].badness:
            best.append(mark)
    return best


def draw(name: str, marks: Sequence[Mark]) -> drawing.Drawing:
    figure, (plot,) = drawing.axes(10.0, 5.5, title="size and quality")
    unit, scale = drawing.byte_unit(max(mark.bytes for mark in marks))
    line = frontier(marks)
    sizes, values = [mark.bytes / scale for mark in line], [mark.measure.value for mark in line]
    plot.plot(sizes, values, color=drawing.GREY, drawstyle="steps-post", zorder=1, label="none smaller is as good")
    for number, mark in enumerate(sorted(marks, key=lambda mark: mark.bytes)):
        place, value, error = mark.bytes / scale, mark.measure.value, mark.measure.error
        label = drawing.shortened(mark.name, 40)
        plot.errorbar(place, value, yerr=error, **drawing.look(number), linestyle="none", capsize=3, label=label)
    plot.margins(x=0.12, y=0.14)
    plot.set_xlabel(f"stored [{unit}]")
    plot.set_ylabel(name if marks[0].measure.unit is None else f"{name}\n[{marks[0].measure.unit}]")
    drawing.legend_beside(plot)
    return drawing.Drawing(re.sub(r"[^\w.]+", "-", f"size {name}").strip("-")[:LONGEST], figure)
