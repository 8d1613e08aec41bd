"""Where the bytes are and how many bits a weight takes; size against quality of several checkpoints."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.checkpoints.quality import Measure
from compress.inspection.linears import StoredLinear, linear_names
from compress.inspection.plots.style import (
    BLUE,
    GREY,
    ORANGE,
    Drawing,
    axes,
    byte_text,
    byte_unit,
    legend_beside,
    look,
    shortened,
)
from compress.inspection.summary import Inspection, bits_per_weight, place_of
from compress.models.tensor_files import StoredTensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HELD_OUT = "divergence from dense, held out while compressing"
LONGEST = 100  # characters of a file's name
ADAPTERS = ("lora_", "first.", "second.")
# What else a tensor is for, by the end of its name.
PURPOSES = {
    **dict.fromkeys(("scale", "weight_scale", "weight_zero_point", "weight_shape", "shares"), "scales and zero points"),
    **{"places": "places of kept weights", "order": "order of outputs", "bias": "biases"},
}


def plot_sizes(seen: Inspection) -> list[Drawing]:
    names = linear_names(seen.linears)
    bars = len(bytes_by_kind(seen)), len(names) + 1
    figure, (upper, lower) = axes(8.5, 2.8 + 0.3 * sum(bars), title=seen.name, rows=bars)
    draw_bytes(upper, seen)
    draw_bits(lower, seen, names)
    return [Drawing("sizes", figure)] if names else []


def draw_bytes(plot: "Axes", seen: Inspection) -> None:
    found = dict(sorted(bytes_by_kind(seen).items(), key=lambda item: item[1]))
    unit, scale = byte_unit(seen.bytes)
    bars = plot.barh(list(found), [count / scale for count in found.values()], color=BLUE)
    labels = [f"{byte_text(count)}, {count / seen.bytes:.1%}" for count in found.values()]
    plot.bar_label(bars, labels, padding=4, fontsize=10)
    plot.margins(x=0.25)
    plot.set_xlabel(f"stored [{unit}]")
    plot.grid(visible=False)
    dense = f"; dense it has {byte_text(seen.metadata.dense_size.bytes)}" if seen.metadata else ""
    plot.set_title(f"where its {byte_text(seen.bytes)} are{dense}")


def draw_bits(plot: "Axes", seen: Inspection, names: list[str]) -> None:
    kinds = {name: [linear for linear in seen.linears if linear.name == name] for name in reversed(names)}
    found = {"all": seen.bits_per_weight or 0} | {name: bits_per_weight(each) or 0 for name, each in kinds.items()}
    bars = plot.barh(list(found), list(found.values()), color=[GREY] + [ORANGE] * len(names))
    plot.bar_label(bars, [f"{value:.2f}" for value in found.values()], padding=4, fontsize=10)
    plot.margins(x=0.12)
    plot.set_xlabel("stored [bits a weight]")
    plot.grid(visible=False)
    plot.set_title("linears of the blocks, everything counted but biases")


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
            found[kind_outside(tensor)] += tensor.bytes
    return found


def kind_outside(tensor: StoredTensor) -> str:
    """Of a tensor that is no part of a linear."""
    place = place_of(tensor)
    if place == "embeddings":
        return place
    if len(tensor.shape) < 2:
        return "norms"
    return "head" if place == "head" else "other tensors"


def kind_of(linear: StoredLinear, name: str) -> str:
    if linear.is_product:
        name = name.removeprefix("first.").removeprefix("second.")
    if name.startswith(ADAPTERS):
        return "adapters"
    if (purpose := PURPOSES.get(name.rpartition(".")[2])) is not None:
        return purpose
    if linear.block is None:
        return "head"
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


def plot_frontiers(seen: Sequence[Inspection]) -> list[Drawing]:
    """A drawing for each measure that two checkpoints or more have."""
    measures: dict[str, list[Mark]] = {}
    for each in seen:
        for measure in [*(each.quality.measures if each.quality else []), *held_out(each, seen)]:
            measures.setdefault(measure.name, []).append(Mark(each.name, each.bytes, measure))
    return [draw(name, marks) for name, marks in measures.items() if len(marks) > 1]


def held_out(one: Inspection, seen: Sequence[Inspection]) -> list[Measure]:
    """What was measured while compressing, where all of ours did so on the same text and against the same model."""
    metadata = [each.metadata for each in seen if each.metadata is not None]
    same = len({(str(each.fingerprints), str(each.recipe.calibration)) for each in metadata}) == 1
    if one.metadata is None or one.metadata.held_out_divergence is None or not same:
        return []
    return [Measure(HELD_OUT, one.metadata.held_out_divergence, None, "nats a token")]


def frontier(marks: Sequence[Mark]) -> list[Mark]:
    """Those that no other is at least as small as and better than, by size."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.bytes, mark.badness)):
        if not best or mark.badness < best[-1].badness:
            best.append(mark)
    return best


def draw(name: str, marks: Sequence[Mark]) -> Drawing:
    figure, (plot,) = axes(10.0, 5.5, title="size and quality")
    unit, scale = byte_unit(max(mark.bytes for mark in marks))
    line = frontier(marks)
    sizes, values = [mark.bytes / scale for mark in line], [mark.measure.value for mark in line]
    plot.plot(sizes, values, color=GREY, drawstyle="steps-post", zorder=1, label="none smaller is as good")
    for number, mark in enumerate(sorted(marks, key=lambda mark: mark.bytes)):
        place, value, error = mark.bytes / scale, mark.measure.value, mark.measure.error
        label = shortened(mark.name, 40)
        plot.errorbar(place, value, yerr=error, **look(number), linestyle="none", capsize=3, label=label)
    plot.margins(x=0.12, y=0.14)
    plot.set_xlabel(f"stored [{unit}]")
    plot.set_ylabel(name if marks[0].measure.unit is None else f"{name}\n[{marks[0].measure.unit}]")
    legend_beside(plot)
    return Drawing(re.sub(r"[^\w.]+", "-", f"size {name}").strip("-")[:LONGEST], figure)
