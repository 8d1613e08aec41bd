"""Size against quality of several checkpoints, as PNG files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.checkpoints.quality import Measure
from compress.errors import UsageError
from compress.inspection.checkpoint import Inspection
from compress.inspection.drawing import GREY, Drawing, axes, byte_unit, legend_beside, look, save, shortened, style

HELD_OUT = "divergence from dense, held out while compressing"
LONGEST = 100  # characters of a file's name


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
    with style():
        return save([draw(name, found) for name, found in shared.items()], folder)


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
