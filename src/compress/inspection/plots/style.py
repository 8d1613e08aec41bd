"""How all plots look: one set of sizes, and colors that everybody can tell apart (Okabe and Ito's)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, BLACK, GREY = "#56B4E9", "#E69F00", "#222222", "#8C8C8C"
COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, BLACK)
MARKERS = "osD^vPX"
MAP = "cividis"
DOTS_PER_INCH = 150
RULES: dict[Any, Any] = {
    "font.size": 11,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.dpi": DOTS_PER_INCH,
    "savefig.dpi": DOTS_PER_INCH,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.15,
    # A name with dollars in it is no formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Drawing:
    """name: of its file, without the suffix."""

    name: str
    figure: "Figure"


@contextmanager
def style() -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()  # nobody's own settings
        mpl.rcParams.update(RULES)
        yield


def axes(width: float, height: float, *, title: str, rows: Sequence[int] = (1,)) -> "tuple[Figure, list[Axes]]":
    """A figure that belongs to no window: nothing of it outlives its last use. Sizes are in inches.

    rows: of the plots below one another, how high they are beside each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.02, horizontalalignment="left")
    grid = figure.subplots(len(rows), squeeze=False, height_ratios=rows)
    return figure, list(grid.flat)


def byte_unit(largest: int) -> tuple[str, float]:
    """The unit to count bytes in, and what they are divided by."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if largest >= scale:
            return unit, scale
    return "bytes", 1.0


def byte_text(count: int) -> str:
    unit, scale = byte_unit(count)
    return f"{count / scale:.3g} {unit}"


def shortened(text: str, length: int) -> str:
    """The ends of a name that is too long to be drawn."""
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
