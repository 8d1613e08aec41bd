"""Plots of one checkpoint, and of several side by side, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from compress.errors import UsageError
from compress.inspection.plots.depth import plot_energy, plot_errors, plot_ranks, plot_spectra
from compress.inspection.plots.sizes import plot_frontiers, plot_sizes
from compress.inspection.plots.style import save, style
from compress.inspection.summary import Inspection


def plot_inspection(seen: Inspection, folder: Path) -> list[Path]:
    """What there is to draw of a checkpoint. Raises OutputError for a full disk."""
    with style():
        plots = (plot_spectra, plot_energy, plot_errors, plot_ranks, plot_sizes)
        return save([drawing for plot in plots for drawing in plot(seen)], folder)


def plot_comparison(seen: Sequence[Inspection], folder: Path) -> list[Path]:
    """Size against quality, a file a measure. Raises UsageError where two have none in common."""
    with style():
        drawings = plot_frontiers(seen)
        if not drawings:
            raise UsageError(
                "There is no measure that two of these checkpoints have. Measure them alike: compress eval --save."
            )
        return save(drawings, folder)
