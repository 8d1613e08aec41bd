"""Everything worth measuring on one CUDA device, within a time limit; at toy size on a CPU, to see that it works.

    scripts/gpu_bench.sh [--toy] [--limit 540] [--parts tests,compress,generation,linears] [--layers 4]

tests       the tests marked gpu, in several processes
compress    a Llama with the shapes of Llama-2-7B but fewer layers (see synthetic_llama.py) through the shipped recipes:
            seconds by kind of work, the device's and the host's peak memory, seconds for 32 layers by proportion
generation  dense against each result: prefill and decoding, each batch, as `compress bench` measures them
linears     dense against each result's linears, by themselves

Every step is a process of its own. One that fails is told in the report, its traceback is in a log beside it, and the
others go on; what the time does not suffice for is left out and said. Writes report.md, report.json and the logs to
$OUT, or to ./gpu_bench. Ends with code 1 if anything failed.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "compress", "generation", "linears")
NEEDED = (
    *("torch", "transformers", "safetensors", "tokenizers", "accelerate", "huggingface_hub"),
    *("pydantic", "yaml", "psutil", "wrapt", "jaxtyping", "numpy"),
)
USEFUL = {
    "pytest": "the GPU tests",
    "beartype": "checking shapes in the GPU tests",
    "pytest_timeout": "the tests' own configuration",
    "compressed_tensors": "the proof that packed weights load without our code",
    "peft": "the proof that adapters load without our code",
    "typer": "the command line",
    "rich": "the command line",
    "datasets": "texts from the hub",
}
LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
TOY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
FULL_DEPTH = 32
SHARDS = 8  # processes of tests
ENDS = {"tests": 0.25, "compress": 0.7, "generation": 0.85, "linears": 1.0}  # of each part: the share of time gone by


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    sizes: dict[str, int]
    layers: int
    samples: int
    seq_len: int
    trial_samples: int
    batches: tuple[int, ...]
    prompt: int
    new: int
    rounds: int
    tokens: tuple[int, ...]


@dataclass
class Session:
    """Where things are written, until when, and what has come of them so far."""

    scale: Scale
    scratch: Path
    out: Path
    start: float
    limit: float
    proof: bool
    device: str
    found: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    part: str = PARTS[-1]
    head: dict[str, Any] = field(default_factory=dict)
    recipes: tuple[str, ...] = ()  # none: all

    @property
    def left(self) -> float:
        """Seconds of the present part."""
        return self.start + self.limit * ENDS[self.part] - time.monotonic()

    @property
    def dense(self) -> Path:
        return self.scratch / "dense"

    def result(self, name: str) -> Path:
        return self.scratch / "results" / name


def recipes() -> dict[str, dict[str, Any]]:
    """The shipped ones, and SLiM's in other forms; slow ones last, so that the others come in any case."""
    from compress import presets

    shipped = {name: presets.load(name) for name in ("slicegpt", "lord", "slim")}
    packed = {"stage": "slim", "quantize": {"method": "absmax", "num_bits": 4}}
    compact = {**shipped["slim"]["stages"][0], "form": "compact"}
    shipped["4 bits, packed"] = {**shipped["slim"], "method": "absmax", "stages": [packed]}
    shipped["slim, compact"] = {**shipped["slim"], "method": "slim-compact", "stages": [compact]}
    return shipped | {name: presets.load(name) for name in ("anchored", "lord-anchored", "slim-anchored")}


# Steps: each runs in a process of its own and returns what goes into the report.


def write_dense(session: Session) -> dict[str, Any]:
    import torch
    from synthetic_llama import write_llama

    start = time.perf_counter()
    sizes = session.scale.sizes | {"num_hidden_layers": session.scale.layers, "max_position_embeddings": 4096}
    parameters = write_llama(session.dense, sizes, torch.device(session.device))
    return {"parameters": parameters, "seconds": time.perf_counter() - start, **sizes}


