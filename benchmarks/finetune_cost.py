"""What a step of `compress finetune` costs, in plain forward and backward passes of its tokens.

    python benchmarks/finetune_cost.py FOLDER ... [--teacher DENSE]

The unit is the same compressed model in float32 with every stored weight as a plain linear, what is trained as PEFT
has it, and `model(input_ids=ids, labels=ids).loss.backward()`; with a teacher its forward pass besides. Step and unit
take turns in one process, on random tokens; given are medians. A run is 400 steps of 16 windows with all looks at
held-out windows and the measurements at its end, in the same units.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from compress.models.hub import find_model
from compress.models.loading import load_tokenizer
from compress.own_model.modeling_compress import AdaptedLinear
from compress.tuning.looking import Prepared, block_linears, look, thin_linears
from compress.tuning.settings import NUM_HELD_OUT, Settings, TuningJob, What
from compress.tuning.trained import open_folder, open_teacher, open_trained
from compress.tuning.training import Training

CPU = torch.device("cpu")
COLUMNS = ["checkpoint", "trained", "toward", "step, s", "unit, s", "step", "against all weights", "look, s", "run"]
STEPS, WINDOWS = 400, 16  # of a run at the defaults
LONG = 60.0


def measure(
    folder: Path, *, teacher: Path | None = None, batch_size: int = 4, seq_len: int = 512, rounds: int = 3
) -> dict[str, Any]:
    """Seconds of a step, of the plain pass and of a look, and their ratios.

    folder: a compressed checkpoint of any kind. teacher: the dense model to distill from; None for the text alone.

    Returns step_seconds; unit_seconds, of the pass with gradients where finetune trains; full_seconds, with gradients
    of every weight; look_seconds, of `batch_size` held-out windows; ratio and full_ratio of the step; run_ratio of a
    whole run at the defaults.
    """
    with tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(folder, teacher, Path(scratch), batch_size, seq_len)
        trained, dense = open_trained(prepared, CPU), open_teacher(prepared, CPU)
    settings, texts = prepared.job.settings, prepared.texts
    held_out = texts.held_out[:batch_size]
    training = Training(trained, dense, texts.train, held_out, settings, prepared.rate, Accelerator(cpu=True))
    unit, full = plain_model(prepared, what=prepared.what), plain_model(prepared, what="all")
    ids = texts.train[:batch_size]
    found = interleaved(
        {
            "step": training.step,
            "unit": lambda: plain_pass(unit, dense, ids),
            "full": lambda: plain_pass(full, dense, ids),
            "look": training.held_out_loss,
        },
        rounds,
    )
    step, whole, look = found["step"], found["unit"], found["look"] / batch_size
    usual = settings.model_copy(update={"batch_size": WINDOWS})
    looks = (STEPS // usual.eval_every + 1) * usual.num_looked_at(NUM_HELD_OUT)
    looks += (4 if teacher is None else 5) * NUM_HELD_OUT  # before and after, on two texts; the dense model on one
    return {
        "trained": prepared.what,
        "step_seconds": step,
        "unit_seconds": whole,
        "full_seconds": found["full"],
        "look_seconds": found["look"],
        "ratio": step / whole,
        "full_ratio": step / found["full"],
        "run_ratio": step / whole + looks * look / (STEPS * WINDOWS * whole / batch_size),
    }


def prepare(folder: Path, teacher: Path | None, scratch: Path, batch_size: int, seq_len: int) -> Prepared:
    """A tuning of random text, everything else at its default."""
    tokenizer = load_tokenizer(folder)
    drawn = torch.randint(len(tokenizer), (8 * batch_size * seq_len,), generator=torch.Generator().manual_seed(0))
    text = scratch / "text.txt"
    text.write_text(tokenizer.decode(drawn), encoding="utf-8")
    settings = Settings(
        data=str(text),
        steps=STEPS,
        seq_len=seq_len,
        batch_size=batch_size,
        distill="none" if teacher is None else "logits",
    )
    job = TuningJob(
        model=find_model(str(folder)),
        settings=settings,
        teacher=None if teacher is None else find_model(str(teacher)),
        out=scratch / "out",
        command="",
    )
    return look(job)


def plain_model(prepared: Prepared, *, what: What) -> Any:
    """The compressed model of plain float32 linears, with gradients of what is trained."""
    model = open_folder(prepared.job.folder, torch.float32, CPU).requires_grad_(False).train()
    ranks = {path: plain(model, path, each) for path, each in stored_linears(model).items()}
    if what in ("all", "factors"):
        for part in [model] if what == "all" else thin_linears(model).values():
            part.requires_grad_()
        return model
    if what == "lora":
        ranks = dict.fromkeys(block_linears(model, prepared.config), prepared.job.settings.lora_rank)
    ranks = {path: rank for path, rank in ranks.items() if rank}
    inject_adapter_in_model(LoraConfig(target_modules=list(ranks), rank_pattern=ranks, lora_alpha=1), model, "default")
    return model


def stored_linears(model: nn.Module) -> dict[str, AdaptedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def plain(model: nn.Module, path: str, linear: AdaptedLinear) -> int:
    """Put a plain linear in a stored one's place; the rank of the adapter that it had."""
    dense = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None).requires_grad_(False)
    dense.weight.data = linear.rows(0, linear.out_features, torch.float32).clone()
    model.set_submodule(path, dense)
    adapter = linear.adapter(torch.float32)
    return 0 if adapter is None else len(adapter[0])


def plain_pass(model: Any, teacher: Any, ids: Tensor) -> None:
    if teacher is not None:
        with torch.no_grad():
            teacher(input_ids=ids, use_cache=False)
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def interleaved(passes: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each, in turns.

    The first turn does not count, but where it takes `LONG` seconds, next to which a first call is nothing, it is the
    only one.
    """
    turns: list[dict[str, float]] = []
    while len(turns) <= rounds and sum(turns[0].values() if turns else ()) < LONG:
        turns.append({name: seconds_of(run) for name, run in passes.items()})
    return {name: statistics.median(turn[name] for turn in turns[1:] or turns) for name in passes}


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(folder: Path, teacher: Path | None, found: dict[str, Any]) -> str:
    cells = [
        folder.name,
        found["trained"],
        "the text" if teacher is None else "the dense model",
        *(f"{found[f'{name}_seconds']:.2f}" for name in ("step", "unit")),
        *(f"{found[f'{name}']:.2f}" for name in ("ratio", "full_ratio")),
        f"{found['look_seconds']:.2f}",
        f"{found['run_ratio']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|" + "---|" * len(COLUMNS), flush=True)
    sizes = {"batch_size": options.batch_size, "seq_len": options.seq_len, "rounds": options.rounds}
    for folder in options.folders:
        print(row(folder, options.teacher, measure(folder, teacher=options.teacher, **sizes)), flush=True)


if __name__ == "__main__":
    main()
