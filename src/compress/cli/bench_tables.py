"""What was measured of two models, as tables."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from compress.cli.reporting import gigabytes, print_lines, print_table

if TYPE_CHECKING:
    from compress.evaluation.speed.generation import Speeds
    from compress.evaluation.speed.layerwise import Form, LinearSpeed
    from compress.evaluation.speed.report import Report
    from compress.evaluation.speed.timing import Comparison, Spread

NO_ROOM = "no room"


def show(report: "Report") -> None:
    dense, compressed = (model.name for model in report.models)
    show_footprints(report)
    if report.speeds:
        rows = [row for speeds in report.speeds for row in speed_rows(speeds)]
        columns = ["rows x tokens", dense, compressed, "speedup (middle half)"]
        print_table("In turns: tokens a second, ± half the distance of the quartiles", columns, rows)
    if report.linears:
        show_linears(report.linears)
    print_lines([f"Speedups are of times, {dense} / {compressed}: above 1, {compressed} is faster.", *report.notes])


def show_footprints(report: "Report") -> None:
    dense, compressed = report.footprints
    load = report.asked.largest
    at = f"and running {load.batch} x ({load.prompt} + {load.new})"
    rows = [
        compared("parameters", report.parameters, "{:,}".format),
        compared("bytes on disk", (dense.disk, compressed.disk), gigabytes),
        ["seconds to load, cached files", near(dense.load, ".2f"), near(compressed.load, ".2f"), ""],
        compared("most memory, loading", above_libraries(report, "loading"), gigabytes),
        compared(at, above_libraries(report, "running"), gigabytes),
    ]
    if report.asked.device.type == "cpu" and dense.before and compressed.before:
        rows.append(["libraries, not counted there", gigabytes(dense.before), gigabytes(compressed.before), ""])
    dtype = str(report.asked.dtype).removeprefix("torch.")
    names = [model.name for model in report.models]
    print_table(f"{dtype} on {report.machine}", ["", *names, "of dense"], rows)


def above_libraries(report: "Report", when: str) -> list[int | None]:
    """The most bytes of both models until then, without what was held before."""
    peaks = [(getattr(took, when), took.before) for took in report.footprints]
    return [None if peak is None or before is None else peak - before for peak, before in peaks]


def compared(name: str, pair: Sequence[int | None], shown: Callable[[int], str]) -> list[str]:
    dense, compressed = pair
    cells = ["not known" if value is None else shown(value) for value in pair]
    share = f"{compressed / dense:.2f}" if dense and compressed is not None else ""
    return [name, *cells, share]


def speed_rows(speeds: "Speeds") -> list[list[str]]:
    load = speeds.workload
    before, after = f"{load.batch} x {load.prompt}", f"{load.batch} x {load.new}"
    if speeds.prefill is None or speeds.decode is None:
        return [[f"{before} + {load.new}", NO_ROOM, "", ""]]
    prefill, decode = speeds.prefill, speeds.decode
    latency = [f"{1e3 * spread.median:,.1f}" for spread in (prefill.dense, prefill.compressed)]
    return [
        [f"prefill {before}", *rates(prefill, load.batch * load.prompt), speedup(prefill)],
        ["  first token, ms", *latency, ""],
        [f"decode {after}", *rates(decode, load.batch * load.new), speedup(decode)],
    ]


def rates(times: "Comparison", tokens: int) -> list[str]:
    return [near(spread.inverse(tokens), ",.0f") for spread in (times.dense, times.compressed)]


def near(spread: "Spread", digits: str) -> str:
    return f"{spread.median:{digits}} ± {(spread.high - spread.low) / 2:{digits}}"


def speedup(times: "Comparison") -> str:
    spread = times.speedup
    return f"{spread.median:.2f} ({spread.low:.2f}-{spread.high:.2f})"


def show_linears(speeds: "list[LinearSpeed]") -> None:
    tokens = list(dict.fromkeys(speed.tokens for speed in speeds))
    by_place: dict[int, list[LinearSpeed]] = {}
    for speed in speeds:
        by_place.setdefault(id(speed.place), []).append(speed)
    rows = []
    for found in by_place.values():
        dense, stored = found[0].place.forms
        name = f"{found[0].place.name} ({len(stored)})\n{dense.m} x {dense.n}"
        kind = "" if dense.kind == "dense" else f"{form(dense)} to\n"
        rows.append([name, kind + forms(stored), *(linear_cell(speed) for speed in found)])
    columns = ["linears, m x n", "compressed", *(f"{count:,} token{'s' * (count > 1)}" for count in tokens)]
    print_table("A linear by itself: µs dense / compressed, speedup", columns, rows)


def linear_cell(speed: "LinearSpeed") -> str:
    times = speed.times
    if times is None:
        return NO_ROOM
    dense, compressed = (f"{1e6 * spread.median:,.1f}" for spread in (times.dense, times.compressed))
    return f"{dense} / {compressed}\n{speedup(times)}"


def form(one: "Form") -> str:
    words = [one.kind]
    if one.bits is not None:
        words.append(f"{one.bits} bits")
    if one.pattern is not None:
        words.append(one.pattern)
    return ", ".join(words)


def forms(stored: "list[Form]") -> str:
    """How a place's linears are stored; where sizes or ranks differ by block, how far they go."""
    sizes = [span([getattr(one, name) for one in stored]) for name in ("m", "n")]
    rank = span([one.rank for one in stored])
    kinds = " or ".join(dict.fromkeys(form(one) for one in stored))
    return f"{kinds}\n{' x '.join(sizes)}" + (f", rank {rank}" if rank != "0" else "")


def span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"
