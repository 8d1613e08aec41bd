"""`compress eval`: how good a model is, dense or compressed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.options import BatchSize, DataDir, Device, Json, look_at, usual_seq_len
from compress.cli.reporting import print_json, print_table, progress_bar, quiet_libraries, reporting_errors
from compress.errors import Faults, UsageError

if TYPE_CHECKING:
    import torch

    from compress.evaluation.perplexity import Perplexity


@reporting_errors
def evaluate(
    ppl: Annotated[
        str, typer.Option(help="Data sets or text files, with commas between: wikitext2, c4, ptb, stdlib, FILE.txt")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="A hub id, an alias, a folder or demo. Default: newest under ./compressed, else demo."),
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens a window. Default: 2048, or what the model has.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first windows, for a quick look.")] = None,
    batch_size: BatchSize = 8,
    dtype: Annotated[
        str | None, typer.Option(help="To compute in. Default: float32 on the CPU, the model's own on a GPU.")
    ] = None,
    device: Device = None,
    data_dir: DataDir = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modeling code that the checkpoint brings along.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure perplexity by the papers' convention, with its standard error.

    Example: compress eval --ppl wikitext2 --model opt-125m
    """
    sets = [name.strip() for name in ppl.split(",") if name.strip()]
    faults = Faults()
    with faults.noted():
        if not sets:
            raise UsageError("--ppl names no data set. Try --ppl wikitext2.")
    named = model or newest_output()
    source, data_folder, target = look_at(faults, model=named, dtype=dtype, data_dir=data_dir, device=device)

    from compress.models.counting import num_parameters
    from compress.models.loading import check_positions, check_vocabulary, load_config, load_tokenizer
    from compress.models.opening import open_model
    from compress.streaming.weights import LazyWeights

    quiet_libraries()
    folder = source.whole_folder()
    config = load_config(folder, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config()
    length = usual_seq_len(text_config, seq_len)
    with faults.noted():
        check_positions(text_config, length)
    with faults.noted():
        LazyWeights(folder)
    with faults.noted():
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        windows = read_windows(sets, tokenizer, length, data_folder, limit)
        for window in windows.values():
            check_vocabulary(window, config, folder)
    faults.report()
    precision = computing_dtype(dtype, config, target)
    loaded = open_model(folder, dtype=precision, device=target, trust_remote_code=trust_remote_code)
    results = measure(loaded, windows, batch_size or 8)
    parameters = num_parameters(loaded)
    show(source.name, parameters, str(precision), results, as_json=json)


def show(name: str, parameters: int, dtype: str, results: "list[Perplexity]", *, as_json: bool) -> None:
    if as_json:
        entries = [result.to_dict() for result in results]
        print_json({"model": name, "parameters": parameters, "dtype": dtype, "perplexity": entries})
        return
    columns = ["text", "perplexity", "± std. error", "tokens", "windows", "of tokens", "seconds"]
    print_table(f"{name}: {parameters:,} parameters", columns, [row(result) for result in results])


def newest_output() -> str:
    """The checkpoint last written under ./compressed, or the embedded model where there is none."""
    found = [file.parent for file in Path("compressed").glob("*/compress.json")]
    outputs = [folder for folder in found if folder.suffix not in (".partial", ".replaced")]
    return str(max(outputs, key=lambda folder: (folder / "compress.json").stat().st_mtime)) if outputs else "demo"


def computing_dtype(asked: str | None, config: object, device: "torch.device") -> "torch.dtype":
    import torch

    if asked is not None:
        named: torch.dtype = getattr(torch, asked)
        return named
    own = getattr(config, "dtype", None) or torch.float32
    return torch.promote_types(own, torch.float32) if device.type == "cpu" else own


def read_windows(
    sets: list[str], tokenizer: Any, seq_len: int, data_dir: Path | None, limit: int | None
) -> "dict[str, torch.Tensor]":
    from compress.datasets.windows import evaluation_windows

    faults, windows = Faults(), {}
    for name in sets:
        with faults.noted():
            windows[name] = evaluation_windows(name, tokenizer, seq_len=seq_len, data_dir=data_dir, limit=limit)
    faults.report()
    return windows


def measure(model: "torch.nn.Module", windows: "dict[str, torch.Tensor]", batch_size: int) -> "list[Perplexity]":
    from compress.evaluation.perplexity import perplexity

    total, done, results = sum(map(len, windows.values())), 0, []
    with progress_bar("evaluating") as progress:
        for name, batch in windows.items():

            def advance(count: int, name: str = name) -> None:
                nonlocal done
                done += count
                progress(name, done, total)

            results.append(perplexity(model, batch, dataset=name, batch_size=batch_size, on_batch=advance))
    return results


def row(result: "Perplexity") -> list[str]:
    return [
        result.dataset,
        f"{result.ppl:.3f}",
        f"{result.standard_error:.3f}",
        f"{result.tokens:,}",
        f"{result.windows:,}",
        str(result.seq_len),
        f"{result.seconds:.1f}",
    ]