def compress(session: Session, name: str) -> dict[str, Any]:
    import torch

    import compress.pipeline
    from compress.models.hub import find_model
    from compress.planning.prepare import Job
    from compress.recipe import parse_recipe

    scale = session.scale
    recipe = recipes()[name]
    recipe |= {"calibration": {"source": "stdlib", "samples": scale.samples, "seq_len": scale.seq_len}}
    if "budget" in recipe:
        recipe["budget"] |= {"trial_samples": scale.trial_samples}
    if not session.proof:
        vars(compress.pipeline)["verify"] = lambda *_arguments, **_options: 0.0
    job = Job(
        model=find_model(str(session.dense)),
        recipe=parse_recipe(recipe),
        out=session.result(name),
        command="scripts/gpu_bench.sh",
        device=torch.device(session.device),
    )
    result = compress.pipeline.run(job)
    return {
        "seconds": result.seconds,
        "parameters": result.size.parameters / result.dense.parameters,
        "bytes": result.size.bytes / result.dense.bytes,
        "lost_energy": result.lost,
        "held_out_divergence": result.metadata.held_out_divergence,
        "device_peak": torch.cuda.max_memory_allocated() if session.device == "cuda" else None,
        "host_peak": host_peak(),
    }


def host_peak() -> int | None:
    from torch import device

    from compress.evaluation.footprint import peak

    return peak(device("cpu"))


def both(session: Session, name: str) -> list[Any]:
    import torch

    from compress.models.stored_loading import open_model

    folders = (session.dense, session.result(name))
    return [open_model(folder, dtype=torch.bfloat16, device=torch.device(session.device)) for folder in folders]


def generation(session: Session, name: str) -> list[dict[str, Any]]:
    from cuda_graphs import recorded

    from compress.evaluation.speed import Workload, compare_generation

    scale, models, found = session.scale, both(session, name), []
    for graphs in ways(session):
        for batch in scale.batches:
            load = Workload(batch, scale.prompt, scale.new)
            with unsupported_is_said(found, {"batch": batch, "cuda_graphs": graphs}):
                how = {"decoding": recorded(load.new)} if graphs else {}
                speeds = compare_generation(*models, load, rounds=scale.rounds, **how)
                found.append(speeds | {"cuda_graphs": graphs})
    return found


def linears(session: Session, name: str) -> list[dict[str, Any]]:
    import torch
    from cuda_graphs import captured

    from compress.evaluation.speed import compare_linears, matched

    scale, found = session.scale, []
    options = (torch.bfloat16, torch.device(session.device))
    places = matched(*both(session, name)).places
    for place in one_of_a_shape(places):
        for tokens in scale.tokens:
            for graphs in ways(session):
                with unsupported_is_said(found, {"name": place.name, "tokens": tokens, "cuda_graphs": graphs}):
                    how = {"record": captured} if graphs else {}
                    speed = compare_linears(place, tokens, *options, rounds=scale.rounds, **how)
                    found.append(speed | {"cuda_graphs": graphs})
    return found


def one_of_a_shape(places: list[Any]) -> list[Any]:
    """Of places with the same forms the first: k and v are as q. None where nothing has changed."""
    by_forms: dict[Any, Any] = {}
    for place in places:
        dense, stored = place.forms
        if set(stored) != {dense}:
            by_forms.setdefault((dense, frozenset(stored)), place)
    return list(by_forms.values())


def ways(session: Session) -> list[bool]:
    """Without CUDA graphs, and with them where there is CUDA."""
    return [False, True] if session.device == "cuda" else [False]


