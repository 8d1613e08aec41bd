"""Commands that something befalls at any moment, and what has to be true afterwards.

What a command writes is absent, or as it was before, or new and whole; nothing lies anywhere else; no process lives on.
And the run can be gone on with: to the bytes of a run that nothing befell, or it says why not and what to do, and that
works. `benchmarks/faults.py` does this by the hundred, `test_faults.py` a few times; what befalls them is drawn in
`fault_kinds.py`.
"""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cli_runner import Ran, Request, run_warm, snapshot
from tiny import write_model, write_text

Files = Mapping[str, bytes | None]
OUT, PARTIAL, ASIDE, SCRATCH = "out", "out.partial", "out.replaced", "tmp"
USAGE, INTERRUPTED = 2, 130
TEXT = shlex.split("--calib ../text.txt --samples 8 --seq-len 32")
SLIM = shlex.split("slim --fast --bits 4 --sparsity 2:4 --group 16 --adapter-rank 4")
BUDGET = shlex.split("--keep-params 0.8 --set budget.trial_samples=8")
SECONDS = re.compile(rb'"seconds": [0-9.e-]+,')
RECIPE = """
method: three-stages
stages:
  - {stage: fold_norms}
  - {stage: rotate_shared, gradient_weight: 0.9}
  - {stage: slice, ratio: 0.25, slice_head: true}
  - {stage: refit}
  - {stage: factorize, rank_frac: 0.6, form: factors}
  - {stage: slim, quantize: {method: gptq, num_bits: 4, strategy: channel}, polish: 1, form: compact}
"""


