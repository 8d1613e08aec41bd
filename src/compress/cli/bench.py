"""`compress bench`: speed, memory and size of a compressed model beside the dense one's, in one run."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options as opt
from compress.cli.console import progress_bar, quiet_libraries, reporting_errors
from compress.cli.tables import Row, gigabytes, print_json, print_lines, print_rows
from compress.errors import Problems, UsageError
from compress.models.hub import ModelSource, find_model

if TYPE_CHECKING:
    from compress.checkpoints.quality import Speed

OUT = "A compressed model, or any other. Default: the newest under ./compressed."
AGAINST = "The model to compare with. Default: the base model of OUT, where it is found by its name."
LAYERWISE = "Time single linear layers too, as SLiM reports speed."
TOKENS = "Tokens per call of a linear layer, with --layerwise. Default: 1,16,128."
ENGINE = "What runs the models: transformers, or llamacpp for GGUF files, alone or --against another."
DTYPE = "Dtype of both models. Default: OUT's own, on the CPU at least float32."
NOT_FOR_LLAMACPP = (
    "--engine llamacpp runs one sequence on the CPU, in the file's own types. "
    "Leave --batch-sizes, --layerwise, --dtype and --device out."
)
SIDES = ("dense", "compressed")
SPEEDUP, NO_ROOM = "speedup (middle half)", "no room"


@reporting_errors
def bench(
    out: Annotated[str | None, typer.Argument(help=OUT, show_default=False)] = None,
    against: Annotated[str | None, typer.Option(help=AGAINST, show_default=False)] = None,
    batch_sizes: Annotated[str | None, opt.Method("Sequences per batch; several with commas. Default: 1,8.")] = None,
    prompt: Annotated[str | None, opt.Method("Prompt length in tokens; several with commas. Default: 128.")] = None,
    new: Annotated[int | None, opt.Method("New tokens per sequence. Default: 32.", min=1)] = None,
    rounds: Annotated[int, opt.Method("Repetitions of each measurement, the two models alternating.", min=1)] = 7,
    layerwise: Annotated[bool, opt.Method(LAYERWISE, "--layerwise")] = False,
    tokens: Annotated[str | None, opt.Method(TOKENS)] = None,
    engine: Annotated[opt.Engine, opt.Machine(ENGINE)] = "transformers",
    dtype: Annotated[str | None, opt.Machine(DTYPE)] = None,
    device: opt.Device = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    save: opt.Save = False,
    json: opt.Json = False,
) -> None:
    """Measure speed, memory and size of a compressed model beside the dense one, in turns.

    Example: compress bench compressed/opt-125m-anchored-kp0.75 --against opt-125m
    """
    problems, sources = Problems(), list[ModelSource]()
    lists = [
        problems.check(numbers_in, option, text) or []
        for option, text in (("batch-sizes", batch_sizes), ("prompt", prompt), ("tokens", tokens))
    ]
    with problems.collect():
        if tokens is not None and not layerwise:
            raise UsageError("--tokens has no effect without --layerwise. Add it, or leave --tokens out.")
    problems.check(opt.check_dtype, dtype)
    with problems.collect():
        if engine == "llamacpp" and (batch_sizes or layerwise or dtype or device):
            raise UsageError(NOT_FOR_LLAMACPP)
    with problems.collect():
        sources.append(find_model(out or str(opt.newest_or_refuse("bench"))))
        if save:
            problems.check(opt.kept_in, sources[0])
        if against is not None or engine == "transformers":
            sources.insert(0, base_of(sources[0]) if against is None else find_model(against))
    target: Any = problems.check(opt.pick_device, device) if device is not None or not problems.found else None
    problems.report()
    if engine == "llamacpp":
        report = measure_llamacpp(sources, lists[1], new, rounds)
        speeds = [speed_in_llamacpp(report, load) for load in report["speeds"]] if save else []
    else:
        from compress.evaluation.bench import Asked, look_at_pair, measure, other_source, workloads

        quiet_libraries()
        pair, configs = look_at_pair(sources, trust_remote_code=trust_remote_code)
        asked = Asked(
            workloads=workloads(lists[0], lists[1], new, configs),
            rounds=rounds,
            dtype=opt.computing_dtype(dtype, configs[1], target),
            device=target,
            tokens=(lists[2] or [1, 16, 128]) if layerwise else [],
            trust_remote_code=trust_remote_code,
        )
        with progress_bar("preparing") as progress:
            report = measure(*pair, asked, progress)
        report["notes"] += other_source(*pair)
        speeds = [speed_in_turns(report, load) for load in report["generation"]] if save else []
    if save:
        from compress.checkpoints.quality import Quality, save_quality

        save_quality(opt.kept_in(sources[-1]), Quality(speed=speeds))
    if json:
        print_json(report)
    else:
        show_llamacpp(report) if engine == "llamacpp" else show(report)


def numbers_in(option: str, text: str | None) -> list[int]:
    """The numbers between commas, once each; none where nothing was typed."""
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise UsageError(f"--{option} takes whole numbers from 1 on, with commas between, got {text!r}. Try 1,8.")
    return list(dict.fromkeys(map(int, words)))


def base_of(source: ModelSource) -> ModelSource:
    from compress.evaluation.bench import facts_of

    name = facts_of(source.folder).get("base_model") if source.folder else None
    if not isinstance(name, str):
        raise UsageError(f"{source.name} does not say what it was made from. Name a model: --against M.")
    try:
        return find_model(name)
    except UsageError as error:
        raise UsageError(
            f"{source.name} was made from {name!r}, which is no folder here, no alias and no id of the hub. "
            "Say where it is: --against FOLDER."
        ) from error


def measure_llamacpp(
    sources: Sequence[ModelSource], prompts: Sequence[int], new: int | None, rounds: int
) -> dict[str, Any]:
    """Measure GGUF files in llama.cpp, one sequence at a time; the one to compare with comes first."""
    from compress.evaluation.bench import workloads
    from compress.evaluation.llamacpp import compare_speeds, gguf_file
    from compress.models.loading import load_config

    problems, files, configs = Problems(), [], []
    for source in sources:
        with problems.collect():
            files.append(gguf_file(source.whole_folder(), source.name))
            configs.append(load_config(source.whole_folder()))
    problems.report()
    names, sizes = [source.name for source in sources], [config.vocab_size for config in configs]
    if len(set(names)) < len(names):  # files of one name in two folders
        names = [str(file) for file in files]
    speeds = [
        {
            **{"prompt": load.prompt, "new": load.new},
            "files": dict(zip(names, compare_speeds(files, sizes, load.prompt, load.new, rounds), strict=True)),
        }
        for load in workloads([1], prompts, new, configs)
    ]
    return {"engine": "llamacpp", "rounds": rounds, "speeds": speeds}


# What was measured, for quality.json.


def speed_in_turns(report: Mapping[str, Any], load: Mapping[str, Any]) -> "Speed":
    """Make the record of two models' generation in turns. load: an entry of the report's `generation`."""
    from compress.checkpoints.quality import Speed

    rates = {name: load[name]["tokens_per_second"] if load[name] else {} for name in ("prefill", "decode")}
    size = {name: load[name] for name in ("batch", "prompt", "new")}
    how = {name: report[name] for name in ("dtype", "machine", "rounds")}
    return Speed.model_validate({"engine": "transformers", "dense": report["dense"]["name"], **size, **how, **rates})


def speed_in_llamacpp(report: Mapping[str, Any], load: Mapping[str, Any]) -> "Speed":
    """llama.cpp's speeds. load: an entry of the report's `speeds`, whose last file is the compressed model."""
    from compress.checkpoints.quality import Speed

    names = list(load["files"])
    sides = {side: load["files"][name] for side, name in zip(SIDES[-len(names) :], names, strict=True)}
    rates = {name: {side: each[name] for side, each in sides.items()} for name in ("prefill", "decode")}
    how = {"batch": 1, "prompt": load["prompt"], "new": load["new"], "dtype": None, "machine": None}
    dense = names[0] if len(names) > 1 else None
    return Speed.model_validate({"engine": "llamacpp", "dense": dense, "rounds": report["rounds"], **how, **rates})


# The report as tables.


def show_llamacpp(report: Mapping[str, Any]) -> None:
    for load in report["speeds"]:
        rows = [
            {
                **{"file": name, "bytes": gigabytes(found["bytes"])},
                **{"prefill": near(found["prefill"], ",.0f"), "decode": near(found["decode"], ",.1f")},
            }
            for name, found in load["files"].items()
        ]
        title = f"llama.cpp, {load['prompt']} + {load['new']} tokens: tokens a second, ± half the quartiles' distance"
        print_rows(title, rows)


def show(report: Mapping[str, Any]) -> None:
    dense, compressed = (report[side]["name"] for side in SIDES)
    print_rows(f"{compressed} beside {dense}: {report['dtype']} on {report['machine']}", footprint_rows(report))
    speeds = [row for each in report["generation"] for row in speed_rows(each)]
    print_rows("In turns: tokens a second, ± half the distance of the quartiles", speeds)
    forms = {
        (each["name"], str(each["dense"]), str(each["compressed"])): {
            "linears": f"{each['name']} ({each['linears']})",
            **{side: form(each[side]) for side in SIDES},
        }
        for each in report["linears"]
    }
    print_rows("Linears: outputs x inputs", list(forms.values()))
    alone = [
        {
            **{"linears": f"{each['name']} ({each['linears']})", "tokens": f"{each['tokens']:,}"},
            **({**medians(each, 1e6), SPEEDUP: speedup(each)} if each["seconds"] else {"dense": NO_ROOM}),
        }
        for each in report["linears"]
    ]
    print_rows("A linear by itself: µs", alone)
    print_lines([f"Speedups are of times, {dense} / {compressed}: above 1, {compressed} is faster.", *report["notes"]])


def footprint_rows(report: Mapping[str, Any]) -> list[Row]:
    """Memory is what is held beyond the libraries."""
    load, dense, compressed = report["memory_at"], report["dense"], report["compressed"]

    def row(label: str, shown: Callable[[int], str], value: Callable[[dict[str, Any]], int | None]) -> Row:
        one, two = value(dense), value(compressed)
        cells = ["not known" if each is None else shown(each) for each in (one, two)]
        share = f"{two / one:.2f}" if one and two is not None else None
        return {"": label, **dict(zip(SIDES, cells, strict=True)), "of dense": share}

    def above(when: str) -> Callable[[dict[str, Any]], int | None]:
        return lambda side: None if None in (side[when], side["before"]) else side[when] - side["before"]

    rows = [
        row("parameters", "{:,}".format, lambda side: side["parameters"]),
        row("bytes on disk", gigabytes, lambda side: side["disk"]),
        {"": "seconds to load, cached files", **{side: near(report[side]["load"], ".2f") for side in SIDES}},
        row("most memory, loading", gigabytes, above("loading")),
        row(f"and running {load['batch']} x ({load['prompt']} + {load['new']})", gigabytes, above("running")),
    ]
    if report["machine"].startswith("cpu") and dense["before"] and compressed["before"]:
        libraries = {side: gigabytes(report[side]["before"]) for side in SIDES}
        rows.append({"": "libraries, not counted there", **libraries})
    return rows


def speed_rows(speeds: Mapping[str, Any]) -> list[Row]:
    rows = list[Row]()
    for name, tokens in (("prefill", speeds["prompt"]), ("decode", speeds["new"])):
        times, label = speeds[name], {"rows x tokens": f"{name} {speeds['batch']} x {tokens}"}
        if times is None:
            rows.append({**label, "dense": NO_ROOM})
            continue
        rates = {side: near(found, ",.0f") for side, found in times["tokens_per_second"].items()}
        rows.append({**label, **rates, SPEEDUP: speedup(times)})
        if name == "prefill":
            rows.append({"rows x tokens": "  first token, ms", **medians(times, 1e3)})
    return rows


def medians(times: Mapping[str, Any], unit: float) -> Row:
    return {side: f"{unit * found['median']:,.1f}" for side, found in times["seconds"].items()}


def near(spread: Mapping[str, float], digits: str) -> str:
    return f"{spread['median']:{digits}} ± {(spread['high'] - spread['low']) / 2:{digits}}"


def speedup(times: Mapping[str, Any]) -> str:
    return "{median:.2f} ({low:.2f}-{high:.2f})".format(**times["speedup"])


def form(stored: Any) -> str:
    """How linears are stored; where sizes or ranks differ by block, how far they go."""
    forms = stored if isinstance(stored, list) else [stored]
    words = [(each["kind"], each["bits"] and f"{each['bits']} bits", each["pattern"]) for each in forms]
    kinds = dict.fromkeys(", ".join(filter(None, each)) for each in words)
    m, n, rank = (span([each[name] for each in forms]) for name in ("m", "n", "rank"))
    return f"{' or '.join(kinds)}, {m} x {n}" + (f", rank {rank}" if rank != "0" else "")


def span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"