@contextlib.contextmanager
def unsupported_is_said(found: list[dict[str, Any]], where: dict[str, Any]) -> Iterator[None]:
    """A case that cannot be measured is an entry with the reason."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        found.append(where | {"fault": f"{type(error).__name__}: {error}".splitlines()[0]})


# Running them.


def attempt(session: Session, label: str, step: Callable[..., Any], *words: Any) -> Any:
    """What a step returns, in a process of its own, or None where it fails or time runs out."""
    if session.left < 5:
        session.skipped[label] = "no time left"
        say(f"{label}: left out, no time left")
        return None
    say(f"{label} ...")
    start = time.monotonic()
    answer = session.scratch / "answer.json"
    answer.unlink(missing_ok=True)
    log = session.out / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', label)}.log"
    process = multiprocessing.get_context("forkserver").Process(target=work, args=(log, answer, step, session, *words))
    process.start()
    process.join(session.left)
    if process.is_alive():
        process.kill()
        process.join()
        session.failed[label] = f"ended after {time.monotonic() - start:.0f} s: no time left"
    elif not answer.is_file():
        session.failed[label] = f"{last_line(log) or f'ended with code {process.exitcode}'} (logs/{log.name})"
    took = f"{time.monotonic() - start:.1f} s"
    say(f"{label}: {session.failed.get(label, 'done')}, {took}")
    return json.loads(answer.read_text()) if label not in session.failed else None


def work(log: Path, answer: Path, step: Callable[..., Any], session: Session, *words: Any) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        found = step(session, *words)
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(answer)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else ""


def say(line: str) -> None:
    print(line, flush=True)


def run_tests(session: Session) -> None:
    if session.device != "cuda":
        session.skipped["tests"] = "no CUDA device"
    elif importlib.util.find_spec("pytest") is None:
        session.skipped["tests"] = "pytest is not installed"
    else:
        session.found["tests"] = in_shards(session, "gpu")
    say(f"tests: {session.found.get('tests', session.skipped.get('tests'))}")


def in_shards(session: Session, marker: str) -> dict[str, int]:
    """How many of the marked tests passed, failed and were skipped."""
    files = [file for file in sorted((ROOT / "tests").glob("test_*.py")) if f"mark.{marker}" in file.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *configuration(session, marker)]
    listed = subprocess.run(
        [*command, "--collect-only", *map(str, files)], cwd=ROOT, capture_output=True, text=True, timeout=session.left
    )
    names = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    logs = [session.out / "logs" / f"tests-{number}.log" for number in range(SHARDS)]
    (session.out / "logs" / "tests-collected.log").write_text(listed.stdout + listed.stderr)
    running = []
    for number, log in enumerate(logs):
        if mine := names[number::SHARDS]:
            with log.open("w") as file:
                running.append(subprocess.Popen([*command, "-rfE", *mine], cwd=ROOT, stdout=file, stderr=file))
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(1.0, session.left))
        if process.poll() is None:
            process.kill()
    summary = "".join(log.read_text() for log in logs if log.is_file())
    counts = {kind: sum(map(int, re.findall(rf"(\d+) {kind}", summary))) for kind in ("passed", "failed", "skipped")}
    counts["errors"] = sum(map(int, re.findall(r"(\d+) error", summary)))
    counts["not run"] = len(names) - sum(counts.values())
    if len(names) == 0 or counts["failed"] or counts["errors"] or counts["not run"] > 0:
        session.failed["tests"] = f"{counts} (logs/tests-*.log)"
    return counts


def configuration(session: Session, marker: str) -> list[str]:
    """The project's own where its plugins are installed, else one that does without."""
    if all(importlib.util.find_spec(name) for name in ("beartype", "pytest_timeout", "jaxtyping")):
        return ["-m", marker]
    plain = session.scratch / "pytest.ini"
    plain.write_text("[pytest]\nmarkers =\n    gpu: needs CUDA\n    slow: takes long\n")
    return ["-c", str(plain), "--rootdir", str(ROOT), "-m", marker]


def run_compress(session: Session) -> None:
    session.found["dense"] = attempt(session, "dense model", write_dense)
    if session.found["dense"] is None:
        return
    found = session.found["compress"] = {}
    for name in session.recipes or recipes():
        entry = attempt(session, f"compress: {name}", compress, name)
        if entry is not None:
            found[name] = entry
            report(session)


def run_compared(session: Session, part: str, step: Callable[..., Any]) -> None:
    found = session.found[part] = {}
    for name in session.found.get("compress", {}):
        entry = attempt(session, f"{part}: {name}", step, name)
        if entry is not None:
            found[name] = entry
            faults = [each["fault"] for each in entry if "fault" in each]
            if faults:
                session.failed[f"{part}: {name}, {len(faults)} of {len(entry)} cases"] = faults[0]
            report(session)


