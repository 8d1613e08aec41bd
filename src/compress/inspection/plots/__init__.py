"""Plots of one checkpoint, and of several side by side, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

from compress.errors import OutputError, UsageError
from compress.inspection.plots.depth import plot_energy, plot_errors, plot_ranks, plot_spectra
from compress.inspection.plots.sizes import plot_frontiers, plot_sizes
from compress.inspection.plots.style import Drawing, style
from compress.inspection.summary import Inspection
from compress.io import atomic_write


def plot_inspection(seen: Inspection, folder: Path) -> list[Path]:
    """What there is to draw of a checkpoint. Raises UsageError where that is nothing, OutputError for a full disk."""
    drawings: list[Drawing] = []
    with style():
        for plot in (plot_spectra, plot_energy, plot_errors, plot_ranks, plot_sizes):
            drawings += plot(seen)
        return save(drawings, folder)


def plot_comparison(seen: Sequence[Inspection], folder: Path) -> list[Path]:
    """Size against quality, a file a measure."""
    with style():
        drawings = plot_frontiers(seen)
        if not drawings:
            raise UsageError(
                "There is no measure that two of these checkpoints have. Measure them alike: compress eval --save."
            )
        return save(drawings, folder)


def save(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
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
