"""Which rank each linear of each block has been given."""

from collections.abc import Sequence

from compress.inspection.linears import StoredLinear, linear_names
from compress.inspection.plots.style import MAP, Drawing, axes, shortened
from compress.inspection.summary import Inspection

WIDEST = 16.0  # inches
WRITTEN = 260  # cells up to which each says its rank


def plot_ranks(seen: Inspection) -> list[Drawing]:
    """Blocks by linears, coloured by the share of the full rank that factors or adapters have."""
    from matplotlib.ticker import PercentFormatter

    ranked = [linear for linear in seen.linears if linear.block is not None and linear.rank]
    names = linear_names(ranked)
    if not names:
        return []
    blocks = 1 + max(linear.block or 0 for linear in seen.linears)
    shares = [[float("nan")] * blocks for _ in names]
    figure, (plot,) = axes(
        min(max(6.0, 2.6 + 0.42 * blocks), WIDEST), 1.6 + 0.3 * len(names), title=shortened(seen.name, 60)
    )
    written: dict[tuple[int, int], int] = {}
    for linear in ranked:
        row, column = names.index(linear.name), linear.block or 0
        shares[row][column] = (linear.rank or 0) / full_rank(linear)
        written[row, column] = linear.rank or 0
    highest = max(share for row in shares for share in row if share == share)
    image = plot.imshow(shares, cmap=MAP, vmin=0, vmax=highest, aspect="auto")
    if len(written) <= WRITTEN:
        for (row, column), rank in written.items():
            colour = "black" if shares[row][column] > 0.55 * highest else "white"
            plot.text(column, row, str(rank), ha="center", va="center", color=colour, fontsize=9)
    plot.set_yticks(range(len(names)), names)
    plot.set_xticks(range(0, blocks, max(1, blocks // 16)))
    plot.set_xlabel("block")
    plot.grid(visible=False)
    plot.set_title(what(ranked))
    figure.colorbar(image, ax=plot, label="of the full rank", pad=0.02, format=PercentFormatter(1))
    return [Drawing("ranks", figure)]


def full_rank(linear: StoredLinear) -> int:
    return min(linear.m, linear.n)


def what(ranked: Sequence[StoredLinear]) -> str:
    factorised = [bool(linear.facts and linear.facts.form) for linear in ranked]
    if all(factorised):
        return "rank of each linear"
    return "rank of each linear, or of its adapter" if any(factorised) else "rank of each adapter"