# The report.


def markdown(session: Session) -> str:
    lines = ["# GPU bench", "", *(f"- {name}: {value}" for name, value in session.head.items()), ""]
    lines += compress_table(session) + generation_table(session) + linears_table(session)
    if "tests" in session.found:
        lines += ["", f"GPU tests: {session.found['tests']}"]
    for title, entries in (("Failed", session.failed), ("Left out", session.skipped)):
        if entries:
            lines += ["", f"## {title}", "", *(f"- {name}: {why}" for name, why in entries.items())]
    return "\n".join(lines) + "\n"


def compress_table(session: Session) -> list[str]:
    found = session.found.get("compress")
    if not found:
        return []
    scale = session.scale
    about = f"{scale.layers} layers, {scale.samples} windows of {scale.seq_len} tokens"
    proof = "the proof by reloading included" if session.proof else "without the proof by reloading"
    title = f"## Compressing, {about}, {proof}"
    columns = ["recipe", "seconds", "by kind", f"for {FULL_DEPTH} layers (in proportion, not measured)"]
    columns += ["device peak", "host peak", "parameters", "bytes"]
    rows = []
    for name, entry in found.items():
        seconds = dict(entry["seconds"])
        total = seconds.pop("total")
        walked = sum(seconds.values())
        seconds["preparing"] = total - walked
        kinds = sorted(((value, kind) for kind, value in seconds.items() if value > total / 100), reverse=True)
        proportion = f"{total - walked + walked * FULL_DEPTH / scale.layers:,.0f}"
        peaks = [gigabytes(entry[peak]) for peak in ("device_peak", "host_peak")]
        shares = [f"{entry[share]:.2f}" for share in ("parameters", "bytes")]
        rows.append(
            [
                name,
                f"{total:.1f}",
                ", ".join(f"{kind} {value:.1f}" for value, kind in kinds),
                proportion,
                *peaks,
                *shares,
            ]
        )
    return [title, "", *table(columns, rows)]


def generation_table(session: Session) -> list[str]:
    found = session.found.get("generation")
    if not found:
        return []
    scale = session.scale
    columns = ["recipe", "CUDA graphs", "batch", "prefill dense, tokens/s", "compressed", "speedup"]
    columns += ["decode dense, tokens/s", "compressed", "speedup"]
    rows = []
    for name, entries in found.items():
        for entry in entries:
            cells = [cell for kind in ("prefill", "decode") for cell in rates(entry, kind)]
            rows.append([name, "yes" if entry["cuda_graphs"] else "no", str(entry["batch"]), *cells])
    return ["", f"## Generation, {scale.prompt} + {scale.new} tokens, bfloat16", "", *table(columns, rows)]


def rates(entry: dict[str, Any], kind: str) -> list[str]:
    measured = entry.get(kind)
    if measured is None:
        return ["", "", entry.get("fault", "no room")]
    per_second = measured["tokens_per_second"]
    return [f"{per_second[side]['median']:,.0f}" for side in ("dense", "compressed")] + [speedup(measured["speedup"])]


def linears_table(session: Session) -> list[str]:
    found = session.found.get("linears")
    if not found:
        return []
    columns = ["recipe", "linear", "dense, m x n", "compressed", "CUDA graphs"]
    columns += ["tokens", "dense, µs", "compressed, µs", "speedup"]
    rows = []
    for name, entries in found.items():
        for entry in entries:
            how = ["yes" if entry["cuda_graphs"] else "no", f"{entry['tokens']:,}"]
            if entry.get("seconds") is None:
                rows.append([name, entry["name"], "", "", *how, "", "", entry.get("fault", "no room")])
                continue
            dense, first = entry["dense"], entry["compressed"][0]
            shape = f"{dense['m']} x {dense['n']}"
            times = [f"{1e6 * entry['seconds'][side]['median']:,.1f}" for side in ("dense", "compressed")]
            rows.append([name, entry["name"], shape, described(first), *how, *times, speedup(entry["speedup"])])
    return ["", "## Linears by themselves, bfloat16", "", *table(columns, rows)]


