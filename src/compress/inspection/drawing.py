"""How all plots look, with colors that everybody can tell apart (Okabe and Ito's), and how they are saved."""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import OutputError
from compress.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8C8C8C"
COLORS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#222222")
INK = "#111111"  # on a bright color
MARKERS = "osD^vP"  # one less than colors: lines look alike only after 42
MAP = "cividis"
STYLE = Path(__file__).with_name("plots.mplstyle")


@dataclass(frozen=True)
class Drawing:
    """A figure. name: of its file, without the suffix."""

    name: str
    figure: "Figure"


def style() -> AbstractContextManager[None]:
    """Our own settings, nobody else's, as long as something is drawn."""
    from matplotlib.style import context

    return context(["default", STYLE])


def axes(width: float, height: float, *, title: str, rows: Sequence[int] = (1,)) -> "tuple[Figure, list[Axes]]":
    """A figure that belongs to no window: nothing of it outlives its last use. Sizes are in inches.

    rows: of the plots below one another, how high they are beside each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(shortened(title, int(9 * width)), x=0.02, horizontalalignment="left")
    grid = figure.subplots(len(rows), squeeze=False, height_ratios=rows)
    return figure, list(grid.flat)


def look(number: int) -> dict[str, Any]:
    """Color and marker of a line among others."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def legend_beside(plot: "Axes") -> None:
    plot.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def save(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Raises OutputError for a full disk."""
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawings:
            file = folder / f"{drawing.name}.png"
            # Without the version in it, the same figure is the same bytes.
            with atomic_write(file) as unfinished:
                drawing.figure.savefig(unfinished, format="png", metadata={"Software": None})
            files.append(file)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written ({error}). Choose another --plot.") from error
    return files


# What a page says of colors in an SVG that is part of it.
PAGE_COLORS = {"#000000": "currentColor", COLORS[-1]: "currentColor", "#e3e3e3": "var(--grid)"}
SIZE = re.compile(r"<svg[^>]*?(?= viewBox)")
LARGEST, LEAST = 1.2, 0.85  # of its own size, on a wide page and on a narrow one, which scrolls it
FONT = re.compile(r"(?<=px); font-family: [^;\"<]*")
DIGITS = re.compile(r"(?<=\d\.\d\d)\d+(?=[^<>]*>)")  # of a tag's numbers, past the second
NAMED = re.compile(r"(?<=\bid=\")|(?<=url\(#)|(?<=href=\"#)")


def as_svg(drawing: Drawing) -> str:
    """The figure without its title as an SVG element of a page, which gives `--grid` and may be dark.

    Text stays text. What the drawing's name has of letters goes before all ids, which a page may have once.
    """
    from matplotlib import rc_context

    drawing.figure.suptitle("")
    text, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": drawing.name}):
        drawing.figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    found = text.getvalue()
    found = NAMED.sub(f"{drawing.name}-", FONT.sub("", found[found.index("<svg") :]))
    width = 72 * drawing.figure.get_figwidth()
    found = SIZE.sub(f'<svg style="width:{LARGEST * width:.0f}px;min-width:{LEAST * width:.0f}px"', found, count=1)
    found = DIGITS.sub("", found)
    for color, page in PAGE_COLORS.items():
        found = found.replace(f": {color.lower()}", f": {page}")
    return found


def byte_unit(largest: int) -> tuple[str, float]:
    """The unit to count bytes in, and what they are divided by."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next((each for each in units if largest >= each[1]), ("bytes", 1.0))


def byte_text(count: int) -> str:
    unit, scale = byte_unit(count)
    return f"{count / scale:.3g} {unit}"


def shortened(text: str, length: int) -> str:
    """The ends of a name that is too long to be drawn."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
