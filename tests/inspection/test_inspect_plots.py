"""`compress inspect --plot`: which plots there are of what, what they show, and that their labels can be read."""

import shutil
import sys
from pathlib import Path

import matplotlib
import matplotlib.image
import pytest
from test_inspect import write_quality

from cli_runner import invoke, succeeds
from compress.checkpoints.quality import Measure
from compress.inspection import plots
from compress.inspection.checkpoint import Inspection, inspect
from compress.inspection.drawing import style
from compress.inspection.plots import (
    Mark,
    bytes_by_kind,
    frontier,
    losses,
    plot_energy,
    plot_errors,
    plot_ranks,
    plot_sizes,
)

PLOTS = {
    "sliced": {"spectra", "energy", "errors", "sizes"},
    "turned": {"spectra", "energy", "sizes"},
    "thin": {"errors", "bits", "ranks", "sizes"},
    "packed": {"errors", "bits", "ranks", "sizes"},
    "compact": {"errors", "bits", "ranks", "sizes"},
}
WRITTEN = PLOTS


def seen(folder: Path) -> Inspection:
    return inspect(folder, fast=True, progress=lambda *_: None)


def test_what_there_is_to_draw_is_drawn(root, tmp_path):
    """And nobody's settings of matplotlib are touched."""
    matplotlib.rcParams["font.size"] = 7.5
    ran = succeeds("inspect", root / "sliced", "--plot", tmp_path / "plots")
    assert matplotlib.rcParams["font.size"] == 7.5
    matplotlib.rcdefaults()
    files = sorted((tmp_path / "plots").iterdir())
    assert {file.name for file in files} == {f"{name}.png" for name in PLOTS["sliced"]}
    for file in files:
        image = matplotlib.image.imread(file)
        assert image.shape[0] > 400
        assert image.shape[1] > 800
        assert image[..., :3].std() > 0.01  # something is on it
    assert "wrote" in ran.out


def test_plots_show_the_numbers(root):
    thin, sliced = seen(root / "thin"), seen(root / "sliced")
    assert sliced.metadata is not None
    with style():
        (energy,), (errors,), (ranks,) = plot_energy(sliced), plot_errors(sliced), plot_ranks(thin)
        upper, lower = energy.figure.axes
        points = sliced.metadata.points
        assert upper.lines[0].get_ydata().tolist() == [100 * (point.kept_energy or 0) for point in points]
        assert lower.lines[0].get_ydata().tolist() == [point.width for point in points]
        shown = errors.figure.axes[0].lines[0].get_ydata().tolist()
        assert shown == [100 * (point.relative_error or 0) for point in points]
        texts = [int(text.get_text()) for text in ranks.figure.axes[0].texts]
        assert texts == [linear.rank for linear in thin.linears if linear.block is not None]
    assert losses(thin)["mlp.down_proj"] == {
        linear.block: linear.metadata.lost
        for linear in thin.linears
        if linear.name == "mlp.down_proj" and linear.metadata
    }


@pytest.mark.parametrize("kind", [*PLOTS, "llama"])
def test_only_what_there_is_to_draw_is_drawn_and_every_byte_has_a_kind(kind, root, tmp_path, monkeypatch):
    looked, names = seen(root / kind), list[str]()
    monkeypatch.setattr(plots.drawing, "save", lambda drawings, _folder: names.extend(each.name for each in drawings))
    plots.plot_inspection(looked, tmp_path)
    assert set(names) == PLOTS.get(kind, {"sizes"})
    found = bytes_by_kind(looked)
    assert sum(found.values()) == looked.bytes
    assert found["other tensors"] == 0
    assert (found["adapters"] > 0) is (kind in ("packed", "compact"))
    assert (found["places of kept weights"] > 0) is (kind == "compact")
    assert (found["shortcuts"] > 0) is (kind == "turned")
    with style():
        (sizes,) = plot_sizes(looked)
        bars = [bar.get_width() for bar in sizes.figure.axes[0].patches]
    assert sum(bars) * 1e3 == pytest.approx(looked.bytes)


def test_size_against_what_was_measured(root, tmp_path):
    folders = [shutil.copytree(root / kind, tmp_path / kind) for kind in ("sliced", "thin", "packed")]
    for folder, ppl in zip(folders, (30, 20, 25), strict=True):
        write_quality(Path(folder), ppl)
    ran = succeeds("inspect", *folders, "--plot", tmp_path / "plots", "--fast")
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert names == {
        "size-perplexity-on-wikitext2-windows-of-128.png",
        "size-divergence-from-dense-held-out-while-compressing.png",
    }
    assert "size-perplexity" in "".join(ran.out.split())


def test_where_nothing_is_measured_alike_that_is_said(root, tmp_path):
    ran = invoke("inspect", root / "turned", root / "llama", "--plot", tmp_path / "plots", "--fast")
    assert ran.code == 2
    assert "no measure that two of these checkpoints have" in ran.faults[0]
    assert not (tmp_path / "plots").exists()


def mark(name: str, size: int, value: float, *, lower: bool = True) -> Mark:
    return Mark(name, size, Measure("m", value, 0.1, lower_is_better=lower))


def test_the_frontier_is_of_those_that_none_beats():
    marks = [mark("a", 10, 5.0), mark("b", 20, 4.0), mark("c", 20, 6.0), mark("d", 30, 4.0), mark("e", 40, 3.0)]
    assert [each.name for each in frontier(marks)] == ["a", "b", "e"]
    accuracies = [mark("a", 10, 0.5, lower=False), mark("b", 20, 0.4, lower=False), mark("c", 30, 0.6, lower=False)]
    assert [each.name for each in frontier(accuracies)] == ["a", "c"]


def test_without_matplotlib_the_remedy_is_said(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = invoke("inspect", root / "sliced", "--plot", tmp_path / "plots")
    assert ran.code == 2
    assert ran.faults == ["Plots need matplotlib. Install it: pip install 'compress-llm[plots]'."]
    assert not (tmp_path / "plots").exists()
