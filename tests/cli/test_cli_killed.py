"""`slim` and `finetune` killed at their own moments, and `finetune` in two processes: all in forks of one process."""

import json
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli_runner import Disturbance, Ran, Request, environments, run_warm, same_files, snapshot
from tiny import write_model, write_text

SLIM = shlex.split(
    "slim --model ../tiny --calib ../text.txt --samples 4 --seq-len 32 --device cpu --out out --json --fast"
)
TURNED = shlex.split(
    "slice --method slicegpt --ratio 0.25 --model tiny --calib text.txt --samples 4 --seq-len 32 --out turned"
)
TUNE = shlex.split("finetune ../turned --data ../longer.txt --data-dir ../data --seq-len 32 --batch-size 4 --steps 6")
TUNE += shlex.split("--set eval_every=3 --distill none --lr 0.003 --out out --json --device cpu")
RECORD = "compress.checkpoints.run_folder:RunFolder.record"
SAVE = "compress.io:save_file"
# By command and moment; what the run that goes on has of the killed one, parts or steps.
MOMENTS: dict[str, tuple[list[str], Disturbance, int | None]] = {
    # Of embeddings a part and its state are written, of the first block a part, its share of the adapter and a state.
    "slim, part 2": (SLIM, Disturbance(RECORD, call=2, after=True), 2),
    "slim, half an adapter part": (SLIM, Disturbance(SAVE, call=4, kind="tear"), 1),
    "slim, an unfinished adapter": (SLIM, Disturbance("compress.checkpoints.files:join", after=True), 3),
    "finetune, after three steps": (TUNE, Disturbance(RECORD, call=2, after=True), 3),
    "finetune, writing": (TUNE, Disturbance("compress.tuning.tuner:put_tensors", after=True), 6),
}
NOT_RESUMED = {"slim, part 2": [("--bits", "3"), ("--compact",)], "finetune, after three steps": [("--seed", "7")]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    write_model(root / "tiny", "opt", dtype=torch.float32, num_hidden_layers=1)
    write_text(root / "text.txt", lines=60)
    write_text(root / "longer.txt", lines=200)
    (root / "data/wikitext-2").mkdir(parents=True)
    write_text(root / "data/wikitext-2/wiki.valid.raw", lines=40, seed=5)
    (ran,) = run_warm([Request(TURNED, str(root))])
    assert ran.code == 0, ran.err
    return root


def request(
    root: Path, name: str, words: list[str], *more: str, hit: Disturbance | None = None, **how: object
) -> Request:
    folder = root / name
    folder.mkdir(exist_ok=True)
    return Request([*words, *more], str(folder), hit, **how)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(root) -> dict[str, Ran]:
    """Undisturbed runs by their command's name, and runs killed at each moment."""
    wanted = {"slim": request(root, "slim", SLIM), "finetune": request(root, "finetune", TUNE)}
    wanted |= {name: request(root, name, words, hit=hit) for name, (words, hit, _) in MOMENTS.items()}
    ran = dict(zip(wanted, run_warm(list(wanted.values())), strict=True))
    for name in NOT_RESUMED:
        shutil.copytree(root / name, root / f"other {name}")
    return ran


@pytest.fixture(scope="module")
def resumed(root, runs) -> dict[str, Ran]:
    return dict(
        zip(MOMENTS, run_warm([request(root, name, MOMENTS[name][0], "--resume") for name in MOMENTS]), strict=True)
    )


def test_nothing_is_left_over_in_the_finished_folder(root, runs):
    assert runs["slim"].code == 0, runs["slim"].err
    names = {path.relative_to(root / "slim/out").as_posix() for path in (root / "slim/out").rglob("*")}
    adapter = {"adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert {name for name in names if "adapter" in name} == adapter
    assert not [name for name in names if name.startswith(("state", "finding", "run.json", "lock"))]
    assert not [name for name in names if "unfinished" in name]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bytes(root, runs, resumed, moment):
    assert runs[moment].code == -signal.SIGKILL
    assert resumed[moment].code == 0, resumed[moment].err
    same_files(root / moment, snapshot(root / moment.partition(",")[0]))
    kept = MOMENTS[moment][2]
    said = resumed[moment].json
    assert kept is None or kept == said.get("resumed_parts", said.get("resumed_steps"))


def test_another_run_does_not_go_on_with_it(root, runs):
    asked = [(name, option) for name, options in NOT_RESUMED.items() for option in options]
    before = {name: snapshot(root / f"other {name}") for name in NOT_RESUMED}
    requests = [request(root, f"other {name}", MOMENTS[name][0], "--resume", *option) for name, option in asked]
    for ran in [run_warm([each])[0] for each in requests]:
        assert ran.code == 2
        assert len(ran.faults) == 1, ran.err
        assert "another recipe" in ran.faults[0] or "another settings" in ran.faults[0]
    assert {name: snapshot(root / f"other {name}") for name in NOT_RESUMED} == before


def test_two_processes_tune_to_what_one_does_and_it_reloads(root, runs):
    """With the proof in a clean process, of an adapter that is kept."""
    words = [*TUNE, "--no-merge"]
    alone = request(root, "alone", words)
    two = [request(root, "two", words, verify=True, env=env) for env in environments(2)]
    (one,), (first, second) = run_warm([alone]), run_warm(two)
    assert (one.code, first.code, second.code) == (0, 0, 0), first.err + second.err
    assert (second.out, second.err) == ("", "")
    said = json.loads(first.out)
    assert said["held_out"]["after"] == pytest.approx(one.json["held_out"]["after"], abs=1e-4)
    assert said["reload_difference"] < 1e-4
    adapter = "out/adapter/adapter_model.safetensors"
    found, expected = load_file(root / "two" / adapter), load_file(root / "alone" / adapter)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=2e-3)