@dataclass(frozen=True)
class Command:
    """
    builds: whether it makes the folder OUT, by way of OUT.partial; else it adds files to what is there.
    start: what made the OUT that is there before, if any: another command's words. inputs: of the folder of all inputs,
        what the command has for itself, in its own folder.
    """

    name: str
    words: Sequence[str]
    builds: bool = True
    start: Sequence[str] = ()
    inputs: Sequence[str] = ()

    @property
    def key(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return tuple(self.start), tuple(self.inputs)


def building(name: str, words: Sequence[str], model: str = "llama", start: Sequence[str] = ()) -> Command:
    placed = ["--model", f"../{model}", *TEXT, "--device", "cpu", "--out", OUT, "--json"]
    over = ["--overwrite"] if start else []
    return Command(name, [*words, *placed, *over], start=[*start, *placed] if start else ())


SLICE, SLICE_LESS = (shlex.split(f"slice --ratio {ratio} --measure-error") for ratio in (0.25, 0.5))
MADE = building("", SLICE_LESS).words
COMMANDS = [
    building("slice", SLICE),
    building("slice, method slicegpt", shlex.split("slice --method slicegpt --ratio 0.25"), "opt"),
    building("slice, under a budget", ["slice", *BUDGET]),
    building("slice, neurons free", ["slice", *BUDGET, "--allocation", "free"]),
    building("slice, activations on disk", [*SLICE, "--cache-memory", "1"]),
    building("slice, with a GGUF file", ["slice", "--ratio", "0.25", "--export", "gguf"], "plain"),
    building("slice, over another output", SLICE, start=SLICE_LESS),
    building("lord", shlex.split("lord --rank-frac 0.5")),
    building("lord, under a budget", ["lord", *BUDGET]),
    building("lord, multiplied out", shlex.split("lord --rank-frac 0.5 --materialize")),
    building("slim, packed with an adapter", SLIM),
    building("slim, compact", [*SLIM, "--compact"]),
    building("slim, over another output", SLIM, start=SLICE_LESS),
    building("run, three stages", ["run", "../three-stages.yaml"]),
    Command("eval --save", shlex.split(f"eval --model {OUT} --ppl ../text.txt --seq-len 32 --save"), False, MADE),
    Command("inspect --plot", shlex.split(f"inspect {OUT} --plot plots"), False, MADE),
    Command("inspect --card", shlex.split(f"inspect {OUT} --card"), False, MADE),
    Command(
        "bench",
        shlex.split(f"bench {OUT} --against ../llama --rounds 1 --batch-sizes 1 --prompt 4 --new 2 --device cpu"),
        False,
        MADE,
    ),
]


def write_inputs(root: Path) -> None:
    """The models and the text that the commands name."""
    write_text(root / "text.txt", lines=60)
    write_model(root / "llama", "llama", dtype=torch.float32)
    write_model(root / "plain", "llama", dtype=torch.float32, attention_bias=False, mlp_bias=False)
    write_model(root / "opt", "opt", dtype=torch.float32)
    (root / "three-stages.yaml").write_text(RECIPE, encoding="utf-8")


# A run that nothing disturbs.


@dataclass(frozen=True)
class Undisturbed:
    """What a command finds, leaves and takes. events: the moments at which it changes files or starts a process."""

    command: Command
    before: Files
    after: Files
    events: int
    seconds: float


@dataclass
class Place:
    """Where runs happen: the inputs, and beside them a folder for each run, with a folder for its temporary files."""

    root: Path
    processes: int | None = None
    made: int = 0
    disks: list[Path] = field(default_factory=list)

    def folder(self, files: Files | None = None) -> Path:
        self.made += 1
        folder = self.root / f"run-{self.made:05d}"
        (folder / SCRATCH).mkdir(parents=True)
        lay_out(folder, files or {})
        return folder

    def disk(self, size: str) -> Path:
        """A run's folder on a disk of its own, which is held in memory. Raises OSError where that is not allowed."""
        mounted = self.folder()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            raise PermissionError(errno.EPERM, "only root may mount")
        self.disks.append(mounted)
        for path in self.root.iterdir():
            if not path.name.startswith("run-"):
                (mounted / path.name).symlink_to(path)
        folder = mounted / "run"
        (folder / SCRATCH).mkdir(parents=True)
        return folder

    def unmount(self) -> None:
        while self.disks:
            subprocess.run(["umount", str(self.disks.pop())], check=True)

    def request(self, folder: Path, words: Sequence[str], **options: object) -> Request:
        scratch = str(folder / SCRATCH)
        return Request(tuple(words), str(folder), env={"TMPDIR": scratch}, **options)  # type: ignore[arg-type]

    def run(self, requests: Sequence[Request]) -> list[Ran]:
        return run_warm(requests, self.processes)

    def undisturbed(self, commands: Sequence[Command]) -> list[Undisturbed]:
        starts = {command.key: self.folder(self._inputs(command)) for command in commands}
        self._succeed([self.request(folder, start) for (start, _), folder in starts.items() if start])
        before = {key: contents(folder) for key, folder in starts.items()}
        folders = [self.folder(before[command.key]) for command in commands]
        pairs = list(zip(commands, folders, strict=True))
        ran = self._succeed([self.request(folder, command.words, write_event=0) for command, folder in pairs])
        return [
            Undisturbed(command, before[command.key], contents(folder), int(one.err.splitlines()[-1]), one.seconds)
            for (command, folder), one in zip(pairs, ran, strict=True)
        ]

    def _inputs(self, command: Command) -> Files:
        found: dict[str, bytes | None] = {}
        for name in command.inputs:
            path = self.root / name
            found |= {name: path.read_bytes()} if path.is_file() else {}
            found |= {f"{name}/{file}": content for file, content in snapshot(path).items()}
        return found

    def _succeed(self, requests: Sequence[Request]) -> list[Ran]:
        ran = self.run(requests)
        for request, one in zip(requests, ran, strict=True):
            assert one.code == 0, (request.words, one.err)
        return ran


def lay_out(folder: Path, files: Files) -> None:
    for name, content in files.items():
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file of a run's folder; the folder for temporary files itself left out, what lies in it not.

    How long a measurement took is no part of it.
    """
    found = {name: content for name, content in snapshot(folder).items() if name != SCRATCH}
    return {name: SECONDS.sub(b"", content) if content else content for name, content in found.items()}


def below(files: Files, name: str) -> dict[str, bytes | None]:
    return {path: content for path, content in files.items() if path.partition("/")[0] == name}


# What is true after a kill.


@dataclass(frozen=True)
class Found:
    """state: of what the command writes: absent, old, new or half. litter: what lies where nothing should."""

    state: str
    lost: bool
    litter: list[str]
    beside: list[str]

    @property
    def is_clean(self) -> bool:
        return self.state != "half" and not self.lost and not self.litter


def look_at(folder: Path, whole: Undisturbed) -> Found:
    files = contents(folder)
    return find_built(files, whole) if whole.command.builds else find_added(files, whole)


def find_built(files: Files, whole: Undisturbed) -> Found:
    old, new, found = (below(each, OUT) for each in (whole.before, whole.after, files))
    state = "absent" if not found else "new" if found == new else "old" if found == old else "half"
    aside = {name.replace(ASIDE, OUT, 1): content for name, content in below(files, ASIDE).items()}
    names = sorted({name.partition("/")[0] for name in files})
    return Found(
        state,
        lost=bool(old) and state == "absent" and aside != old,
        litter=[name for name in names if name not in (OUT, PARTIAL, ASIDE) and not below(whole.before, name)],
        beside=[name for name in names if name in (PARTIAL, ASIDE)],
    )


def find_added(files: Files, whole: Undisturbed) -> Found:
    """Of files each is as before or new; one may lie there as unfinished, and is no litter: the next run takes it."""
    half, litter = list[str](), list[str]()
    for name, content in files.items():
        if name not in whole.before and name not in whole.after:
            litter += [] if name.endswith(".unfinished") else [name]
        elif content not in (whole.before.get(name), whole.after.get(name)):
            half.append(name)
    unfinished = [name for name in files if name.endswith(".unfinished")]
    state = "half" if half else "new" if files == whole.after else "old"
    return Found(state, not whole.before.keys() <= files.keys(), litter, unfinished)


# What befalls it.


@dataclass(frozen=True)
class Fault:
    """
    kind: in a word or two, for a table. moment: in words. number: of the signal that is sent, None for none. request:
        the fields of a Request that bring it about. damage: what is done to the files between it and the next run.
    """

    kind: str
    moment: str
    number: int | None
    request: Mapping[str, object] = field(default_factory=dict)
    damage: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        name = self.kind if self.number is None else signal.Signals(self.number).name
        return f"{name} {self.moment}"


@dataclass
class Trial:
    """A command, what befalls it, and what became of it. faults: what should not be, in words."""

    whole: Undisturbed
    fault: Fault
    folder: Path
    again: list[Fault] = field(default_factory=list)
    really_reloaded: bool = False
    struck: int = 0
    found: Found | None = None
    states: list[str] = field(default_factory=list)
    left: int = 0
    refusals: list[str] = field(default_factory=list)
    ending: str = ""
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        befell = ", then ".join(map(str, [self.fault, *self.again]))
        return f"{self.whole.command.name}: {befell} in {self.folder.name}"


def try_pairs(place: Place, trials: Sequence[Trial], seconds: Sequence[Sequence[str]]) -> None:
    """Each run beside a second one on the same output, whose options are in `seconds`; then they are gone on with."""
    requests = []
    for trial, more in zip(trials, seconds, strict=True):
        words = trial.whole.command.words
        requests += [place.request(trial.folder, words)]
        requests += [place.request(trial.folder, [*words, *more], **trial.fault.request)]
    ran = place.run(requests)
    for number, trial in enumerate(trials):
        for one in ran[2 * number : 2 * number + 2]:
            judge(trial, trial.fault, one)
    go_on(place, trials)


def try_all(place: Place, trials: Sequence[Trial]) -> None:
    """All that befalls them, then all are gone on with; what is found stands in the trials afterwards."""
    ran = place.run([place.request(each.folder, each.whole.command.words, **each.fault.request) for each in trials])
    for trial, one in zip(trials, ran, strict=True):
        judge(trial, trial.fault, one)
    for number in range(max((len(trial.again) for trial in trials), default=0)):
        those = [trial for trial in trials if len(trial.again) > number and can_go_on(trial)]
        ran = place.run([place.request(t.folder, next_words(t), **t.again[number].request) for t in those])
        for trial, one in zip(those, ran, strict=True):
            judge(trial, trial.again[number], one)
    for trial in trials:
        if trial.fault.damage is not None and can_go_on(trial):
            trial.fault.damage(trial.folder)
    go_on(place, trials)


def judge(trial: Trial, fault: Fault, ran: Ran) -> None:
    """Into the trial goes what is not as it should be right afterwards."""
    trial.left += ran.left
    trial.found = found = look_at(trial.folder, trial.whole)
    if not found.is_clean:
        trial.faults.append(f"{fault}: {found}")
    if ran.left:
        trial.faults.append(f"{fault}: {ran.left} processes live on")
    if ran.code == 0:
        if found.state != "new":
            trial.faults.append(f"{fault}: exit code 0 and not there")
        return
    if fault.number is not None and ran.code == USAGE and ran.faults:
        return  # refused before the signal came
    trial.struck += 1
    trial.states.append(found.state)
    if not ended_well(fault, ran):
        trial.faults.append(f"{fault}: exit code {ran.code}: {ran.err[-1500:]}")


def ended_well(fault: Fault, ran: Ran) -> bool:
    """A kill ends at once, a signal with a word, everything else with an error that a user can mend."""
    if fault.number == signal.SIGKILL:
        return ran.code == -signal.SIGKILL
    if "Traceback" in ran.err:
        return False
    if fault.number is None:
        return ran.code in (1, 2, 3, 4) and bool(ran.faults)
    return ran.code == INTERRUPTED and ran.err.splitlines()[-1].startswith("interrupted")


def can_go_on(trial: Trial) -> bool:
    return trial.found is not None and trial.found.state != "new"


def next_words(trial: Trial) -> list[str]:
    """What a user types after a kill."""
    words, found = list(trial.whole.command.words), trial.found
    assert found is not None
    if not trial.whole.command.builds:
        return words
    if found.state == "new":
        return words if "--overwrite" in words else [*words, "--overwrite"]
    return [*words, "--resume"] if PARTIAL in found.beside else words


def go_on(place: Place, trials: Sequence[Trial]) -> None:
    """Until all is as after a run that nothing befell; what a refusal says is done, once or twice."""
    for trial in trials:
        lay_out(trial.folder, {name: each for name, each in trial.whole.before.items() if not name.startswith(OUT)})
    waiting = [(trial, next_words(trial)) for trial in trials if needs_more(trial)]
    for _ in range(3):
        ran = place.run([place.request(each.folder, words, verify=each.really_reloaded) for each, words in waiting])
        following = []
        for (trial, words), one in zip(waiting, ran, strict=True):
            if one.code != 0:
                trial.refusals.append(one.err.strip()[-800:])
                if (remedy := remedied(words, one)) is not None:
                    following.append((trial, remedy))
        waiting = following
    for trial in trials:
        conclude(trial)


def needs_more(trial: Trial) -> bool:
    found = trial.found
    return found is not None and (found.state != "new" or bool(found.beside))


def remedied(words: Sequence[str], ran: Ran) -> list[str] | None:
    """The command with what its refusal says, a line beginning with `error:`; None where that is nothing."""
    said = " ".join(ran.faults)
    kept = [word for word in words if word != "--resume"]
    if "without --resume" in said:
        return kept
    if "start over with --overwrite" in said.lower():
        return [*(word for word in kept if word != "--overwrite"), "--overwrite"]
    if "with --resume" in said and "--resume" not in words:
        return [*words, "--resume"]
    return None


def conclude(trial: Trial) -> None:
    files = contents(trial.folder)
    wrong = sorted(name for name in files.keys() | trial.whole.after.keys() if differs(name, files, trial.whole.after))
    if wrong:
        trial.ending = "wrong"
        trial.faults.append(f"in the end: {', '.join(wrong[:4])} differ; {trial.refusals}")
    elif not needs_more(trial):
        trial.ending = "was whole"
    else:
        trial.ending = "refused, then identical" if trial.refusals else "identical"
    if not trial.faults:
        shutil.rmtree(trial.folder)


def differs(name: str, files: Files, expected: Files) -> bool:
    return (name in files) != (name in expected) or files[name] != expected[name]


def as_lines(trials: Iterable[Trial]) -> list[str]:
    """What is wrong, a line each."""
    return [f"{trial}: {fault}" for trial in trials for fault in trial.faults]