def described(form: dict[str, Any]) -> str:
    words = [form["kind"], f"{form['m']} x {form['n']}"]
    words += [f"{form['bits']} bits"] if form["bits"] else []
    words += [form["pattern"]] if form["pattern"] else []
    return ", ".join(words + ([f"rank {form['rank']}"] if form["rank"] else []))


def speedup(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows]]


def gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f} GB"


def report(session: Session) -> None:
    (session.out / "report.md").write_text(markdown(session))
    data = {"about": session.head, **session.found, "failed": session.failed, "skipped": session.skipped}
    (session.out / "report.json").write_text(json.dumps(data, indent=1))


# From the command line.


def main() -> int:
    options = arguments()
    # A polite kill ends like any other end: nothing is left in the scratch folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    absent = [name for name in (*NEEDED, *USEFUL) if importlib.util.find_spec(name) is None]
    for name in absent:
        say(f"not installed: {name}, for {USEFUL.get(name, 'everything')}")
    if set(absent) & set(NEEDED):
        say("Install what is for everything, or name a folder that has it in PYTHONPATH.")
        return 1
    session = new_session(options)
    try:
        return run(session, options, absent)
    finally:
        shutil.rmtree(session.scratch)


def run(session: Session, options: argparse.Namespace, absent: list[str]) -> int:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "transformers", "compress.pipeline"])
    session.head = about(session, absent)
    for name, value in session.head.items():
        say(f"{name}: {value}")
    steps = {
        "tests": lambda: run_tests(session),
        "compress": lambda: run_compress(session),
        "generation": lambda: run_compared(session, "generation", generation),
        "linears": lambda: run_compared(session, "linears", linears),
    }
    for part in options.parts:
        session.part = part
        try:
            steps[part]()
        except Exception:
            session.failed[part] = traceback.format_exc().strip().splitlines()[-1]
            traceback.print_exc()
        report(session)
    say(f"{session.out / 'report.md'}: {len(session.failed)} failed, {len(session.skipped)} left out")
    return 1 if session.failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny shapes; of itself where there is no CUDA device")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between; the later ones need compress")
    parser.add_argument("--recipes", help="names with semicolons between; by default all")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of each")
    parser.add_argument("--proof", action="store_true", help="with the reloading of each result in a clean process")
    options = parser.parse_args()
    options.parts = [part.strip() for part in options.parts.split(",")]
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {min(unknown)!r}; there are {', '.join(PARTS)}")
    return options


def new_session(options: argparse.Namespace) -> Session:
    import torch

    start = time.monotonic()
    has_cuda = torch.cuda.is_available()
    if not has_cuda and not options.toy:
        say("There is no CUDA device: toy size, on the CPU. Its figures say nothing.")
    toy = options.toy or not has_cuda
    scale = (
        Scale(TOY, 2, 8, 64, 8, (1, 2), 16, 4, 3, (1, 8))
        if toy
        else Scale(
            LLAMA_2_7B,
            options.layers,
            options.samples,
            options.seq_len,
            min(16, options.samples),
            (1, 8, 32, 128),
            128,
            32,
            7,
            (1, 16, 128, 2048),
        )
    )
    out = Path(os.environ.get("OUT") or "gpu_bench").absolute()
    shutil.rmtree(out / "logs", ignore_errors=True)
    (out / "logs").mkdir(parents=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu_bench-"))
    device = "cuda" if has_cuda else "cpu"
    names = tuple(options.recipes.split(";")) if options.recipes else ()
    return Session(scale, scratch, out, start, options.limit, options.proof, device, recipes=names)


def about(session: Session, absent: list[str]) -> dict[str, Any]:
    import torch

    from compress.version import __version__

    cuda = session.device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["scripts/gpu_bench.sh", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})",
        "CUDA": torch.version.cuda or "none",
        "versions": f"compress {__version__}, torch {torch.__version__}, "
        f"transformers {importlib.metadata.version('transformers')}, Python {platform.python_version()}",
        "not installed": ", ".join(absent) or "nothing",
    }


if __name__ == "__main__":
    sys.exit(main())
